"""`kong-metering spool redirect`, the program itself, beside real plugin servers and with real endpoints."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kong_metering.spool.accepted import Acceptances
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.directory import survey
from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.requests import REQUESTS
from tests.support.plugin_server import PluginServerProcess
from tests.support.waiting import wait_until
from tests.unit.commands.helpers import (
    HOUR,
    NOW,
    PLUGIN,
    dead_letters,
    event,
    events_of,
    holder,
    letter,
    run,
    sent_at,
    start,
    waiting,
)
from tests.unit.commands.serving import Gateway, command, received, wait_for
from tests.unit.ingest.ingest_server import Exchange, IngestServer, answer, running

OLD = QueueIdentity(PLUGIN, "metering-and-billing", "https://old.example/events")
NEW = QueueIdentity(PLUGIN, "metering-and-billing", "https://new.example/events")


@pytest.fixture
def old() -> Iterator[IngestServer]:
    with running(IngestServer()) as server:
        yield server


@pytest.fixture
def new() -> Iterator[IngestServer]:
    with running(IngestServer()) as server:
        yield server


@pytest.fixture
def serve() -> Iterator[Callable[..., Gateway]]:
    """Start plugin servers."""
    made: list[PluginServerProcess] = []

    def make(prefix: Path | None = None, socket_name: str = "metering-and-billing.sock") -> Gateway:
        made.append(PluginServerProcess("--socket-name", socket_name, prefix=prefix))
        return Gateway(made[-1].start(), socket_name)

    yield make
    for process in made:
        process.stop(signal.SIGKILL)


def to_new(*more: object) -> list[object]:
    return ["redirect", "--plugin-id", PLUGIN, "--to", NEW.endpoint, "--yes", *more]


def stuck(gateway: Gateway, old: IngestServer, count: int = 30) -> list[str]:
    """Have events wait at an endpoint that has accepted one; give their ids."""
    gateway.configure(old.url)
    wait_for(old, gateway.request(1))
    wait_until(lambda: gateway.status()["waiting"] == 0, "the first one is delivered")
    old.on_request = answer(503)
    old.requests.clear()
    ids = gateway.request(count)
    wait_until(lambda: len(gateway.waiting(old.url)) == count, "they are on disk")
    wait_until(lambda: old.requests, "one of them was tried")
    return ids


# ----------------------------------------------------------------------------------------- what a running server holds


def test_what_a_running_server_holds_goes_to_the_url_that_the_plugin_has_now(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    gateway = serve()
    ids = stuck(gateway, old)
    gateway.configure(new.url)
    later = gateway.request(5)
    wait_for(new, later)
    assert sorted(received(new)) == sorted(later)
    result = gateway.command("redirect", "--plugin-id", PLUGIN, "--endpoint", old.url, "--to", new.url, "--yes")
    assert (result.returncode, result.stdout.partition(".\n")[0]) == (0, f"30 events redirected to {new.url}")
    assert f"30 of them held by process {gateway.process.server_pid}" in result.stderr
    wait_for(new, ids)
    wait_until(lambda: gateway.status()["waiting"] == 0, "all are delivered")
    assert Counter(received(new)) == Counter(ids + later)
    assert gateway.waiting(old.url) == gateway.waiting(new.url) == []
    assert list((gateway.root / REQUESTS).iterdir()) == []


@pytest.mark.slow
def test_what_is_redirected_to_a_url_that_no_plugin_has_waits_there_and_what_comes_later_does_not(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer, token: Path
) -> None:
    """The configuration still has the old URL: what comes next waits there."""
    gateway = serve()
    ids = stuck(gateway, old)
    result = gateway.command("redirect", "--plugin-id", PLUGIN, "--to", new.url, "--yes", "--json")
    told = json.loads(result.stdout)
    assert (told["redirected"], told["redirected_by"], told["problems"]) == (30, [gateway.process.server_pid], [])
    assert gateway.waiting(new.url) == ids
    later = gateway.request(3)
    wait_until(lambda: gateway.waiting(old.url) == later, "what comes later waits at the old one")
    # A while later nobody has taken it back.
    tries = len(old.requests)
    wait_until(lambda: len(old.requests) > tries + 5, "the server goes on")
    assert gateway.waiting(new.url) == ids
    assert new.requests == []
    by_hand = gateway.command(
        "deliver", "--plugin-id", PLUGIN, "--endpoint", new.url, "--token-file", token, "--batch-size", 7
    )
    assert by_hand.stdout == "30 events delivered.\n"
    assert received(new) == ids
    old.on_request = answer(204)
    wait_until(lambda: gateway.status()["waiting"] == 0, "the later ones are delivered")
    assert gateway.process.stop() == 0


def test_what_is_in_flight_is_settled_first(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    gateway = serve()
    gate, ids = threading.Event(), stuck(gateway, old)
    accepted: list[str] = []

    def accept_late(exchange: Exchange) -> None:
        asked = [each["id"] for each in exchange.server.requests[-1].events]
        gate.wait(60)
        accepted.extend(asked)
        exchange.reply(204)

    old.on_request = accept_late
    old.requests.clear()
    wait_until(lambda: old.requests, "a request is under way")
    redirecting = start(gateway.root, "redirect", "--plugin-id", PLUGIN, "--to", new.url, "--yes", "--json")
    answers = gateway.root / REQUESTS
    wait_until(lambda: answers.is_dir() and list(answers.glob("*.done.json")), "the server has taken it up")
    assert len(gateway.waiting(old.url)) == 30
    gate.set()
    stdout, _ = redirecting.communicate(timeout=60)
    assert json.loads(stdout)["redirected"] == 30 - len(accepted)
    assert 0 < len(accepted) < 30
    assert sorted(accepted + gateway.waiting(new.url)) == sorted(ids)


@pytest.mark.slow
def test_marks_go_with_the_events(serve: Callable[..., Gateway], old: IngestServer, new: IngestServer) -> None:
    """Which ones may have arrived is known at the new endpoint too."""
    gateway = serve()
    stuck(gateway, old)
    before = json.loads(gateway.command("status", "--json").stdout)["queues"][0]["may_have_arrived"]
    assert before > 0
    result = gateway.command("redirect", "--plugin-id", PLUGIN, "--to", new.url, "--yes")
    assert "of them were sent without an answer so far, and may have arrived" in result.stderr
    (queue,) = [
        queue
        for queue in json.loads(gateway.command("status", "--json").stdout)["queues"]
        if queue["endpoint"] == new.url
    ]
    assert queue["may_have_arrived"] >= before


@pytest.mark.slow
def test_two_servers_give_up_what_each_of_them_holds(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    """Two gateways share a spool; one of them has the new URL already."""
    one = serve()
    ids = stuck(one, old)
    other = serve(one.process.prefix, "other.sock")
    other.configure(old.url)
    ids += other.request(20)
    wait_until(lambda: len(one.waiting(old.url)) == 50, "they are on disk")
    other.configure(new.url)
    result = one.command("redirect", "--plugin-id", PLUGIN, "--endpoint", old.url, "--to", new.url, "--yes", "--json")
    told = json.loads(result.stdout)
    assert (result.returncode, told["redirected"]) == (0, 50)
    assert told["redirected_by"] == sorted([one.process.server_pid, other.process.server_pid])
    wait_for(new, ids)
    assert Counter(received(new)) == Counter(ids)


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    root = tmp_path / "metering-spool"
    with holder(root, OLD) as pid:
        result = command(root, *to_new("--wait", "1s"))
        assert result.returncode == 1
        assert f"No answer from process {pid}, which holds" in result.stderr
    assert list((root / REQUESTS).iterdir()) == []


@pytest.mark.slow
def test_a_server_that_is_killed_meanwhile_loses_nothing(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    """It has taken the request up, and waits for an answer; what it held is free then, and moved by the command."""
    gateway = serve()
    ids = stuck(gateway, old)
    old.on_request = Exchange.hang
    old.requests.clear()
    wait_until(lambda: old.requests, "a request is under way")
    redirecting = start(gateway.root, "redirect", "--plugin-id", PLUGIN, "--to", new.url, "--yes", "--json")
    wait_until(lambda: list(gateway.root.glob(f"{REQUESTS}/*.done.json")), "the server has taken it up")
    os.kill(gateway.process.server_pid, signal.SIGKILL)
    stdout, _ = redirecting.communicate(timeout=60)
    told = json.loads(stdout)
    assert (redirecting.returncode, told["redirected"], told["left"]) == (0, 30, 0)
    assert gateway.waiting(new.url) == ids


@pytest.mark.slow
def test_each_event_arrives_once_while_requests_come_and_redirects_go_to_and_fro(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    """The plugin has the old URL all the time."""
    gateway = serve()
    ids, is_over = stuck(gateway, old), threading.Event()

    def go_on() -> None:
        while not is_over.wait(0.005):
            ids.extend(gateway.request(1))

    requests = threading.Thread(target=go_on)
    requests.start()
    try:
        for source, target in [(old, new), (new, old)] * 2:
            arguments = ("--endpoint", source.url, "--to", target.url)
            redirected = gateway.command("redirect", "--plugin-id", PLUGIN, *arguments, "--yes", "--json")
            assert redirected.returncode == 0, redirected
            assert json.loads(redirected.stdout)["redirected"] >= 30
    finally:
        is_over.set()
        requests.join()
    old.requests.clear()
    old.on_request = answer(204)
    wait_until(lambda: len(received(old)) >= len(ids) and not gateway.waiting(old.url), "all are delivered")
    assert gateway.waiting(new.url) == []
    assert new.requests == []
    assert Counter(received(old)) == Counter(ids)
    assert gateway.process.stop() == 0


def test_a_request_whose_asker_is_gone_is_removed(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    gateway = serve()
    ids = stuck(gateway, old)
    servers = [gateway.process.pid, gateway.process.server_pid]
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    redirecting = start(gateway.root, "redirect", "--plugin-id", PLUGIN, "--to", new.url, "--yes")
    wait_until(lambda: list(gateway.root.glob(f"{REQUESTS}/*.json")), "the request is there")
    redirecting.kill()
    redirecting.communicate()
    for pid in servers:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not list((gateway.root / REQUESTS).iterdir()), "nothing is left of it")
    assert gateway.waiting(old.url) == ids


# ------------------------------------------------------------------------------------------------- what nobody holds


def test_what_nobody_holds_is_redirected_with_its_ids_and_marks(root: Path) -> None:
    waiting(root, [event(n) for n in range(100)], OLD)
    sent_at(root, 10, NOW - HOUR)
    Acceptances(root).note(OLD.key)
    result = run(root, *to_new())
    assert result.exit_code == 0
    assert result.stdout.startswith(f"100 events redirected to {NEW.endpoint}.\n")
    assert "10 of them were sent without an answer so far" in result.stderr
    assert events_of(root, NEW) == [event(n) for n in range(100)]
    assert events_of(root, OLD) == []
    assert json.loads(run(root, "status", "--json").stdout)["queues"][0]["may_have_arrived"] == 10


def test_what_was_redirected_is_not_taken_back(
    serve: Callable[..., Gateway], old: IngestServer, new: IngestServer
) -> None:
    """The plugin's own URL is the old one, and the new one never accepted an event of it."""
    gateway = serve()
    root = gateway.root
    waiting(root, [event(n) for n in range(10)], gateway.identity(old.url))
    assert command(root, "redirect", "--plugin-id", PLUGIN, "--to", new.url, "--yes").returncode == 0
    gateway.configure(old.url)
    wait_for(old, gateway.request(1))
    tries = len(old.requests)
    wait_for(old, gateway.request(1))
    assert len(old.requests) > tries
    assert len(gateway.waiting(new.url)) == 10
    gateway.configure(new.url)
    wait_until(lambda: len(received(new)) == 10, "they are delivered once the plugin has the URL")


