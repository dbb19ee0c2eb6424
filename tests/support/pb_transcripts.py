"""What was recorded of a real Kong 3.9.3 over `ProtoBuf:1`, and how to play it again (`wire/transcripts_protobuf`).

It was recorded between Kong and our own plugin server, frame by frame, in the order in which frames were complete; an
entry with `end` in it is the end of a connection, and one with `warm_up` stands for so many requests with a plain
header, after which a phase asks at once. So a replay sends the very bytes of Kong's and compares what comes
back. Only the ids of instances, and the endpoint in a configuration, must be those of today: they are replaced in the
bytes, everything else in the frame stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.protobuf import as_bytes, parsed

DIRECTORY = Path(__file__).parents[1] / "wire" / "transcripts_protobuf"

_HANDLE_EVENT, _CLOSE_INSTANCE, _START_INSTANCE = 36, 35, 33
_INSTANCE_ID, _CONFIG = 1, 2

_Field = tuple[int, int, bytes]  # number, wire type, and the bytes of the value


@dataclass(frozen=True)
class Entry:
    """A frame that Kong or the plugin server sent on a connection, or that it ended it; `said` is what is in it."""

    sender: str
    connection: int
    frame: bytes
    said: dict[str, Any]

    @property
    def is_end(self) -> bool:
        return "end" in self.said

    @property
    def warm_up(self) -> int:
        """How many plain requests there were, which are not here."""
        return int(self.said.get("warm_up", 0))

    @property
    def call(self) -> dict[str, Any]:
        """What Kong calls, empty if this is something else."""
        call: dict[str, Any] = self.said.get("call", {})
        return call

    def with_instance(self, instance_id: int) -> bytes:
        """Give the frame with another instance in it."""
        return self._changed({_HANDLE_EVENT, _CLOSE_INSTANCE}, _INSTANCE_ID, 0, _varint(instance_id))

    def with_config(self, config: str) -> bytes:
        """Give the frame with another configuration in it."""
        return self._changed({_START_INSTANCE}, _CONFIG, 2, as_bytes(config))

    def _changed(self, within: set[int], number: int, wire_type: int, value: bytes) -> bytes:
        changed = []
        for outer, kind, raw in fields(self.frame[4:]):
            inner = fields(raw) if outer in within else []
            replaced = [(number, wire_type, value) if field[0] == number else field for field in inner]
            changed.append((outer, kind, _joined(replaced) if outer in within else raw))
        content = _joined(changed)
        return len(content).to_bytes(4, "little") + content


@dataclass(frozen=True)
class PBTranscript:
    """One scenario."""

    scenario: str
    entries: tuple[Entry, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """What `kong.log.serialize` gave; bytes that are not UTF-8 as Python's surrogate escapes."""
        return [json.loads(text) for text in self.answers("kong.log.serialize") if text]

    def answers(self, method: str) -> list[Any]:
        """Give what Kong answered to a PDK function, None for nil."""
        return [
            entry.said["answer"]
            for entry in self.entries
            if entry.said.get("method") == method and "answer" in entry.said
        ]

    def calls(self, kind: str) -> list[dict[str, Any]]:
        return [entry.call[kind] for entry in self.entries if kind in entry.call]


def scenarios() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


@cache
def load(scenario: str) -> PBTranscript:
    recording = json.loads((DIRECTORY / f"{scenario}.json").read_text(encoding="utf-8"))
    return PBTranscript(scenario, tuple(_entries(recording["frames"])))


def _entries(items: list[dict[str, Any]]) -> Iterator[Entry]:
    for item in items:
        said = {name: value for name, value in item.items() if name not in ("from", "conn", "hex")}
        yield Entry(item.get("from", ""), item.get("conn", 0), bytes.fromhex(item.get("hex", "")), said)


def fields(content: bytes) -> list[_Field]:
    """Take a message apart."""
    found: list[_Field] = []
    position = 0
    while position < len(content):
        tag, position = _read_varint(content, position)
        if tag & 7 == 0:
            end = _read_varint(content, position)[1]
        else:
            assert tag & 7 == 2
            length, position = _read_varint(content, position)
            end = position + length
        found.append((tag >> 3, tag & 7, content[position:end]))
        position = end
    return found


def _joined(taken_apart: list[_Field]) -> bytes:
    return b"".join(
        _varint(number << 3 | wire_type) + (_varint(len(value)) if wire_type == 2 else b"") + value
        for number, wire_type, value in taken_apart
    )


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def returned(frame: bytes) -> Any:
    """Read what a call returned."""
    return parsed("Return", frame[4:])
