"""Some SIGKILLs of two processes side by side, as `make torture` has many."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
# What a process has in its own memory alone is on disk within 10 ms only when its queue's log is there and a core is
# free for the writer. On a busy machine that cannot be asked for; half a second can.
@pytest.mark.parametrize(
    "inbox", [(), ("--inbox", "none"), ("--inbox", "alone", "--allowance", "500")], ids=["ring", "none", "alone"]
)
def test_nothing_is_lost_in_twenty_sigkills(inbox: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kong_metering_torture", "--kills", "20", "--seed", "4", *inbox],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    counted = {
        name.strip(): int(count.replace(",", ""))
        for name, count in re.findall(r"^ (.*?)  +([\d,]+) *$", done.stdout, re.MULTILINE)
    }
    assert counted["accepted events lost"] == 0
    assert counted["SIGKILLs"] >= 20
    assert counted["events whose put returned"] > 1000, said
    assert counted["dead letters"] > 10, said
    assert counted["events that arrived more than once"] > 0, said
