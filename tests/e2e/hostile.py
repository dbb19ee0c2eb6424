"""Sends requests byte by byte, and tells what each of them was billed as."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kong_metering_sandbox.gateways import wait_for
from kong_metering_sandbox.status import plugin_status
from tests.e2e.traffic import Header, conversation, request

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.collector.records import StoredEvent
    from kong_metering_sandbox.gateways import Gateway

TENANT = "X-Tenant-Id"
ACME: Header = (TENANT, "acme")
CHUNKED: Header = ("Transfer-Encoding", "chunked")
MANY: list[Header] = [(f"x-filler-{number}", "1") for number in range(150)]

_SETTLED_SECONDS = 0.3
# What the plugin server wrote itself, and what the plugin said through `kong.log`; Kong has lines of its own about it.
_OWN_LINE = re.compile(r"\[metering:\d+\] (.*)", re.DOTALL)
_RELAYED_LINE = re.compile(r"\[(?:warn|error)\] .*?\[metering-and-billing\] (.*)", re.DOTALL)


@dataclass(frozen=True)
class Bill:
    """What became of some requests: the answers, the events, and how many gave none, by reason."""

    answer: bytes
    events: list[StoredEvent]
    skipped: dict[str, int]

    @property
    def status(self) -> int:
        """The status of the first answer, 0 without one."""
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", self.answer)
        return int(found[1]) if found else 0

    @property
    def subjects(self) -> list[str]:
        return [event.subject for event in self.events]

    @property
    def data(self) -> Mapping[str, Any]:
        """The data of the only event."""
        (event,) = self.events
        return event.data or {}


class Till:
    """A gateway and a collector; each request that is sent must be accounted for, once.

    `sent_before` is how many requests were answered since the plugin server serves.
    """

    def __init__(self, gateway: Gateway, collector: CollectorProcess, sent_before: int) -> None:
        self.gateway = gateway
        self.collector = collector
        self._expected = sent_before
        self.wait_for(0)
        # Those that asked whether the gateway answers may be among them, if the plugin server served already.
        self._expected = self._counted_when_settled()
        self._log_starts_at = len(gateway.error_log)

    @property
    def port(self) -> int:
        return self.gateway.proxy_port

    def bill(self, sent: bytes | Callable[[int], bytes | None], requests: int = 1) -> Bill:
        """Send bytes, or call a function with the proxy's port, and tell what came of so many requests."""
        self.collector.client.reset()
        before = self.status()
        answer = conversation(self.port, sent) if isinstance(sent, bytes) else sent(self.port)
        self.wait_for(requests)
        skipped = Counter(self.status()["skipped"])
        skipped.subtract(before["skipped"])
        return Bill(answer or b"", self.collector.client.events(), {name: n for name, n in skipped.items() if n})

    def wait_for(self, requests: int) -> None:
        """Wait until so many more requests are accounted for, and what they gave is delivered."""
        self._expected += requests
        wait_for(self._is_accounted_for, f"{requests} requests are accounted for", lambda: f"{self.status()}")

    def status(self) -> Mapping[str, Any]:
        """Give the plugin server's own account."""
        return plugin_status(self.gateway)

    def log_lines(self) -> list[str]:
        """List what the plugin has logged since this till was opened."""
        lines = self.gateway.error_log[self._log_starts_at :].split("\n")
        found = [_OWN_LINE.search(line) or _RELAYED_LINE.search(line) for line in lines]
        return [match[1] for match in found if match]

    def check(self) -> None:
        """Fail if a request was accounted for more than once."""
        assert self._counted_when_settled() == self._expected

    def _is_accounted_for(self) -> bool:
        status = self.status()
        return counted(status) >= self._expected and status["waiting"] == 0

    def _counted_when_settled(self) -> int:
        """Wait until nothing more is counted, and give the number."""
        before = -1
        while (now := counted(self.status())) != before:
            before = now
            time.sleep(_SETTLED_SECONDS)
        return now


def counted(status: Mapping[str, Any]) -> int:
    """Tell how many requests an account knows of, where each gives one event or none."""
    skipped: dict[str, int] = status["skipped"]
    return int(status["accepted"]) + sum(skipped.values())


@contextmanager
def open_till(gateway: Gateway, collector: CollectorProcess, *warm_up: str) -> Iterator[Till]:
    """Start a gateway, ask each target until both workers have their instances, and check the account at the end."""
    with gateway:
        targets = warm_up * 15
        for target in targets:
            conversation(gateway.proxy_port, request(target))
        till = Till(gateway, collector, len(targets))
        yield till
        till.check()


def is_printable_line(line: str) -> bool:
    """Whether a log line has no character that does something to a terminal or hides something."""
    return all(char.isprintable() for char in line)
