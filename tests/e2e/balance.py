"""Compares what a gateway answered with what was billed, and looks at what waits on disk in between."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering.eventlog.log import EventLog
from kong_metering.spool.directory import survey
from kong_metering_sandbox.gateways import wait_for
from kong_metering_sandbox.status import plugin_status

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from tests.e2e.traffic import Answered

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.2
_BATCH_BYTES = 64 * 1024 * 1024


def number_of(data: Mapping[str, Any] | None) -> int:
    """Give the number of the request that an event with this data is about."""
    return int(str((data or {})["request_uri"]).rpartition("/")[2])


def bill(collector: CollectorProcess) -> Counter[int]:
    """Count the unique events of each request."""
    return Counter(number_of(event.data) for event in collector.client.events())


def wait_for_bill(gateway: Gateway, collector: CollectorProcess, asked: Iterable[Answered]) -> None:
    """Wait until each of these requests is billed, and nothing waits any more."""
    wanted = {one.number: one for one in asked}

    def is_billed() -> bool:
        time.sleep(_POLL_SECONDS)
        return wanted.keys() <= bill(collector).keys() and plugin_status(gateway)["waiting"] == 0

    def told() -> str:
        billed = bill(collector)
        missing = [one for number, one in wanted.items() if number not in billed]
        words = f"{len(missing)} of {len(wanted)} are missing, {missing[:3]} to {missing[-3:]}"
        return f"{words}. {spooled(gateway)}. {account(gateway)}. {own_lines(gateway)}"

    wait_for(is_billed, "all requests are billed", told, _PATIENCE_SECONDS)


def check_bill(collector: CollectorProcess, answered: Mapping[int, Answered]) -> list[Answered]:
    """Fail if a request was billed twice, or an event came with two contents; give the requests that were not billed.

    Requests that got no answer may be billed or not.
    """
    billed = bill(collector)
    assert {number: count for number, count in billed.items() if count > 1} == {}
    assert collector.client.stats().conflicts == 0
    return [one for number, one in sorted(answered.items()) if number not in billed]


def account(gateway: Gateway) -> Mapping[str, Any]:
    """Give the account of the plugin server that serves, after a check that it adds up and that nothing was given up.

    Only at a quiet time.
    """
    status = plugin_status(gateway)
    assert status["waiting"] == sum(status["queues"].values()), status
    assert status["dropped"] == status["dead_letters"] == {}, status
    return status


def own_lines(gateway: Gateway, newest: int = 30) -> str:
    """Give the newest lines that the plugin and its server have logged."""
    return "\n".join([line for line in gateway.error_log.splitlines() if "metering" in line][-newest:])


# ---------------------------------------------------------------------------------------------------------- the disk


@dataclass(frozen=True)
class Spooled:
    """A log in the spool: the plugin entity that it belongs to, who holds it, the ids of the events that wait."""

    entity: str
    holder: int | None
    ids: tuple[str, ...]


def spool_of(gateway: Gateway) -> Path:
    return gateway.prefix / "metering-spool"


def spooled(gateway: Gateway) -> list[Spooled]:
    """Read what waits on disk, the logs of the oldest events first; empty logs are left out."""
    found: list[tuple[int, Spooled]] = []
    for log in survey(spool_of(gateway)):
        try:
            view = EventLog.view(log.directory)
        except FileNotFoundError:
            continue  # done, and removed just now
        with closing(view):
            events = view.read(0, 1_000_000, _BATCH_BYTES)
        # Who was killed while making or removing a log may leave one without an owner, but then without events too.
        if events:
            assert log.identity is not None
            ids = tuple(json.loads(event.payload)["id"] for event in events)
            found.append((events[0].time_ms, Spooled(log.identity.entity_id, log.holder, ids)))
    return [log for _, log in sorted(found, key=lambda item: item[0])]


def waiting_on_disk(gateway: Gateway) -> int:
    return sum(len(log.ids) for log in spooled(gateway))


def check_files(gateway: Gateway, *tokens: str) -> None:
    """Fail if a file in the spool could be read by others, or holds a token."""
    for path in (spool_of(gateway), *spool_of(gateway).rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
        content = b"" if path.is_dir() else path.read_bytes()
        assert not [token for token in tokens if token.encode() in content], path


def check_nothing_is_left(gateway: Gateway) -> None:
    """Fail if something waits on disk after a stop; if the plugin server had the time, its logs are gone as well."""
    assert spooled(gateway) == []
    if ended_by_itself(gateway):
        assert survey(spool_of(gateway)) == []


def stop_with_nothing_more(gateway: Gateway, collector: CollectorProcess) -> None:
    """Stop, and fail if an event is on disk that the collector does not have: the test did not expect it."""
    gateway.stop()
    arrived = {event.id for event in collector.client.events()}
    assert [event for log in spooled(gateway) for event in log.ids if event not in arrived] == []


def ended_by_itself(gateway: Gateway) -> bool:
    """Whether the last plugin server came to its last words, in the 30 ms that Kong grants."""
    log = gateway.error_log
    return log.rfind("] info: ended: ") > log.rfind("] info: serving on ")


def kong_metering(gateway: Gateway, *arguments: str, stdin: str = "") -> Any:
    """Run `kong-metering` on the gateway's spool, and give the JSON that it prints."""
    command = [str(Path(sys.executable).with_name("kong-metering")), *arguments, "--json"]
    done = subprocess.run(
        [*command, "--kong-prefix", str(gateway.prefix)], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_until(condition: Callable[[], Any], what: str, gateway: Gateway) -> None:
    """Wait, and on failure tell what the plugin has logged."""
    wait_for(condition, what, lambda: own_lines(gateway), _PATIENCE_SECONDS)
