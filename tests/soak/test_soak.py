"""A soak of 90 s, as `make soak` runs it for longer."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kong_metering_soak.schedule import kinds_of


@pytest.mark.timeout(400)
def test_nothing_is_lost_in_a_minute_and_a_half_of_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kong_metering_soak", "--seconds", "90", "--seed", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "It all adds up: nothing is lost." in done.stdout, said
    assert all(kind.value in done.stdout for kind in kinds_of(90)), said
    rows = re.findall(r"^ (.*?)  +([\d,]+) *$", done.stdout, re.MULTILINE)
    counted = {name.strip(): int(count.replace(",", "")) for name, count in rows}
    # Every request with a subject was either metered or met a plugin server that was not there. How many requests a
    # busy machine has time for is another matter.
    billed = counted["of them for a request that is billed"]
    assert billed > max(1000, counted["answered 200"] / 2), said
    assert counted["unique events collected"] > billed * 0.9, said
    assert counted["lost"] == 0
