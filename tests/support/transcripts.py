"""What was recorded of a real Kong 3.9.1, and how to play it again (`tests/wire/transcripts`).

The recorder in the plugin server's place asked for other PDK calls than our plugin does, in another order. So a
replay sends, for each call of ours, the very frame in which Kong answered that call in that phase. The ids of
instances and events in it must be those of today: the frame is decoded without touching its strings, the id is
replaced, and it is encoded again as Kong's library does; that this changes nothing but the id is itself tested.
`kong.ctx.shared` was filled by the recorder, and is kept for real instead. nginx's variables and the request's URI in
Kong's context, which it did not ask for, are worked out from what it did.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import msgpack

from tests.support.rpc import Frame, KongRequest, Result, Step

DIRECTORY = Path(__file__).parents[1] / "wire" / "transcripts"

_Call = tuple[str, str]  # a PDK function, and its arguments as JSON


@dataclass(frozen=True)
class RecordedFrame:
    """The bytes of one message that Kong sent."""

    raw: bytes

    @cached_property
    def message(self) -> list[Any]:
        """The message with all its strings as bytes."""
        return cast("list[Any]", msgpack.unpackb(self.raw, raw=True, strict_map_key=False))

    @property
    def number(self) -> int:
        return int(self.message[1])

    @property
    def method(self) -> str:
        return str(self.message[2].decode()).removeprefix("plugin.")

    @property
    def argument(self) -> Any:
        return self.message[3][0]

    def with_argument(self, argument: object) -> Frame:
        """Give the frame with another argument in its place."""
        kind, number, method, _ = self.message
        return Frame(number, cast("bytes", msgpack.packb([kind, number, method, [argument]], use_bin_type=False)))

    def with_member(self, name: bytes, value: object) -> Frame:
        """Give the frame with another value under `name` in its argument."""
        assert name in self.argument
        return self.with_argument({**self.argument, name: value})


@dataclass(frozen=True)
class RecordedStep:
    """Kong's own answer to a PDK call; it keeps the id that its message had."""

    recorded: RecordedFrame

    @property
    def value(self) -> Any:
        """What Kong answered, strings as bytes; None for nil."""
        return self.recorded.argument.get(b"Data")

    def frame(self, number: int, event_id: int) -> Frame:  # noqa: ARG002 - as any `Step`
        return self.recorded.with_member(b"EventId", event_id)


@dataclass(frozen=True)
class RecordedPhase:
    """One event: how Kong announced it, and how it answered the recorder's PDK calls."""

    handle: RecordedFrame
    answers: dict[_Call, RecordedFrame] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.handle.argument[b"EventName"].decode())

    def step(self, method: str, arguments: Sequence[Any]) -> RecordedStep | None:
        recorded = self.answers.get((method, json.dumps(list(arguments))))
        return RecordedStep(recorded) if recorded else None

    def value(self, method: str, *arguments: object) -> Any:
        """Give what Kong answered, strings as bytes; None for nil."""
        return self.answers[method, json.dumps(list(arguments))].argument.get(b"Data")


