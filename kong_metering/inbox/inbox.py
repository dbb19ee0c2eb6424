"""Where a log phase puts an event before it returns to Kong; one thread takes events from here to the logs.

Contract: any thread may call `append`, `open_queue` and `log_opened`; they never wait for a disk, a network or a thread
that does, and never raise for what those do. One thread, the consumer, drains and advances; it may sleep when
`may_sleep` says so: the thread that appends the next event calls `wake` then, once or a few times. That may be before
the consumer sleeps, so `wake` has to be remembered; and it must not wait.

An event whose `append` returned True is given by `drain` in order, until it is advanced past. While it is in the ring
it outlives the death of the process by SIGKILL, not that of the machine: see `pouring.py`; one that the supervisor
keeps (`lent.py`) does not outlive that. An event is in this process's memory alone where there is neither, and when the
ring was full: then up to `OVERFLOW_BYTES` of events wait behind it. Beyond that an event is refused, and the caller
counts it as dropped.

A number is one identity's for as long as the process lives. `close` comes after the last `append` and `advance`: if the
consumer hangs in a write that may still complete, leave the inbox open, and the end of the process hands it on. A fork
must not outlive the process (see `place.py`).

One more thread may `move` the ring to another place, though the consumer hangs: what is in it comes along, and nobody
who appends or drains notices.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from kong_metering.errors import InboxError
from kong_metering.inbox.place import RING_BYTES
from kong_metering.inbox.queues import ListedQueue, encode_queue
from kong_metering.inbox.ring import HEADER_BYTES, Drained, Ring
from kong_metering.log import LOGGER

if TYPE_CHECKING:
    from kong_metering.inbox.place import Place, RingFile, Rings
    from kong_metering.spool.identity import QueueIdentity

OVERFLOW_BYTES = 64 * 1024 * 1024


class Inbox:
    """The inbox of this process."""

    def __init__(
        self,
        ring: Ring,
        file: RingFile | None,
        wake: Callable[[], None],
        overflow_bytes: int,
        *,
        survives_supervisor: bool,
    ) -> None:
        self.survives_supervisor = survives_supervisor
        self._ring = ring
        self._file = file
        self._wake = wake
        self._is_consumer_asleep = False
        self._overflow = _Overflow(overflow_bytes)
        self._queues: dict[int, ListedQueue] = {}
        # Who moves it may come late to the end.
        self._whereabouts = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(
        cls,
        rings: Rings,
        wake: Callable[[], None],
        *,
        survives_supervisor: bool = True,
        ring_bytes: int = RING_BYTES,
        overflow_bytes: int = OVERFLOW_BYTES,
    ) -> Inbox:
        """Make the inbox of this process, with its ring there. Raises `InboxError`.

        `survives_supervisor`: whether what is in it outlives this process though the supervisor dies with it.
        """
        file, ring = rings.create(ring_bytes)
        return cls(ring, file, wake, overflow_bytes, survives_supervisor=survives_supervisor)

    @classmethod
    def in_memory(
        cls, wake: Callable[[], None], *, ring_bytes: int = RING_BYTES, overflow_bytes: int = OVERFLOW_BYTES
    ) -> Inbox:
        """Make an inbox that ends with the process."""
        memory = mmap.mmap(-1, HEADER_BYTES + ring_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return cls(Ring(memory), None, wake, overflow_bytes, survives_supervisor=False)

    @property
    def name(self) -> str | None:
        """PID-RANDOM, which the ring's file is named after; None when it ends with the process."""
        return self._file.stem if self._file else None

    @property
    def path(self) -> Path | None:
        """Where the ring's file is, in words for people; None when it ends with the process."""
        return self._file.path if self._file else None

    @property
    def waiting(self) -> int:
        """How many events are in it: appended and not advanced past."""
        return self._ring.waiting + self._overflow.waiting

    def lost_with_process(self, number: int, events: int) -> int:
        """Tell how many of a queue's events in it, which are so many, end with this process, if nobody takes them out.

        To be called when nothing is appended any more. The supervisor's memory mostly ends as well, so it counts.
        """
        return min(events, self._overflow.count_of(number)) if self.survives_supervisor else events

    # -- any thread ---------------------------------------------------------------------------------------------------

    def open_queue(self, number: int, identity: QueueIdentity) -> None:
        """Tell whose events have this number, before the first is appended; again, it does nothing."""
        if number not in self._queues:
            self._list(number, ListedQueue(identity, None))

    def log_opened(self, number: int, directory: Path) -> None:
        """Tell where the log of a queue is, before the first of its events is written there."""
        queue = ListedQueue(self._queues[number].identity, f"{directory.parent.name}/{directory.name}")
        if queue != self._queues[number]:
            self._list(number, queue)

    def append(self, number: int, event: bytes) -> bool:
        """Take an event of a queue; False when it has no room: the ring and the memory behind it are full."""
        # While anything waits behind the ring, this waits behind that.
        overflow = self._overflow
        is_taken = overflow.appended == overflow.taken and self._ring.append(number, event)
        if not is_taken:
            is_taken = overflow.append(number, event)
        if self._is_consumer_asleep:
            self._is_consumer_asleep = False
            self._wake()
        return is_taken

    # -- the consumer's thread ----------------------------------------------------------------------------------------

    def may_sleep(self) -> bool:
        """Tell whether nothing waits: the next `append` calls `wake` then; False when there is something to drain."""
        # First this, then the look: whoever appends does it the other way round, and nothing is missed.
        self._is_consumer_asleep = True
        if self.waiting:
            self._is_consumer_asleep = False
            return False
        return True

    def drain(self, limit: int) -> Drained:
        """Give the oldest events, `limit` at most; they stay, and are given again, until `advance`."""
        # Counted before the ring is read: those were appended after all that is in the ring by then.
        behind = self._overflow.waiting
        drained = self._ring.drain(limit)
        if not behind or len(drained.events) == limit:
            return drained
        others = self._overflow.oldest(min(behind, limit - len(drained.events)))
        return Drained(drained.events + others, drained.position, len(others))

    def advance(self, drained: Drained) -> None:
        """Take out what was just drained, all of which is in logs, or in the care of somebody else."""
        self._ring.advance(drained)
        self._overflow.take_out(drained.overflowed)

    def close(self) -> None:
        """Let go of it: the file is removed if nothing waits, and left for another process to pour if something does.

        `append` refuses everything from now on. Never raises for the disk's sake.
        """
        self._overflow.close()
        with self._whereabouts:
            self._is_closed = True
            is_done = self._ring.waiting == 0
            self._ring.close()
            file, self._file = self._file, None
        if file is None:
            return
        try:
            if is_done:
                file.remove()
        except InboxError as error:
            LOGGER.warning("an empty file is left behind: %s", error)
        finally:
            file.release()

    # -- whoever looks after where it is ------------------------------------------------------------------------------

    def is_held_by(self, place: Place) -> bool:
        """Tell whether the next process finds the ring there. Raises `InboxError` while the spool is not there."""
        return self._file is not None and place.holds(self._file)

    def move(self, rings: Rings, *, survives_supervisor: bool) -> None:
        """Go on, with all that is here, in a ring that is made there, and remove the one before.

        If the process is killed meanwhile, one of the two has all. Raises `InboxError`, and has done nothing then.
        """
        file, ring = rings.create(self._ring.capacity)
        try:
            listed = self._list_all(file, {})
        except OSError as error:
            _undo(file, ring)
            raise InboxError(f"{file.path} cannot be used: {error.strerror or error}") from error
        with self._whereabouts:
            if self._is_closed:
                _undo(file, ring)
                raise InboxError("the process ends")
            self._ring.move_to(ring)
            self.survives_supervisor = survives_supervisor
            if self._file is None:
                self._file = file
            else:
                self._file.become(file)
            # Others may have listed in the old one meanwhile.
            with _told():
                self._list_all(self._file, listed)

    def _list(self, number: int, queue: ListedQueue) -> None:
        self._queues[number] = queue
        if self._file is not None:
            with _told():
                self._file.add_line(encode_queue(number, queue))

    def _list_all(self, file: RingFile, listed: dict[int, ListedQueue]) -> dict[int, ListedQueue]:
        """Add those to a file's list that are not `listed` there so, also if they come meanwhile; give what is then."""
        while listed != (queues := self._queues.copy()):
            for number, queue in queues.items():
                if listed.get(number) != queue:
                    file.add_line(encode_queue(number, queue))
            listed = queues
        return listed


