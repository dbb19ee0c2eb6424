"""What holds of the events of a request, whatever it was."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kong_metering.account import QueueAccount
from kong_metering.backlog.memory import MemoryBacklog
from kong_metering.config import Queue
from kong_metering.stats import Stats
from kong_metering.trial.batching import MAX_EVENT_BYTES
from tests.support.clock import FakeClock
from tests.support.openmeter import valid_event

if TYPE_CHECKING:
    from tests.fuzz.cases import Case


def check_events(events: Sequence[bytes], config: Case) -> list[dict[str, Any]]:
    """Check all events of one request: valid for both APIs, typed, of one subject, told apart, deliverable."""
    names = frozenset(item["event_property_name"] for item in config.get("attributes", ()))
    found = [valid_event(event, attributes=names) for event in events]
    assert all(event["subject"].strip() for event in found)
    assert all(event["subject"] == event["subject"].strip(string.whitespace) for event in found)
    assert len({event["subject"] for event in found}) <= 1
    assert len({(event["source"], event["id"]) for event in found}) == len(found)
    for event in events:
        if len(event) > MAX_EVENT_BYTES:
            check_refused(event)
    return found


def check_refused(event: bytes) -> None:
    """Check that a queue counts an event that Kafka would not take, and keeps it out."""
    clock, stats = FakeClock(), Stats()
    account = QueueAccount("fuzz", stats)
    account.accept()
    backlog = MemoryBacklog(Queue(), clock, account)
    backlog.put(event)
    assert (account.waiting, backlog.unread, stats.snapshot().dropped) == (0, 0, {"event_too_large": 1})
