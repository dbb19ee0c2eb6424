"""Kong's part of the plugin-server protocol `MsgPack:1`, over real Unix sockets, as Kong 3.9.1 plays it.

Kong opens or reuses a connection for every single RPC; runs the PDK calls that a phase asks for, brings each result
with the form of `Step` that belongs to the function (`kong/runloop/plugin_servers/rpc/mp_rpc.lua`), leaves `Data` away
for nil, and reads the event's id from the first answer only.
"""

from __future__ import annotations

import itertools
import json
import random
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import msgpack

if TYPE_CHECKING:
    from typing_extensions import Self

PLUGIN = "metering-and-billing"

_TIMEOUT_SECONDS = 60.0
_GET_VARIABLE = "kong.nginx.get_var"
_REQUEST_ID = f"{_GET_VARIABLE}(kong_request_id)"
_HEADER = "http_"
_FORMS = {
    "kong.client.authenticate": "StepCredential",
    "kong.client.get_consumer": "StepConsumer",
    "kong.client.get_credential": "StepCredential",
    "kong.client.load_consumer": "StepConsumer",
    "kong.node.get_memory_stats": "StepMemoryStats",
    "kong.request.get_headers": "StepMultiMap",
    "kong.request.get_query": "StepMultiMap",
    "kong.response.get_headers": "StepMultiMap",
    "kong.router.get_route": "StepRoute",
    "kong.router.get_service": "StepService",
    "kong.service.response.get_headers": "StepMultiMap",
}


class RPCFailedError(Exception):
    """The plugin server answered with an error."""


def pack(message: object) -> bytes:
    """Encode as Kong's Lua library does: strings of bytes, in the forms of the older MessagePack."""
    return cast("bytes", msgpack.packb(message, use_bin_type=False, unicode_errors="surrogateescape"))


class Frame(NamedTuple):
    """The bytes of a request, and its id, which the answer will carry."""

    number: int
    data: bytes


def request_frame(number: int, method: str, *arguments: object) -> Frame:
    """Encode a request; `method` is the part behind `plugin.`."""
    return Frame(number, pack([0, number, f"plugin.{method}", list(arguments)]))


@dataclass(frozen=True)
class Answer:
    id: int
    error: str | None
    result: Any


class Connection:
    """One connection to a plugin server."""

    def __init__(self, path: Path) -> None:
        self.notifications: list[tuple[Any, ...]] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(_TIMEOUT_SECONDS)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._unpacker = msgpack.Unpacker(raw=False, unicode_errors="surrogateescape", strict_map_key=False)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> Answer:
        """Wait for the next answer; raises ConnectionError when the server ends the connection instead."""
        while True:
            for kind, *parts in self._unpacker:
                if kind == 2:  # a notification, which stands before an answer
                    self.notifications.append(tuple(parts))
                    continue
                assert kind == 1
                return Answer(*parts)
            data = self.socket.recv(65_536)
            if not data:
                raise ConnectionError("the plugin server ended the connection")
            self._unpacker.feed(data)

    def is_ended(self) -> bool:
        """Wait for what comes next, and tell whether it is the end of the connection."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Step(Protocol):
    """The RPC that brings a PDK call's result, and the result."""

    @property
    def value(self) -> Any: ...

    def frame(self, number: int, event_id: int) -> Frame: ...


@dataclass(frozen=True)
class Result:
    """A result of our own making; `form` is the kind of step, None stands for nil."""

    value: Any = None
    form: str = "Step"

    def frame(self, number: int, event_id: int) -> Frame:
        argument = {"EventId": event_id} if self.value is None else {"EventId": event_id, "Data": self.value}
        return request_frame(number, self.form, argument)


class KongRequest:
    """One client's request in Kong: it answers the PDK calls of its phases, and keeps `kong.ctx.shared`.

    `answers` has the values of PDK functions by name, or by `name(first argument)`; what is not there is nil, but the
    id of the request, which is the log record's if there is one, and nginx's variables of headers, which are what
    `kong.request.get_header` gives.
    """

    def __init__(self, answers: Mapping[str, object] | None = None) -> None:
        answers = answers or {}
        self._answers = {_REQUEST_ID: _id_in(answers.get("kong.log.serialize")), **answers}
        self.shared: dict[object, object] = {}
        self.said: list[str] = []

    def handle_event(self, number: int, phase: str, instance_id: int) -> Frame:
        return request_frame(number, "HandleEvent", {"InstanceId": instance_id, "EventName": phase})

    def step(self, phase: str, method: str, arguments: Sequence[Any]) -> Step:
        if method == "kong.ctx.shared.get":
            return Result(self.shared.get(arguments[0]))
        if method == "kong.ctx.shared.set":
            self.shared[arguments[0]] = _without_nil(arguments[1])
            return Result()
        if method.startswith("kong.log.") and method != "kong.log.serialize":
            self.said.append(str(arguments[0]))
            return Result()
        return self.answer(phase, method, arguments)

    def answer(self, phase: str, method: str, arguments: Sequence[Any]) -> Step:
        specific = f"{method}({arguments[0]})" if arguments else method
        if method == _GET_VARIABLE and arguments[0].startswith(_HEADER) and specific not in self._answers:
            name = arguments[0].removeprefix(_HEADER).replace("_", "-")
            return self.answer(phase, "kong.request.get_header", [name])
        value = self._answers.get(specific, self._answers.get(method))
        return Result(value, _FORMS.get(method, "Step"))


