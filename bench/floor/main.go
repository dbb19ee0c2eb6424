// The floor of the benchmark: a plugin server that asks Kong what kong-metering asks, over the same protocol, and throws
// the answers away. There is no event, no metering and nothing else behind it, so what it costs, itself and Kong, is the
// least that a plugin server costs that asks this. What kong-metering costs beyond it is kong-metering's own.
//
// It answers with as little as can be: one thread, one epoll loop (loop.go), one read and one write each time that a
// connection has something, system calls of which Go's scheduler does not know (system.go), nothing allocated for a
// request, and no library for Protocol Buffers (wire.go). What it says to Kong, and when, is in conversation.go; what it
// asks, and what Kong is told about it, in plugin.go. Its name in Kong is bench-floor, and its socket is
// bench-floor.socket in Kong's prefix, as if it were made with go-pdk.
package main

import (
	"encoding/json"
	"flag"
	"log"
	"os"
	"path/filepath"
)

func main() {
	log.SetFlags(0) // Kong puts the time before each line of a plugin server
	log.SetPrefix(pluginName + ": ")
	prefix := flag.String("kong-prefix", "/usr/local/kong", "Kong's prefix, where the socket is made")
	dump := flag.Bool("dump", false, "tell Kong about the plugin, and end")
	flag.Parse()
	if flag.NArg() > 0 {
		log.Fatalf("it takes no arguments, but got %q", flag.Args())
	}
	socket := filepath.Join(*prefix, pluginName+".socket")
	if *dump {
		if err := json.NewEncoder(os.Stdout).Encode(describe(socket)); err != nil {
			log.Fatal(err)
		}
		return
	}
	log.Fatal(serve(socket))
}
