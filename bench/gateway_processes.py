"""What Kong's processes and those of its plugin server have cost, by Linux's own accounts.

Kong's are the nginx master and its children. Everything below those is the plugin server: what Kong started, and what
that has forked. A process that has ended counts from when its parent has waited for it (`cutime` in /proc/PID/stat, in
steps of 10 ms, as Linux adds it up unless the parent ignores SIGCHLD); a living one is read from its own CPU clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2  # of the whole process, its ended threads included; see clock_getcpuclockid(3)
_TRIES = 20


@dataclass(frozen=True)
class Found:
    """A process as /proc/PID/stat shows it; `waited_for` is the CPU time, in seconds, of its ended children."""

    parent: int
    waited_for: float


@dataclass(frozen=True)
class Cost:
    """CPU time in seconds, user and system, since the processes started."""

    kong: float
    plugin: float

    def since(self, before: Cost) -> Cost:
        """Tell what was used between two moments."""
        return Cost(self.kong - before.kong, self.plugin - before.plugin)


def parse_stat(text: bytes) -> Found:
    """Read /proc/PID/stat; the program's name in it may hold blanks and brackets."""
    fields = text.rpartition(b")")[2].split()
    # Counted as proc(5) does, the first one here is 3: the parent is 4, the ended children's times are 16 and 17.
    return Found(int(fields[1]), (int(fields[13]) + int(fields[14])) / _TICKS_PER_SECOND)


def children(processes: Mapping[int, Found], parents: set[int]) -> set[int]:
    """List the processes that were started by one of these."""
    return {pid for pid, found in processes.items() if found.parent in parents}


def descendants(processes: Mapping[int, Found], parents: set[int]) -> set[int]:
    """List the processes that were started by one of these, or by one that they started, and so on."""
    found: set[int] = set()
    while parents := children(processes, parents) - found:
        found |= parents
    return found


def plugin_processes(master: int) -> set[int]:
    """List the processes of the plugin server below an nginx master."""
    processes = _processes()
    return descendants(processes, children(processes, {master}))


def serving_processes(master: int) -> set[int]:
    """List the processes of the plugin server that serve: those that have none below them, so no supervisor."""
    processes = _processes()
    serving = descendants(processes, children(processes, {master}))
    return {pid for pid in serving if not children(processes, {pid})}


def cost_below(master: int) -> Cost:
    """Tell what Kong and its plugin server have used."""
    for _ in range(_TRIES):
        processes = _processes()
        workers = children(processes, {master})
        server = descendants(processes, workers)
        try:
            kong = sum(map(_cpu_seconds, {master} | workers))
            living = sum(map(_cpu_seconds, server))
        except (OSError, KeyError):  # one of them has just ended
            continue
        return Cost(kong, living + sum(processes[pid].waited_for for pid in workers | server))
    raise RuntimeError("the processes of Kong come and go too fast to be counted")


def _processes() -> dict[int, Found]:
    found = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - a Path for each of them would cost more than the reading
        if entry.isdigit():
            try:
                found[int(entry)] = parse_stat(Path("/proc", entry, "stat").read_bytes())
            except OSError:
                continue
    return found


def _cpu_seconds(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
