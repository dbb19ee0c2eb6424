package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"runtime"
	"syscall"
)

const (
	waitingConnections = 1024
	eventsAtOnce       = 256
)

// loop serves all connections in one thread.
//
// Go's own network connections, which go-pdk uses, have a goroutine each, and what comes reaches it through Go's
// scheduler, maybe in another thread that must be woken first. Here what has come is known where it is dealt with, as
// soon as the system call that waits for it returns.
type loop struct {
	plugin        *plugin
	epoll         int
	listener      int
	conversations map[int]*conversation // by their sockets
	written       []byte
}

// serve listens at a path, which it takes over from whoever had it, and serves until something fails.
func serve(path string) error {
	runtime.LockOSThread()
	listener, err := listen(path)
	if err != nil {
		return err
	}
	epoll, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	l := &loop{plugin: newPlugin(), epoll: epoll, listener: listener, conversations: map[int]*conversation{}}
	if err := l.watch(listener); err != nil {
		return err
	}
	return l.run()
}

func listen(path string) (int, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	listener, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("a socket: %w", err)
	}
	if err := syscall.Bind(listener, &syscall.SockaddrUnix{Name: path}); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if err := syscall.Listen(listener, waitingConnections); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return listener, nil
}

func (l *loop) watch(socket int) error {
	event := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(socket)}
	if err := syscall.EpollCtl(l.epoll, syscall.EPOLL_CTL_ADD, socket, &event); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

func (l *loop) run() error {
	events := make([]syscall.EpollEvent, eventsAtOnce)
	for {
		count, err := waitFor(l.epoll, events)
		if err != nil && err != syscall.EINTR {
			return fmt.Errorf("epoll: %w", err)
		}
		for i := 0; i < count; i++ {
			socket := int(events[i].Fd)
			if socket == l.listener {
				if err := l.accept(); err != nil {
					return err
				}
			} else if err := l.wake(socket); err != nil {
				log.Print(err)
				l.end(socket)
			}
		}
	}
}

// accept takes one connection; if more wait, epoll tells so at once.
func (l *loop) accept() error {
	socket, _, err := syscall.Accept4(l.listener, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
	if err == syscall.EAGAIN || err == syscall.ECONNABORTED || err == syscall.EINTR {
		return nil // whoever it was has gone
	}
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	l.conversations[socket] = newConversation(l.plugin)
	return l.watch(socket)
}

// wake reads once from a connection, and writes once if there is something to say. If there is more to be read than
// there was room for, epoll tells so at once. After an error the connection is to be ended.
func (l *loop) wake(socket int) error {
	talk := l.conversations[socket]
	size, err := read(socket, talk.space())
	if err == syscall.EAGAIN || err == syscall.EINTR {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if size == 0 {
		l.end(socket)
		return nil
	}
	l.written, err = talk.take(size, l.written[:0])
	if err != nil {
		return err
	}
	if len(l.written) == 0 {
		return nil
	}
	size, err = write(socket, l.written)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if size < len(l.written) {
		// Kong has read all that was written before it calls again, so there is always room for a few hundred bytes.
		return errors.New("write: Kong does not read what it asked for")
	}
	return nil
}

// end closes a connection, and forgets it; epoll forgets a socket that is closed.
func (l *loop) end(socket int) {
	delete(l.conversations, socket)
	_ = syscall.Close(socket)
}
