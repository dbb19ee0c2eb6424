"""Kong's part of the plugin-server protocol `ProtoBuf:1`, over real Unix sockets, as Kong 3.9.3 plays it.

An event stays on one connection: Kong sends the call, answers each PDK call that it reads there, up to an empty name,
and reads what the call returns (`kong/runloop/plugin_servers/rpc/pb_rpc.lua`). It sends a frame in two pieces, its
length and its content. A connection that ends is the only error there is.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.protobuf import (
    FUNCTIONS,
    as_bytes,
    as_text,
    list_of,
    message,
    parsed,
    struct_message,
    struct_of,
    value_message,
    value_of,
)
from tests.support.rpc import PLUGIN, Connection, KongClient, KongRequest, PhaseRun, Write

_READ_BYTES = 65_536


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def write_as_kong(connection: Connection, whole: bytes) -> None:
    """Write a frame as Kong does: its length, then its content, which may be empty."""
    connection.send(whole[:4])
    connection.send(whole[4:])


class FrameConnection(Connection):
    """One connection to a plugin server."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._unread = b""

    def receive_frame(self) -> bytes:
        """Wait for the next frame and give its content; raises ConnectionError when the server ends the connection."""
        while (end := self._end_of_frame()) is None:
            data = self.socket.recv(_READ_BYTES)
            if not data:
                raise ConnectionError("closed")
            self._unread += data
        content, self._unread = self._unread[4:end], self._unread[end:]
        return content

    def holds_frame(self) -> bool:
        """Tell whether the next frame is here already."""
        return self._end_of_frame() is not None

    def _end_of_frame(self) -> int | None:
        if len(self._unread) < 4:
            return None
        end = 4 + int.from_bytes(self._unread[:4], "little")
        return end if len(self._unread) >= end else None


def call_frame(sequence: int, **fields: Any) -> bytes:
    """Encode a call of Kong's."""
    return frame(message("Call", sequence=sequence, **fields).SerializeToString())


def arguments_of(method: str, content: bytes) -> list[Any]:
    """Read the argument of a PDK function as Kong unpacks it."""
    kind = FUNCTIONS[method][0]
    made = parsed(kind, content)
    if kind == "List":
        return list_of(made)
    if kind == "Struct":
        return [struct_of(made)]
    if kind == "KV":
        return [as_text(made.k), value_of(made.v)]
    values = [getattr(made, field.name) for field in made.DESCRIPTOR.fields]
    return [as_text(value) if isinstance(value, bytes) else value for value in values]


def answer_to(method: str, value: Any) -> bytes:
    """Encode what a PDK function gave as Kong does."""
    kind = FUNCTIONS[method][1]
    if kind == "Value":
        return value_message(value).SerializeToString()
    if value is None or kind == "Empty":
        return b""
    if kind == "Struct":
        return struct_message({name: _as_lua_has_it(values) for name, values in value.items()}).SerializeToString()
    if kind in ("String", "Int", "Number", "Bool"):
        made = message(kind, v=as_bytes(value) if kind == "String" else value)
    else:
        made = _entity(kind, value)
    encoded: bytes = made.SerializeToString()
    return encoded


def _as_lua_has_it(values: Any) -> Any:
    """Give one header or query argument: a list only if there are several, true for one without a value."""
    if isinstance(values, list) and len(values) < 2:
        return values[0] if values else True
    return values


def _entity(kind: str, table: Mapping[Any, Any]) -> Any:
    """Make the message of an entity; Kong's encoder leaves out what it has no field for."""
    made = message(kind)
    known = {field.name: field for field in made.DESCRIPTOR.fields}
    for key, value in table.items():
        field = known.get(as_bytes(key).decode())
        if field is None or value is None:
            continue
        if field.message_type is not None:
            getattr(made, field.name).CopyFrom(_entity(field.message_type.name, value))
        elif isinstance(value, list):
            getattr(made, field.name).extend(map(as_bytes, value))
        else:
            setattr(made, field.name, as_bytes(value) if isinstance(value, (str, bytes)) else value)
    return made