def _undo(file: RingFile, ring: Ring) -> None:
    ring.close()
    with contextlib.suppress(InboxError):
        file.remove()
    file.release()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        LOGGER.warning("if this process is killed now, the owner of some events will not be known: %s", error)


class _Overflow:
    """Events behind a full ring. Those who append have a lock of their own; the consumer takes none."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._appending = threading.Lock()
        self._events: deque[tuple[int, bytes]] = deque()
        # Those that the consumer has seen, for `deque`s do not like to be looked through while others append.
        self._seen: deque[tuple[int, bytes]] = deque()
        # How many ever came and went, and their bytes: each is written by one side alone.
        self.appended = self._appended_bytes = 0
        self.taken = self._taken_bytes = 0

    @property
    def waiting(self) -> int:
        """How many there are."""
        return self.appended - self.taken

    def count_of(self, number: int) -> int:
        """Tell how many events of a queue there are."""
        return sum(each == number for each, _ in (*self._seen.copy(), *self._events.copy()))

    def append(self, number: int, event: bytes) -> bool:
        """Put an event behind the others; False when it has no room."""
        with self._appending:
            if self._appended_bytes - self._taken_bytes + len(event) > self._max_bytes:
                return False
            self._events.append((number, event))
            self._appended_bytes += len(event)
            self.appended += 1
        return True

    def oldest(self, count: int) -> list[tuple[int, bytes]]:
        """Give the oldest ones, as many of them."""
        while len(self._seen) < count:
            self._seen.append(self._events.popleft())
        return list(islice(self._seen, count))

    def take_out(self, count: int) -> None:
        """Take the oldest ones out, which `oldest` gave."""
        for _ in range(count):
            self._taken_bytes += len(self._seen.popleft()[1])
        self.taken += count

    def close(self) -> None:
        """Refuse everything from now on."""
        with self._appending:
            self._max_bytes = -1
