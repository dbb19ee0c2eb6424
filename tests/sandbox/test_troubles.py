"""README's failure table is true: the sandbox prints a curl for each row, and what the row says happens."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import requests

from kong_metering_sandbox.collector.tokens import fingerprint
from kong_metering_sandbox.troubles import ROTATED
from tests.support.plugin_server import ROOT
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl to try the commands with"),
]

SANDBOX = [sys.executable, "-m", "kong_metering_sandbox.contained", sys.executable]
SANDBOX += ["-m", "kong_metering_sandbox.demo", "--keep", "--any-ports"]
# Kong is made to start instances once a minute at most.
PATIENCE = 90.0


def readmes_rows() -> list[str]:
    """Read the first column of the failure table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What happens when things fail")[2]
    rows = re.findall(r"^\| (.+?) \|", text.partition("\n## ")[0], re.MULTILINE)
    return [row for row in rows if row not in ("trouble", "---")]


@dataclass(frozen=True)
class Way:
    """One way to try a row: the command that brings it about, and the one that ends it, empty if it needs none."""

    curl: str
    ending: str


class Sandbox:
    """A sandbox that runs, and what it printed."""

    def __init__(self, printed: str) -> None:
        self._numbers = count(1)
        self._urls = {
            name: url.strip() for name, url in re.findall(r"^(\w[\w ]+?)  +(http://[\d.:]+)", printed, re.MULTILINE)
        }
        (self.enabling,) = re.findall(r"^  (curl -X POST \S+/plugins/ .*)$", printed, re.MULTILINE)
        (self.verifying,) = re.findall(r"`(\S+ \S+/kong-metering verify .*)` finds them", printed)
        (self.well,) = re.findall(r"^  (curl -X DELETE \S+/troubles)$", printed, re.MULTILINE)
        self.ways: dict[str, list[Way]] = defaultdict(list)
        for row, block in re.findall(r"^- (.+)\n((?:  .*\n)+)", printed, re.MULTILINE):
            curls = re.findall(r"^  (\S.*)$", block, re.MULTILINE)
            self.ways[row].append(Way(curls[0], curls[1] if len(curls) > 1 else ""))

    def run(self, command: str) -> str:
        """Run a command as it is printed, in a shell."""
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def ask(self, subject: str = "acme") -> int:
        """Send a request, which must be answered 200; returns the number in its path."""
        number = next(self._numbers)
        url = f"{self._urls['Gateway']}/orders/{number}"
        assert requests.get(url, headers={"x-tenant-id": subject}, timeout=30).status_code == 200
        return number

    def ask_until(self, words: str) -> list[int]:
        """Send requests until the log has these words, which Kong may write with the next one; gives their numbers."""
        numbers = []

        def are_said() -> bool:
            numbers.append(self.ask())
            return words in self.log

        self.wait(are_said, f"the log says {words!r}")
        return numbers

    def get(self, where: str, path: str) -> Any:
        return requests.get(self._urls[where] + path, timeout=30).json()

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get("Sandbox", "/status")
        return status

    def skipped(self, reason: str) -> int:
        """How many requests gave no event for a reason."""
        return int(self.status["skipped"].get(reason, 0))

    @property
    def log(self) -> str:
        return requests.get(f"{self._urls['Sandbox']}/log", timeout=30).text

    @property
    def arrived(self) -> list[int]:
        """The numbers of the requests whose events are at the collector, in the order in which they came."""
        return [self.number_of(event) for event in self.events]

    @property
    def events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = self.get("Collector", "/events?limit=10000")["events"]
        return events

    @staticmethod
    def number_of(event: dict[str, Any]) -> int:
        return int(event["data"]["request_uri"].rpartition("/")[2])

    def usage(self, subject: str) -> int:
        return sum(row["count"] for row in self.get("Collector", "/usage")["usage"] if row["subject"] == subject)

    def wait_for(self, numbers: list[int]) -> None:
        self.wait(lambda: set(numbers) <= set(self.arrived), f"the events of {numbers}")

    @staticmethod
    def wait(condition: Callable[[], Any], what: str) -> None:
        wait_until(condition, what, PATIENCE, pause=0.05)


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    with subprocess.Popen(SANDBOX, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = ""
            while "Ctrl-C ends it." not in printed:
                line = process.stdout.readline()
                assert line, f"the sandbox has ended: {printed}"
                printed += line
            sandbox = Sandbox(printed)
            sandbox.run(sandbox.enabling)
            sandbox.wait_for([sandbox.ask()])
            yield sandbox
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture
def sandbox(running: Sandbox) -> Iterator[Sandbox]:
    yield running
    running.run(running.well)
    running.wait(lambda: running.status["waiting"] == 0, "nothing waits")


def the_way(sandbox: Sandbox, beginning: str, place: int = 0) -> Way:
    """Give the way to try the row that begins so."""
    (ways,) = [ways for row, ways in sandbox.ways.items() if row.startswith(beginning)]
    return ways[place]


def at_most_one_overtaken(numbers: list[int]) -> bool:
    """Whether they are in order but for one: an event on its way may be overtaken when an endpoint comes back."""
    return any(rest == sorted(rest) for rest in ([*numbers[:n], *numbers[n + 1 :]] for n in range(len(numbers))))


def test_each_row_of_the_readme_can_be_tried(running: Sandbox) -> None:
    assert list(running.ways) == readmes_rows()


def test_bytes_of_a_client(sandbox: Sandbox) -> None:
    sandbox.run(the_way(sandbox, "A client sends bytes").curl)
    sandbox.wait(lambda: sandbox.usage("café") == 1, "café is billed")


def test_an_endpoint_that_is_down(sandbox: Sandbox) -> None:
    way = the_way(sandbox, "The endpoint is down")
    sandbox.run(way.curl)
    numbers = [sandbox.ask() for _ in range(5)]
    sandbox.wait(lambda: sandbox.status["waiting"] == 5, "five events wait")
    assert not set(numbers) & set(sandbox.arrived)
    sandbox.run(way.ending)
    sandbox.wait_for(numbers)
    assert at_most_one_overtaken([number for number in sandbox.arrived if number in numbers])


def test_one_event_that_the_endpoint_refuses(sandbox: Sandbox) -> None:
    sandbox.run(the_way(sandbox, "The endpoint fails because of one event").curl)
    refused = sandbox.ask("initech")
    others = []

    def is_dead_letter() -> bool:
        others.append(sandbox.ask())
        return bool(sandbox.status["dead_letters"])

    sandbox.wait(is_dead_letter, "the event is a dead letter")
    sandbox.wait_for(others)
    assert refused not in sandbox.arrived


def test_events_that_are_lost_after_a_2xx(sandbox: Sandbox) -> None:
    way = the_way(sandbox, "OpenMeter answers 2xx and loses")
    sandbox.run(way.curl)
    before = sandbox.status["delivered"]
    lost = sandbox.ask("umbrella")
    sandbox.wait(lambda: sandbox.status["delivered"] > before, "it is delivered")
    sandbox.run(way.ending)
    sandbox.wait_for([sandbox.ask()])
    assert lost not in sandbox.arrived
    assert sandbox.usage("umbrella") == 0
    verified = subprocess.run(
        ["/bin/sh", "-c", sandbox.verifying], capture_output=True, text=True, timeout=60, check=False
    )
    assert verified.returncode == 1, verified.stderr
    assert "1 event MISSING" in verified.stdout


def test_an_answer_that_does_not_come(sandbox: Sandbox) -> None:
    sandbox.run(the_way(sandbox, "An answer does not come").curl)
    number = sandbox.ask("hooli")
    sandbox.wait(lambda: sandbox.get("Collector", "/stats")["duplicates"] == 1, "the event is sent again")
    assert sandbox.arrived.count(number) == sandbox.usage("hooli") == 1


def test_a_token_that_is_rotated_in_a_vault(sandbox: Sandbox) -> None:
    sandbox.run(the_way(sandbox, "A token is rotated").curl)
    numbers = [sandbox.ask()]

    def has_arrived() -> bool:
        numbers.append(sandbox.ask())
        return numbers[0] in sandbox.arrived

    sandbox.wait(has_arrived, "the new token is used")
    sandbox.wait_for(numbers)
    tokens = {event["token"] for event in sandbox.events if sandbox.number_of(event) in numbers}
    assert tokens == {fingerprint(f"Bearer {ROTATED}")}


def test_a_wrong_token(sandbox: Sandbox) -> None:
    way = the_way(sandbox, "The token is wrong")
    sandbox.run(way.curl)
    numbers = sandbox.ask_until("api_token")
    assert not set(numbers) & set(sandbox.arrived)
    sandbox.run(way.ending)
    sandbox.wait_for([*numbers, sandbox.ask()])


def test_a_wrong_url(sandbox: Sandbox) -> None:
    way = the_way(sandbox, "The token is wrong", 1)
    sandbox.run(way.curl)
    numbers = sandbox.ask_until("answered 404")
    assert not set(numbers) & set(sandbox.arrived)
    sandbox.run(way.ending)
    sandbox.wait_for([*numbers, sandbox.ask()])


def test_a_configuration_that_cannot_be_used(sandbox: Sandbox) -> None:
    way = the_way(sandbox, "A configuration cannot be used")
    sandbox.run(way.curl)
    before = sandbox.skipped("unusable_configuration")
    sandbox.ask_until("CANNOT BE USED")
    sandbox.wait(lambda: sandbox.skipped("unusable_configuration") > before, "it is counted")
    sandbox.run(way.ending)
    sandbox.wait_for([sandbox.ask()])


def test_a_bug(sandbox: Sandbox) -> None:
    way = the_way(sandbox, "The plugin has a bug")
    sandbox.run(way.curl)
    before = sandbox.skipped("error")
    numbers = []

    def are_counted() -> bool:
        numbers.append(sandbox.ask())
        return sandbox.skipped("error") >= before + 3

    sandbox.wait(are_counted, "three requests with a bug")
    sandbox.ask_until("has put a bug in here")
    assert sandbox.log.count("has put a bug in here") == 1
    sandbox.run(way.ending)


@pytest.mark.parametrize("trouble", ["broken", "read-only"])
def test_a_disk_in_trouble(sandbox: Sandbox, trouble: str) -> None:
    way = the_way(sandbox, "The disk is full")
    sandbox.run(way.curl.replace("broken", trouble))
    numbers = sandbox.ask_until("EVENTS CANNOT BE WRITTEN TO DISK")
    sandbox.run(way.ending)
    sandbox.wait_for([*numbers, sandbox.ask()])


@pytest.mark.parametrize("trouble", ["full", "hangs"])
def test_a_disk_whose_trouble_is_seen_later(sandbox: Sandbox, trouble: str) -> None:
    way = the_way(sandbox, "The disk is full")
    sandbox.run(way.curl.replace("broken", trouble))
    numbers = [sandbox.ask() for _ in range(3)]
    sandbox.run(way.ending)
    sandbox.wait_for([*numbers, sandbox.ask()])


def test_a_plugin_server_that_is_killed(sandbox: Sandbox) -> None:
    sandbox.run(the_way(sandbox, "The plugin server is killed").curl)
    sandbox.wait_for(sandbox.ask_until("was ended by SIGKILL"))


def test_kong_stops_while_events_wait(sandbox: Sandbox) -> None:
    down = the_way(sandbox, "The endpoint is down")
    sandbox.run(down.curl)
    number = sandbox.ask()
    sandbox.run(the_way(sandbox, "Kong stops").curl)
    sandbox.run(down.ending)
    sandbox.wait_for([number, sandbox.ask()])
