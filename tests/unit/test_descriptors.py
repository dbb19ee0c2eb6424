"""What keeps descriptors open keeps to a share of them where there are few."""

from __future__ import annotations

import resource

import pytest

from kong_metering.descriptors import most_of_descriptors


@pytest.mark.parametrize(
    ("limit", "most"), [(1024, 128), (65_536, 128), (64, 8), (4, 1), (resource.RLIM_INFINITY, 128)]
)
def test_it_is_a_share_where_that_is_less(monkeypatch: pytest.MonkeyPatch, limit: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert most_of_descriptors(128, 8) == most
