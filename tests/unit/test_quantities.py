"""Lengths of time and sizes on the command line: what both programs take for one, and what not."""

from __future__ import annotations

import click
import pytest

from kong_metering.quantities import Duration, Size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.25", 0.25),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("90s", 90),
        ("90m", 5400),
        ("1.5h", 5400),
        ("24H", 86_400),
        ("30d", 2_592_000),
        (" 2 W ", 1_209_600),
    ],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert Duration()(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-1h", "-1", "1y", "nan", "inf", "1e999", "1.2.3", "\u0661h", "h", "0", "0h"]
)
def test_no_lengths_of_time(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a length of time above 0, such as 90s, 15m, 24h or 30d$"):
        Duration()(text)


def test_a_length_of_time_may_be_nothing_where_that_makes_sense() -> None:
    assert Duration(may_be_zero=True)("0") == 0
    with pytest.raises(click.BadParameter, match=r"^-1 is not a length of time, such as 90s"):
        Duration(may_be_zero=True)("-1")


def test_a_length_of_time_is_a_hundred_years_at_most() -> None:
    assert Duration()("36500d") == 36_500 * 86_400
    for text in ("36501d", "99999999999999999999999h", "1e300"):
        with pytest.raises(click.BadParameter, match=rf"^{text} is too long: 36500d, a hundred years, is the most$"):
            Duration()(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096B", 4096),
        ("64k", 64 * 1024),
        ("500M", 500 * 1024**2),
        ("500MiB", 500 * 1024**2),
        (" 1g ", 1024**3),
        ("2GB", 2 * 1024**3),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert Size()(text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "0G", "-1", "1.5G", "1T", "1 G 1", "\u0661"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a size above 0, such as 500M or 1G$"):
        Size()(text)
