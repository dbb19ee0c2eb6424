"""Plays Kong's part of the plugin-server protocol, at little cost: it must not be what is measured.

As Kong does, it sends each RPC of an event over whichever pooled connection is free, one RPC at a time on each, with
many requests under way at once. What it answers to PDK calls is packed beforehand, from a record of a real Kong; only
the request's id changes, so that each request gives an event of its own.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import msgpack

_RECORD = Path(__file__).parent / "data" / "record.json"
_ANSWER = 1
_ANSWER_BYTES = 65_536
_SPARE_CONNECTIONS = 4
_SUBJECT = "acme"

_PLUGIN_ID = "878715eb-ff5f-4bc3-b2ce-a52b1cd3b907"

_REQUEST = b"\x94\x00\xce"  # [0, id as 32 bits,
_STEP = b"\xabplugin.Step\x91"  # "plugin.Step", [
_EVENT_ID = b"\xa7EventId\xcf"  # "EventId": 64 bits
_DATA = b"\xa4Data"


def plugin_config(url: str, queue: Mapping[str, float], *, plugin_id: str = _PLUGIN_ID) -> dict[str, Any]:
    """Give a configuration as Kong passes it on."""
    return {
        "__plugin_id": plugin_id,
        "__seq__": 1,
        "__key__": "plugins:metering-and-billing:::::e0620768-7d2e-49db-830e-b7c0663fbf5c",
        "__ws_id": "e0620768-7d2e-49db-830e-b7c0663fbf5c",
        "ingest_endpoint": url,
        "api_token": "bench",
        "meter_api_requests": True,
        "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
        "queue": queue,
    }


class ServerError(Exception):
    """The plugin server did not do what Kong needs of it."""


@dataclass
class Times:
    """What a run took, in seconds: as a whole, of each access phase (HandleEvent to `ret`), and of each RPC."""

    whole: float = 0
    access: list[float] = field(default_factory=list)
    rpcs: list[float] = field(default_factory=list)


class _Request:
    """One request on its way through both phases."""

    __slots__ = ("began", "event_id", "instance", "number", "phase", "sent")

    def __init__(self, number: int, instance: int) -> None:
        self.number = number
        self.instance = instance
        self.phase = "access"
        self.event_id = b""
        self.began = self.sent = 0.0


class Client:
    """Sends requests to one plugin server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0
        self._free: deque[socket.socket] = deque()
        record = _RECORD.read_text().strip()
        request_id = json.loads(record)["request"]["id"].encode()
        packed = cast("bytes", msgpack.packb(record))
        self._record_head, _, self._record_tail = packed.partition(request_id)
        self._id_format = b"%%0%dx" % len(request_id)
        self._id_head = cast("bytes", msgpack.packb(request_id.decode())).removesuffix(request_id)
        self._subject = cast("bytes", msgpack.packb(_SUBJECT))

    def start_instance(self, name: str, config: Mapping[str, Any]) -> int:
        """Start an instance of the plugin and give its id."""
        argument = {"Name": name, "Config": json.dumps(config)}
        self._connect(1)
        connection = self._free[0]
        connection.sendall(cast("bytes", msgpack.packb([0, 1, "plugin.StartInstance", [argument]])))
        return int(_result(connection)["Id"])

    def run(self, instances: Sequence[int], requests: int, in_flight: int) -> Times:
        """Send `requests` requests, always `in_flight` of them at once, over the instances in turn."""
        self._connect(in_flight + _SPARE_CONNECTIONS)
        times = Times()
        waiting: dict[int, tuple[socket.socket, _Request]] = {}
        poll = select.epoll()
        for connection in self._free:
            poll.register(connection, select.EPOLLIN)
        left = requests
        began = perf_counter()
        for _ in range(min(in_flight, requests)):
            left -= 1
            self._send_first(_Request(self._next_number(), instances[left % len(instances)]), waiting)
        while waiting:
            for descriptor, _ in poll.poll():
                connection, request = waiting.pop(descriptor)
                result = _result(connection)
                times.rpcs.append(perf_counter() - request.sent)
                self._free.append(connection)
                if result["Data"] != "ret":
                    self._send_step(request, result, waiting)
                elif request.phase == "access":
                    times.access.append(perf_counter() - request.began)
                    request.phase, request.event_id = "log", b""
                    self._send_first(request, waiting)
                elif left:
                    left -= 1
                    self._send_first(_Request(self._next_number(), instances[left % len(instances)]), waiting)
        times.whole = perf_counter() - began
        poll.close()
        return times

    def close(self) -> None:
        """End all connections."""
        while self._free:
            self._free.popleft().close()

    def _connect(self, connections: int) -> None:
        """Open what lacks, and end what is too many: a spare one more makes the steps change connections."""
        while len(self._free) > connections:
            self._free.popleft().close()
        while len(self._free) < connections:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(self._path))
            self._free.append(connection)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _send_first(self, request: _Request, waiting: dict[int, tuple[socket.socket, _Request]]) -> None:
        event = {"EventName": request.phase, "InstanceId": request.instance}
        frame = cast("bytes", msgpack.packb((0, request.number, "plugin.HandleEvent", (event,))))
        request.began = perf_counter()
        self._send(request, frame, waiting)

    def _send_step(
        self, request: _Request, result: Mapping[str, Any], waiting: dict[int, tuple[socket.socket, _Request]]
    ) -> None:
        # Kong, too, reads the id of an event from its first answer only.
        if not request.event_id:
            request.event_id = struct.pack(">Q", result["EventId"])
        value = self._value(request, result["Data"])
        head = _REQUEST + struct.pack(">I", request.number) + _STEP
        if value is None:
            frame = head + b"\x81" + _EVENT_ID + request.event_id
        else:
            frame = head + b"\x82" + _EVENT_ID + request.event_id + _DATA + value
        self._send(request, frame, waiting)

    def _send(self, request: _Request, frame: bytes, waiting: dict[int, tuple[socket.socket, _Request]]) -> None:
        connection = self._free.popleft()
        waiting[connection.fileno()] = (connection, request)
        request.sent = perf_counter()
        connection.sendall(frame)

    def _value(self, request: _Request, call: Mapping[str, Any]) -> bytes | None:
        """Answer a PDK call, in MessagePack; None for nil."""
        method = call["Method"]
        if method == "kong.log.serialize":
            return self._record_head + self._id_format % request.number + self._record_tail
        if method == "kong.request.get_header":
            return self._subject
        if method == "kong.nginx.get_var":
            return self._id_head + self._id_format % request.number
        if method in ("kong.log.warn", "kong.log.err"):
            return None
        raise ServerError(f"the plugin calls {method}, which this client does not know")


def _result(connection: socket.socket) -> Any:
    """Read the answer of an RPC; only one can be under way, but it may come in parts, and behind a notification."""
    unpacker = msgpack.Unpacker()
    while True:
        part = connection.recv(_ANSWER_BYTES)
        if not part:
            raise ServerError("the server closed a connection")
        unpacker.feed(part)
        for kind, *others in unpacker:
            if kind != _ANSWER:
                continue
            _, error, result = others
            if error is not None:
                raise ServerError(f"the server answered with an error: {error}")
            return result