class _Event:
    """One event on its connection, as Kong takes it through."""

    def __init__(self, run: PhaseRun, sequence: int) -> None:
        self.run = run
        self._sequence = sequence

    def call(self) -> bytes:
        """Give the frame that begins it."""
        self.run.rpcs += 1
        handled = {"instance_id": self.run.instance_id, "event_name": self.run.phase.encode()}
        return call_frame(self._sequence, handle_event=handled)

    def go_on(self, connection: FrameConnection) -> bytes | None:
        """Read the next PDK call and give the frame that answers it, None at the event's end."""
        method = connection.receive_frame().decode("ascii")
        content = connection.receive_frame()
        if method == "":
            assert parsed("Return", content) == message("Return", sequence=self._sequence)
            self.run.is_over = True
            return None
        self.run.calls.append(method)
        step = self.run.request.step(self.run.phase, method, arguments_of(method, content))
        return frame(answer_to(method, step.value))


class PBKongClient:
    """Calls the plugin server at `path`.

    Each call and each event goes over a connection of its own, or over the next of `connections`. `write` puts a frame
    into a connection. When an event is over here, the server has taken all its answers as well: an RPC that follows on
    the same connection was answered.
    """

    def __init__(self, path: Path, connections: Sequence[FrameConnection] = (), write: Write = write_as_kong) -> None:
        self._path = path
        self._write = write
        self._connections = itertools.cycle(connections) if connections else None
        self._sequences = itertools.count(1)

    def call(self, **fields: Any) -> Any:
        """Do a call and give what it returns; raises ConnectionError when the server ends the connection."""
        with self.connection() as connection:
            return self._call(connection, **fields)

    def start_instance(self, config: Mapping[str, Any] | str, name: str = PLUGIN) -> int:
        config = config if isinstance(config, str) else json.dumps(config)
        start = {"name": as_bytes(name), "config": as_bytes(config)}
        return int(self.call(start_instance=start).instance_status.instance_id)

    def close_instance(self, instance_id: int) -> None:
        self.call(close_instance={"instance_id": instance_id})

    def status(self, name: str = PLUGIN) -> dict[str, Any]:
        """Give the server's status of the plugin, which only the other protocol can ask for."""
        return KongClient(self._path).status(name)

    def run(self, phase_run: PhaseRun) -> PhaseRun:
        """Take an event to its end."""
        with self.connection() as connection:
            event = _Event(phase_run, next(self._sequences))
            self._write(connection, event.call())
            while (answer := event.go_on(connection)) is not None:
                self._write(connection, answer)
            self._settle(connection)
        return phase_run

    def run_phases(self, instance_id: int, request: KongRequest, *phases: str) -> list[PhaseRun]:
        """Take a request through phases, by default through access and log."""
        return [self.run(PhaseRun(instance_id, phase, request)) for phase in phases or ("access", "log")]

    def run_together(self, phase_runs: Sequence[PhaseRun], connection: FrameConnection) -> None:
        """Take many events to their ends, one after another: answers go out with the next call where they can."""
        unwritten = b""
        for run in phase_runs:
            event = _Event(run, next(self._sequences))
            unwritten += event.call()
            while not run.is_over:
                if unwritten and not connection.holds_frame():
                    self._write(connection, unwritten)
                    unwritten = b""
                unwritten += event.go_on(connection) or b""
        if unwritten:
            self._write(connection, unwritten)
        self._settle(connection)

    def run_shuffled(
        self, phase_runs: Sequence[PhaseRun], connections: Sequence[FrameConnection], chance: random.Random
    ) -> None:
        """Take many events to their ends side by side, one on a connection: frame by frame, in an order by chance."""
        waiting, idle = list(phase_runs), list(connections)
        running: list[tuple[_Event, FrameConnection]] = []
        while waiting or running:
            if waiting and idle and chance.random() < 0.5:
                event = _Event(waiting.pop(), next(self._sequences))
                connection = idle.pop(chance.randrange(len(idle)))
                self._write(connection, event.call())
                running.append((event, connection))
            elif running:
                event, connection = running[chance.randrange(len(running))]
                answer = event.go_on(connection)
                if answer is None:
                    running.remove((event, connection))
                    idle.append(connection)
                else:
                    self._write(connection, answer)
        for connection in connections:
            self._settle(connection)

    def _settle(self, connection: FrameConnection) -> None:
        self._call(connection, get_plugin_names={})

    def _call(self, connection: FrameConnection, **fields: Any) -> Any:
        sequence = next(self._sequences)
        self._write(connection, call_frame(sequence, **fields))
        returned = parsed("Return", connection.receive_frame())
        assert returned.sequence == sequence
        return returned

    @contextmanager
    def connection(self) -> Iterator[FrameConnection]:
        """Give a connection of its own, or the next of `connections`."""
        if self._connections is not None:
            yield next(self._connections)
        else:
            with FrameConnection(self._path) as connection:
                yield connection
