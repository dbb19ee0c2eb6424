"""What is known of the endpoints that accepted an event, and what a disk that fails does to it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kong_metering.errors import SpoolError
from kong_metering.spool.accepted import ACCEPTED, Acceptances


@pytest.mark.parametrize("at", ["root", "learned"])
def test_a_disk_that_cannot_be_read_is_named_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    root = tmp_path / "spool"
    root.mkdir()
    failing = root if at == "root" else root / ACCEPTED / "learned"
    stat = Path.stat

    def fails(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == failing:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    acceptances = Acceptances(root)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", fails)
        with pytest.raises(SpoolError, match=r"accepted cannot be used for the spool: Input/output error"):
            acceptances.learn()
    assert not (root / ACCEPTED).exists()
    acceptances.learn()
    assert (root / ACCEPTED / "learned").exists()
