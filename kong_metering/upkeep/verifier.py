"""Reads back from OpenMeter what this process's queues delivered, each some minutes, and counts what it found.

Contract: all of it happens on the thread `metering verifier`, which nobody waits for; it asks twenty times a second at
most. Of several processes over one spool one verifies a queue at a time, whichever has the queue open, with that
queue's own endpoint and token. A segment is judged once, when it has been settled for `SETTLE_SECONDS`; one that could
not be asked for is tried again in the next round. Missing events are sent again only with `verify_resend`, and only if
at least as many others of the same look are stored: else OpenMeter is behind, or down, and nothing is known.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kong_metering.errors import DISK_ERRORS, StartupError
from kong_metering.ingest.client import IngestClient
from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.plurals import counted, form
from kong_metering.proof.api import EventsApi
from kong_metering.proof.asking import Asker
from kong_metering.proof.resending import resend
from kong_metering.proof.verifying import Verification
from kong_metering.proof.web import CannotAsk, Pace, Web
from kong_metering.spool.delivered import Delivered, KeptSegment, mark_checked, verifying
from kong_metering.spool.settled import still_here
from kong_metering.upkeep.guard import guarded

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.ingest.client import Endpoint
    from kong_metering.proof.verifying import Findings
    from kong_metering.spool.delivered import KeptQueue
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.options import SpoolOptions

SETTLE_SECONDS = 60.0
_BETWEEN_SECONDS = 0.05
# Before it asks, before it calls an event missing, and before it looks for one that was sent again.
_WAITS = 3
# Fewer events than end a look, however small they are.
_SEGMENTS_AT_ONCE = 4


@dataclass(frozen=True)
class DeliveredQueue:
    """A queue that is open here: whose it is, and where it sends with which token.

    `begin_segment` has what is settled be kept, though its segment is not full; `count` takes what was found.
    """

    identity: QueueIdentity
    endpoint: Endpoint
    begin_segment: Callable[[], None]
    count: Callable[[str, int], None]


class _Ending(Exception):  # noqa: N818 - the process ends
    """There is no time for the rest."""


class Verifier:
    """The verifier of one process."""

    def __init__(
        self,
        options: SpoolOptions,
        queues: Callable[[], Sequence[DeliveredQueue]],
        clock: Clock,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        """Take what gives the queues that are open."""
        self._options = options
        self._queues = queues
        self._clock = clock
        self._settle_seconds = settle_seconds
        self._delivered = Delivered(options.directory, self._wall_ms)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metering verifier", daemon=True)

    def start(self) -> None:
        """Begin, if that is wanted; raises `StartupError` when no thread can be started."""
        if not self._options.verify_every:
            return
        if not self._options.keep_delivered:
            LOGGER.error("--verify-every has nothing to read back: --keep-delivered is 0")
            return
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StartupError(f"no thread can be started to read back what was delivered: {error}") from error

    def end(self, timeout: float) -> None:
        """End, and wait for it, `timeout` seconds at most."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._ending.wait(self._options.verify_every):
            began = self._clock.monotonic()
            guarded(self.look)
            passed = self._clock.monotonic() - began
            if passed - _WAITS * self._settle_seconds > self._options.verify_every:
                LOGGER.warning(
                    "reading back takes longer than --verify-every: more is delivered than can be asked for",
                    extra=trouble("verify late"),
                )

    def look(self) -> None:
        """Read back what was delivered and not judged yet."""
        queues = self._queues()
        for queue in queues:
            guarded(queue.begin_segment)
        try:
            self._pause(self._settle_seconds)
            kept = {found.identity.key: found for found in self._delivered.queues()}
            for queue in queues:
                if queue.identity.key in kept:
                    self._verify(queue, kept[queue.identity.key])
        except _Ending:
            return

    def _verify(self, queue: DeliveredQueue, kept: KeptQueue) -> None:
        api = EventsApi.of(queue.endpoint.url)
        if api is None:
            _say(
                queue,
                "api",
                "its endpoint is none of OpenMeter's URLs for events, so what it delivered cannot be read back",
            )
            return
        try:
            with (
                verifying(kept.directory) as is_ours,
                closing(Web(queue.endpoint, self._clock, Pace(self._pause, _BETWEEN_SECONDS))) as web,
            ):
                if is_ours:
                    self._verify_all(queue, kept, Asker(api, web))
        except CannotAsk as error:
            queue.count("unknown", 1)
            _say(queue, "asking", f"what it delivered cannot be read back, for now: {error}")
        except DISK_ERRORS as error:
            _say(queue, "disk", f"what it delivered cannot be read from disk, for now: {cause_of(error)}")

    def _verify_all(self, queue: DeliveredQueue, kept: KeptQueue, asker: Asker) -> None:
        settled_ms = self._wall_ms() - int(self._settle_seconds * 1000)
        due = iter([one for one in kept.segments() if not one.is_checked and one.kept_ms <= settled_ms])
        while some := list(itertools.islice(due, _SEGMENTS_AT_ONCE)):
            here = partial(still_here, self._options.directory, is_meant=lambda other: other.key == queue.identity.key)
            unread: list[KeptSegment] = []
            with Verification(asker, here, self._pause, settle_seconds=self._settle_seconds) as verification:
                verification.run(_events_of(some, unread))
                resent = self._resent(queue, verification)
                self._count(queue, verification.findings, resent)
            for segment in some:
                if segment not in unread:
                    mark_checked(segment)
            if unread:
                queue.count("unknown", len(unread))
                _say(queue, "disk", f"what it delivered cannot be read from disk, for now: {unread[0].path}")

    def _resent(self, queue: DeliveredQueue, verification: Verification) -> int:
        """Send again what is missing, if that is wanted, and tell how many were sent."""
        findings = verification.findings
        if not (self._options.verify_resend and 0 < findings.counts["missing"] <= findings.stored):
            return 0
        with closing(IngestClient(queue.endpoint, self._clock)) as client:
            sent = resend(verification.missing.events(), client.send, self._pause).sent
        if sent:
            verification.recheck(verification.missing.events())
        return sent

    def _count(self, queue: DeliveredQueue, findings: Findings, resent: int) -> None:
        if missing := findings.counts["missing"]:
            what = counted(missing, "event that its endpoint took is", "events that its endpoint took are")
            which = findings.missing_ids[0] if missing == 1 else f"{findings.missing_ids[0]} for one"
            them = form(missing, "it", "them")
            _say(
                queue,
                "missing",
                f"{what} not stored there, {which}; `kong-metering verify` shows {them}, and sends {them} again with "
                "--resend",
            )
        if resent:
            again = counted(resent, "event that was missing was", "events that were missing were")
            LOGGER.warning("queue %s: %s sent again", queue.identity.name, again)
        if uncounted := findings.counts["unassigned"] + findings.counts["invalid"]:
            what = counted(uncounted, "event is", "events are")
            _say(queue, "uncounted", f"{what} stored and will not be billed; `kong-metering verify` shows why")
        for result, events in {**findings.counts, "resent": resent}.items():
            if events:
                queue.count(result, events)

    def _pause(self, seconds: float) -> None:
        if self._ending.wait(seconds):
            raise _Ending

    def _wall_ms(self) -> int:
        return int(self._clock.wall() * 1000)


def _events_of(segments: Sequence[KeptSegment], unread: list[KeptSegment]) -> Iterator[bytes]:
    """Go through what was delivered of these segments; those that cannot be read are added to `unread`."""
    for segment in segments:
        try:
            undelivered = segment.undelivered()
            yield from (event.payload for event in segment.events() if event not in undelivered)
        except FileNotFoundError:
            continue  # its time was over
        except DISK_ERRORS:
            unread.append(segment)


def _say(queue: DeliveredQueue, kind: str, message: str) -> None:
    name = queue.identity.name
    LOGGER.error("queue %s: %s", name, message, extra=trouble(f"verify {kind}:{name}"))
