package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
)

// The fields of a call of Kong's, and of what it returns (kong/pluginsocket.proto).
const (
	sequenceField       = 1
	pluginNamesField    = 31
	pluginInfoField     = 32
	startInstanceField  = 33
	instanceStatusField = 34
	closeInstanceField  = 35
	handleEventField    = 36
	// A status is returned in the field of start_instance, whichever call asked for it.
	returnedStatusField = startInstanceField
)

const firstBufferBytes = 64 << 10

// The protocol has no place for an error. Kong takes a connection that ends for a server that has started anew: it
// starts its instance again, and sends the event again.
var errNoInstance = errors.New("an instance that is not there")

// conversation is what Kong and the plugin say to each other on one connection. It knows nothing of sockets: what has
// come lies in its buffer, and what is to be written is returned.
type conversation struct {
	plugin   *plugin
	buffer   []byte
	held     int    // bytes in the buffer: of a frame that is not all there yet
	due      int    // answers to PDK calls that come before Kong's next call
	returned []byte // memory for what a call returns, used again and again
}

func newConversation(plugin *plugin) *conversation {
	return &conversation{plugin: plugin, buffer: make([]byte, firstBufferBytes)}
}

// space is where the next bytes are to be read to; there is always some.
func (c *conversation) space() []byte {
	return c.buffer[c.held:]
}

// take looks at so many bytes more in the buffer, and appends to written what is to be sent.
//
// Frames come split and joined in any way: Kong sends a length and its message apart, and what it sends without waiting
// comes together. All that is whole is taken, the rest stays.
func (c *conversation) take(size int, written []byte) ([]byte, error) {
	c.held += size
	unread := c.buffer[:c.held]
	for len(unread) >= lengthBytes {
		length := int(binary.LittleEndian.Uint32(unread))
		if length > maxFrameBytes {
			return written, fmt.Errorf("a frame of more than %d bytes", maxFrameBytes)
		}
		end := lengthBytes + length
		if end > len(unread) {
			if end > len(c.buffer) {
				c.grow(end, unread)
				return written, nil
			}
			break
		}
		message := unread[lengthBytes:end]
		unread = unread[end:]
		if c.due > 0 {
			c.due-- // an answer: this is where others would meter
			continue
		}
		var err error
		if written, err = c.respond(message, written); err != nil {
			return written, err
		}
	}
	c.held = copy(c.buffer, unread)
	return written, nil
}

// grow makes room for a frame that is larger than the buffer.
func (c *conversation) grow(size int, unread []byte) {
	larger := make([]byte, size)
	c.held = copy(larger, unread)
	c.buffer = larger
}

// respond appends what is to be sent upon a call.
func (c *conversation) respond(message, written []byte) ([]byte, error) {
	var sequence uint64
	var call field
	for len(message) > 0 {
		one, rest, err := cutField(message)
		if err != nil {
			return written, err
		}
		if one.number == sequenceField {
			sequence = one.integer
		} else {
			call = one
		}
		message = rest
	}
	returned := appendInteger(c.returned[:0], sequenceField, sequence)
	var err error
	if call.number == handleEventField {
		written, err = c.handle(call.content, written)
	} else {
		returned, err = c.plugin.returned(call, returned)
	}
	if err != nil {
		return written, err
	}
	c.returned = returned
	return appendFrame(written, returned), nil
}

// handle appends all that a phase asks at once. Kong reads the frames one by one and finds each of them there, the end
// of the phase and the return of the call included, so it never waits for us; its answers come afterwards.
func (c *conversation) handle(event, written []byte) ([]byte, error) {
	var id uint64
	var phase []byte
	for len(event) > 0 {
		one, rest, err := cutField(event)
		if err != nil {
			return written, err
		}
		switch one.number {
		case 1:
			id = one.integer
		case 2:
			phase = one.content
		}
		event = rest
	}
	found := c.plugin.instances[int64(id)]
	if found == nil {
		return written, errNoInstance
	}
	asked := found.phase(phase)
	c.due = asked.answers
	return append(written, asked.frames...), nil
}

// returned appends what a call other than that of a phase returns. Those are few, so they are read at leisure.
func (p *plugin) returned(call field, returned []byte) ([]byte, error) {
	arguments := map[uint64]field{}
	for content := call.content; len(content) > 0; {
		one, rest, err := cutField(content)
		if err != nil {
			return nil, err
		}
		arguments[one.number] = one
		content = rest
	}
	id := int64(arguments[1].integer)
	name := string(arguments[1].content)
	switch call.number {
	case pluginNamesField:
		return appendContent(returned, pluginNamesField, textMessage(pluginName)), nil
	case pluginInfoField:
		if name != pluginName {
			return nil, fmt.Errorf("Kong asks for a plugin %q", name)
		}
		return p.appendInfo(returned)
	case startInstanceField:
		if name != pluginName {
			return nil, fmt.Errorf("Kong starts a plugin %q", name)
		}
		started, err := p.start(arguments[2].content)
		if err != nil {
			return nil, err
		}
		return started.appendStatus(returned), nil
	case instanceStatusField:
		found := p.instances[id]
		if found == nil {
			return nil, errNoInstance
		}
		return found.appendStatus(returned), nil
	case closeInstanceField:
		delete(p.instances, id)
		return returned, nil
	default:
		return nil, errors.New("a call of an unknown kind")
	}
}

func (p *plugin) appendInfo(returned []byte) ([]byte, error) {
	text, err := json.Marshal(schema)
	if err != nil {
		return nil, err
	}
	info := appendContent(nil, 1, []byte(pluginName))
	info = appendInteger(info, 2, uint64(p.loaded))
	info = appendInteger(info, 3, uint64(p.loaded))
	for _, phase := range phases {
		info = appendContent(info, 4, []byte(phase))
	}
	info = appendContent(info, 5, []byte(version))
	info = appendInteger(info, 6, priority)
	info = appendContent(info, 7, text)
	return appendContent(returned, pluginInfoField, info), nil
}

func (i *instance) appendStatus(returned []byte) []byte {
	status := appendContent(nil, 1, []byte(pluginName))
	status = appendInteger(status, 2, uint64(i.id))
	status = appendInteger(status, 4, uint64(i.started))
	return appendContent(returned, returnedStatusField, status)
}
