"""The thread that takes events from the inbox to the logs, by itself."""

from __future__ import annotations

from collections.abc import Sequence

from kong_metering.inbox.inbox import Inbox
from kong_metering.measures import Histogram
from kong_metering.upkeep.writer import Bell, Writer
from tests.support.clock import FakeClock


class Page:
    """A log in memory."""

    def __init__(self) -> None:
        self.events: list[bytes] = []

    def write(self, events: Sequence[bytes]) -> None:
        self.events += events

    def rest(self) -> None:
        pass


def test_a_log_is_let_go_of_once_what_was_in_the_inbox_is_written() -> None:
    bell, clock, page, other = Bell(), FakeClock(), Page(), Page()
    inbox = Inbox.in_memory(bell.ring)
    writer = Writer(inbox, bell, clock, Histogram())
    writer.register(1, page)
    writer.register(2, other)
    assert inbox.append(1, b"late")
    writer.forget(1)
    assert inbox.append(2, b"next")
    writer.start()
    assert writer.end(30)
    assert (page.events, other.events) == ([b"late"], [b"next"])
