"""`kong-metering spool deliver`, to a real HTTP server."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering.commands.deliver import LEFT_TO_SERVERS
from kong_metering.commands.endurance import ROUNDS, TRIES
from kong_metering.commands.handdelivery import Timing
from kong_metering.eventlog.log import EventLog
from kong_metering.spool import deadletters
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import SpoolDirectory, survey
from kong_metering.spool.identity import QueueIdentity
from tests.support.clock import FakeClock
from tests.support.waiting import wait_until
from tests.unit.commands.helpers import (
    HOUR,
    NOW,
    PLUGIN,
    damage,
    event,
    events_of,
    holder,
    killed_before_it_wrote,
    run,
    run_json,
    sent_at,
    start,
    waiting,
)
from tests.unit.ingest.ingest_server import Exchange, IngestServer, answer

if TYPE_CHECKING:
    from kong_metering.commands.holding import IsWanted

Deliver = Callable[..., list[object]]


class Waiting:
    """A clock that waits at once; `pauses` has how long."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self._clock = FakeClock()
        self._clock.set_wall(time.time())
        self.timing = Timing(self._clock, self._wait)

    def _wait(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._clock.advance(seconds)


@pytest.fixture
def at_once() -> Waiting:
    return Waiting()


def choking(*numbers: int, fails: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    """Fail at requests that hold one of these events."""
    ids = {f"{number:08d}:api_request" for number in numbers}

    def react(exchange: Exchange) -> None:
        bad = any(each["id"] in ids for each in exchange.server.requests[-1].events)
        fails(exchange) if bad else exchange.reply(204)

    return react


@pytest.fixture
def queue(endpoint: IngestServer) -> QueueIdentity:
    return QueueIdentity(PLUGIN, "metering-and-billing", endpoint.url)


@pytest.fixture
def deliver(token: Path) -> Deliver:
    return lambda *more: ["deliver", "--plugin-id", PLUGIN, "--token-file", token, *more]


def received(endpoint: IngestServer) -> list[bytes]:
    """All events in the order in which they came."""
    return [json.dumps(each).encode() for request in endpoint.requests for each in request.events]


def letters(root: Path) -> Counter[str]:
    return Counter(stored.letter.reason for stored in DeadLetters(root / DEAD_LETTERS).letters())


def refuse(*numbers: int) -> Callable[[Exchange], None]:
    """Refuse requests that hold one of these events, without naming it."""
    return choking(*numbers, fails=answer(400, b'{"detail": "bad event"}'))


def test_what_dead_processes_left_is_delivered_in_order(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(250, 300)], queue)
    waiting(root, [event(n) for n in range(250)], queue, accepted=NOW - HOUR)
    result = run(root, *deliver("--batch-size", 100))
    assert (result.exit_code, result.stdout) == (0, "300 events delivered.\n")
    assert received(endpoint) == [event(n) for n in range(300)]
    assert endpoint.requests[0].headers["Authorization"] == "Bearer s3cr3t-t0ken"
    assert survey(root) == []


def kept(root: Path) -> list[bytes]:
    delivered = Delivered(root, lambda: NOW)
    return [stored.payload for segment in delivered.segments() for stored in segment.events()]


def test_what_is_delivered_is_kept_to_be_read_back_unless_nothing_is_to_be(
    root: Path, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(3)], queue)
    assert run(root, *deliver("--keep-delivered", 0)).exit_code == 0
    assert kept(root) == []
    waiting(root, [event(n) for n in range(3, 6)], queue)
    assert run(root, *deliver()).exit_code == 0
    assert kept(root) == [event(n) for n in range(3, 6)]


def test_what_a_killed_server_had_delivered_is_kept_when_its_shared_memory_is_looked_at(
    root: Path, queue: QueueIdentity, deliver: Deliver
) -> None:
    killed_before_it_wrote(root, 3, written=3, done=3, queue=queue)
    waiting(root, [event(3)], queue)
    assert run(root, *deliver()).stdout == "1 event delivered.\n"
    assert sorted(kept(root)) == [event(n) for n in range(4)]


def test_json_tells_the_account(root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver) -> None:
    waiting(root, [event(n) for n in range(20)], queue)
    endpoint.on_request = refuse(7)
    account = run_json(root, *deliver())
    assert account == {
        "delivered": 19,
        "dead_letters": {"rejected": 1},
        "left": 0,
        "held": 0,
        "held_by": [],
        "delivered_by_servers": 0,
        "unanswered_by": [],
        "server_problems": [],
        "problem": None,
    }