def test_again_it_has_nothing_to_do(root: Path) -> None:
    waiting(root, [event(1)], OLD)
    assert run(root, *to_new()).exit_code == 0
    result = run(root, *to_new("--endpoint", OLD.endpoint))
    assert result.exit_code == 1
    assert "no events were accepted for https://old.example/events" in result.stderr
    assert events_of(root, NEW) == [event(1)]


def test_nothing_is_changed_without_a_yes(root: Path) -> None:
    waiting(root, [event(1)], OLD)
    result = run(root, "redirect", "--plugin-id", PLUGIN, "--to", NEW.endpoint, stdin="n\n")
    assert result.exit_code == 1
    assert f"Redirect 1 waiting event to {NEW.endpoint}?" in result.stderr
    assert events_of(root, OLD) == [event(1)]


@pytest.mark.parametrize("url", ["", "new.example", "ftp://new.example/", "http://x y/", "http://[::"])
def test_a_url_that_is_none_is_refused(root: Path, url: str) -> None:
    waiting(root, [event(1)], OLD)
    result = run(root, "redirect", "--plugin-id", PLUGIN, "--to", url, "--yes")
    assert (result.exit_code, events_of(root, OLD)) == (2, [event(1)])


def test_the_url_where_they_wait_is_refused(root: Path) -> None:
    waiting(root, [event(1)], OLD)
    result = run(root, "redirect", "--plugin-id", PLUGIN, "--to", OLD.endpoint, "--endpoint", OLD.endpoint, "--yes")
    assert result.exit_code == 1
    assert "that is where they wait" in result.stderr


