"""What access phases captured, until the log phase of the same request takes it."""

from __future__ import annotations

import secrets
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.captured import GENERATION_SECONDS, CapturedHeaders
from kong_metering.request import ASKED
from tests.support.clock import FakeClock

ACME = {"x-tenant-id": "acme"}


@pytest.fixture
def captured(clock: FakeClock) -> CapturedHeaders:
    return CapturedHeaders(clock)


def small(clock: FakeClock, max_bytes: int) -> CapturedHeaders:
    return CapturedHeaders(clock, max_bytes)


def test_headers_are_taken_once(captured: CapturedHeaders) -> None:
    assert captured.keep("a", ACME)
    assert captured.take("a") == ACME
    assert captured.take("a") is None
    assert len(captured) == 0


def test_that_there_were_none_is_kept_as_well(captured: CapturedHeaders) -> None:
    captured.keep("a", {ASKED: "x-tenant-id"})
    assert captured.take("a") == {ASKED: "x-tenant-id"}


@pytest.mark.parametrize("request_id", [None, "", 5, {}])
def test_without_an_id_nothing_is_kept(captured: CapturedHeaders, request_id: object) -> None:
    assert not captured.keep(request_id, ACME)
    assert len(captured) == 0
    assert captured.are_identified is False


def test_whether_kong_tells_ids_is_known_from_the_first_request_on(captured: CapturedHeaders) -> None:
    known = [captured.are_identified]
    captured.keep("a", ACME)
    known.append(captured.are_identified)
    assert known == [None, True]


def test_a_stream_of_hours_finds_its_headers(captured: CapturedHeaders, clock: FakeClock) -> None:
    captured.keep("stream", ACME)
    for _ in range(12):
        clock.advance(3600 - 1)
        captured.sweep()
    assert captured.take("stream") == ACME


def test_what_nobody_takes_is_let_go_of(captured: CapturedHeaders, clock: FakeClock) -> None:
    captured.keep("a", ACME)
    for _ in range(2):
        clock.advance(GENERATION_SECONDS)
        captured.sweep()
    assert captured.take("a") is None
    assert len(captured) == 0


def test_requests_that_end_take_no_room_however_many_there_are(clock: FakeClock) -> None:
    captured = small(clock, 10_000)
    captured.keep("stream", ACME)
    for number in range(10_000):
        captured.keep(str(number), ACME)
        assert captured.take(str(number)) == ACME
    assert captured.take("stream") == ACME


@pytest.mark.parametrize("value", ["a", "a" * 8000, "\udcff" * 100, "株式会社" * 100])
def test_a_flood_that_never_logs_fills_no_more_than_its_bound(clock: FakeClock, value: str) -> None:
    bound = 1_000_000
    captured = small(clock, bound)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(10_000):
            captured.keep(secrets.token_hex(16), {"x-tenant-id": f"{value}{secrets.token_hex(4)}"})
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1.3 * bound
    assert len(captured) > 0


def test_what_there_is_no_room_for_is_said_with_its_count(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    captured = small(clock, 2_000)
    with caplog.at_level("ERROR", "kong_metering"):
        for number in range(20):
            captured.keep(str(number), ACME)
    assert "the headers of" in caplog.text
    assert "by the headers in Kong's record" in caplog.text


headers = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=5), headers, max_size=5))
def test_the_next_process_goes_on_with_what_the_one_before_had(kept: dict[str, dict[str, str]]) -> None:
    clock = FakeClock()
    before, after = (CapturedHeaders(clock) for _ in range(2))
    for request_id, values in kept.items():
        before.keep(request_id, values)
    after.unpack(before.pack())
    assert {request_id: after.take(request_id) for request_id in kept} == kept


def test_bytes_that_are_not_utf8_are_handed_over_too(clock: FakeClock) -> None:
    before, after = (CapturedHeaders(clock) for _ in range(2))
    before.keep("a", {"x-tenant-id": "caf\udce9"})
    after.unpack(before.pack())
    assert after.take("a") == {"x-tenant-id": "caf\udce9"}


@pytest.mark.parametrize("packed", [b"", b"\xff", b"[1]", b'{"a": 5}', b'{"a": {"b": 5}}', b"{"])
def test_what_is_not_in_that_form_is_refused_and_nothing_else_lost(captured: CapturedHeaders, packed: bytes) -> None:
    captured.keep("a", ACME)
    captured.unpack(packed)
    assert captured.take("a") == ACME
