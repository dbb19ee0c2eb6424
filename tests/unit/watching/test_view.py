"""Figures of several servers added up, over their deaths. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from kong_metering.watching.continuity import Continuity
from kong_metering.watching.view import View
from kong_metering.watching.words import standing


def told(pid: int = 1, *, disk: str = "works", last_request_at: float | None = None) -> dict[str, Any]:
    queue = {"entity": "e", "name": "n", "endpoint": "u", "condition": "works", "disk": disk}
    plugin = {"name": "n", "requests": {"metered": 1}, "last_request_at": last_request_at}
    return {"pid": pid, "queue_details": [queue], "plugins": {"e": plugin}}


@pytest.mark.parametrize(
    ("disks", "worst", "is_well"),
    [
        (("works", "works"), "works", True),
        (("works", "refuses"), "refuses", False),
        (("refuses", "works"), "refuses", False),
        (("hangs", "works"), "hangs", False),
        (("none", "none"), "none", True),
        (("a word of another version", "works"), "works", True),
    ],
)
def test_a_disk_is_as_bad_as_the_worst_that_a_server_tells(disks: tuple[str, str], worst: str, is_well: bool) -> None:  # noqa: FBT001 - of a table
    (queue,) = View.of(told(pid, disk=disk) for pid, disk in enumerate(disks, 1)).queues.values()
    assert (queue.disk, standing(queue).is_well) == (worst, is_well)


def test_the_last_request_is_that_of_all_servers_also_of_those_that_are_gone() -> None:
    continuity = Continuity(2)
    continuity.look([told(1, last_request_at=50.0), told(2, last_request_at=40.0)])
    assert continuity.view().plugins["e"].last_request_at == 50.0
    continuity.look([told(3), told(2, last_request_at=45.0)])
    assert continuity.view().plugins["e"].last_request_at == 50.0
    continuity.look([told(3), told(2, last_request_at=60.0)])
    assert continuity.view().plugins["e"].last_request_at == 60.0
