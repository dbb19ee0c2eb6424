"""What the times in a spool are worth: whether, and how far, the wall clock was set since they were written.

    ROOT/clock    a line of JSON: the wall clock at one moment, the time since the machine started at the same moment,
                  which start that was, since when the clock has run evenly, the times that it was set, the spool's own
                  time at that moment, and the restarts of the machine

A clock is set when it moves by more than a minute against the time since the machine started, which nobody sets. Over a
restart of the machine nobody can tell a clock that is ahead from a machine that was off; such time is no age by which
anything is dropped.

What was sent without an answer is noted by the spool's own time, which is the same for all processes, and which nobody
sets: it begins with the wall clock, and runs as the machine does. Over a restart it goes on where the wall clock is,
but never back, and how long the machine was off is what the wall clock says; when that is set afterwards, it is known
better. While it is not known what was sent before a restart is neither sent again nor given up.

Contract: `look` is one thread's, all else may be asked by any. Nothing raises for the disk's sake: what cannot be
written is remembered by the process.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kong_metering.eventlog import files
from kong_metering.spool import locks

if TYPE_CHECKING:
    from kong_metering.clock import Clock

CLOCK = "clock"

# For so long a clock has to run evenly before anything is taken for old by it.
STEADY_SECONDS = 600.0
# By more than this it was set; NTP slews what is less.
_SET_MS = 60_000
_SAVE_SECONDS = 60.0
_ONE_MOMENT_SECONDS = 1.0
_MOST_KEPT = 32
# A clock that is further behind than this, after a restart, was slow.
_SLOW_MS = 2 * _SET_MS + int(2 * _SAVE_SECONDS * 1000)


@dataclass(frozen=True)
class Setting:
    """The clock showed up to `up_to_ms`, and was then set by `by_ms`."""

    up_to_ms: int
    by_ms: int


@dataclass(frozen=True)
class Restart:
    """The spool's time was `up_to_ms` at most when the machine went off, and went on `by_ms` later.

    `off_ms` is for how long it was off, as far as the wall clock can tell; below zero the clock was slow.
    """

    up_to_ms: int
    by_ms: int
    off_ms: int


class Window(NamedTuple):
    """Whether what was sent so many seconds ago may be sent again: the spool's time now, and what is too old for it.

    Sent before `over_ms`: too old. Between that and `perhaps_over_ms`: nobody can tell yet.
    """

    now_ms: int
    over_ms: int
    perhaps_over_ms: int


@dataclass(frozen=True)
class Reading:
    """Both clocks at one moment, the time since the machine started (`since_boot`, seconds) and the wall's."""

    boot: str
    since_boot: float
    wall_ms: int


@dataclass(frozen=True)
class Record:
    """What is known of the clocks: a reading, since when the wall's has run evenly, and how it was set, in order.

    `time_ms` is the spool's own time; `restarts` are those of the machine, in order.
    """

    at: Reading
    steady_since: float
    time_ms: int
    settings: tuple[Setting, ...] = ()
    restarts: tuple[Restart, ...] = ()

    @classmethod
    def beginning(cls, now: Reading) -> Record:
        """Return what is known where nothing was written."""
        return cls(now, now.since_boot, now.wall_ms)

    def seen_at(self, now: Reading) -> Record:
        """Return what is known after another reading."""
        is_same = now.boot == self.at.boot and now.since_boot >= self.at.since_boot
        # Over a restart: up to then times may have been written after this was.
        passed = now.since_boot - self.at.since_boot if is_same else 2 * _SAVE_SECONDS
        expected_ms = self.at.wall_ms + int(passed * 1000)
        by_ms = now.wall_ms - expected_ms
        was_set = abs(by_ms) > _SET_MS
        setting = (Setting(expected_ms, by_ms),) if was_set else ()
        steady_since = self.steady_since if is_same and not was_set else now.since_boot
        time_ms, restarts = self.time_ms + int(passed * 1000), self.restarts
        if not is_same:
            restart = Restart(time_ms, max(1, now.wall_ms - time_ms), by_ms)
            time_ms, restarts = time_ms + restart.by_ms, (*restarts, restart)
        elif was_set and restarts:
            restarts = (*restarts[:-1], replace(restarts[-1], off_ms=restarts[-1].off_ms + by_ms))
        settings = (*self.settings, *setting)[-_MOST_KEPT:]
        return Record(now, steady_since, time_ms, settings, restarts[-_MOST_KEPT:])

    @property
    def is_steady(self) -> bool:
        """Whether the clock has run evenly for long enough to tell an age by it."""
        return self.at.since_boot - self.steady_since >= STEADY_SECONDS

    def older_than_ms(self, seconds: float) -> int:
        """Return the time up to which all that was written before is older than this, however the clock was set."""
        limit_ms = self.at.wall_ms - int(seconds * 1000)
        ahead = sorted((each for each in self.settings if each.by_ms > 0), key=lambda each: each.up_to_ms)
        by_ms = sum(each.by_ms for each in ahead)
        for each in ahead:
            if each.up_to_ms + by_ms >= limit_ms:
                return limit_ms - by_ms
            by_ms -= each.by_ms
        return limit_ms

    def window(self, seconds: float) -> Window:
        """Return what was sent too long ago by the spool's time, so many seconds, to be sent again."""
        likely_ms = self._sent_before(seconds, lambda restart: max(0, restart.off_ms))
        if self.is_steady:
            return Window(self.time_ms, likely_ms, likely_ms)
        over_ms = self._sent_before(seconds, lambda _: 0)
        is_slow = bool(self.restarts) and self.restarts[-1].off_ms < -_SLOW_MS
        return Window(self.time_ms, over_ms, max(likely_ms, self.restarts[-1].up_to_ms + 1) if is_slow else likely_ms)

    def _sent_before(self, seconds: float, off_ms: Callable[[Restart], int]) -> int:
        """Return the time before which all was sent longer ago than this, if the machine was off for so long."""
        limit_ms = self.time_ms - int(seconds * 1000)
        for restart in reversed(self.restarts):
            if limit_ms > restart.up_to_ms + restart.by_ms:
                break
            limit_ms = min(limit_ms - restart.by_ms + off_ms(restart), restart.up_to_ms + 1)
        return limit_ms


