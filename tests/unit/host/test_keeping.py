"""What the supervisor keeps for its servers: without shared memory as well, one that is killed loses nothing."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.host.keeping import Keeping, Lent
from kong_metering.memoryfile import MemoryFile, Use
from tests.support.plugin_server import PluginServerProcess
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.host.conftest import answers, header_config
from tests.unit.host.test_supervisor import wait_for_another

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer

Launch = Callable[..., PluginServerProcess]

PROMPT = {"max_batch_size": 1000, "max_coalescing_delay": 0.1}


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    keeping = Keeping()
    yield keeping
    keeping.close()


def own(lent: Lent, use: Use = Use.EVENTS) -> MemoryFile:
    memory = lent.empty_for(use)
    assert memory is not None
    return memory


def leave(memory: MemoryFile, data: bytes) -> None:
    os.ftruncate(memory.descriptor, len(data))
    with mmap.mmap(memory.descriptor, len(data)) as mapped:
        mapped[:] = data


def test_what_a_dead_process_left_is_lent_to_each_next_one_until_it_is_given_back(keeping: Keeping) -> None:
    first = keeping.lend()
    keeping.lent_to(1, first)
    leave(own(first), b"left")
    assert keeping.lend().left == (), "the process lives"
    keeping.reclaim(1)
    for process in (2, 3):
        lent = keeping.lend()
        assert lent.left_for(Use.EVENTS) == (own(first),)
        assert lent.left_for(Use.REQUESTS) == ()
        assert own(lent).descriptor != own(first).descriptor
        keeping.lent_to(process, lent)
        keeping.reclaim(process)
    os.ftruncate(own(first).descriptor, 0)
    lent = keeping.lend()
    keeping.put_back(lent)
    assert keeping.lend().left == ()


def test_each_use_has_its_own(keeping: Keeping) -> None:
    lent = keeping.lend()
    keeping.lent_to(1, lent)
    leave(own(lent, Use.REQUESTS), b"left")
    keeping.reclaim(1)
    again = keeping.lend()
    assert again.left == again.left_for(Use.REQUESTS) == (own(lent, Use.REQUESTS),)
    assert len({own(again, use).descriptor for use in Use}) == len(Use)
    keeping.lent_to(2, again)


def test_a_memory_is_used_again_under_another_name(keeping: Keeping) -> None:
    first = keeping.lend()
    keeping.put_back(first)
    again = keeping.lend()
    keeping.put_back(again)
    assert {each.descriptor for each in again.empty} == {each.descriptor for each in first.empty}
    assert not {each.name for each in again.empty} & {each.name for each in first.empty}


def test_no_two_living_processes_have_one(keeping: Keeping) -> None:
    lent = [keeping.lend() for _ in range(3)]
    for process, each in enumerate(lent, start=1):
        keeping.lent_to(process, each)
    assert len({memory.descriptor for each in lent for memory in each.empty}) == 3 * len(Use)


def test_what_is_left_again_and_again_does_not_take_all_descriptors(keeping: Keeping) -> None:
    lent = Lent()
    for process in range(1, 200):
        lent = keeping.lend()
        keeping.lent_to(process, lent)
        for memory in lent.empty:
            leave(memory, b"left")
        keeping.reclaim(process)
    assert lent.empty == ()
    assert len(lent.left) == 8


def test_where_the_system_has_none_to_give_nothing_is_lent(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError(name)

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert keeping.lend() == Lent()


# Through the real thing


@pytest.mark.slow
@pytest.mark.parametrize("place", ["none", "/nowhere", "/proc"])
def test_a_killed_server_loses_nothing_without_shared_memory(launch: Launch, ingest: IngestServer, place: str) -> None:
    server = launch("--inbox-dir", place).start()
    known: list[int] = []
    for life in range(6):
        client = KongClient(server.path)
        instance = client.start_instance(header_config(ingest.url, queue=PROMPT))
        known.append(server.server_pid)
        for number in range(life * 100, life * 100 + 50):
            client.run_phases(instance, KongRequest(answers("acme", number)))
        os.kill(known[-1], signal.SIGKILL)
        wait_for_another(server, *known)
    KongClient(server.path).start_instance(header_config(ingest.url, queue=PROMPT))
    expected = {f"{life * 100 + number:032x}:api_request" for life in range(6) for number in range(50)}
    # Some may come twice: their sender was killed before it had noted the answer.
    wait_until(lambda: {event["id"] for event in ingest.events()} == expected, "all of them at the endpoint")
    assert server.stop() == 0
    warned = [line for line in server.log if "its last events are in its supervisor's memory alone" in line]
    assert bool(warned) == (place != "none"), server.log


@pytest.mark.slow
def test_what_access_phases_read_outlives_a_killed_server(launch: Launch, ingest: IngestServer) -> None:
    """A later plugin has taken the header out of the request; it still counts, as the client sent it."""
    server = launch().start()
    known: list[int] = []
    ids = {number: {"kong.nginx.get_var": f"{number:032x}"} for number in range(30)}
    requests = [KongRequest({**answers("acme", number), **ids[number]}) for number in ids]
    for life in range(3):
        client = KongClient(server.path)
        instance = client.start_instance(header_config(ingest.url, queue=PROMPT))
        for request in requests[life * 10 : life * 10 + 10]:
            client.run_phases(instance, request, "access")
        known.append(server.server_pid)
        os.kill(known[-1], signal.SIGKILL)
        wait_for_another(server, *known)
    client = KongClient(server.path)
    instance = client.start_instance(header_config(ingest.url, queue=PROMPT))
    for request in requests:
        client.run_phases(instance, request, "log")
    events = ingest.wait_for_events(len(requests))
    assert [event["subject"] for event in events] == ["acme"] * len(requests)


@pytest.mark.slow
def test_of_what_the_supervisor_keeps_a_server_has_its_own_alone(launch: Launch) -> None:
    server = launch("--inbox-dir", "none", "--servers", "3").start()
    wait_until(lambda: len(server.server_pids()) == 3, "three servers")
    # A server lets go of the others' a moment after it was forked.
    wait_until(lambda: all(len(memories_of(pid)) == len(Use) for pid in server.server_pids()), "each has its own")
    assert len(memories_of(server.pid)) == 3 * len(Use)
    assert set.union(*map(memories_of, server.server_pids())) == memories_of(server.pid)


def memories_of(pid: int) -> set[int]:
    """Give the inodes of what a process has open of it."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            if str(descriptor.readlink()).startswith("/memfd:kong-metering"):
                found.add(descriptor.stat().st_ino)
    return found
