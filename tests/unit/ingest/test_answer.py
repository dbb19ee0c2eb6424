"""Retry-After: how long the endpoint asks for."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime, formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.ingest.answer import parse_retry_after

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("-5", 0.0),
        ("9" * 400, None),
        ("1e300", 1e300),
        ("inf", None),
        ("nan", None),
        ("", None),
        ("  ", None),
        ("soon", None),
        ("12 parsecs", None),
        ("\N{ARABIC-INDIC DIGIT FIVE} minutes", None),
        (formatdate(NOW + 90, usegmt=True), 90.0),
        (formatdate(NOW + 90, localtime=False), 90.0),
        (formatdate(NOW - 90, usegmt=True), 0.0),
        (formatdate(NOW, usegmt=True), 0.0),
        ("Fri, 15 Jan 2027 09:01:30 +0100", 90.0),
        ("Fri, 15 Jan 2027 08:01:30", 90.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 251602300799.0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 251602300799.0 + 86340),
        ("Fri, 99 Foo 2027 99:99:99 GMT", None),
        ("Fri, 15 Jan 99999999999999999999 08:01:30 GMT", None),
        ("Fri, 15 Jan 2027 08:01:30 +99999999999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, NOW) == seconds


@given(header=st.text(max_size=60) | st.from_regex(r"[A-Z][a-z]{2}, [0-9 ]{1,4} [A-Za-z]{3} [0-9]{0,6} [0-9:+ A-Z-]*"))
def test_whatever_stands_in_retry_after_is_seconds_or_nothing(header: str) -> None:
    seconds = parse_retry_after(header, NOW)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


@given(
    moment=st.integers(min_value=0, max_value=200_000_000_000),
    offset=st.integers(min_value=-1439, max_value=1439),
    now=st.integers(min_value=-(10**11), max_value=10**12),
)
def test_a_date_is_as_far_away_as_the_wall_clock_says(moment: int, offset: int, now: int) -> None:
    zone = timezone(timedelta(minutes=offset))
    header = format_datetime(datetime.fromtimestamp(moment, zone))
    assert parse_retry_after(header, now) == max(0, moment - now)
