"""`kong-metering verify` and `customers`, against the stand-in for OpenMeter."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner, Result

from kong_metering.commands.handdelivery import Timing
from kong_metering.commands.main import program
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.settled import id_of
from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.collector.process import CollectorProcess
from tests.support.clock import FakeClock

PLUGIN = "0d9a4f0e-6a37-4a6e-9d3f-52f3b4ad0001"
TOKEN = "s3cr3t-t0ken"


@pytest.fixture(scope="module")
def process() -> Iterator[CollectorProcess]:
    with CollectorProcess() as running:
        yield running


@pytest.fixture
def collector(process: CollectorProcess) -> CollectorProcess:
    process.client.clear_faults()
    process.client.set_tokens([TOKEN])
    process.client.set_reading()
    process.client.reset()
    process.client.set_tokens([])
    process.client.add_customer("acme")
    process.client.set_tokens([TOKEN])
    return process


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "metering-spool"


def event(number: int, **members: Any) -> bytes:
    made = {
        "specversion": "1.0",
        "id": f"{number:032x}:api_request",
        "source": "kong",
        "type": "kong.api_request",
        "subject": "acme",
        "data": {"request_uri": "/orders"},
    }
    return json.dumps(made | members).encode()


def event_id(number: int) -> str:
    return f"{number:032x}:api_request"


def queue(url: str, plugin: str = PLUGIN) -> QueueIdentity:
    return QueueIdentity(plugin, "metering", url)


def post(url: str, *events: bytes) -> None:
    headers = {"Content-Type": "application/cloudevents-batch+json", "Authorization": f"Bearer {TOKEN}"}
    answer = requests.post(url, b"[" + b",".join(events) + b"]", headers=headers, timeout=10)
    assert answer.ok, answer.text


def keep(root: Path, url: str, *events: bytes, kept_ms: int | None = None, plugin: str = PLUGIN) -> None:
    """Have events in the spool that were delivered, and are kept."""
    wall = kept_ms or time.time_ns() // 1_000_000
    spool = SpoolDirectory(root, delivered=Delivered(root, lambda: wall))
    held = spool.log_for(queue(url, plugin))
    held.log.append(events, wall)
    held.log.done(len(events))
    spool.retire(held)
    spool.close()


def wait(root: Path, url: str, *events: bytes, done: int = 0) -> None:
    """Have events in a log that nobody holds, of which the first ones are settled."""
    spool = SpoolDirectory(root)
    held = spool.log_for(queue(url))
    held.log.append(events, 1)
    held.log.done(done)
    spool.close()


class AtOnce:
    """A clock whose pauses take no time; `meanwhile` happens in each that is long."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self._clock = FakeClock()
        self._clock.set_wall(time.time())
        self.timing = Timing(self._clock, self._wait)

    def _wait(self, seconds: float) -> None:
        if seconds > 1:
            self.pauses.append(seconds)
            self.meanwhile()
        self._clock.advance(seconds)


@pytest.fixture
def at_once() -> AtOnce:
    return AtOnce()


def run(root: Path, at_once: AtOnce, *arguments: str, stdin: str | None = None) -> Result:
    environment = {"KONG_METERING_SPOOL_DIR": str(root), "KONG_METERING_API_TOKEN": TOKEN, "COLUMNS": "200"}
    result = CliRunner(env=environment).invoke(program, list(arguments), input=stdin, obj=at_once.timing)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def delivered_by_hand(root: Path, at_once: AtOnce) -> str:
    token = root.parent / "token"
    token.write_text(TOKEN)
    options = ("--plugin-id", PLUGIN, "--token-file", str(token), "--inbox-dir", "none")
    return run(root, at_once, "spool", "deliver", *options).stdout


