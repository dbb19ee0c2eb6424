"""What the times in a spool are worth: whether, and how far, the wall clock was set since they were written.

    ROOT/clock    a line of JSON: the wall clock at one moment, the time since the machine started at the same moment,
                  which start that was, since when the clock has run evenly, and the times that it was set

A clock is set when it moves by more than a minute against the time since the machine started, which nobody sets. Over a
restart of the machine nobody can tell a clock that is ahead from a machine that was off; such time is no age.

Contract: `look` is one thread's, all else may be asked by any. Nothing raises for the disk's sake: what cannot be
written is remembered by the process.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_MAX_SETTINGS = 32
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Setting:
    """The clock showed up to `up_to_ms`, and was then set by `by_ms`; `is_sure`: within one run of the machine."""

    up_to_ms: int
    by_ms: int
    is_sure: bool


@dataclass(frozen=True)
class Reading:
    """Both clocks at one moment, the time since the machine started (`since_boot`, seconds) and the wall's."""

    boot: str
    since_boot: float
    wall_ms: int


@dataclass(frozen=True)
class Record:
    """What is known of the wall clock: a reading, since when it has run evenly, and how it was set, in order."""

    at: Reading
    steady_since: float
    settings: tuple[Setting, ...] = ()

    def seen_at(self, now: Reading) -> Record:
        """Return what is known after another reading."""
        is_same = now.boot == self.at.boot
        # Over a restart: up to then times may have been written after this was.
        passed = now.since_boot - self.at.since_boot if is_same else 2 * _SAVE_SECONDS
        expected_ms = self.at.wall_ms + int(passed * 1000)
        by_ms = now.wall_ms - expected_ms
        was_set = abs(by_ms) > _SET_MS
        setting = (Setting(expected_ms, by_ms, is_same),) if was_set else ()
        steady_since = self.steady_since if is_same and not was_set else now.since_boot
        return Record(now, steady_since, (*self.settings, *setting)[-_MAX_SETTINGS:])

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

    def as_now(self, time_ms: int) -> int:
        """Return what a time would be by the clock as it is set now; as it stands where that is not sure."""
        for each in self.settings:
            # Only what comes out behind that setting: so it is never corrected twice.
            if each.is_sure and time_ms <= each.up_to_ms < time_ms + each.by_ms:
                time_ms += each.by_ms
        for each in reversed(self.settings):
            if time_ms > self.at.wall_ms + _SET_MS and each.by_ms < 0 and time_ms <= each.up_to_ms:
                time_ms += each.by_ms
        return time_ms


class SpoolTimes:
    """The wall clock of one spool's machine."""

    def __init__(self, root: Path, clock: Clock, boot_id: Callable[[], str] | None = None) -> None:
        """Take the spool's root, and the machine's clocks."""
        self._root = root
        self._clock = clock
        self._boot = (boot_id or _boot_id)()
        self._known: Record | None = None

    def look(self) -> Record:
        """Read the clocks, and write down what comes of it, when the clock was set or a minute has passed."""
        before = self._newest()
        record = self._seen(before)
        is_due = (
            before is None
            or before.settings != record.settings
            or before.at.boot != record.at.boot
            or record.at.since_boot - before.at.since_boot >= _SAVE_SECONDS
        )
        self._known = record
        if is_due:
            with contextlib.suppress(OSError), locks.root_lock(self._root):
                # Another process may have written meanwhile.
                self._known = record = self._seen(self._newest())
                files.write_file(self._root / CLOCK, json.dumps(asdict(record)).encode("ascii"))
        return record

    def now(self) -> Record:
        """Read the clocks; nothing is written."""
        return self._seen(self._newest())

    def _seen(self, before: Record | None) -> Record:
        reading = self._read_clocks()
        return before.seen_at(reading) if before else Record(reading, reading.since_boot)

    def _read_clocks(self) -> Reading:
        """Read both clocks at one moment: a process that is stopped between them would take its pause for a setting."""
        while True:
            since_boot = self._clock.since_boot()
            wall_ms = int(self._clock.wall() * 1000)
            if self._clock.since_boot() - since_boot < _ONE_MOMENT_SECONDS:
                return Reading(self._boot, since_boot, wall_ms)

    def _newest(self) -> Record | None:
        written, known = _read(self._root / CLOCK), self._known
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
    settings = tuple(
        Setting(int(each["up_to_ms"]), int(each["by_ms"]), bool(each["is_sure"])) for each in found["settings"]
    )
    return Record(at, float(found["steady_since"]), settings)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        return ""
