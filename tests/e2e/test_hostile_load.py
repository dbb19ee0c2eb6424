"""Thousands of hostile requests at once: each is accounted for, and neither memory nor log grow with them."""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pytest

from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from tests.e2e.declarative import document, metering, service
from tests.e2e.hostile import ACME, CHUNKED, MANY, TENANT, is_printable_line, open_till
from tests.e2e.traffic import request

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.hostile import Till
    from tests.e2e.traffic import Header

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# Some hundred are enough to try the test itself, not to see that memory stays.
REQUESTS = int(os.environ.get("HOSTILE_REQUESTS", "10000"))
CLIENTS = 8
STEPS = 5
TIMEOUT = 30
# What a step may leave behind in an allocator's pockets; 2,000 requests that are kept would be ten times as much.
MEMORY_SLACK = 3 * 1024 * 1024

SECRETS: list[Header] = [
    ("Authorization", "Bearer hush-hush"),
    ("Cookie", "session=hush-hush"),
    ("X-Junk", b"hush\xff"),
]
POISON = "poison"


@dataclass(frozen=True)
class Kind:
    """A kind of request: its bytes, given a number of its own; the subjects that it is billed to, None for nobody.

    A client that `leaves` closes the connection without waiting for the answer.
    """

    share: int
    data: Callable[[int], bytes]
    subjects: Callable[[int], list[str | None]]
    leaves: bool = False


def kind(  # noqa: PLR0913 - a request has this many parts
    share: int,
    subject: str | None,
    *headers: Header,
    target: str = "/echo",
    method: str = "GET",
    version: str = "HTTP/1.1",
    body: bytes = b"",
    leaves: bool = False,
) -> Kind:
    data = request(
        target, *SECRETS, *headers, method=method, version=version, body=body, keep_alive=version == "HTTP/1.1"
    )
    return Kind(share, lambda _: data, lambda _: [subject], leaves)


def _distinct(number: int) -> bytes:
    return request("/echo", (TENANT, f"tenant-{number}"), keep_alive=True)


def _pipelined(number: int) -> bytes:
    return b"".join(request(f"/echo/{part}", (TENANT, f"pipe-{number % 7}"), keep_alive=True) for part in range(3))


KINDS = [
    kind(200, "acme", ACME),
    Kind(200, _distinct, lambda number: [f"tenant-{number}"]),
    Kind(30, _pipelined, lambda number: [f"pipe-{number % 7}"] * 3),
    # -- the subject
    kind(50, None),
    kind(30, None, (TENANT, " \t ")),
    kind(30, "blank, then not", (TENANT, ""), (TENANT, "blank, then not")),
    kind(30, "caf\xe9", (TENANT, b"caf\xe9")),
    kind(30, "ÿþ\u241b80;", (TENANT, b"\xff\xfe\x80")),
    kind(30, "\u202eemca\u200b", (TENANT, "\u202eemca\u200b")),
    kind(20, "ac\u241b1;\u241b1B;[31m\u241b7F;me", (TENANT, b"ac\x01\x1b[31m\x7fme")),
    kind(20, "a" * 8000, (TENANT, "a" * 8000)),
    kind(20, None, (TENANT, "a" * 9000)),
    kind(20, None, (TENANT, b"ac\x00me")),
    kind(20, "after many", *MANY, (TENANT, "after many")),
    kind(20, "after many, twice", *MANY, (TENANT, "after many, twice"), (TENANT, "x")),
    kind(20, "underscores", ("x_tenant_id", "underscores")),
    kind(20, "consumer:b32379d9", (TENANT, "consumer:b32379d9")),
    kind(10, POISON, (TENANT, POISON)),
    # -- the request
    kind(20, "failed", (TENANT, "failed"), target="/echo/status/500"),
    kind(20, "lost", (TENANT, "lost"), target="//lost/%2e%2e/?a=%zz;b"),
    kind(20, None, *MANY, (TENANT, "lost"), target="/lost"),
    kind(20, None, ACME, target="/echo/../.."),
    kind(20, "absolute", (TENANT, "absolute"), target="http://[2001:db8::7]:99/echo"),
    kind(20, "old", (TENANT, "old"), version="HTTP/1.0"),
    kind(10, None, ACME, version="HTTP/2.0"),
    kind(20, "connect", (TENANT, "connect"), method="CONNECT"),
    Kind(20, lambda _: b"\x16\x03\x01\x02\x00\x01\r\n\r\n", lambda _: [None]),
    # -- the body
    kind(20, "body", (TENANT, "body"), ("Content-Length", "5000"), method="POST", body=b"x" * 5000),
    kind(20, "chunks", (TENANT, "chunks"), CHUNKED, method="POST", body=b"3\r\nabc\r\n0\r\n\r\n"),
    kind(20, "bad chunks", (TENANT, "bad chunks"), CHUNKED, method="POST", body=b"zz\r\n"),
    kind(20, "lengths", (TENANT, "lengths"), ("Content-Length", "1"), ("Content-Length", "2"), method="POST"),
    # -- clients that leave
    kind(15, "upload", (TENANT, "upload"), ("Content-Length", "9999"), method="POST", body=b"x", leaves=True),
    kind(15, "download", (TENANT, "download"), target="/echo/bytes/5000000", leaves=True),
    kind(15, "impatient", (TENANT, "impatient"), target="/echo/slow/0.2", leaves=True),
]