def test_credentials_in_the_url_are_not_kept(root: Path) -> None:
    waiting(root, [event(1)], OLD)
    result = run(root, "redirect", "--plugin-id", PLUGIN, "--to", "https://me:s3cret@new.example/events", "--yes")
    assert result.exit_code == 0
    assert events_of(root, NEW) == [event(1)]
    assert "s3cret" not in result.output
    assert not [path for path in root.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]


# -------------------------------------------------------------------------------------------------------- dead letters


def letters(root: Path) -> list[tuple[str, str, bytes, int]]:
    return [
        (stored.letter.queue.endpoint, stored.letter.reason, stored.letter.event, stored.time_ms)
        for stored in DeadLetters(root / DEAD_LETTERS).letters()
    ]


def test_dead_letters_go_along_on_request_and_stay_such(root: Path) -> None:
    dead_letters(root, letter("rejected", event(1), OLD), letter("ambiguous", event(2), OLD), now=NOW - HOUR)
    dead_letters(root, letter("rejected", event(3), QueueIdentity("other", "m", OLD.endpoint)))
    waiting(root, [event(4)], OLD)
    assert run(root, *to_new()).exit_code == 0
    assert {endpoint for endpoint, *_ in letters(root)} == {OLD.endpoint}
    result = run(root, *to_new("--dead-letters"))
    assert "2 dead letters redirected, and still dead letters" in result.stdout
    assert sorted(letters(root)) == [
        (NEW.endpoint, "ambiguous", event(2), NOW - HOUR),
        (NEW.endpoint, "rejected", event(1), NOW - HOUR),
        (OLD.endpoint, "rejected", event(3), NOW),
    ]
    assert run(root, "replay", "--all", "--plugin-id", PLUGIN, "--yes").exit_code == 0
    assert sorted(events_of(root, NEW)) == [event(1), event(4)]


