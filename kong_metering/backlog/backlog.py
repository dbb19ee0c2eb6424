"""Where the events of a queue wait: what the queue needs of such a place (`spooled`, or `memory`).

Contract: any thread may call anything. Events come out in the order in which they went in. An event that was read
still waits until it is settled, whatever happens to it in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from kong_metering.backlog.stock import Stock

if TYPE_CHECKING:
    from kong_metering.config import Queue


class Backlog(Stock, Protocol):
    """The events of one queue that are not settled yet."""

    @property
    def keeps(self) -> bool:
        """Whether events outlive the process and every outage here, so that there is never a need to give them up."""
        ...

    @property
    def disk_state(self) -> str:
        """The state of the disk in a word (`works`, `hangs`, `refuses`), `none` where events wait in memory."""
        ...

    @property
    def hangs_for(self) -> float:
        """For how many seconds a write has hung, 0 when none does: what waits for it is as old as that."""
        ...

    @property
    def unread(self) -> int:
        """How many events can be read now."""
        ...

    @property
    def unread_bytes(self) -> int:
        """The bytes of what can be read now, as far as they are bounded."""
        ...

    def on_ready(self, callback: Callable[[], None]) -> None:
        """Have this called when there is more to read."""
        ...

    def reconfigure(self, settings: Queue) -> None:
        """Go by other parameters from now on."""
        ...

    def put(self, event: bytes) -> None:
        """Take an event in, from the thread that answers Kong."""
        ...

    def oldest_at(self) -> float | None:
        """Tell when the first of the unread came (monotonic); None when there is none."""
        ...

    @property
    def letters_pending(self) -> int:
        """How many events wait to become dead letters, because the disk does not take these."""
        ...

    @property
    def known_oldest_ms(self) -> int | None:
        """When the oldest event on disk was accepted (epoch), as far as that is known without a look there."""
        ...

    def try_again(self) -> None:
        """Try again what the disk refused."""
        ...

    def end(self, *, is_written: bool) -> None:
        """Let all events go that still wait, and account for them; `is_written` tells that the writer has ended."""
        ...
