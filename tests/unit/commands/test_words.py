"""Numbers, times and foreign text in words."""

from __future__ import annotations

import json

import pytest

from kong_metering.commands import words


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (9_140_000, "9.1 MB"), (2 * 10**15, "2000.0 TB")]
)
def test_sizes(count: int, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (90, "90 s"), (150, "2 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert words.age(seconds) == text


def test_times() -> None:
    assert words.moment(1_700_000_000_123) == "2023-11-14 22:13:20Z"
    assert words.timestamp(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
    assert words.moment(0) == "unknown"
    assert words.timestamp(0) is None
    assert words.moment(1 << 60) == "9999-12-31 23:59:59Z"
    assert words.moment(-1) == "1970-01-01 00:00:00Z"


def test_what_a_terminal_gets_of_an_event_is_the_same_json() -> None:
    event = json.dumps({"a": "\x7f\x9b\u202e中"}, ensure_ascii=False).encode()
    line = words.one_line(event)
    assert line.isprintable()
    assert json.loads(line) == json.loads(event)
    assert "中" in line


def test_json_is_printable_ascii() -> None:
    for made in (words.json_line({"a": "\x7f\x1b\x9b\ud800"}), words.json_document({"a": "\x7f"}).replace("\n", "")):
        assert made.isascii()
        assert made.isprintable()