def test_refused_events_become_dead_letters_with_the_endpoints_words(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(100)], queue)
    endpoint.on_request = refuse(0, 41, 99)
    result = run(root, *deliver())
    assert result.exit_code == 0
    assert result.stdout == "97 events delivered.\nGiven up, and kept as dead letters: 3 rejected.\n"
    kept = [stored.letter for stored in DeadLetters(root / DEAD_LETTERS).letters()]
    assert sorted(each.event for each in kept) == [event(0), event(41), event(99)]
    assert {each.queue for each in kept} == {queue}
    assert "answered 400" in kept[0].answer
    assert "bad event" in kept[0].answer
    assert survey(root) == []


def test_no_older_dead_letter_is_dropped_for_a_new_one(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadletters.DeadLetters.__init__, "__kwdefaults__", {"max_bytes": 1000, "segment_bytes": 1000})
    waiting(root, [event(n) for n in range(100)], queue)
    endpoint.on_request = refuse(3, 33, 63)
    assert run(root, *deliver()).exit_code == 0
    assert letters(root) == {"rejected": 3}


def test_the_endpoint_names_the_bad_one(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(10)], queue)

    def react(exchange: Exchange) -> None:
        found = [n for n, each in enumerate(exchange.server.requests[-1].events) if each["id"].startswith("00000004")]
        body = json.dumps({"detail": f'Error at "/{found[0]}/subject"'}) if found else ""
        exchange.reply(400 if found else 204, body.encode())

    endpoint.on_request = react
    assert run(root, *deliver()).exit_code == 0
    assert letters(root) == {"rejected": 1}
    assert [len(request.events) for request in endpoint.requests] == [10, 9, 1]


def test_an_event_that_the_endpoint_names_falsely_is_delivered(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(300)], queue)
    taken: set[str] = set()

    def blame_the_first(exchange: Exchange) -> None:
        ids = [each["id"] for each in exchange.server.requests[-1].events]
        is_bad = any(each.startswith("00000104") for each in ids)
        taken.update([] if is_bad else ids)
        exchange.reply(400 if is_bad else 204, b'{"detail": "Error at \\"/0/subject\\""}' if is_bad else b"")

    endpoint.on_request = blame_the_first
    assert run(root, *deliver()).exit_code == 0
    assert letters(root) == {"rejected": 1}
    assert len(taken) == 299


def test_events_never_leave_for_another_endpoint(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(1)], QueueIdentity(PLUGIN, "metering-and-billing", "https://elsewhere.example/events"))
    result = run(root, *deliver("--endpoint", endpoint.url))
    assert result.exit_code == 1
    words = result.stderr.replace("\n", " ")
    assert f"no events were accepted for {endpoint.url}" in words
    assert "events never leave for another endpoint than their own" in words
    assert "https://elsewhere.example/events" in words
    waiting(root, [event(2)], queue)
    assert "choose one with --endpoint" in run(root, *deliver()).stderr
    assert run(root, *deliver("--endpoint", endpoint.url)).exit_code == 0
    assert received(endpoint) == [event(2)]
    assert len(survey(root)) == 1


