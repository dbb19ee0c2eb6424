"""Where log lines go: nothing that standard error may be holds up whoever logs, or is changed for others."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from kong_metering.outlet import MOST_LINES, Outlet, QueuedOutlet, outlet_of
from tests.support.waiting import wait_until

LINE = b"warning: " + b"x" * 90 + b"\n"
Ends = tuple[int, int]  # to read from, to write to


def pipe() -> Ends:
    return os.pipe()


def stream() -> Ends:
    """As systemd gives it to a service: a socket of journald's."""
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return reader.detach(), writer.detach()


def datagrams() -> Ends:
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return reader.detach(), writer.detach()


def terminal() -> Ends:
    reader, writer = pty.openpty()
    tty.setraw(writer)
    return reader, writer


KINDS = [pipe, stream, datagrams, terminal]


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    make: Callable[[], Ends] = request.param
    reader, writer = make()
    os.set_blocking(reader, False)
    yield reader, writer
    for descriptor in (reader, writer):
        with suppress(OSError):
            os.close(descriptor)


@pytest.fixture
def opened() -> Iterator[Callable[[int], Outlet]]:
    """Make outlets that are closed in the end."""
    with ExitStack() as stack:

        def make(descriptor: int) -> Outlet:
            outlet = outlet_of(descriptor)
            stack.callback(outlet.close)
            return outlet

        yield make


def wait_for_threads() -> None:
    wait_until(lambda: "log" not in {thread.name for thread in threading.enumerate()}, "the thread's end")


def read(descriptor: int) -> bytes:
    """Read all that is there."""
    found = b""
    with suppress(BlockingIOError):
        while chunk := os.read(descriptor, 65536):
            found += chunk
    return found


@pytest.mark.parametrize("ends", KINDS, indirect=True)
def test_lines_arrive_as_they_are(ends: Ends, opened: Callable[[int], Outlet]) -> None:
    reader, writer = ends
    outlet = opened(writer)
    for _ in range(3):
        assert outlet.write(LINE)
    outlet.flush(1)
    assert read(reader) == LINE * 3


@pytest.mark.parametrize("ends", KINDS, indirect=True)
def test_where_nobody_reads_lines_are_lost_and_nobody_waits(ends: Ends, opened: Callable[[int], Outlet]) -> None:
    reader, writer = ends
    outlet = opened(writer)
    taken = 0
    while outlet.write(LINE):
        taken += 1
    assert not outlet.write(LINE)
    found = read(reader)
    # One that was cut off was not taken, and does not become part of the next one.
    assert [line for line in found.splitlines(keepends=True) if line == LINE] == [LINE] * taken
    assert outlet.write(b"again\n")
    assert read(reader) in (b"again\n", b"\nagain\n")


@pytest.mark.parametrize("ends", KINDS, indirect=True)
def test_what_others_have_open_as_well_goes_on_blocking(ends: Ends, opened: Callable[[int], Outlet]) -> None:
    _, writer = ends
    others = os.dup(writer)
    try:
        opened(writer).write(LINE)
        assert os.get_blocking(others)
    finally:
        os.close(others)


@pytest.mark.parametrize("ends", [pipe, stream, datagrams], indirect=True)
def test_a_reader_that_is_gone_costs_lines_only(ends: Ends, opened: Callable[[int], Outlet]) -> None:
    reader, writer = ends
    outlet = opened(writer)
    os.close(reader)
    assert not outlet.write(LINE)


def test_a_descriptor_that_is_closed_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    outlet = outlet_of(writer)
    outlet.write(LINE)
    outlet.flush(1)


def test_a_file_is_written_to_by_a_thread_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        outlet = outlet_of(file.fileno())
        for number in range(100):
            assert outlet.write(b"%d\n" % number)
        outlet.flush(10)
    assert path.read_bytes() == b"".join(b"%d\n" % number for number in range(100))
    wait_for_threads()


# What cannot be made non-blocking: the thread waits, and nobody else.


@pytest.fixture
def blocking() -> Iterator[Ends]:
    with ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        # Whatever is still to be written fails once nobody can read it, and the thread ends.
        stack.callback(wait_for_threads)
        stack.callback(os.close, reader)
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(reader, False)
        yield reader, writer


def test_a_thread_that_waits_has_a_bounded_number_of_lines(blocking: Ends) -> None:
    reader, writer = blocking
    outlet = QueuedOutlet(writer)
    taken = 0
    while outlet.write(LINE):
        taken += 1
    assert MOST_LINES <= taken <= MOST_LINES + 4096 // len(LINE) + 1
    found = b""

    def has_all() -> bool:
        nonlocal found
        found += read(reader)
        return len(found) >= taken * len(LINE)

    wait_until(has_all, "all lines that were taken")
    assert found == LINE * taken
    outlet.flush(10)
    assert outlet.write(LINE)


def test_the_end_does_not_wait_for_ever_for_a_thread_that_waits(blocking: Ends) -> None:
    _, writer = blocking
    outlet = QueuedOutlet(writer)
    while outlet.write(LINE):
        pass
    outlet.flush(0.01)


def test_a_forked_process_writes_its_own_lines_only(blocking: Ends) -> None:
    reader, writer = blocking
    outlet = QueuedOutlet(writer)
    taken = 0
    while outlet.write(LINE):
        taken += 1
    child = os.fork()
    if child == 0:
        is_taken = outlet.write(b"the child's\n")
        outlet.flush(60)
        os._exit(0 if is_taken else 1)
    found = b""

    def is_written() -> bool:
        nonlocal found
        found += read(reader)
        return found.count(b"\n") == taken + 1

    wait_until(is_written, "all lines")
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert found.count(b"the child's\n") == 1
    assert found.count(LINE) == taken