def _id_in(record: object) -> str:
    try:
        return str(json.loads(cast("str", record))["request"]["id"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return secrets.token_hex(16)


def _without_nil(value: object) -> object:
    """Leave members away that are nil, as a Lua table does."""
    if isinstance(value, dict):
        return {key: _without_nil(item) for key, item in value.items() if item is not None}
    return [_without_nil(item) for item in value] if isinstance(value, list) else value


@dataclass
class PhaseRun:
    """One event, from HandleEvent to `ret`, as Kong sees it."""

    instance_id: int
    phase: str
    request: KongRequest
    calls: list[str] = field(default_factory=list)
    rpcs: int = 0
    event_id: int = 0
    is_over: bool = False
    number: int = 0
    wanted: Any = None

    def next_frame(self, number: int) -> bytes:
        """Give the next RPC."""
        self.rpcs += 1
        if self.wanted is None:
            frame = self.request.handle_event(number, self.phase, self.instance_id)
        else:
            step = self.request.step(self.phase, self.wanted["Method"], self.wanted.get("Args", ()))
            frame = step.frame(number, self.event_id)
        self.number = frame.number
        return frame.data

    def take(self, answer: Answer) -> None:
        """Take the answer to it."""
        assert answer.id == self.number
        if answer.error is not None:
            raise RPCFailedError(answer.error)
        if self.rpcs == 1:
            self.event_id = answer.result.get("EventId", 0)
        self.wanted = answer.result["Data"]
        if self.wanted == "ret":
            self.is_over = True
        else:
            self.calls.append(self.wanted["Method"])


Write = Callable[[Connection, bytes], None]


def write_whole(connection: Connection, frame: bytes) -> None:
    connection.send(frame)


class KongClient:
    """Sends RPCs to the plugin server at `path`.

    Each goes over a connection of its own, or over the next of `connections`. `write` puts a frame into a connection.
    """

    def __init__(self, path: Path, connections: Sequence[Connection] = (), write: Write = write_whole) -> None:
        self._path = path
        self._write = write
        self._connections = itertools.cycle(connections) if connections else None
        self._numbers = itertools.count(1)

    def answer_to(self, frame: bytes) -> Answer:
        """Send a request and wait for its answer."""
        if self._connections is not None:
            return self._exchange(next(self._connections), frame)
        with Connection(self._path) as connection:
            return self._exchange(connection, frame)

    def call(self, method: str, *arguments: object) -> Any:
        """Do an RPC and give its result; raises `RPCFailedError` with the error that the server answers."""
        frame = request_frame(next(self._numbers), method, *arguments)
        answer = self.answer_to(frame.data)
        assert answer.id == frame.number
        if answer.error is not None:
            raise RPCFailedError(answer.error)
        return answer.result

    def start_instance(self, config: Mapping[str, Any] | str, name: str = PLUGIN) -> int:
        config = config if isinstance(config, str) else json.dumps(config)
        return int(self.call("StartInstance", {"Name": name, "Config": config})["Id"])

    def close_instance(self, instance_id: int) -> None:
        self.call("CloseInstance", instance_id)

    def status(self, name: str = PLUGIN) -> dict[str, Any]:
        """Give the server's status of the plugin."""
        status: dict[str, Any] = self.call("GetStatus")["Plugins"][name]
        return status

    def run(self, phase_run: PhaseRun) -> PhaseRun:
        """Take an event to its end."""
        while not phase_run.is_over:
            phase_run.take(self.answer_to(phase_run.next_frame(next(self._numbers))))
        return phase_run

    def run_phases(self, instance_id: int, request: KongRequest, *phases: str) -> list[PhaseRun]:
        """Take a request through phases, by default through access and log."""
        return [self.run(PhaseRun(instance_id, phase, request)) for phase in phases or ("access", "log")]

    def run_together(self, phase_runs: Sequence[PhaseRun], connection: Connection) -> None:
        """Take many events to their ends side by side: all RPCs that are due go out in one write."""
        running = list(phase_runs)
        while running:
            self._write(connection, b"".join(run.next_frame(next(self._numbers)) for run in running))
            for run in running:
                run.take(connection.receive())
            running = [run for run in running if not run.is_over]

    def run_shuffled(
        self, phase_runs: Sequence[PhaseRun], connections: Sequence[Connection], chance: random.Random
    ) -> None:
        """Take many events to their ends interleaved: each step by chance, over a connection by chance.

        As in Kong, a connection carries one RPC at a time, and as many RPCs are under way as there are connections.
        """
        running = list(phase_runs)
        while running:
            busy = list(zip(chance.sample(running, min(len(running), len(connections))), connections, strict=False))
            chance.shuffle(busy)
            for run, connection in busy:
                self._write(connection, run.next_frame(next(self._numbers)))
            chance.shuffle(busy)
            for run, connection in busy:
                run.take(connection.receive())
            running = [run for run in running if not run.is_over]

    def _exchange(self, connection: Connection, frame: bytes) -> Answer:
        self._write(connection, frame)
        return connection.receive()


def in_rounds(runs: Sequence[PhaseRun], size: int) -> Iterator[Sequence[PhaseRun]]:
    """Cut many events into groups that are under way at the same time."""
    for start in range(0, len(runs), size):
        yield runs[start : start + size]