class RecordedRequest(KongRequest):
    """One client's request of a transcript; what was not recorded of it, it cannot answer.

    A `copy` above 0 is another request like it, with an id of its own: Kong gives no two requests the same.
    """

    def __init__(self, phases: Sequence[RecordedPhase], copy: int = 0) -> None:
        super().__init__()
        self.phases = {phase.name: phase for phase in phases}
        self._copy = copy

    @property
    def record(self) -> dict[str, Any]:
        """What `kong.log.serialize` gave; bytes that are not UTF-8 as Python's surrogate escapes."""
        record: dict[str, Any] = json.loads(self._record_text.decode("utf-8", "surrogateescape"))
        return record

    @property
    def _record_text(self) -> bytes:
        recorded: bytes = self.phases["log"].value("kong.log.serialize")
        if not self._copy:
            return recorded
        request_id = str(json.loads(recorded.decode("utf-8", "surrogateescape"))["request"]["id"]).encode()
        return recorded.replace(request_id, b"%032x" % (int(request_id, 16) ^ self._copy << 64))

    def handle_event(self, number: int, phase: str, instance_id: int) -> Frame:  # noqa: ARG002 - it has its own number
        return self.phases[phase].handle.with_member(b"InstanceId", instance_id)

    def answer(self, phase: str, method: str, arguments: Sequence[Any]) -> Step:
        recorded = self.phases[phase].step(method, arguments)
        if recorded is not None:
            return Result(self._record_text) if self._copy and method == "kong.log.serialize" else recorded
        if (phase, method) == ("access", "kong.request.get_header"):
            values = self._headers.get(arguments[0].lower().encode())
            return Result(values[0] if values else None)
        if (phase, method, arguments[0]) == ("access", "kong.nginx.get_var", "kong_request_id"):
            return Result(self.record["request"]["id"])
        if (phase, method) == ("access", "kong.nginx.get_var"):
            return Result(self._variable(arguments[0].removeprefix("http_").encode()))
        if (phase, method, arguments[0]) == ("log", "kong.nginx.get_ctx", "request_uri"):
            # What Kong's record is made of as well.
            return Result(self.record["request"]["uri"])
        raise LookupError(f"the transcript does not tell what {method}{tuple(arguments)} gave in {phase}")

    @property
    def _headers(self) -> dict[bytes, list[bytes]]:
        headers: dict[bytes, list[bytes]] = self.phases["access"].value("kong.request.get_headers", 1000)
        return headers

    def _variable(self, name: bytes) -> bytes | None:
        """Give nginx's variable of a header: all its lines, joined."""
        lines = [line for key, lines in self._headers.items() if key.replace(b"-", b"_") == name for line in lines]
        return b", ".join(lines) if lines else None


@dataclass(frozen=True)
class Transcript:
    """One scenario."""

    scenario: str
    frames: tuple[RecordedFrame, ...]
    requests: tuple[RecordedRequest, ...]

    def frames_of(self, method: str) -> list[RecordedFrame]:
        return [frame for frame in self.frames if frame.method == method]

    def fresh_requests(self, copy: int = 0) -> list[RecordedRequest]:
        """Give the requests anew, with nothing in their `kong.ctx.shared`."""
        return [RecordedRequest(list(request.phases.values()), copy) for request in self.requests]


def scenarios() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def load(scenario: str) -> Transcript:
    recording = json.loads((DIRECTORY / f"{scenario}.json").read_text(encoding="utf-8"))
    frames = tuple(RecordedFrame(bytes.fromhex(item["hex"])) for item in recording["kong_frames_hex"])
    phases = _phases(recording["frames"], frames)
    return Transcript(scenario, frames, tuple(_requests(phases)))


def _phases(messages: list[dict[str, Any]], frames: Sequence[RecordedFrame]) -> list[RecordedPhase]:
    """Tell events apart, and which frame of Kong's answered which call of the recorder's."""
    phases: list[RecordedPhase] = []
    asked: _Call | None = None
    left = list(frames)
    for item in messages:
        if item["from"] == "plugin":
            asked = _asked(item["message"][3])
            continue
        frame = left.pop(0)
        if frame.method == "HandleEvent":
            phases.append(RecordedPhase(frame))
        elif frame.method.startswith("Step"):
            assert asked is not None
            phases[-1].answers[asked] = frame
    assert not left
    return phases


def _asked(result: dict[str, Any]) -> _Call | None:
    wanted = result.get("Data")
    return (wanted["Method"], json.dumps(wanted["Args"])) if isinstance(wanted, dict) else None


def _requests(phases: Sequence[RecordedPhase]) -> list[RecordedRequest]:
    """Put the phases of each request together: the log phase is its last."""
    requests: list[RecordedRequest] = []
    waiting: list[RecordedPhase] = []
    for phase in phases:
        waiting.append(phase)
        if phase.name == "log":
            requests.append(RecordedRequest(waiting))
            waiting = []
    assert not waiting
    return requests
