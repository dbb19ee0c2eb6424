package main

import (
	"syscall"
	"unsafe"
)

// The system calls of the loop, without telling Go's scheduler about them.
//
// syscall.Read and the like tell it that the thread may wait, so that others can go on meanwhile. Here are no others, but
// Go's monitor keeps looking, takes the processor away from the thread that waits, and is woken when the thread comes
// back: by strace two calls of futex and one of nanosleep for each phase, and half as much CPU again as without, which is
// what the same program takes in C. Go still interrupts the thread when it has to, for the garbage collector say: the
// signal that it sends ends the wait.

// waitFor waits until there are events, and gives how many.
func waitFor(epoll int, events []syscall.EpollEvent) (int, error) {
	const (
		forever     = ^uintptr(0)
		sameSignals = 0 // none is held back meanwhile
	)
	first, size := unsafe.Pointer(&events[0]), uintptr(len(events))
	count, _, errno := syscall.RawSyscall6(
		syscall.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(first), size, forever, sameSignals, 0,
	)
	return outcome(count, errno)
}

// read reads what there is; it does not wait, for the socket is one that does not.
func read(socket int, space []byte) (int, error) {
	first, size := unsafe.Pointer(&space[0]), uintptr(len(space))
	count, _, errno := syscall.RawSyscall(syscall.SYS_READ, uintptr(socket), uintptr(first), size)
	return outcome(count, errno)
}

// write writes what there is room for; nor does it wait.
func write(socket int, written []byte) (int, error) {
	first, size := unsafe.Pointer(&written[0]), uintptr(len(written))
	count, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(socket), uintptr(first), size)
	return outcome(count, errno)
}

func outcome(count uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(count), nil
}
