package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

const (
	pluginName = "bench-floor"
	// After authentication, as ours.
	priority = 850
	version  = "0.1.0"
)

var (
	phases = []string{"access", "log"}
	schema = map[string]any{
		"name": pluginName,
		"fields": []any{
			map[string]any{"config": map[string]any{
				"type":     "record",
				"required": true,
				"fields":   []any{map[string]any{"header": map[string]any{"type": "string", "required": true}}},
			}},
		},
	}
)

// information is what Kong reads when it starts: which protocol to speak, and which plugins there are.
type information struct {
	Protocol   string
	SocketPath string
	Plugins    []pluginInfo
}

type pluginInfo struct {
	Name     string
	Phases   []string
	Version  string
	Priority int
	Schema   map[string]any
}

func describe(socket string) information {
	info := pluginInfo{Name: pluginName, Phases: phases, Version: version, Priority: priority, Schema: schema}
	return information{Protocol: "ProtoBuf:1", SocketPath: socket, Plugins: []pluginInfo{info}}
}

// plugin is what all connections share: the instances that Kong has started.
type plugin struct {
	loaded    int64
	instances map[int64]*instance
	last      int64
}

// instance is the plugin with one configuration. The frames that ask for what a phase needs are made once, for they are
// the same for each request.
type instance struct {
	id      int64
	started int64
	access  question
	log     question
}

// question is what a phase asks at once: the frames of its calls and of their end, and how many answers will come.
type question struct {
	frames  []byte
	answers int
}

func newPlugin() *plugin {
	return &plugin{loaded: time.Now().Unix(), instances: map[int64]*instance{}}
}

// start makes an instance of a configuration, which Kong sends as JSON.
func (p *plugin) start(config []byte) (*instance, error) {
	var settings struct {
		Header string `json:"header"`
	}
	if err := json.Unmarshal(config, &settings); err != nil {
		return nil, fmt.Errorf("a configuration that cannot be read: %w", err)
	}
	// nginx's own name for a request header: it is cheaper for Kong than to look the header up, and so what ours asks.
	variable := "http_" + strings.ReplaceAll(strings.ToLower(settings.Header), "-", "_")
	p.last++
	started := &instance{
		id:      p.last,
		started: time.Now().Unix(),
		access: ask(
			pdkCall{"kong.nginx.get_var", textMessage(variable)},
			pdkCall{"kong.nginx.get_var", textMessage("kong_request_id")},
		),
		log: ask(pdkCall{"kong.log.serialize", nil}),
	}
	p.instances[started.id] = started
	return started, nil
}

// phase gives what a phase asks; one that the dump does not have asks nothing.
func (i *instance) phase(name []byte) question {
	switch string(name) { // compared in place, nothing is copied
	case "access":
		return i.access
	case "log":
		return i.log
	default:
		return question{frames: noCalls}
	}
}

// noCalls is the end of a phase that asks nothing.
var noCalls = ask().frames

// pdkCall is a function of Kong's plugin development kit, and the message with its arguments.
type pdkCall struct {
	function  string
	arguments []byte
}

// ask puts PDK calls into frames: two for each, its name and its arguments, and after all of them an empty name, with
// which the phase ends.
func ask(calls ...pdkCall) question {
	var frames []byte
	for _, call := range calls {
		frames = appendFrame(frames, []byte(call.function))
		frames = appendFrame(frames, call.arguments)
	}
	return question{frames: appendFrame(frames, nil), answers: len(calls)}
}

// textMessage is the message of a PDK function that takes a string.
func textMessage(text string) []byte {
	return appendContent(nil, 1, []byte(text))
}
