"""Kong's side of a conversation over `ProtoBuf:1` without a socket; its messages are made by Google's library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kong_metering.host.pb_rpc import KnownPhases, PBConversation
from tests.support.protobuf import FUNCTIONS, list_of, message, parsed, struct_message, struct_of, value_message
from tests.unit.host.hosting import NAME

if TYPE_CHECKING:
    from tests.unit.host.hosting import Host

NIL = b""
END = b""


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(4, "little") + content


def frames_in(data: bytes) -> list[bytes]:
    """Cut bytes into the contents of their frames; there must be nothing left over."""
    found = []
    while data:
        length = int.from_bytes(data[:4], "little")
        assert len(data) >= 4 + length
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


def call(sequence: int, **fields: Any) -> bytes:
    """Give a call of Kong's, its sequence number in front."""
    return frame(message("Call", sequence=sequence, **fields).SerializeToString())


def event(sequence: int, instance_id: int, phase: str = "log") -> bytes:
    return call(sequence, handle_event={"instance_id": instance_id, "event_name": phase.encode()})


def event_last(sequence: int, instance_id: int, phase: str = "log") -> bytes:
    """Give the same with the sequence number at the end: Kong's encoder puts either first."""
    handled = message("Call", handle_event={"instance_id": instance_id, "event_name": phase.encode()})
    return frame(handled.SerializeToString() + message("Call", sequence=sequence).SerializeToString())


def string(text: bytes | str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return bytes(message("String", v=raw).SerializeToString())


def value(content: object) -> bytes:
    return value_message(content).SerializeToString()


def table(content: dict[str, Any]) -> bytes:
    return struct_message(content).SerializeToString()


def arguments(method: bytes, argument: bytes) -> Any:
    """Read the argument of a PDK function as Kong hands it over."""
    name = FUNCTIONS[method.decode()][0]
    given = parsed(name, argument)
    if name == "List":
        return list_of(given)
    return struct_of(given) if name == "Struct" else given


def returned(content: bytes) -> Any:
    return parsed("Return", content)


class Talk:
    """A connection of Kong's to a host."""

    def __init__(self, host: Host, shared: KnownPhases | None = None) -> None:
        self.shared = shared or KnownPhases(host.dispatcher.instances)
        self.conversation = PBConversation(self.shared)

    def beside(self, host: Host) -> Talk:
        """Open another connection."""
        return Talk(host, self.shared)

    def send(self, *frames: bytes) -> list[bytes]:
        """Send frames in one piece, and give the contents of those that come back."""
        return frames_in(self.conversation.receive(b"".join(frames)))

    def answer(self, *answers: bytes) -> list[bytes]:
        """Answer PDK calls, all in one piece."""
        return self.send(*map(frame, answers))

    def start(self, name: str = NAME, **config: object) -> int:
        start = {"name": name.encode(), "config": json.dumps(config).encode()}
        (content,) = self.send(call(1, start_instance=start))
        return int(returned(content).instance_status.instance_id)

    def close(self, instance_id: int) -> None:
        (content,) = self.send(call(2, close_instance={"instance_id": instance_id}))
        assert returned(content) == message("Return", sequence=2)

    def step_through(self, called: bytes, answers: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], int]:
        """Take a phase in steps to its end: which calls it made, and the sequence number that it ended with."""
        made = []
        written = self.send(called)
        for answer in answers:
            method, argument = written
            made.append((method, argument))
            written = self.answer(answer)
        end, content = written
        assert end == END
        assert returned(content).WhichOneof("one") is None
        return made, returned(content).sequence