class SpoolTimes:
    """The wall clock of one spool's machine."""

    def __init__(self, root: Path, clock: Clock) -> None:
        """Take the spool's root, and the machine's clocks."""
        self._root = root
        self._clock = clock
        self._boot = clock.boot_id()
        self._known: Record | None = None

    def look(self) -> Record:
        """Read the clocks, and write down what comes of it, when the clock was set or a minute has passed."""
        written = _read(self._root / CLOCK)
        record = self._seen(self._newer(written))
        is_due = (
            written is None
            or (written.settings, written.restarts) != (record.settings, record.restarts)
            or written.at.boot != record.at.boot
            or record.at.since_boot - written.at.since_boot >= _SAVE_SECONDS
        )
        self._known = record
        if is_due:
            with contextlib.suppress(OSError), locks.root_lock(self._root):
                # Another process may have written meanwhile.
                self._known = record = self._seen(self._newer(_read(self._root / CLOCK)))
                files.write_file(self._root / CLOCK, json.dumps(asdict(record)).encode("ascii"))
        return record

    def now(self) -> Record:
        """Read the clocks; nothing is written, and what others have written is read the first time only."""
        record = self._seen(self._known or _read(self._root / CLOCK))
        if self._known is None:
            # The spool's time begins with the wall clock once: it may be set before anything is written.
            self._known = record
        return record

    def _seen(self, before: Record | None) -> Record:
        reading = self._read_clocks()
        return before.seen_at(reading) if before else Record.beginning(reading)

    def _read_clocks(self) -> Reading:
        """Read both clocks at one moment: a process that is stopped between them would take its pause for a setting."""
        while True:
            since_boot = self._clock.since_boot()
            wall_ms = int(self._clock.wall() * 1000)
            if self._clock.since_boot() - since_boot < _ONE_MOMENT_SECONDS:
                return Reading(self._boot, since_boot, wall_ms)

    def _newer(self, written: Record | None) -> Record | None:
        """Return what was written, or what this process knows if that is newer."""
        known = self._known
        if known is None or written is None:
            return written or known
        # Each look begins with what was written, so it is older only where nobody has written since.
        is_older = written.at.boot == known.at.boot and written.at.since_boot < known.at.since_boot
        return known if is_older else written


def _read(path: Path) -> Record | None:
    """Read what was written; None where there is nothing that can be used."""
    try:
        return _record(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(found: Mapping[str, Any]) -> Record:
    at = Reading(str(found["at"]["boot"]), float(found["at"]["since_boot"]), int(found["at"]["wall_ms"]))
    settings = tuple(Setting(int(each["up_to_ms"]), int(each["by_ms"])) for each in found["settings"])
    restarts = tuple(
        Restart(int(each["up_to_ms"]), int(each["by_ms"]), int(each["off_ms"])) for each in found["restarts"]
    )
    return Record(at, float(found["steady_since"]), int(found["time_ms"]), settings, restarts)
