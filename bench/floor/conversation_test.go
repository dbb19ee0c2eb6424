package main

import (
	"bytes"
	"testing"
)

// What Kong and the plugin say to each other, however the bytes come; `go test` here runs it.

const firstInstance = 1

func called(sequence uint64, number uint64, arguments []byte) []byte {
	return appendFrame(nil, appendContent(appendInteger(nil, sequenceField, sequence), number, arguments))
}

func event(sequence uint64, phase string) []byte {
	return called(sequence, handleEventField, appendContent(appendInteger(nil, 1, firstInstance), 2, []byte(phase)))
}

func start(sequence uint64) []byte {
	return called(sequence, startInstanceField, appendContent(textMessage(pluginName), 2, []byte(`{"header":"X-Tenant-Id"}`)))
}

func returned(sequence uint64) []byte {
	return appendFrame(nil, appendInteger(nil, sequenceField, sequence))
}

func text(value string) []byte {
	return appendFrame(nil, textMessage(value))
}

func named(function string) []byte {
	return appendFrame(nil, []byte(function))
}

func joined(parts ...[]byte) []byte {
	return bytes.Join(parts, nil)
}

// say has the bytes come in pieces of one size at most, and gives all that is written.
func say(t *testing.T, c *conversation, said []byte, piece int) []byte {
	t.Helper()
	var written []byte
	for len(said) > 0 {
		size := copy(c.space()[:min(piece, len(c.space()))], said)
		if size == 0 {
			t.Fatal("there is no room to read to")
		}
		said = said[size:]
		var err error
		if written, err = c.take(size, written); err != nil {
			t.Fatal(err)
		}
	}
	return written
}

func begun(t *testing.T) *conversation {
	t.Helper()
	c := newConversation(newPlugin())
	say(t, c, start(1), 1<<20)
	return c
}

var (
	accessAsked = joined(
		named("kong.nginx.get_var"), text("http_x_tenant_id"),
		named("kong.nginx.get_var"), text("kong_request_id"),
		named(""),
	)
	logAsked = joined(named("kong.log.serialize"), named(""), named(""))
)

func TestARequestIsAskedForWhatOursAsksHoweverItsBytesCome(t *testing.T) {
	// More than a buffer holds, with what looks like the head of a frame at each place.
	record := text(string(bytes.Repeat([]byte{8, 0, 0, 0}, firstBufferBytes)))
	said := joined(
		event(300, "access"), text("acme"), named(""), // an answer may be empty: there is no such header
		event(301, "log"), record,
		event(302, "access"), text("acme"), text("id"),
	)
	wanted := joined(accessAsked, returned(300), logAsked, returned(301), accessAsked, returned(302))
	for _, piece := range []int{1, 2, 3, 5, 7, 64, 4099, len(said)} {
		if written := say(t, begun(t), said, piece); !bytes.Equal(written, wanted) {
			t.Errorf("in pieces of %d: %q", piece, written)
		}
	}
}

func TestAPhaseThatIsNotThereEndsAtOnce(t *testing.T) {
	if written := say(t, begun(t), event(2, "response"), 99); !bytes.Equal(written, joined(named(""), returned(2))) {
		t.Errorf("%q", written)
	}
}

func TestAnEventOfAnInstanceThatIsNotThereEndsTheConnection(t *testing.T) {
	c := begun(t)
	closed := say(t, c, called(2, closeInstanceField, appendInteger(nil, 1, firstInstance)), 99)
	if !bytes.Equal(closed, returned(2)) {
		t.Errorf("%q", closed)
	}
	if _, err := c.take(copy(c.space(), event(3, "access")), nil); err != errNoInstance {
		t.Errorf("%v", err)
	}
}

func TestTheStatusOfAnInstanceIsWhatItsStartTold(t *testing.T) {
	c := newConversation(newPlugin())
	started := say(t, c, start(7), 99)
	asked := say(t, c, called(7, instanceStatusField, appendInteger(nil, 1, firstInstance)), 99)
	if !bytes.Equal(started, asked) || !bytes.Contains(started, textMessage(pluginName)) {
		t.Errorf("%q, then %q", started, asked)
	}
}

func TestTellsThePluginsName(t *testing.T) {
	names := say(t, newConversation(newPlugin()), called(1, pluginNamesField, nil), 99)
	info := say(t, newConversation(newPlugin()), called(2, pluginInfoField, textMessage(pluginName)), 99)
	for _, told := range [][]byte{names, info} {
		if !bytes.Contains(told, textMessage(pluginName)) {
			t.Errorf("%q", told)
		}
	}
}

func TestWhatIsNotTheProtocolEndsTheConnection(t *testing.T) {
	for _, said := range [][]byte{
		{255, 255, 255, 255},                         // a frame of 4 GiB
		appendFrame(nil, []byte{8, 128}),             // an integer that does not end
		appendFrame(nil, []byte{10, 9, 1}),           // content that does not end
		appendFrame(nil, []byte{13, 0, 0, 0, 0}),     // a type that Kong has not
		called(1, 99, nil),                           // a call that is not known
		called(1, startInstanceField, nil),           // of no plugin
		called(1, pluginInfoField, textMessage("x")), // of another one
	} {
		c := newConversation(newPlugin())
		if _, err := c.take(copy(c.space(), said), nil); err == nil {
			t.Errorf("%q is taken", said)
		}
	}
}

func TestNothingIsAllocatedForARequest(t *testing.T) {
	c := begun(t)
	said := joined(event(300, "access"), text("acme"), text("id"), event(301, "log"), text("record"))
	written := make([]byte, 0, 1024)
	count := testing.AllocsPerRun(100, func() {
		if _, err := c.take(copy(c.space(), said), written); err != nil {
			t.Fatal(err)
		}
	})
	if count > 0 {
		t.Errorf("%v allocations", count)
	}
}