def refused_by_hand(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    """Have ten events delivered, and two become dead letters, in one segment."""
    events = [event(number, subject="bad" if number in (4, 5) else "acme") for number in range(12)]
    wait(root, collector.ingest_v3, *events)
    collector.client.faults(FaultRule(match=FaultMatch(subject="bad"), status=400))
    assert "2 rejected" in delivered_by_hand(root, at_once)
    collector.client.clear_faults()


def verified(root: Path, at_once: AtOnce, *arguments: str) -> tuple[int, dict[str, Any]]:
    result = run(root, at_once, "verify", "--json", *arguments)
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("path", ["/api/v1/events", "/api/v3/openmeter/events", "/v3/openmeter/events"])
def test_all_that_was_delivered_is_confirmed_whichever_api_belongs_to_the_endpoint(
    collector: CollectorProcess, root: Path, at_once: AtOnce, path: str
) -> None:
    url = collector.url + path
    events = [event(number) for number in range(250)]
    post(url, *events)
    keep(root, url, *events)
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing"], told["unknown"]) == (0, 250, 0, 0)
    assert at_once.pauses == []


def test_an_openmeter_without_v2_is_asked_by_v1(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    collector.client.set_reading(versions=["v1"])
    events = [event(number) for number in range(5)]
    post(collector.ingest_v1, *events[:4])
    keep(root, collector.ingest_v1, *events)
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing_ids"]) == (1, 4, [event_id(4)])


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_what_was_lost_after_a_2xx_is_missing_and_is_sent_again(
    collector: CollectorProcess, root: Path, at_once: AtOnce, version: str
) -> None:
    url = collector.ingest_v1 if version == "v1" else collector.ingest_v3
    events = [event(number, subject="acme") for number in range(60)]
    collector.client.faults(FaultRule(lose=FaultMatch(id=event_id(7))), FaultRule())
    post(url, *events)
    keep(root, url, *events)
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing"], told["missing_ids"]) == (1, 59, 1, [event_id(7)])
    assert at_once.pauses == [60]
    collector.client.clear_faults()
    code, told = verified(root, at_once, "--resend", "--yes")
    assert (code, told["confirmed"], told["missing"], told["resent"]) == (0, 60, 0, 1)
    assert collector.client.stats().unique == 60


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_nothing_is_sent_again_without_a_yes_and_what_was_found_is_told(
    collector: CollectorProcess, root: Path, at_once: AtOnce, answer: str
) -> None:
    keep(root, collector.ingest_v3, event(1))
    result = run(root, at_once, "verify", "--resend", stdin=answer)
    assert result.exit_code == 1
    assert "Send 1 event again" in result.output
    assert "with the same id? If it arrives later after all, OpenMeter counts it once only" in result.output
    assert "OpenMeter may only be behind" in result.output
    assert "1 event MISSING: OpenMeter took it, and does not have it." in result.stdout
    assert "`kong-metering verify --resend` sends it again." in result.stdout
    told = json.loads(run(root, at_once, "verify", "--resend", "--json", stdin=answer).stdout)
    assert (told["missing_ids"], told["resent"]) == ([event_id(1)], 0)
    assert collector.client.stats().unique == 0


def test_openmeter_is_not_said_to_be_behind_when_others_are_found_though_they_are_not_counted(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    stranger = event(1, subject="stranger")
    post(collector.ingest_v3, stranger)
    keep(root, collector.ingest_v3, stranger, event(2))
    result = run(root, at_once, "verify", "--resend", stdin="n\n")
    assert "1 event unassigned" in result.stdout
    assert "Send 1 event again" in result.output
    assert "OpenMeter may only be behind" not in result.output


def test_what_is_sent_again_and_still_not_there_is_told(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    collector.client.faults(FaultRule(lose=FaultMatch(subject="gone")))
    keep(root, collector.ingest_v3, event(1), event(2, subject="gone"))
    result = run(root, at_once, "verify", "--resend", "--yes")
    assert result.exit_code == 1
    assert "1 event confirmed" in result.stdout
    assert "2 events sent again" in result.stdout
    assert "1 event MISSING" in result.stdout
    assert "still not there" in result.stdout


def test_an_event_that_can_be_read_only_later_is_not_missing(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    collector.client.set_reading(delay=3600)
    post(collector.ingest_v3, event(1))
    keep(root, collector.ingest_v3, event(1))
    at_once.meanwhile = collector.client.set_reading
    assert verified(root, at_once)[1]["confirmed"] == 1


def test_what_was_delivered_by_hand_is_read_back_and_sent_again_too(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    """The servers of this spool never delivered anything."""
    events = [event(number, subject="stranger") for number in range(6)]
    wait(root, collector.ingest_v3, *events)
    collector.client.faults(FaultRule(lose=FaultMatch(subject="stranger")))
    assert "6 events delivered" in delivered_by_hand(root, at_once)
    collector.client.clear_faults()
    code, told = verified(root, at_once)
    assert (code, told["missing"], told["left_out"]) == (1, 6, 0)
    assert run(root, at_once, "verify", "--resend", "--yes").exit_code == 4
    assert collector.client.stats().unique == 6
    assert json.loads(run(root, at_once, "customers", "--json").stdout)["unassigned"] == {"stranger": 6}


def test_what_is_no_customers_and_what_no_meter_counts_is_shown(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    collector.client.set_reading(meters=["kong.api_request"])
    events = [event(1), event(2, subject="stranger"), event(3, type="kong.other"), event(4, subject="stranger")]
    post(collector.ingest_v3, *events)
    keep(root, collector.ingest_v3, *events)
    code, told = verified(root, at_once)
    assert code == 4
    assert (told["confirmed"], told["unassigned"], told["invalid"]) == (1, 2, 1)
    assert told["unassigned_subjects"] == {"stranger": 2}
    assert told["reasons"] == {"no meter found for event type: kong.other": 1}
    words = run(root, at_once, "verify").output
    assert "2 events unassigned: their subject is no customer's." in words
    assert "`kong-metering customers --create` makes a customer for it." in words
    assert "stranger (2)" in words
    assert "no meter found for event type: kong.other (1)" in words


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_a_line_break_in_a_subject_does_not_make_an_event_invalid(
    collector: CollectorProcess, root: Path, at_once: AtOnce, version: str
) -> None:
    """v1 and v2 give all errors as one text, a line each. Ours write line breaks legibly; an event need not be ours."""
    url = collector.ingest_v1 if version == "v1" else collector.ingest_v3
    collector.client.set_reading(meters=["kong.api_request"])
    forged = "acme\nno customer found for event subject: acme"
    events = [event(1, subject="a\nb"), event(2, subject=forged), event(3, subject="a\nb", type="kong.other")]
    post(url, *events)
    keep(root, url, *events)
    _, told = verified(root, at_once)
    assert (told["confirmed"], told["unassigned"], told["invalid"]) == (0, 2, 1)
    assert told["unassigned_subjects"] == {"a\nb": 2, forged: 1}
    assert told["reasons"] == {"no meter found for event type: kong.other": 1}


def test_dead_letters_and_what_waits_are_left_out(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    url = collector.ingest_v3
    keep(root, url, event(1), event(2), event(3))
    post(url, event(1))
    DeadLetters(root / DEAD_LETTERS).add([DeadLetter("rejected", "no", queue(url), 1, event(2))], 1)
    wait(root, url, event(3))
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing"], told["left_out"]) == (0, 1, 0, 2)
    assert "2 events left out: they wait, or are dead letters." in run(root, at_once, "verify").output


def test_what_was_a_dead_letter_is_not_missing_once_that_is_purged(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    refused_by_hand(collector, root, at_once)
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing"], told["left_out"]) == (0, 10, 0, 2)
    assert run(root, at_once, "spool", "purge", "--dead-letters", "--yes").exit_code == 0
    code, told = verified(root, at_once, "--resend", "--yes")
    assert (code, told["confirmed"], told["missing"], told["left_out"], told["resent"]) == (0, 10, 0, 0, 0)
    assert collector.client.stats().unique == 10
    assert json.loads(run(root, at_once, "customers", "--json").stdout)["subjects"] == 1


def test_what_was_a_dead_letter_is_not_missing_once_that_is_dropped_for_newer_ones(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    refused_by_hand(collector, root, at_once)
    letters = DeadLetters(root / DEAD_LETTERS, max_bytes=1, segment_bytes=1)
    letters.add([DeadLetter("rejected", "no", queue(collector.ingest_v3), 1, event(99))], 1)
    assert [id_of(stored.letter.event) for stored in letters.letters()] == [event_id(99)]
    assert verified(root, at_once)[1]["missing"] == 0


def test_what_waited_and_was_purged_is_not_missing_when_the_rest_was_delivered(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    spool = SpoolDirectory(root)
    held = spool.log_for(queue(collector.ingest_v3))
    held.log.append([event(1), event(2)], 1)
    held.log.append([event(3)], time.time_ns() // 1_000_000)
    spool.close()
    options = ("--waiting", "--plugin-id", PLUGIN, "--older-than", "1d", "--inbox-dir", "none", "--yes")
    assert "2 waiting events removed" in run(root, at_once, "spool", "purge", *options).stdout
    assert "1 event delivered" in delivered_by_hand(root, at_once)
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing"]) == (0, 1, 0)


def test_a_dead_letter_that_was_replayed_and_delivered_counts_once(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    refused_by_hand(collector, root, at_once)
    assert run(root, at_once, "spool", "replay", "--all", "--yes").exit_code == 0
    assert verified(root, at_once)[1]["left_out"] == 2
    assert "2 events delivered" in delivered_by_hand(root, at_once)
    _, told = verified(root, at_once)
    assert (told["confirmed"], told["unassigned_subjects"], told["left_out"]) == (10, {"bad": 2}, 0)
    assert json.loads(run(root, at_once, "customers", "--json").stdout)["unassigned"] == {"bad": 2}


def test_a_dead_letter_that_was_replayed_and_lost_after_a_2xx_is_missing(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    refused_by_hand(collector, root, at_once)
    run(root, at_once, "spool", "replay", "--all", "--yes")
    collector.client.faults(FaultRule(lose=FaultMatch(id=event_id(4))), FaultRule())
    delivered_by_hand(root, at_once)
    code, told = verified(root, at_once)
    assert (code, told["missing_ids"], told["left_out"]) == (1, [event_id(4)], 0)


def test_the_settled_part_of_a_log_is_read_back_too(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    url = collector.ingest_v3
    wait(root, url, event(1), event(2), event(3), done=2)
    post(url, event(1))
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing_ids"]) == (1, 1, [event_id(2)])


def test_what_an_idle_queues_earlier_logs_had_is_read_back_beside_its_new_log(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    """A queue that has nothing to do for a while has no log; its next one has the same name and counts from 1."""
    url = collector.ingest_v3
    times = itertools.count(time.time_ns() // 1_000_000)
    spool = SpoolDirectory(root, delivered=Delivered(root, lambda: next(times)))
    for events in ([event(1), event(2)], [event(3), event(4), event(5)]):
        earlier = spool.log_for(queue(url))
        earlier.log.append(events, 1)
        earlier.log.done(len(events))
        spool.retire(earlier)
    living = spool.log_for(queue(url))
    living.log.append([event(6), event(7)], 1)
    living.log.done(2)
    living.log.save_position()
    post(url, event(2), event(4), event(6), event(7))
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["missing_ids"]) == (1, 4, [event_id(1), event_id(3), event_id(5)])
    spool.retire(living)
    spool.close()


def test_a_subject_that_makes_a_page_fail_costs_only_its_own_event(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    events = [event(number, subject="a\0b" if number == 33 else "acme") for number in range(50)]
    post(collector.ingest_v3, *events)
    keep(root, collector.ingest_v3, *events)
    code, told = verified(root, at_once)
    assert (code, told["confirmed"], told["unknown"], told["missing"]) == (3, 49, 1, 0)
    (reason,) = told["reasons"]
    assert "answered 500" in reason


def test_an_endpoint_that_answers_nothing_is_not_asked_for_ever(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    collector.client.set_reading(is_down=True)
    keep(root, collector.ingest_v3, *(event(number) for number in range(2000)))
    code, told = verified(root, at_once)
    assert (code, told["missing"]) == (3, 0)
    assert "nothing is answered" in told["problem"]


def test_an_endpoint_that_cannot_be_reached_is_said(root: Path, at_once: AtOnce) -> None:
    keep(root, "http://127.0.0.1:9/api/v3/openmeter/events", *map(event, range(50)))
    code, told = verified(root, at_once)
    assert (code, told["missing"], told["unknown"]) == (3, 0, 50)
    (reason,) = told["reasons"]
    assert reason.startswith("http://127.0.0.1:9/api/v3/openmeter/events: ")
    assert reason.endswith("Connection refused")
    asked = run(root, at_once, "customers")
    assert asked.exit_code == 3
    assert "0 of 1 subject is a customer's" in asked.stdout
    assert "http://127.0.0.1:9/api/v3/openmeter/customers: " in asked.stderr
    assert "Connection refused" in asked.stderr


def test_a_token_that_may_not_read_is_said_and_not_shown(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    collector.client.set_tokens(["another"])
    keep(root, collector.ingest_v3, event(1))
    result = run(root, at_once, "verify")
    assert result.exit_code == 3
    assert "may this token read events?" in result.output
    assert TOKEN not in result.output


def test_only_what_is_asked_for_is_read_back(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    url = collector.ingest_v3
    now = time.time_ns() // 1_000_000
    keep(root, url, event(1), kept_ms=now - 7_200_000)
    keep(root, url, event(2), kept_ms=now - 60_000)
    keep(root, url, event(3), plugin="another")
    post(url, event(1), event(2), event(3))
    assert verified(root, at_once)[1]["confirmed"] == 3
    assert verified(root, at_once, "--since", "1h")[1]["confirmed"] == 2
    assert verified(root, at_once, "--since", "1h", "--plugin-id", PLUGIN)[1]["confirmed"] == 1


def test_with_several_endpoints_one_is_chosen(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    keep(root, collector.ingest_v3, event(1))
    keep(root, collector.ingest_v1, event(2))
    post(collector.ingest_v3, event(1), event(2))
    result = run(root, at_once, "verify")
    assert result.exit_code == 1
    assert f"choose one with --endpoint: {collector.ingest_v1}, {collector.ingest_v3}" in result.output
    assert verified(root, at_once, "--endpoint", collector.ingest_v1)[1]["confirmed"] == 1


def test_where_nothing_is_kept_that_is_said(root: Path, at_once: AtOnce) -> None:
    SpoolDirectory(root).close()
    result = run(root, at_once, "verify")
    assert (result.exit_code, "Nothing that was delivered is kept" in result.output) == (0, True)


def test_an_endpoint_that_is_none_of_openmeters_is_not_asked(root: Path, at_once: AtOnce) -> None:
    keep(root, "http://127.0.0.1:9/ingest", event(1))
    result = run(root, at_once, "verify")
    assert result.exit_code == 1
    assert "none of OpenMeter's URLs" in result.output


# Customers


def test_subjects_that_are_nobodys_are_shown_and_become_customers_after_a_yes(
    collector: CollectorProcess, root: Path, at_once: AtOnce
) -> None:
    url = collector.ingest_v3
    collector.client.set_tokens([])
    collector.client.add_customer("holding", "daughter, inc.")
    collector.client.set_tokens([TOKEN])
    long = "字" * 300
    subjects = ["acme", "daughter, inc.", "stranger", "stranger", "Acme", "one, two", " blank ", long]
    keep(root, url, *(event(number, subject=subject) for number, subject in enumerate(subjects)))
    wait(root, url, event(100, subject="late"))
    result = run(root, at_once, "customers", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["unassigned"] == {"stranger": 2, "Acme": 1, "one, two": 1, " blank ": 1, long: 1, "late": 1}
    assert told["subjects"] == 8
    refused = run(root, at_once, "customers", "--create", stdin="n\n")
    assert (refused.exit_code, "Make 6 customers" in refused.output) == (1, True)
    assert run(root, at_once, "customers").exit_code == 1
    assert run(root, at_once, "customers", "--create", stdin="y\n").exit_code == 0
    after = run(root, at_once, "customers")
    assert (after.exit_code, "each of them a customer's" in after.output) == (0, True)
    post(url, *(event(number, subject=subject) for number, subject in enumerate(subjects)))
    assert verified(root, at_once)[1]["unassigned"] == 0


def test_one_customer_is_told_as_one(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    keep(root, collector.ingest_v3, event(1), event(2, subject="stranger"))
    assert "1 customer made." in run(root, at_once, "customers", "--create", stdin="y\n").output


def test_a_subject_that_cannot_be_asked_for_is_said(collector: CollectorProcess, root: Path, at_once: AtOnce) -> None:
    keep(root, collector.ingest_v1, event(1, subject="a\0b"), event(2))
    result = run(root, at_once, "customers", "--json")
    assert (result.exit_code, list(json.loads(result.stdout)["unknown"])) == (3, ["a\0b"])
