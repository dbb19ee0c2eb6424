"""Where the inbox of this process has its ring: in shared memory, else in the supervisor's memory, else in our own.

Contract: `open` comes first, and waits for the disk for a few seconds at most. From `start` on a thread looks, once a
second, whether the next process would find the ring, which it does not when somebody has removed its file or the
spool's directory that its place is named after; the inbox moves then, with all that is in it, to the best place that
there is. Where that is not in shared memory, though it should be, that is tried again once a minute. The thread waits
for nobody; of the disk it only asks which directory the spool is, so that it works while a write hangs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kong_metering.errors import InboxError
from kong_metering.inbox.inbox import Inbox
from kong_metering.log import LOGGER
from kong_metering.upkeep.guard import guarded, within

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.inbox.lent import LentRings
    from kong_metering.inbox.place import Place, Rings

# No request is served until the inbox is open: a disk that takes longer is taken to hang.
_OPENING_SECONDS = 5.0
_ROUND_SECONDS = 1.0
_AGAIN_SECONDS = 60.0
_REMOVED = (
    "%s was removed while it was in use (systemd does that when the last session of the user ends, unless that is a "
    "system user or logind.conf says RemoveIPC=no; or something that clears up there did)"
)
_REPLACED = "the spool is another directory now"


class Lodging:
    """The place of one inbox."""

    def __init__(
        self, place: Place | None, lent: LentRings | None, make_spool: Callable[[], None], clock: Clock
    ) -> None:
        """Take where it should be, None: nowhere, what was lent, and what makes the directory that `place` is for."""
        self._place = place
        self._lent = lent
        self._make_spool = make_spool
        self._clock = clock
        # Where the ring is; None: in our own memory, or where nobody finds it.
        self._at: Rings | None = None
        self._again_at = clock.monotonic() + _AGAIN_SECONDS
        self._is_ending = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, wake: Callable[[], None]) -> Inbox:
        """Open the inbox in the best place that there is; where that is not the one that it should be, it is said."""
        shared, why_not = self._opened_in_shared_memory(wake)
        if shared is not None:
            self._at = self._place
            return shared
        try:
            kept = None if self._lent is None else Inbox.open(self._lent, wake, survives_supervisor=False)
        except InboxError as error:
            kept, why_not = None, why_not or str(error)
        self._at = self._lent if kept else None
        if why_not:
            LOGGER.warning("%s: %s", _at_risk(is_kept=kept is not None), why_not)
        return kept or Inbox.in_memory(wake)

    def start(self, inbox: Inbox) -> None:
        """Begin to look after the inbox; raises `RuntimeError` when no thread can be started."""
        if self._place is None:
            return
        self._thread = threading.Thread(
            target=self._run, args=(inbox, self._place), name="metering lodging", daemon=True
        )
        self._thread.start()

    def end(self, timeout: float) -> None:
        """Leave the inbox where it is from now on; waits `timeout` seconds at most."""
        self._is_ending.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _opened_in_shared_memory(self, wake: Callable[[], None]) -> tuple[Inbox | None, str]:
        """Open the inbox there, if it is to be there; tell why that cannot be."""
        if self._place is None:
            return None, ""
        try:
            inbox = self._opened_in_time(self._place, wake)
        except InboxError as error:
            return None, f"{error} (choose another place with --inbox-dir)"
        return inbox, "" if inbox else "the disk hangs"

    def _opened_in_time(self, place: Place, wake: Callable[[], None]) -> Inbox | None:
        """Open the inbox in shared memory, which belongs to the spool's directory; None when the disk hangs.

        Raises `InboxError`.
        """
        opened: list[Inbox | InboxError] = []
        is_late = threading.Event()

        def open_it() -> None:
            guarded(self._make_spool)
            try:
                inbox = Inbox.open(place, wake)
                opened.append(inbox)
                if is_late.is_set():
                    inbox.close()
            except InboxError as error:
                opened.append(error)

        if not within(_OPENING_SECONDS, open_it, "metering opening") or not opened:
            is_late.set()
            return None
        if isinstance(opened[0], InboxError):
            raise opened[0]
        return opened[0]

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _run(self, inbox: Inbox, place: Place) -> None:
        while not self._is_ending.wait(_ROUND_SECONDS):
            guarded(lambda: self._look(inbox, place))

    def _look(self, inbox: Inbox, place: Place) -> None:
        """Have the inbox move if it is not where it should be."""
        now, was_there = self._clock.monotonic(), self._at is place
        if not was_there and now < self._again_at:
            return
        # While the spool's directory is not there, which the janitor makes anew, nobody can tell where its place is.
        with contextlib.suppress(InboxError):
            # To ask may have taken long.
            if inbox.is_held_by(place) or self._is_ending.is_set():
                return
            self._again_at = now + _AGAIN_SECONDS
            if was_there:
                is_removed = inbox.path is not None and inbox.path.parent == place.path
                self._leave(inbox, place, _REMOVED % inbox.path if is_removed else _REPLACED)
            else:
                self._move_to(inbox, place)
                LOGGER.info("shared memory can be had now: what is not on disk yet is in %s", inbox.path)

    def _leave(self, inbox: Inbox, place: Place, why: str) -> None:
        """Have the inbox move from where nobody finds its ring any more."""
        self._at = None
        try:
            self._move_to(inbox, place)
        except InboxError as error:
            if self._lent is not None:
                with contextlib.suppress(InboxError):
                    self._move_to(inbox, self._lent)
            inbox.survives_supervisor = False
            LOGGER.warning("%s: %s: %s", why, _at_risk(is_kept=self._at is not None), error)
        else:
            LOGGER.warning("%s: what is not on disk yet is in %s now, and none of it is lost", why, inbox.path)

    def _move_to(self, inbox: Inbox, rings: Rings) -> None:
        inbox.move(rings, survives_supervisor=rings is self._place)
        self._at = rings


def _at_risk(*, is_kept: bool) -> str:
    if is_kept:
        return (
            "if a plugin server is killed, its last events are in its supervisor's memory alone, and lost if both are"
        )
    return "if a plugin server is killed, its last 10 ms of events or so are lost"