def test_another_entitys_events_stay(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    other = QueueIdentity("another", "metering-and-billing", endpoint.url)
    waiting(root, [event(1)], other)
    result = run(root, *deliver())
    assert result.exit_code == 1
    assert f"nothing waits for the plugin {PLUGIN}" in result.stderr
    waiting(root, [event(2)], queue)
    assert run(root, *deliver()).exit_code == 0
    assert events_of(root, other) == [event(1)]


def test_what_a_living_process_holds_is_its_own(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    with holder(root, queue) as pid:
        result = run(root, *deliver("--wait", "1s"), width=300)
        assert result.exit_code == LEFT_TO_SERVERS
        assert result.stdout == ""
        assert f"held by process {pid}, which delivers them itself." in result.stderr
        assert "Kong's error log says why" in result.stderr
        waiting(root, [event(1)], queue)
        result = run(root, *deliver("--wait", "1s"), width=300)
        assert (result.exit_code, result.stdout) == (0, "1 event delivered.\n")
        assert f"held by process {pid}" in result.stderr
    assert received(endpoint) == [event(1)]


def test_json_tells_who_holds_the_rest(root: Path, queue: QueueIdentity, deliver: Deliver) -> None:
    with holder(root, queue) as pid:
        result = run(root, *deliver("--json", "--wait", "1s"))
    account = json.loads(result.stdout)
    assert result.exit_code == LEFT_TO_SERVERS
    assert account["unanswered_by"] == [pid]
    assert account["held"] >= 100
    assert (account["held_by"], account["delivered"], account["problem"]) == ([pid], 0, None)


def test_a_holder_in_another_container_is_told_as_one(root: Path, queue: QueueIdentity, deliver: Deliver) -> None:
    with holder(root, queue) as pid:
        (part,) = root.glob("proc-*")
        # It would miss its directory at the next segment.
        os.kill(pid, signal.SIGSTOP)
        # As it looks from outside: its name has an id that is nobody's here.
        part.rename(root / part.name.replace(f"proc-{pid}-", "proc-4194999-"))
        result = run(root, *deliver("--wait", "1s"), width=300)
    assert result.exit_code == LEFT_TO_SERVERS
    assert "held by a process in another container (4194999 there), which delivers them itself." in result.stderr


def test_a_log_that_a_server_is_just_looking_at_is_waited_for(
    root: Path, queue: QueueIdentity, deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(root, [event(1)], queue)
    looks: list[int] = []
    adopt = SpoolDirectory.adopt

    def adopts_later(spool: SpoolDirectory, is_wanted: IsWanted, held_back: Callable[[], Container[Path]]) -> object:
        looks.append(1)
        return adopt(spool, is_wanted if len(looks) > 3 else lambda _: False, held_back)

    monkeypatch.setattr(SpoolDirectory, "adopt", adopts_later)
    assert run(root, *deliver()).stdout == "1 event delivered.\n"


def test_a_failing_endpoint_ends_it_and_loses_nothing(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, at_once: Waiting
) -> None:
    waiting(root, [event(n) for n in range(30)], queue)

    def react(exchange: Exchange) -> None:
        exchange.reply(204 if len(exchange.server.requests) == 1 else 503, b"busy")

    endpoint.on_request = react
    result = run(root, *deliver("--batch-size", 11), width=400, timing=at_once.timing)
    assert result.exit_code == 1
    assert result.stdout == "11 events delivered.\n"
    assert result.stderr.startswith(f"Could not deliver 11 events, will try again: {endpoint.url} answered 503: busy\n")
    problem = f"nothing gets through any more: {endpoint.url} answered 503: busy; 19 events left, and nothing is lost"
    assert f"Error: {problem}: run it again later" in result.stderr
    assert at_once.pauses == [0.5, 1, 2] + [4] * (ROUNDS - 4)
    # OpenMeter may have a part of what it answered 500 to; only the oldest batch was ever sent.
    assert run_json(root, "status")["queues"][0]["may_have_arrived"] == 11
    assert letters(root) == {}
    endpoint.on_request = answer(204)
    assert run(root, *deliver()).stdout == "19 events delivered.\n"


def test_an_endpoint_that_refuses_everything_gets_nothing_blamed(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, at_once: Waiting
) -> None:
    waiting(root, [event(n) for n in range(30)], queue)
    endpoint.on_request = answer(400, b"wrong path")
    result = run(root, *deliver("--batch-size", 10), width=400, timing=at_once.timing)
    assert (result.exit_code, result.stdout) == (1, "0 events delivered.\n")
    assert "nothing gets through: " in result.stderr
    assert "wrong path; 30 events left, and nothing is lost: run it again later" in result.stderr
    assert letters(root) == {}
    assert events_of(root, queue) == [event(n) for n in range(30)]


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (429, TRIES)])
def test_what_surely_did_not_arrive_is_not_ambiguous(  # noqa: PLR0913, PLR0917 - fixtures
    root: Path,
    endpoint: IngestServer,
    queue: QueueIdentity,
    deliver: Deliver,
    at_once: Waiting,
    status: int,
    tries: int,
) -> None:
    waiting(root, [event(1)], queue)
    endpoint.on_request = answer(status, headers={"Retry-After": "7"})
    result = run(root, *deliver(), timing=at_once.timing)
    assert result.exit_code == 1
    assert "s3cr3t" not in result.output
    assert len(endpoint.requests) == tries
    assert at_once.pauses == [7] * (tries - 1)
    assert run_json(root, "status")["queues"][0]["may_have_arrived"] == 0


def test_an_endpoint_that_is_not_there(root: Path, token: Path, at_once: Waiting) -> None:
    waiting(root, [event(1)], QueueIdentity(PLUGIN, "m", "http://127.0.0.1:9/events"))
    result = run(root, "deliver", "--plugin-id", PLUGIN, "--token-file", token, timing=at_once.timing)
    assert result.exit_code == 1
    assert "refused" in result.stderr
    assert at_once.pauses == [0.5, 1, 2, 4]
    assert run_json(root, "status")["queues"][0]["may_have_arrived"] == 0
    assert len(events_of(root, QueueIdentity(PLUGIN, "m", "http://127.0.0.1:9/events"))) == 1


# -- whose fault a failure is


@pytest.mark.parametrize("bad", [0, 4, 9])
@pytest.mark.parametrize("fails", [answer(503, b"out of order"), answer(403, b"blocked"), Exchange.reset])
def test_an_event_that_fails_by_itself_is_found(  # noqa: PLR0913, PLR0917 - fixtures
    root: Path,
    endpoint: IngestServer,
    queue: QueueIdentity,
    deliver: Deliver,
    at_once: Waiting,
    fails: Callable[[Exchange], None],
    bad: int,
) -> None:
    waiting(root, [event(n) for n in range(10)], queue)
    endpoint.on_request = choking(bad, fails=fails)
    result = run(root, *deliver(), timing=at_once.timing)
    assert (result.exit_code, result.stdout) == (
        0,
        "9 events delivered.\nGiven up, and kept as dead letters: 1 rejected.\n",
    )
    assert [stored.letter.event for stored in DeadLetters(root / DEAD_LETTERS).letters()] == [event(bad)]
    assert survey(root) == []


def test_many_bad_ones_in_a_row_do_not_hold_the_others_up(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, at_once: Waiting
) -> None:
    waiting(root, [event(n) for n in range(200)], queue)
    endpoint.on_request = choking(*range(20), fails=Exchange.reset)
    result = run(root, *deliver(), timing=at_once.timing)
    assert result.stdout == "180 events delivered.\nGiven up, and kept as dead letters: 20 rejected.\n"
    assert sorted(stored.letter.event for stored in DeadLetters(root / DEAD_LETTERS).letters()) == [
        event(n) for n in range(20)
    ]


def test_a_dead_letter_has_all_of_the_endpoints_words(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(20)], queue)
    endpoint.on_request = choking(7, fails=answer(400, b"x" * 3000 + b" and this is the point"))
    assert run(root, *deliver()).exit_code == 0
    (stored,) = DeadLetters(root / DEAD_LETTERS).letters()
    assert stored.letter.answer.endswith("and this is the point")


