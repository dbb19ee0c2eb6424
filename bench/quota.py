"""Gives a process a share of a core, where this user may: a control group with a quota, version 1 or 2."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
_PERIOD_US = 10_000


def why_not() -> str:
    """Return why no process can be given a share here; empty if one can."""
    try:
        with limited([], 0.5):
            return ""
    except OSError as error:
        return f"no control group with a quota can be made here: {error}"


@contextmanager
def limited(pids: Sequence[int], share: float) -> Iterator[None]:
    """Give each process this share of a core, in a group of its own, while the context lasts; raises `OSError`."""
    root = next((root for root in _ROOTS if (root / "cgroup.procs").exists()), _ROOTS[-1])
    groups = [root / f"kong-metering-bench-{os.getpid()}-{number}" for number, _ in enumerate([0, *pids])]
    try:
        for group in groups:
            group.mkdir()
            _set_quota(group, int(share * _PERIOD_US))
        for group, pid in zip(groups[1:], pids, strict=True):
            (group / "cgroup.procs").write_text(f"{pid}\n")
        yield
    finally:
        for group in groups:
            _remove(root, group)


def _set_quota(group: Path, quota_us: int) -> None:
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}\n")
    else:
        (group / "cpu.cfs_period_us").write_text(f"{_PERIOD_US}\n")
        (group / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")


def _remove(root: Path, group: Path) -> None:
    with suppress(OSError):
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):  # it has ended meanwhile
                (root / "cgroup.procs").write_text(f"{pid}\n")
        time.sleep(0.05)  # the kernel takes a moment to see that a group is empty
        group.rmdir()
