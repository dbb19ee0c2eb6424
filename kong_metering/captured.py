"""Headers that access phases read, kept until the log phase of the same request takes them.

Contract: one `CapturedHeaders` for a process, used from the thread that runs phases. Entries go by Kong's own
id of a request, which no client can choose. A request whose log phase never comes, or comes after days, must not use up
memory: entries are kept in two generations, and the older one is let go of, which the log says, when the younger one
is full (`MAX_BYTES` for both) or `GENERATION_SECONDS` old. So an entry is kept for at least so many seconds, and for
twice as long at most within one process, as long as there is room. A log phase that finds none goes by the headers in
Kong's record.

The next process gets what it needs of requests under way from this one, where it ends in order (`pack`, `unpack`), and
from memory that outlives it, where it is killed (`mirror_to`, `recover`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from sys import getsizeof
from typing import TYPE_CHECKING

import msgspec

from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.plurals import counted, form

if TYPE_CHECKING:
    from kong_metering.capturememory import CaptureMemory, Headers
    from kong_metering.clock import Clock

MAX_BYTES = 32 * 1024 * 1024
GENERATION_SECONDS = 12 * 3600.0
# The id, the dictionary of headers, and their places; measured with tracemalloc.
_ENTRY_BYTES = 320


def _bytes_of(headers: Headers) -> int:
    size = _ENTRY_BYTES
    for value in headers.values():
        size += getsizeof(value[0] if isinstance(value, list) else value)
    return size


class CapturedHeaders:
    """What access phases read, by the id of the request.

    `are_identified`: whether Kong tells an access phase the id of its request; Kongs before 3.5 do not. None while
    nobody knows.
    """

    def __init__(self, clock: Clock, max_bytes: int = MAX_BYTES) -> None:
        self.are_identified: bool | None = None
        self._clock = clock
        self._most = max_bytes // 2
        self._young: dict[str, Headers] = {}
        self._old: dict[str, Headers] = {}
        self._young_bytes = 0
        self._turned_at = clock.monotonic()
        self._memory: CaptureMemory | None = None

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def keep(self, request_id: object, headers: Headers) -> bool:
        """Keep the headers of a request; that it had none is something to keep as well: the access phase ran.

        False, and nothing is kept, when what Kong told is no id.
        """
        if not isinstance(request_id, str) or not request_id:
            self.are_identified = False
            return False
        self.are_identified = True
        if request_id in self._young or request_id in self._old:
            # Its slot, and its bytes, must not be lost sight of.
            self.take(request_id)
        self._young[request_id] = headers
        self._young_bytes += _bytes_of(headers)
        if self._memory is not None:
            self._memory.put(request_id, headers)
        if self._young_bytes > self._most:
            self._turn()
        return True

    def take(self, request_id: str) -> Headers | None:
        """Give what was kept of a request, and let go of it; None if nothing was."""
        if self._memory is not None:
            self._memory.forget(request_id)
        headers = self._young.pop(request_id, None)
        if headers is None:
            return self._old.pop(request_id, None)
        self._young_bytes -= _bytes_of(headers)
        return headers

    def sweep(self) -> None:
        """Let go of what is too old; to be called every few seconds."""
        if self._clock.monotonic() - self._turned_at >= GENERATION_SECONDS:
            self._turn()

    def pack(self) -> bytes:
        """Give all that is kept, for the process that goes on in the place of this one."""
        # The standard library's JSON holds bytes that are not UTF-8 as well.
        return json.dumps({**self._old, **self._young}).encode("ascii")

    def unpack(self, packed: bytes) -> None:
        """Keep what the process before this one had; anything in another form is ignored."""
        try:
            kept = msgspec.convert(json.loads(packed), dict[str, dict[str, str | list[str]]])
        except ValueError as error:
            LOGGER.warning("what the previous process knew of requests in progress cannot be read: %s", cause_of(error))
            return
        self.recover(kept.items())

    def mirror_to(self, memory: CaptureMemory) -> None:
        """Keep what comes from now on in this memory as well, which outlives the process."""
        self._memory = memory

    def recover(self, kept: Iterable[tuple[str, Headers]]) -> None:
        """Add the headers that an earlier process had captured, by the ids of their requests."""
        for request_id, headers in kept:
            if request_id not in self._young:
                self.keep(request_id, headers)

    def leave_nothing(self) -> None:
        """Leave the next process nothing in the memory that outlives this one, which ends in order."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _turn(self) -> None:
        if self._old:
            LOGGER.error(
                "the headers of %s were discarded; %s will be metered by the headers in Kong's record",
                counted(len(self._old), "unfinished request"),
                form(len(self._old), "that one", "those"),
                extra=trouble("captured"),
            )
            if self._memory is not None:
                for request_id in self._old:
                    self._memory.forget(request_id)
        self._old, self._young, self._young_bytes = self._young, {}, 0
        self._turned_at = self._clock.monotonic()
