"""Whoever operates it sees each fault: by command, metrics, page and alert.

Gateway, plugin server and collector are processes with traffic. The alert is that of a real Prometheus, where there is
one: pending, for how long it takes to go off is not waited for.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from kong_metering_sandbox.faulty_server import DiskFault
from tests.monitoring.watched import KongsMetrics, Watched, watched
from tests.support.prometheus import Prometheus, needs, prometheus
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_PATIENCE_SECONDS = 90.0
_PAUSE_SECONDS = 0.2
# Traffic comes many times a second, so that this is not by chance.
_SILENCE_SECONDS = 5


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong while a context lasts, and by what each view shows it."""

    happens: Callable[[Watched], AbstractContextManager[None]]
    status: Callable[[dict[str, Any]], bool]
    metrics: Callable[[dict[str, float]], bool]
    page: Callable[[str], bool]
    alert: str


def refuses(reason: str) -> Callable[[dict[str, Any]], bool]:
    def shown(queue: dict[str, Any]) -> bool:
        failure = queue["last_failure"]
        return queue["condition"] == "nothing_gets_through" and failure and reason in failure["reason"]

    return shown


def says(*words: str) -> Callable[[str], bool]:
    return lambda page: all(word in page for word in words)


def is_long_ago(moment: float) -> bool:
    return time.time() - moment > _SILENCE_SECONDS


def says_long_ago(page: str) -> bool:
    row = page.partition("last request")[2].splitlines()[1]
    found = re.search(r"(\d+) s ago|min ago", row)
    return found is not None and (found[1] is None or int(found[1]) > _SILENCE_SECONDS)


def is_refused(metrics: dict[str, float]) -> bool:
    return metrics["nothing_gets_through"] == 1


def disk_fault(fault: DiskFault, word: str) -> Fault:
    return Fault(
        lambda one: one.disk(fault),
        lambda queue: queue["disk"] == word,
        lambda metrics: metrics[f"kong_metering_disk_{word}"] == 1,
        says(f"the disk {word}"),
        f"KongMeteringDisk{word.title()}",
    )


def silence(happens: Callable[[Watched], AbstractContextManager[None]], alert: str) -> Fault:
    return Fault(
        happens,
        lambda queue: is_long_ago(queue["last_request_at"]),
        lambda metrics: is_long_ago(metrics["kong_metering_last_request_timestamp_seconds"]),
        says_long_ago,
        alert,
    )


FAULTS = {
    "endpoint killed": Fault(
        Watched.endpoint_killed,
        refuses("ConnectionRefusedError"),
        is_refused,
        says("takes nothing, next try in", "ConnectionRefusedError"),
        "KongMeteringEndpointRefuses",
    ),
    "token refused": Fault(
        Watched.token_refused, refuses("401"), is_refused, says("takes nothing", "401"), "KongMeteringEndpointRefuses"
    ),
    "disk full": disk_fault(DiskFault.FULL, "refuses"),
    "disk broken": disk_fault(DiskFault.BROKEN, "refuses"),
    "disk hangs": disk_fault(DiskFault.HANGS, "hangs"),
    "no traffic": silence(lambda one: one.traffic.stopped(), "KongMeteringTrafficStopped"),
    "Kong has traffic, and none is metered": silence(Watched.not_metered, "KongMeteringSeesNoTraffic"),
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("watched")) as one:
        yield one


@pytest.fixture(scope="module")
def observer(sandbox: Watched) -> Iterator[Prometheus | None]:
    """Run a Prometheus, where there is one."""
    with ExitStack() as running:
        kong = running.enter_context(KongsMetrics(sandbox.traffic))
        targets = {"kong-metering": sandbox.port, "kong": kong.port}
        yield running.enter_context(prometheus(targets)) if shutil.which("prometheus") else None


@pytest.fixture(scope="module", params=list(FAULTS))
def fault(request: pytest.FixtureRequest, sandbox: Watched, observer: Prometheus | None) -> Iterator[Fault]:
    """Let each of them happen once, in a sandbox that was well before."""
    fault = FAULTS[request.param]
    wait_for(sandbox.is_well, "it is well")
    if observer is not None:
        wait_for(lambda: observer.query("increase(kong_metering_requests_total[30m]) > 100"), "it has seen traffic")
        wait_for(lambda: not observer.alerts(), "no alert")
    with fault.happens(sandbox):
        yield fault


def test_the_command_shows_it(sandbox: Watched, fault: Fault) -> None:
    wait_for(lambda: fault.status(sandbox.status()), "status")


def test_the_metrics_show_it(sandbox: Watched, fault: Fault) -> None:
    wait_for(lambda: fault.metrics(sandbox.metrics()), "metrics")


def test_the_page_shows_it(sandbox: Watched, fault: Fault) -> None:
    wait_for(lambda: fault.page(sandbox.page()), "page")


@needs("prometheus")
def test_the_alert_is_pending(observer: Prometheus, fault: Fault) -> None:
    wait_for(lambda: fault.alert in observer.alerts(), fault.alert)


def wait_for(condition: Callable[[], Any], what: str) -> None:
    wait_until(condition, what, seconds=_PATIENCE_SECONDS, pause=_PAUSE_SECONDS)
