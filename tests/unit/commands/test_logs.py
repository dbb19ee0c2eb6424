"""What the commands see of a spool while its servers go on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kong_metering.commands.logs import damaged_files
from kong_metering.eventlog.log import DAMAGED
from tests.unit.commands.helpers import leave_damaged_file


@pytest.mark.parametrize("gone", [f"{DAMAGED}/below", "proc-1-dead", "proc-1-dead/log/damaged"])
def test_damaged_files_are_found_while_a_directory_vanishes(
    root: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    leave_damaged_file(root)
    there = damaged_files(root)
    (root / gone).mkdir(parents=True)
    (root / gone / "1.seg").touch()
    vanishes_before_it_is_listed(root / gone, monkeypatch)
    assert damaged_files(root) == there
    assert not (root / gone).exists()


def test_damaged_files_that_cannot_be_listed_are_not_taken_for_none(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_damaged_file(root)
    scandir = os.scandir

    def without_descriptors(path: Any) -> Any:
        if Path(path).is_relative_to(root / DAMAGED):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        damaged_files(root)


def vanishes_before_it_is_listed(gone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def removed_first(path: Any) -> Any:
        if Path(path) == gone:
            monkeypatch.undo()
            shutil.rmtree(gone)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed_first)