def test_a_letter_that_a_killed_redirect_left_at_both_is_one_again(root: Path) -> None:
    dead_letters(
        root, letter("rejected", event(1), OLD), letter("rejected", event(1), NEW), letter("rejected", event(2), OLD)
    )
    result = run(root, *to_new("--dead-letters"))
    assert "2 dead letters redirected" in result.stdout
    assert sorted(letters(root)) == [
        (NEW.endpoint, "rejected", event(1), NOW),
        (NEW.endpoint, "rejected", event(2), NOW),
    ]


# ------------------------------------------------------------------------------------------------------------- a kill


@pytest.mark.slow
def test_a_redirect_that_is_killed_is_in_one_place_or_the_other(root: Path) -> None:
    for part in range(30):
        waiting(root, [event(part * 10 + n) for n in range(10)], OLD)
    redirecting = start(root, *to_new())
    wait_until(
        lambda: any(log.identity == NEW for log in survey(root)) or redirecting.poll() is not None, "it has begun"
    )
    redirecting.kill()
    redirecting.communicate()
    assert sorted(events_of(root, OLD) + events_of(root, NEW)) == sorted(event(n) for n in range(300))
    if events_of(root, OLD):
        assert run(root, *to_new()).exit_code == 0
    assert sorted(events_of(root, NEW)) == sorted(event(n) for n in range(300))
