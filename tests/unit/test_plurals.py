"""Numbers with what they count."""

from __future__ import annotations

import pytest

from kong_metering.plurals import counted, form


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 events"), (1, "1 event"), (2, "2 events"), (4_820, "4,820 events"), (-1, "-1 events")]
)
def test_only_one_is_told_in_the_singular(count: int, told: str) -> None:
    assert counted(count, "event") == told


def test_a_plural_that_is_not_made_by_an_s_is_given() -> None:
    assert counted(1, "dead letter was", "dead letters were") == "1 dead letter was"
    assert counted(1000, "dead letter was", "dead letters were") == "1,000 dead letters were"
    assert [form(count, "it", "them") for count in (0, 1, 2)] == ["them", "it", "them"]
    assert [form(seconds, "second") for seconds in (0.5, 1.0, 1.5)] == ["seconds", "second", "seconds"]
