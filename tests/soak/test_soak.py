"""A soak of 90 s, as `make soak` runs it for longer, with a Prometheus that watches it where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from kong_metering_sandbox.ports import port_of, reserve_port
from kong_metering_soak.schedule import kinds_of
from tests.support.prometheus import Prometheus, dashboard_queries, needs, prometheus

pytestmark = pytest.mark.timeout(400)

_LOOK_AGAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Soaked:
    """A soak that is over: its exit status, what it said, and which queries of the dashboard never had data."""

    status: int
    said: str
    queries_without_data: list[str]


@pytest.fixture(scope="module")
def soaked() -> Iterator[Soaked]:
    with ExitStack() as running:
        port = port_of(running.enter_context(reserve_port()))
        observer = None
        if shutil.which("prometheus"):
            observer = running.enter_context(prometheus({"kong-metering": port}))
        command = [sys.executable, "-m", "kong_metering_soak", "--seconds", "90", "--seed", "4"]
        command += ["--flags", f"--metrics-listen 127.0.0.1:{port}"]
        output = running.enter_context(tempfile.TemporaryFile("w+"))
        soak = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        without_data = dashboard_queries()
        while soak.poll() is None:
            without_data = _still_without(observer, without_data)
            time.sleep(_LOOK_AGAIN_SECONDS)
        output.seek(0)
        yield Soaked(soak.returncode, output.read(), without_data)


def _still_without(observer: Prometheus | None, queries: list[str]) -> list[str]:
    return [query for query in queries if observer is None or not observer.panel(query)]


def test_nothing_is_lost_in_a_minute_and_a_half_of_faults(soaked: Soaked) -> None:
    said = soaked.said
    assert soaked.status == 0, said
    assert "It all adds up: nothing is lost." in said, said
    assert all(kind.value in said for kind in kinds_of(90)), said
    rows = re.findall(r"^ (.*?)  +([\d,]+) *$", said, re.MULTILINE)
    counted = {name.strip(): int(count.replace(",", "")) for name, count in rows}
    # Every request with a subject was either metered or met a plugin server that was not there. How many requests a
    # busy machine has time for is another matter.
    billed = counted["of them for a request that is billed"]
    assert billed > max(1000, counted["answered 200"] / 2), said
    assert counted["unique events collected"] > billed * 0.9, said
    assert counted["lost"] == 0


@needs("prometheus")
def test_each_query_of_the_dashboard_had_data(soaked: Soaked) -> None:
    assert soaked.queries_without_data == []