class Client:
    """Sends requests over one connection as long as the gateway keeps it open, then over the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: socket.socket | None = None
        self._reader: BinaryIO | None = None

    def send(self, kind: Kind, number: int) -> None:
        """Send one kind of request, and read what is answered."""
        if kind.leaves:
            with self._connected() as connection:
                connection.sendall(kind.data(number))
            return
        if self._connection is None or self._reader is None:
            self._connection = self._connected()
            self._reader = self._connection.makefile("rb")
        self._connection.sendall(kind.data(number))
        for _ in kind.subjects(number):
            if not _read_answer(self._reader):
                self.close()
                return

    def close(self) -> None:
        if self._connection is not None and self._reader is not None:
            self._reader.close()
            self._connection.close()
        self._connection = self._reader = None

    def _connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=TIMEOUT)


def _read_answer(reader: BinaryIO) -> bool:
    """Read an answer to its end, and tell whether the connection stays open."""
    assert reader.readline().startswith(b"HTTP/1.1 ")
    length, is_open = 0, True
    while (line := reader.readline().lower()) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name == b"content-length" else length
        is_open = is_open and line != b"connection: close\r\n"
    assert len(reader.read(length)) == length
    return is_open


class Load:
    """Sends a mix of all kinds, and knows what it must be billed as."""

    def __init__(self, till: Till, requests: int) -> None:
        self._till = till
        chance = random.Random(3)  # noqa: S311 - the same mix each time
        mix = chance.choices(KINDS, [kind.share for kind in KINDS], k=requests)
        self._plan = list(enumerate([*KINDS, *mix][:requests]))
        chance.shuffle(self._plan)
        self.expected: Counter[str | None] = Counter()

    def send_part(self, part: int) -> None:
        """Send one of so many parts of the mix from several clients, and wait until it is accounted for."""
        plan = self._plan[part::STEPS]
        _send_from_all(self._till.port, plan)
        self._till.wait_for(self._expect(plan))

    def _expect(self, plan: list[tuple[int, Kind]]) -> int:
        subjects = [subject for number, kind in plan for subject in kind.subjects(number)]
        self.expected.update(subjects)
        return len(subjects)


def _send_from_all(port: int, plan: list[tuple[int, Kind]]) -> None:
    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in [clients.submit(_send, port, plan[client::CLIENTS]) for client in range(CLIENTS)]:
            done.result()


def _send(port: int, plan: list[tuple[int, Kind]]) -> None:
    client = Client(port)
    for number, kind in plan:
        client.send(kind, number)
    client.close()


def resident_bytes(gateway: Gateway) -> int:
    """Tell how much memory the plugin server has, besides what is shared and of a fixed size."""
    (pid,) = gateway.plugin_server_pids()
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def test_thousands_of_hostile_requests_are_accounted_for_one_by_one(
    gateway_class: type[Gateway],
    tmp_path: Path,
    upstream: UpstreamProcess,
    collector: CollectorProcess,
) -> None:
    plugin = metering(collector.ingest_v3)
    gateway = gateway_class(tmp_path / "gateway", document(service(upstream.url), plugins=[plugin]))
    collector.client.faults(FaultRule(status=400, match=FaultMatch(subject=POISON)))
    with open_till(gateway, collector, "/echo", "/lost") as till:
        before = till.status()
        load = Load(till, REQUESTS)
        memory = []
        for part in range(STEPS):
            load.send_part(part)
            memory.append(resident_bytes(gateway))
        till.check()
        after = till.status()
        lines = till.log_lines()

    skipped, rejected = load.expected.pop(None), load.expected.pop(POISON)
    assert {usage.subject: usage.count for usage in collector.client.usage()} == load.expected
    assert collector.client.stats().duplicates == collector.client.stats().conflicts == 0
    assert after["skipped"]["no_subject"] - before["skipped"]["no_subject"] == skipped
    assert after["skipped"].keys() == {"no_subject"}
    assert after["dead_letters"] == {"rejected": rejected}
    assert after["dropped"] == {}
    assert after["delivered"] - before["delivered"] == load.expected.total()

    assert memory[-1] - memory[1] < MEMORY_SLACK, memory

    assert len(lines) <= 20, lines
    assert sum(map(len, lines)) <= 10_000
    for line in lines:
        assert is_printable_line(line)
        assert not any(word in line for word in ("hush", "om_token", "acme", "tenant-", "caf"))