def test_an_endpoint_that_fails_at_random_gets_all_in_the_end(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, at_once: Waiting
) -> None:
    waiting(root, [event(n) for n in range(1000)], queue)
    chance = random.Random(1)  # noqa: S311
    endpoint.on_request = lambda exchange: exchange.reply(503 if chance.random() < 0.7 else 204)
    result = run(root, *deliver("--batch-size", 10), timing=at_once.timing)
    assert (result.exit_code, result.stdout) == (0, "1,000 events delivered.\n")


def test_what_overtook_a_bad_one_does_not_come_again_after_an_outage(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, at_once: Waiting
) -> None:
    waiting(root, [event(n) for n in range(100)], queue)
    taken: list[bytes] = []

    def react(exchange: Exchange) -> None:
        events = [json.dumps(each).encode() for each in exchange.server.requests[-1].events]
        if event(0) in events or len(taken) >= 15:
            exchange.reply(503)
            return
        taken.extend(events)
        exchange.reply(204)

    endpoint.on_request = react
    result = run(root, *deliver("--batch-size", 10), timing=at_once.timing)
    assert result.exit_code == 1
    assert sorted([*taken, *events_of(root, queue)]) == [event(n) for n in range(100)]


def test_what_was_sent_long_ago_without_an_answer_is_not_sent_again(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    waiting(root, [event(n) for n in range(10)], queue)
    sent_at(root, 4, NOW - 25 * HOUR)
    result = run(root, *deliver("--batch-size", 3))
    assert result.stdout == "6 events delivered.\nGiven up, and kept as dead letters: 4 ambiguous.\n"
    assert received(endpoint) == [event(n) for n in range(4, 10)]
    kept = [stored.letter for stored in DeadLetters(root / DEAD_LETTERS).letters()]
    assert [each.event for each in kept] == [event(n) for n in range(4)]
    assert kept[0].answer == "sent more than 24 hours ago without an answer, and may have arrived"


def test_what_was_sent_within_the_window_is_sent_again(root: Path, queue: QueueIdentity, deliver: Deliver) -> None:
    waiting(root, [event(n) for n in range(4)], queue)
    sent_at(root, 4, NOW - 25 * HOUR)
    assert run(root, *deliver("--dedupe-window", "32d")).stdout == "4 events delivered.\n"
    assert letters(root) == {}


def test_a_log_whose_position_is_lost_is_in_doubt(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver
) -> None:
    for accepted in (NOW - 30 * HOUR, NOW - HOUR):
        log = waiting(root, [event(accepted % 1000)], queue, accepted=accepted)
        (log.directory / "position").unlink()
    assert run(root, *deliver()).exit_code == 0
    assert len(received(endpoint)) == 1
    assert letters(root) == {"ambiguous": 1}


def test_damage_becomes_a_dead_letter(root: Path, queue: QueueIdentity, deliver: Deliver) -> None:
    damage(waiting(root, [event(n) for n in range(5)], queue), 1, 4)
    result = run(root, *deliver())
    assert result.stdout == "3 events delivered.\nGiven up, and kept as dead letters: 2 unreadable.\n"
    assert letters(root) == {"unreadable": 2}
    assert survey(root) == []
    assert len(list((root / "damaged").rglob("*.bytes"))) == 2


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_everything_consistent(
    root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver, interruption: signal.Signals
) -> None:
    waiting(root, [event(n) for n in range(50)], queue)
    endpoint.on_request = lambda exchange: exchange.reply(204) if len(endpoint.requests) < 3 else exchange.hang()
    with start(root, *deliver("--batch-size", 10)) as process:
        wait_until(lambda: len(endpoint.requests) == 3, "the third batch is being sent")
        process.send_signal(interruption)
        stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + interruption
    assert stdout == b"20 events delivered.\n"
    assert b"Interrupted: 30 events left, and nothing is lost." in stderr
    (found,) = survey(root)
    assert found.holder is None
    view = EventLog.view(found.directory)
    assert (view.waiting, view.sent_at(21) is None, view.sent_at(30) is None, view.sent_at(31)) == (
        30,
        False,
        False,
        None,
    )


def test_ctrl_c_ends_a_pause(root: Path, endpoint: IngestServer, queue: QueueIdentity, deliver: Deliver) -> None:
    waiting(root, [event(1)], queue)
    endpoint.on_request = answer(429, headers={"Retry-After": "60"})
    with start(root, *deliver()) as process:
        wait_until(lambda: endpoint.requests, "the request came")
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert len(events_of(root, queue)) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"two words", "one word"), (b"caf\xe9", "one word"), (b"a\nb", "one word")],
)
def test_a_file_without_a_token(  # noqa: PLR0913, PLR0917 - fixtures
    root: Path, endpoint: IngestServer, queue: QueueIdentity, token: Path, deliver: Deliver, content: bytes, said: str
) -> None:
    waiting(root, [event(1)], queue)
    token.write_bytes(content)
    result = run(root, *deliver(), width=300)
    assert result.exit_code == 1
    assert said in result.stderr
    assert endpoint.requests == []
    token.unlink()
    assert "No such file" in run(root, *deliver()).stderr


def test_a_token_from_stdin(root: Path, endpoint: IngestServer, queue: QueueIdentity) -> None:
    waiting(root, [event(1)], queue)
    result = run(root, "deliver", "--plugin-id", PLUGIN, "--token-file", "-", stdin="0ther\n")
    assert result.exit_code == 0
    assert endpoint.requests[0].headers["Authorization"] == "Bearer 0ther"
    assert "0ther" not in result.output


def test_a_wrong_call(root: Path, deliver: Deliver, token: Path) -> None:
    SpoolDirectory(root)
    for more in (["--insecure", "--ca-bundle", token], ["--dedupe-window", "soon"], ["--batch-size", 0]):
        assert run(root, *deliver(*more)).exit_code == 2
    assert "such as 90s, 15m, 24h or 30d" in run(root, *deliver("--timeout", "1y")).stderr
