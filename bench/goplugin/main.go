// The plugin of the benchmark on Kong's own Go PDK: it reads a header in access, keeps it for the log phase, and builds a
// small CloudEvent there, which it throws away. The executable's name, bench-go, is its name in Kong.
package main

import (
	"encoding/json"
	"time"

	"github.com/Kong/go-pdk"
	"github.com/Kong/go-pdk/server"
)

const (
	sharedKey = "bench-go"
	// After authentication, as ours.
	priority = 850
	version  = "0.1.0"
)

// Config has the header that tells who is billed.
type Config struct {
	Header string `json:"header"`
}

// record is what the event needs of Kong's log record.
type record struct {
	Request struct {
		ID     string `json:"id"`
		Method string `json:"method"`
		URI    string `json:"uri"`
	} `json:"request"`
	Response struct {
		Status int `json:"status"`
		Size   int `json:"size"`
	} `json:"response"`
	Route struct {
		ID string `json:"id"`
	} `json:"route"`
	StartedAt int64 `json:"started_at"`
}

type event struct {
	SpecVersion string `json:"specversion"`
	ID          string `json:"id"`
	Source      string `json:"source"`
	Type        string `json:"type"`
	Subject     string `json:"subject"`
	Time        string `json:"time"`
	Data        data   `json:"data"`
}

type data struct {
	Method string `json:"request_method"`
	URI    string `json:"request_uri"`
	Status int    `json:"response_http_status"`
	Size   int    `json:"response_size_bytes"`
	Route  string `json:"route_id"`
}

// New makes a configuration for go-pdk to fill in.
func New() interface{} {
	return &Config{}
}

// Access keeps the client's value of the header.
func (config *Config) Access(kong *pdk.PDK) {
	subject, err := kong.Request.GetHeader(config.Header)
	if err == nil {
		err = kong.Ctx.SetShared(sharedKey, subject)
	}
	if err != nil {
		_ = kong.Log.Err(err)
	}
}

// Log builds the event.
func (config *Config) Log(kong *pdk.PDK) {
	if err := meter(kong); err != nil {
		_ = kong.Log.Err(err)
	}
}

func meter(kong *pdk.PDK) error {
	subject, err := kong.Ctx.GetSharedString(sharedKey)
	if err != nil {
		return err
	}
	text, err := kong.Log.Serialize()
	if err != nil {
		return err
	}
	_, err = encode(subject, []byte(text))
	return err
}

func encode(subject string, text []byte) ([]byte, error) {
	var found record
	if err := json.Unmarshal(text, &found); err != nil {
		return nil, err
	}
	return json.Marshal(event{
		SpecVersion: "1.0",
		ID:          found.Request.ID,
		Source:      "kong-gateway",
		Type:        "kong.api_request",
		Subject:     subject,
		Time:        time.UnixMilli(found.StartedAt).UTC().Format(time.RFC3339Nano),
		Data: data{
			Method: found.Request.Method,
			URI:    found.Request.URI,
			Status: found.Response.Status,
			Size:   found.Response.Size,
			Route:  found.Route.ID,
		},
	})
}

func main() {
	if err := server.StartServer(New, version, priority); err != nil {
		panic(err)
	}
}
