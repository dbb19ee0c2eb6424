"""One POST and what its answer means, over real sockets."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kong_metering import __version__
from kong_metering.config import PluginConfig
from kong_metering.ingest.client import Endpoint, IngestClient
from kong_metering.trial.outcome import Delivered, Failed, Outcome, Rejected, kind_of
from tests.support.clock import FakeClock
from tests.support.posts import INGEST_PATH
from tests.support.waiting import wait_until
from tests.unit.ingest.ingest_server import Exchange, IngestServer, Reaction, answer, broken_off, running

if TYPE_CHECKING:
    from tests.support.loglines import LogLines

TOKEN = "kpat_s3cr3t-Token"
SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
SHORT = 0.3  # a timeout, in seconds, for tests that run into it
LONG_ENOUGH = 1.5  # one for tests in which something must come before it, also on a busy machine, and then nothing more
BOUNDED = 30.0  # and what that may take on a busy machine

ClientMaker = Callable[..., IngestClient]


@pytest.fixture
def client(server: IngestServer, clock: FakeClock, log: LogLines) -> Iterator[ClientMaker]:
    """Make clients; whatever became of their requests, nothing was logged that holds the token."""
    made: list[IngestClient] = []

    def make(
        url: str | None = None, *, timeout: float = 10, keepalive: float = 60, verify: bool | str = True
    ) -> IngestClient:
        endpoint = Endpoint(url=url or server.url, token=TOKEN, timeout=timeout, keepalive=keepalive, verify=verify)
        assert TOKEN not in repr(endpoint)
        made.append(IngestClient(endpoint, clock))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not [text for _, text in log.lines if TOKEN in text]


def failed(outcome: Outcome) -> Failed:
    assert isinstance(outcome, Failed), outcome
    assert TOKEN not in outcome.reason
    assert TOKEN not in outcome.kind
    assert outcome.reason.isprintable()
    return outcome


def delivered(outcome: Outcome) -> Delivered:
    assert isinstance(outcome, Delivered), outcome
    return outcome


def rejected(outcome: Outcome) -> Rejected:
    assert isinstance(outcome, Rejected), outcome
    assert TOKEN not in outcome.reason
    return outcome


# -- the request -------------------------------------------------------------------------------------------------------


def test_one_event_is_posted_as_it_is(server: IngestServer, client: ClientMaker) -> None:
    assert client().send([b'{"id":"1"}']) == Delivered()
    (request,) = server.requests
    assert request.path == INGEST_PATH
    assert request.body == b'{"id":"1"}'
    assert request.headers == {
        "Host": server.url.split("/")[2],
        "Content-Type": SINGLE,
        "Content-Length": "10",
        "Authorization": f"Bearer {TOKEN}",
        "Accept": "application/json, application/problem+json",
        "Accept-Encoding": "identity",
        "User-Agent": f"kong-metering/{__version__}",
    }


def test_several_events_are_posted_as_a_batch(server: IngestServer, client: ClientMaker) -> None:
    events = [json.dumps({"id": str(number)}).encode() for number in range(3)]
    assert client().send(events) == Delivered()
    (request,) = server.requests
    assert request.headers["Content-Type"] == BATCH
    assert request.headers["Content-Length"] == str(len(request.body))
    assert request.body == b'[{"id": "0"},{"id": "1"},{"id": "2"}]'


def test_requests_of_one_client_do_not_mix(server: IngestServer, client: ClientMaker) -> None:
    sender = client()
    for events in ([b"{}"], [b"{}", b"{}"], [b'{"a":1}']):
        sender.send(events)
    assert [(request.headers["Content-Type"], request.body) for request in server.requests] == [
        (SINGLE, b"{}"),
        (BATCH, b"[{},{}]"),
        (SINGLE, b'{"a":1}'),
    ]


def test_events_are_not_compressed_and_not_touched(server: IngestServer, client: ClientMaker) -> None:
    event = json.dumps({"subject": "Zoë \N{SNOWMAN}" * 1000}, ensure_ascii=False).encode()
    client().send([event])
    assert server.requests[0].body == event
    assert "Content-Encoding" not in server.requests[0].headers
    assert "Transfer-Encoding" not in server.requests[0].headers


def test_a_large_batch_arrives_whole(server: IngestServer, client: ClientMaker) -> None:
    events = [b'{"id":"%06d","data":"%s"}' % (number, b"x" * 700) for number in range(10_000)]
    assert client().send(events) == Delivered()
    assert json.loads(server.requests[0].body)[-1]["id"] == "009999"


def test_the_path_and_query_of_the_url_are_kept(server: IngestServer, client: ClientMaker) -> None:
    client(server.url + "/?tenant=a%20b&x=%2F").send([b"{}"])
    assert server.requests[0].path == INGEST_PATH + "/?tenant=a%20b&x=%2F"


def test_credentials_in_the_url_do_not_replace_the_token_and_are_not_shown(
    server: IngestServer, client: ClientMaker
) -> None:
    server.on_request = answer(503)
    url = server.url.replace("//", "//someone:hunter2@")
    reason = failed(client(url).send([b"{}"])).reason
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert "hunter2" not in reason
    assert "answered 503" in reason


# -- the connection ----------------------------------------------------------------------------------------------------


def test_the_connection_is_kept_and_used_again(server: IngestServer, client: ClientMaker) -> None:
    sender = client()
    for status in (204, 202, 200, 400, 401, 500, 204):
        server.on_request = answer(status, b"" if status == 204 else b"some words")
        sender.send([b"{}"])
    assert [request.connection for request in server.requests] == [1] * 7


def test_a_connection_that_was_idle_for_too_long_is_not_used_again(
    server: IngestServer, client: ClientMaker, clock: FakeClock
) -> None:
    sender = client(keepalive=60)
    for pause in (0, 59, 60, 61, 1):
        clock.advance(pause)
        assert sender.send([b"{}"]) == Delivered()
    assert [request.connection for request in server.requests] == [1, 1, 1, 2, 2]


def test_without_keepalive_the_connection_is_kept_until_the_endpoint_ends_it(
    server: IngestServer, client: ClientMaker, clock: FakeClock
) -> None:
    sender = client(keepalive=0)
    sender.send([b"{}"])
    clock.advance(1_000_000)
    sender.send([b"{}"])
    assert server.connections == 1


def test_a_connection_that_the_endpoint_ended_is_replaced_without_a_failure(
    server: IngestServer, client: ClientMaker
) -> None:
    sender = client()
    assert sender.send([b"{}"]) == Delivered()
    server.end_connections()
    assert sender.send([b"{}"]) == Delivered()
    assert server.connections == 2


def test_an_endpoint_that_wants_the_connection_closed_gets_a_new_one(server: IngestServer, client: ClientMaker) -> None:
    server.on_request = answer(200, b"", {"Connection": "close"})
    sender = client()
    assert [sender.send([b"{}"]) for _ in range(3)] == [Delivered()] * 3
    assert server.connections == 3


def test_a_closed_client_has_no_connection_left(server: IngestServer, client: ClientMaker) -> None:
    sender = client()
    sender.send([b"{}"])
    sender.close()
    sender.send([b"{}"])
    assert server.connections == 2


def test_cookies_are_neither_kept_nor_sent(server: IngestServer, client: ClientMaker) -> None:
    numbers = itertools.count()
    server.on_request = lambda exchange: exchange.reply(200, b"", {"Set-Cookie": f"c{next(numbers)}=x; Path=/"})
    sender = client()
    for _ in range(20):
        sender.send([b"{}"])
    assert not any("Cookie" in request.headers for request in server.requests)


# -- the answer --------------------------------------------------------------------------------------------------------


def test_every_status_has_its_meaning_and_a_clear_reason(server: IngestServer, client: ClientMaker) -> None:
    sender = client()
    for status in range(200, 600):
        server.on_request = answer(status, b"some words")
        outcome = sender.send([b"{}", b"{}"])
        if status < 300:
            assert outcome == Delivered()
            continue
        words = "no explanation" if status == 304 else "some words"
        expected = f"{server.url} answered {status}: {words}"
        if status in (400, 413, 422):
            assert outcome == Rejected(expected)
            continue
        failure = failed(outcome)
        assert failure.reason.startswith(expected)
        assert failure.kind == str(status)
        assert failure.is_misconfigured == (status < 500 and status not in (408, 425, 429))
        assert ("redirects are not followed" in failure.reason) == (status < 400)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (HTTPStatus.UNAUTHORIZED, "is api_token right, and not expired?"),
        (HTTPStatus.FORBIDDEN, "may this api_token ingest events?"),
        (HTTPStatus.NOT_FOUND, "is ingest_endpoint the URL for events, with its path?"),
    ],
)
def test_a_configuration_trouble_comes_with_a_hint(
    server: IngestServer, client: ClientMaker, status: int, hint: str
) -> None:
    server.on_request = answer(status, b'{"detail":"no"}')
    assert failed(client().send([b"{}"])).reason == f'{server.url} answered {int(status)}: {{"detail":"no"}} ({hint})'


def test_words_of_the_endpoint_are_cut_and_escaped(server: IngestServer, client: ClientMaker) -> None:
    server.on_request = answer(500, b"\x1b[31m\r\nERROR\x00 \xff\xfe" + "\u202e".encode() + b"x" * 5000)
    reason = failed(client().send([b"{}"])).reason
    assert reason.isprintable()
    assert len(reason) < 600


@pytest.mark.parametrize("status", [400, 422, 413, 401, 503, 307])
def test_words_of_the_endpoint_are_kept_whole_beside_the_short_reason(
    server: IngestServer, client: ClientMaker, status: int
) -> None:
    point = "the point of it all"
    server.on_request = answer(status, f"{'x' * (4096 - len(point))}{point}{'y' * 100}".encode())
    outcome = client().send([b"{}"])
    assert isinstance(outcome, Failed | Rejected)
    assert f"{point}…" in outcome.words
    assert "yy" not in outcome.words
    assert outcome.words.startswith(f"{server.url} answered {status}: xxx")
    assert point not in outcome.reason
    assert len(outcome.reason) < 600


def test_short_words_of_the_endpoint_are_in_the_reason_whole(server: IngestServer, client: ClientMaker) -> None:
    server.on_request = answer(400, "some \N{SNOWMAN}\r\nwords".encode())
    outcome = rejected(client().send([b"{}"]))
    assert outcome.reason == outcome.words == f"{server.url} answered 400: some \N{SNOWMAN}\\r\\nwords"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_explained_and_not_followed(server: IngestServer, client: ClientMaker, status: int) -> None:
    with running(IngestServer()) as elsewhere:
        server.on_request = answer(status, b"", {"Location": elsewhere.url})
        failure = failed(client().send([b"{}"]))
    assert elsewhere.requests == []
    assert failure.is_misconfigured
    assert failure.reason == (
        f"{server.url} answered {status}: no explanation "
        f"(redirects are not followed; should ingest_endpoint be {elsewhere.url}?)"
    )


@pytest.mark.parametrize(
    "location", ["", "http://[", "//", "\xff\xfe", "http://a b/", "javascript:alert(1)", "x" * 5000]
)
def test_a_redirect_to_nonsense_is_explained_too(server: IngestServer, client: ClientMaker, location: str) -> None:
    server.on_request = answer(307, b"", {"Location": location})
    failure = failed(client().send([b"{}"]))
    assert "answered 307" in failure.reason
    assert "redirects are not followed" in failure.reason
    assert len(failure.reason) < 600


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("120", 120.0), (formatdate(FakeClock().wall() + 90, usegmt=True), 90.0), ("soon", None), (None, None)],
)
@pytest.mark.parametrize("status", [429, 503, 401])
def test_the_pause_that_the_endpoint_asks_for_is_read(
    server: IngestServer, client: ClientMaker, status: int, header: str | None, seconds: float | None
) -> None:
    server.on_request = answer(status, b"", {"Retry-After": header} if header else {})
    assert failed(client().send([b"{}"])).retry_after == seconds


# -- which event the answer is about -----------------------------------------------------------------------------------


def v1(detail: object) -> object:
    return {"type": "about:blank", "title": "Bad Request", "status": 400, "detail": detail, "instance": "urn:x"}


def v3(*fields: object) -> object:
    return {"status": 400, "detail": "x", "invalid_parameters": [{"field": field, "reason": "x"} for field in fields]}


KIN = 'request body has an error: doesn\'t match schema: Error at "/3/subject": minimum string length is 1'


@pytest.mark.parametrize(
    ("problem", "indexes"),
    [
        (v1(KIN), (3,)),
        (v1('Error at "/0": property "id" is missing'), (0,)),
        (v1('Error at "/12/subject": x | Error at "/3/id": x | Error at "/12/id": x'), (3, 12)),
        (v1('Error at "/subject": minimum string length is 1'), ()),
        (v1('Error at "/3x/subject": x'), ()),
        (v1("no event is named"), ()),
        # The validator prints the value too, as JSON: what a client wrote there names no event.
        (v1('Error at "/2/subject": x\nValue:\n  "/7/orders"'), (2,)),
        (v1('Error at "/2": x\nValue:\n  {"request_uri": "/7/orders", "a": "Error at \\"/8/subject\\""}'), (2,)),
        (v1(["not", "a", "text"]), ()),
        (v3("3.subject"), (3,)),
        (v3("[3].subject", "0", "12.data.tokens"), (0, 3, 12)),
        (v3("subject", "body.3", "3x.subject", "-1.subject", "99999999.subject", "", None, {}), ()),
        ({"invalid_parameters": "3.subject", "detail": KIN}, (3,)),
        ({"invalid_parameters": ["3.subject", None, 7, {}], "detail": None}, ()),
        ([], ()),
        ("3.subject", ()),
        (None, ()),
    ],
)
def test_the_events_that_the_endpoint_names_are_found(
    server: IngestServer, client: ClientMaker, problem: object, indexes: tuple[int, ...]
) -> None:
    server.on_request = answer(400, json.dumps(problem).encode(), {"Content-Type": "application/problem+json"})
    assert rejected(client().send([b"{}"] * 4)).indexes == indexes


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"[" * 60_000, b"9" * 10_000, b"\xff", b'{"detail":"\\ud800"}'])
def test_an_explanation_that_cannot_be_read_names_no_event(
    server: IngestServer, client: ClientMaker, body: bytes
) -> None:
    server.on_request = answer(422, body)
    outcome = rejected(client().send([b"{}"] * 4))
    assert outcome.indexes == ()
    assert outcome.reason.isprintable()


# -- an endpoint that takes its time -----------------------------------------------------------------------------------


def never_answers(exchange: Exchange) -> None:
    exchange.hang()


def drips_the_body(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 503 X\r\nContent-Length: 100000\r\n\r\n")
    exchange.drip()


def drips_chunks(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n")
    exchange.drip(b"1\r\nx\r\n")


def drips_a_chunk_size(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n")
    exchange.drip(b"0")


def hangs_in_the_body(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 503 X\r\nContent-Length: 100\r\n\r\nsome words")
    exchange.hang()


def hangs_in_the_headers(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 503 X\r\nContent-Le")
    exchange.hang()


def drips_the_headers(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 503 X\r\nX-Long: ")
    exchange.drip()


def hangs_in_an_interim_answer(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 103 Early Hints\r\nLink: ")
    exchange.hang()


def drips_the_status_line(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 ")
    exchange.drip()


def drips_interim_answers(exchange: Exchange) -> None:
    exchange.drip(b"HTTP/1.1 100 Continue\r\n\r\n")


def pours_interim_answers(exchange: Exchange) -> None:
    while not exchange.server.stopping.is_set():
        exchange.raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def refuses_to_read(status: int) -> Reaction:
    """Answer to the headers, and end the connection without reading the body."""

    def react(exchange: Exchange) -> None:
        while exchange.rfile.readline().strip():
            pass
        exchange.raw(b"HTTP/1.1 %d X\r\nContent-Length: 9\r\n\r\ntoo large" % status)
        exchange.connection.shutdown(socket.SHUT_RDWR)

    return react


@pytest.mark.parametrize(
    "reaction",
    [
        never_answers,
        hangs_in_an_interim_answer,
        drips_the_status_line,
        drips_interim_answers,
        pours_interim_answers,
    ],
)
def test_an_endpoint_without_an_answer_in_time_has_failed(
    server: IngestServer, client: ClientMaker, reaction: Reaction
) -> None:
    server.on_request = reaction
    started = time.monotonic()
    failure = failed(client(timeout=SHORT).send([b"{}"]))
    assert SHORT * 0.9 < time.monotonic() - started < BOUNDED
    assert "timed out" in failure.reason
    assert server.url in failure.reason
    assert not failure.is_misconfigured


@pytest.mark.parametrize(
    "reaction",
    [hangs_in_the_headers, drips_the_headers, drips_the_body, drips_chunks, drips_a_chunk_size, hangs_in_the_body],
)
def test_the_status_counts_when_the_words_after_it_do_not_end(
    server: IngestServer, client: ClientMaker, reaction: Reaction
) -> None:
    server.on_request = reaction
    sender = client(timeout=LONG_ENOUGH)
    started = time.monotonic()
    assert failed(sender.send([b"{}"])).kind == "503"
    assert time.monotonic() - started < BOUNDED
    server.on_request = answer(204)
    assert sender.send([b"{}"]) == Delivered()
    assert server.connections == 2


@pytest.mark.parametrize("rest", [b"Content-Length: 100\r\n\r\n{", b"Content-Le"])
def test_a_delivery_is_a_delivery_however_the_answer_goes_on(
    server: IngestServer, client: ClientMaker, rest: bytes
) -> None:
    def delivered_then_silence(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 202 Accepted\r\n" + rest)
        exchange.hang()

    server.on_request = delivered_then_silence
    assert client(timeout=LONG_ENOUGH).send([b"{}"]) == Delivered()


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"Content-Length: 100\r\n\r\n", b""),
        (b"Content-Length: 100000\r\n\r\n", b"x"),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"\r\n", b"x"),
    ],
)
def test_an_acceptance_that_does_not_end_is_waited_for_much_shorter_than_an_answer(
    server: IngestServer, client: ClientMaker, head: bytes, drop: bytes
) -> None:
    """It once held its queue for the whole timeout, request after request."""

    def accepted_without_end(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + head)
        exchange.drip(drop)

    server.on_request = accepted_without_end
    sender = client(timeout=BOUNDED)
    started = time.monotonic()
    assert sender.send([b"{}"]) == Delivered()
    assert time.monotonic() - started < BOUNDED
    assert not sender.is_connected
    server.on_request = answer(204)
    assert sender.send([b"{}"]) == Delivered()
    assert server.connections == 2


def test_the_words_of_a_refusal_may_take_longer_than_those_of_an_acceptance(
    server: IngestServer, client: ClientMaker
) -> None:
    def with_late_words(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 503 X\r\nContent-Length: 11\r\n\r\n")
        exchange.server.stopping.wait(1.5)
        exchange.raw(b"maintenance")

    server.on_request = with_late_words
    sender = client(timeout=BOUNDED)
    assert failed(sender.send([b"{}"])).reason.endswith("503: maintenance")
    assert sender.is_connected


def test_an_endpoint_that_does_not_read_has_failed(server: IngestServer, client: ClientMaker) -> None:
    server.on_connect = never_answers
    started = time.monotonic()
    failure = failed(client(timeout=SHORT).send([b"x" * 30_000_000]))
    assert time.monotonic() - started < BOUNDED
    assert "timed out" in failure.reason


def test_an_endpoint_that_does_not_shake_hands_has_failed(server: IngestServer, client: ClientMaker) -> None:
    server.on_connect = never_answers
    failure = failed(client(server.url.replace("http:", "https:"), timeout=SHORT).send([b"{}"]))
    assert "timed out" in failure.reason


def test_a_slow_answer_does_not_shorten_the_time_of_the_next(server: IngestServer, client: ClientMaker) -> None:
    def slow(exchange: Exchange) -> None:
        exchange.server.stopping.wait(1.6)
        exchange.reply(204)

    server.on_request = slow
    sender = client(timeout=3)
    assert [sender.send([b"{}"]) for _ in range(2)] == [Delivered()] * 2
    assert server.connections == 1


# -- interim answers ---------------------------------------------------------------------------------------------------

INTERIM = {
    100: b"HTTP/1.1 100 Continue\r\n\r\n",
    102: b"HTTP/1.1 102 Processing\r\n\r\n",
    103: b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nContent-Length: 7\r\n\r\n",
    199: b"HTTP/1.1 199 X\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
}
OUTCOMES = (204, 400, 503, 204, 422, 202, 400, 204)


def statuses(outcomes: Iterable[Outcome]) -> list[type[Outcome]]:
    return [type(outcome) for outcome in outcomes]


def meanings(statuses: Iterable[int]) -> list[type[Outcome]]:
    return [Delivered if status < 300 else Rejected if status in (400, 422) else Failed for status in statuses]


@pytest.mark.parametrize(
    "interim",
    [*INTERIM.values(), INTERIM[100] + INTERIM[102] * 3 + INTERIM[103], INTERIM[103] * 500],
    ids=[*map(str, INTERIM), "several", "very many"],
)
def test_interim_answers_are_read_over(server: IngestServer, client: ClientMaker, interim: bytes) -> None:
    sender = client()

    def send(status: int) -> Outcome:
        def answers_twice(exchange: Exchange) -> None:
            exchange.raw(interim)
            exchange.reply(status)

        server.on_request = answers_twice
        return sender.send([b"{}"])

    assert statuses(map(send, OUTCOMES)) == meanings(OUTCOMES)
    assert server.connections == 1


def test_an_interim_answer_may_come_late_and_the_final_one_later(server: IngestServer, client: ClientMaker) -> None:
    sender = client()

    def send(status: int) -> Outcome:
        def takes_its_time(exchange: Exchange) -> None:
            for interim in (INTERIM[102], INTERIM[103]):
                exchange.server.stopping.wait(0.05)
                exchange.raw(interim)
            exchange.server.stopping.wait(0.05)
            exchange.reply(status)

        server.on_request = takes_its_time
        return sender.send([b"{}"])

    assert statuses(map(send, OUTCOMES)) == meanings(OUTCOMES)
    assert server.connections == 1


@pytest.mark.parametrize("stray", [*INTERIM.values(), b"HTTP/1.1 204 X\r\n\r\n", INTERIM[103][:30], b"\r\n"])
def test_what_comes_after_an_answer_is_not_taken_for_the_next_one(
    server: IngestServer, client: ClientMaker, stray: bytes
) -> None:
    sender = client()

    def send(status: int) -> Outcome:
        server.on_request = lambda exchange: exchange.raw(
            b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status + stray
        )
        return sender.send([b"{}"])

    assert statuses(map(send, OUTCOMES)) == meanings(OUTCOMES)


UNCLEAR = {
    "204 with a length": b"HTTP/1.1 204 X\r\nContent-Length: 27\r\n\r\n",
    "204 in chunks": b"HTTP/1.1 204 X\r\nTransfer-Encoding: chunked\r\n\r\n",
    "304 with a length": b"HTTP/1.1 304 X\r\nContent-Length: 27\r\n\r\n",
    "two ways to tell the end": b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\nContent-Length: 32\r\n\r\n0\r\n\r\n",
    "a coding that is not known": b"HTTP/1.1 503 X\r\nTransfer-Encoding: gzip, chunked\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("unclear", UNCLEAR.values(), ids=UNCLEAR)
def test_the_rest_of_an_answer_whose_end_is_not_clear_is_not_taken_for_the_next_one(
    server: IngestServer, client: ClientMaker, unclear: bytes
) -> None:
    is_sent = threading.Event()

    def says_more_once_the_next_request_is_sent(exchange: Exchange) -> None:
        if is_sent.is_set():
            exchange.reply(503)
            return
        is_sent.set()
        exchange.raw(unclear)
        exchange.connection.recv(1, socket.MSG_PEEK)
        exchange.raw(b"HTTP/1.1 204 No Content\r\n\r\n")

    server.on_request = says_more_once_the_next_request_is_sent
    sender = client()
    sender.send([b"{}"])
    assert failed(sender.send([b"{}"])).kind == "503"


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_has_no_body_is_whole_with_its_head_whatever_that_says(
    server: IngestServer, client: ClientMaker, status: int
) -> None:
    is_over = threading.Event()

    def announces_a_body(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        is_over.wait()
        exchange.reset()

    server.on_request = announces_a_body
    outcomes: list[Outcome] = []
    sending = threading.Thread(target=lambda: outcomes.append(client(timeout=3600).send([b"{}"])))
    sending.start()
    try:
        wait_until(lambda: outcomes, "the answer is taken")
    finally:
        is_over.set()
        sending.join()
    assert statuses(outcomes) == meanings([status])


def test_interim_answers_that_come_between_two_requests_are_not_taken_for_an_answer(
    server: IngestServer, client: ClientMaker
) -> None:
    sender = client()
    said = threading.Event()

    def send(status: int) -> Outcome:
        def says_more_later(exchange: Exchange) -> None:
            exchange.reply(status)
            exchange.server.stopping.wait(0.05)
            exchange.raw(INTERIM[103])
            said.set()

        server.on_request = says_more_later
        outcome = sender.send([b"{}"])
        assert said.wait(BOUNDED)
        said.clear()
        return outcome

    assert statuses(map(send, OUTCOMES)) == meanings(OUTCOMES)


STRAY = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "later"])
def test_an_answer_that_nobody_asked_for_is_not_taken_for_that_to_the_next_request(
    server: IngestServer, tls_server: IngestServer, client: ClientMaker, *, is_tls: bool, is_late: bool
) -> None:
    endpoint = tls_server if is_tls else server
    sender = client(endpoint.url, verify=False)
    said = threading.Event()

    def send(status: int) -> Outcome:
        def answers_once_more(exchange: Exchange) -> None:
            final = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status
            if is_late:
                exchange.raw(final)
                exchange.server.stopping.wait(0.02)
                exchange.raw(STRAY)
            else:
                exchange.raw(final + STRAY)
            said.set()

        endpoint.on_request = answers_once_more
        outcome = sender.send([b"{}"])
        assert said.wait(BOUNDED)
        said.clear()
        return outcome

    assert statuses(map(send, OUTCOMES)) == meanings(OUTCOMES)


def test_another_protocol_is_no_answer_to_an_event(server: IngestServer, client: ClientMaker) -> None:
    server.on_request = lambda exchange: exchange.raw(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nHTTP/1.1 204 X\r\n\r\n"
    )
    sender = client()
    assert [failed(sender.send([b"{}"])).kind for _ in range(2)] == ["101"] * 2
    assert server.connections == 2


# -- a 2xx that is no acceptance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "content_type"),
    [
        (200, None),
        (200, "application/json; charset=utf-8"),
        (200, "application/problem+json"),
        (200, "text/plain"),
        (201, None),
        (202, "application/json"),
        (204, None),
    ],
)
def test_an_acceptance_comes_without_a_note(
    server: IngestServer, client: ClientMaker, status: int, content_type: str | None
) -> None:
    server.on_request = answer(status, b"", {"Content-Type": content_type} if content_type else {})
    assert delivered(client().send([b"{}"])).note == ""


@pytest.mark.parametrize(
    ("status", "content_type", "what"),
    [
        (200, "text/html; charset=utf-8", "200 with text/html"),
        (200, "Text/HTML;nonce=17", "200 with text/html"),
        (202, "image/png", "202 with image/png"),
        (207, None, "207"),
        (207, "application/json", "207 with application/json"),
        (203, "application/json", "203 with application/json"),
        (206, None, "206"),
    ],
)
def test_a_delivery_that_does_not_look_like_one_comes_with_a_note(
    server: IngestServer, client: ClientMaker, status: int, content_type: str | None, what: str
) -> None:
    server.on_request = answer(status, b"<html>", {"Content-Type": content_type} if content_type else {})
    assert delivered(client().send([b"{}"])).note == (
        f"{server.url} answers {what}, which is unusual for an acceptance, and counts as one "
        "(is ingest_endpoint the URL for events, with its path?)"
    )


@pytest.mark.parametrize("content_type", ["", "/", "x" * 5000, "a/b\x1b[31m", f"text/{TOKEN}", "text/html, \xff"])
def test_a_note_is_short_and_printable(server: IngestServer, client: ClientMaker, content_type: str) -> None:
    server.on_request = answer(207, b"", {"Content-Type": content_type})
    note = delivered(client().send([b"{}"])).note
    assert note.isprintable()
    assert len(note) < 600
    assert TOKEN.lower() not in note.lower()


# -- what the endpoint surely does not have ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 307, 401, 402, 403, 404, 405, 406, 409, 415, 425, 429, 451])
def test_a_refusal_of_the_request_itself_means_that_nothing_arrived(
    server: IngestServer, client: ClientMaker, status: int
) -> None:
    server.on_request = answer(status)
    assert not failed(client().send([b"{}"])).may_have_arrived


@pytest.mark.parametrize("status", [101, 408, 500, 502, 503, 504, 599])
def test_an_endpoint_that_read_the_request_and_failed_may_have_the_events(
    server: IngestServer, client: ClientMaker, status: int
) -> None:
    server.on_request = answer(status)
    assert failed(client().send([b"{}"])).may_have_arrived


@pytest.mark.parametrize(
    "reaction", [never_answers, drips_the_status_line, broken_off(b""), broken_off(b"garbage\r\n")]
)
def test_a_whole_request_without_an_answer_may_have_arrived(
    server: IngestServer, client: ClientMaker, reaction: Reaction
) -> None:
    server.on_request = reaction
    assert failed(client(timeout=SHORT).send([b"{}"])).may_have_arrived


def test_a_request_that_broke_off_while_it_was_sent_has_not_arrived(server: IngestServer, client: ClientMaker) -> None:
    server.on_connect = Exchange.reset
    assert not failed(client().send([b"x" * 30_000_000])).may_have_arrived


def test_a_request_that_was_not_read_in_time_has_not_arrived(server: IngestServer, client: ClientMaker) -> None:
    server.on_connect = never_answers
    assert not failed(client(timeout=SHORT).send([b"x" * 30_000_000])).may_have_arrived


@pytest.mark.parametrize("status", [200, 204, 500, 503])
def test_an_answer_before_the_request_was_read_says_that_nothing_arrived(
    server: IngestServer, client: ClientMaker, status: int
) -> None:
    server.on_connect = refuses_to_read(status)
    failure = failed(client().send([b"x" * 30_000_000]))
    assert failure.kind == str(status)
    assert not failure.may_have_arrived
    if status < 300:
        assert failure.reason == f"{server.url} answered {status} without reading the whole request"


def test_a_request_over_tls_that_was_not_read_has_not_arrived(tls_server: IngestServer, client: ClientMaker) -> None:
    tls_server.on_connect = refuses_to_read(503)
    assert not failed(client(tls_server.url, verify=False).send([b"x" * 30_000_000])).may_have_arrived


def test_a_batch_that_is_refused_before_it_was_read_is_refused(server: IngestServer, client: ClientMaker) -> None:
    server.on_connect = refuses_to_read(413)
    assert "answered 413: too large" in rejected(client().send([b"x" * 30_000_000])).reason


def test_an_endpoint_that_is_not_there_has_nothing(client: ClientMaker) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/events"
        assert not failed(client(url).send([b"{}"])).may_have_arrived
    assert not failed(client("http://nowhere.invalid/events").send([b"{}"])).may_have_arrived
    assert not failed(client("http:///events").send([b"{}"])).may_have_arrived


def test_an_endpoint_that_does_not_shake_hands_has_nothing(
    server: IngestServer, tls_server: IngestServer, client: ClientMaker, tmp_path: Path
) -> None:
    assert not failed(client(tls_server.url).send([b"{}"])).may_have_arrived
    assert not failed(client(tls_server.url, verify=str(tmp_path / "gone.pem")).send([b"{}"])).may_have_arrived
    assert not failed(client(server.url.replace("http:", "https:")).send([b"{}"])).may_have_arrived
    server.on_connect = never_answers
    assert not failed(client(server.url.replace("http:", "https:"), timeout=SHORT).send([b"{}"])).may_have_arrived
    server.on_connect = Exchange.reset
    assert not failed(client(server.url.replace("http:", "https:")).send([b"{}"])).may_have_arrived


# -- an endpoint that breaks -------------------------------------------------------------------------------------------


def test_a_connection_reset_before_the_request_is_read_is_a_failure(server: IngestServer, client: ClientMaker) -> None:
    server.on_connect = Exchange.reset
    failure = failed(client().send([b"x" * 1_000_000]))
    assert not failure.is_misconfigured
    assert server.url in failure.reason


def test_a_connection_reset_after_the_request_was_read_is_a_failure(server: IngestServer, client: ClientMaker) -> None:
    server.on_request = Exchange.reset
    sender = client()
    assert not failed(sender.send([b"{}"])).is_misconfigured
    server.on_request = answer(204)
    assert sender.send([b"{}"]) == Delivered()


def test_an_answer_that_breaks_off_counts_by_its_status(server: IngestServer, client: ClientMaker) -> None:
    server.on_request = broken_off(b"HTTP/1.1 400 X\r\nContent-Length: 100\r\n\r\nsome words")
    assert "answered 400" in rejected(client().send([b"{}"])).reason


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 100,
        b"\r\n\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 99999999999999999999 OK\r\n\r\n",
        b"HTTP/1.1 -1 OK\r\n\r\n",
        b"HTTP/7.0 200 OK\r\n\r\n",
        b"HTTP/1.1 500 X\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 500 X\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 " + b"9" * 100_000,
        b"<html>It works!</html>\n",
        b"HTTP/1.1 200 X\r\nContent-Length: 1, 2\r\n\r\nwords",
        b"\x15\x03\x01\x00\x02\x02\x50",
        b"\xff\xfe\xfd",
    ],
)
def test_garbage_instead_of_http_is_a_failure(server: IngestServer, client: ClientMaker, garbage: bytes) -> None:
    server.on_request = broken_off(garbage)
    failure = failed(client().send([b"{}"]))
    assert server.url in failure.reason
    assert len(failure.reason) < 600


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 503 X\r\nno colon here\r\n\r\nwords",
        b"HTTP/1.1 503 X\r\n: empty name\r\nContent-Length: many\r\n\r\nwords",
        b"HTTP/1.1 503 X\r\nContent-Length: -5\r\n\r\nwords",
        b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"HTTP/1.1 503 X\r\nContent-Encoding: gzip\r\n\r\nnot gzip",
        b"HTTP/1.1 503 X\r\nContent-Encoding: zstd, br, nonsense\r\n\r\nwords",
        b"HTTP/1.1 503 \xff\xff\r\nRetry-After: \xff\r\n\r\n",
        b"HTTP/1.0 503 X\r\n\r\nwords",
    ],
)
def test_a_status_with_garbage_around_it_still_counts(
    server: IngestServer, client: ClientMaker, garbage: bytes
) -> None:
    server.on_request = broken_off(garbage)
    assert failed(client().send([b"{}"])).kind == "503"


@pytest.mark.parametrize("headers", [b"A: b\r\n" * 101, b"A: " + b"x" * 100_000 + b"\r\n"], ids=["many", "long"])
def test_a_status_with_more_headers_than_are_read_still_counts(
    server: IngestServer, client: ClientMaker, headers: bytes
) -> None:
    sender = client()

    def send(status: int) -> Outcome:
        server.on_request = lambda exchange: exchange.raw(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, headers))
        return sender.send([b"{}"])

    assert statuses(map(send, OUTCOMES)) == meanings(OUTCOMES)
    assert server.connections == len(OUTCOMES)
    assert not sender.is_connected
    assert not sender.said_unasked


answers = st.binary(max_size=200) | st.builds(
    lambda status, headers, body: b"HTTP/1.1 %d X\r\n%b\r\n%b" % (status, headers, body),
    st.integers(min_value=0, max_value=1100),
    st.binary(max_size=60)
    | st.sampled_from([b"Location: //\r\n", b"Content-Length: x\r\n", b"Transfer-Encoding: chunked\r\n"]),
    st.binary(max_size=60),
)


def test_no_answer_at_all_makes_the_client_raise(server: IngestServer, client: ClientMaker) -> None:
    sender = client(timeout=2)

    @given(garbage=answers)
    @settings(max_examples=200)
    def send(garbage: bytes) -> None:
        server.on_request = broken_off(garbage)
        assert isinstance(sender.send([b"{}"]), Delivered | Failed | Rejected)

    send()


def test_a_port_where_nobody_listens_is_a_failure(client: ClientMaker) -> None:
    with socket.socket() as reserved:
        # Bound and not listening: connections are refused, and nobody else gets the port.
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/events"
        failure = failed(client(url).send([b"{}"]))
    assert "Connection refused" in failure.reason
    assert url in failure.reason
    assert not failure.is_misconfigured


def test_a_host_that_does_not_exist_is_a_failure(client: ClientMaker) -> None:
    failure = failed(client("http://nowhere.invalid/events").send([b"{}"]))
    assert "nowhere.invalid" in failure.reason
    assert not failure.is_misconfigured


@pytest.mark.parametrize(
    "url",
    [
        "http://*/events",
        "http://.example/events",
        "http://[::1/events",
        "http://127.0.0.1:99999/events",
        "http://" + "a" * 64 + ".example/events",
        "http:///events",
        "ftp://127.0.0.1/events",
        "events",
        "",
    ],
)
def test_a_url_that_cannot_be_used_is_a_trouble_of_the_configuration(client: ClientMaker, url: str) -> None:
    sender = client()
    sender._endpoint = Endpoint(url=url, token=TOKEN, timeout=1, keepalive=0, verify=True)
    for _ in range(2):
        assert failed(sender.send([b"{}"])).is_misconfigured


# -- an endpoint that says too much ------------------------------------------------------------------------------------


def pours(exchange: Exchange, head: bytes) -> None:
    exchange.raw(head)
    block = b"x" * 65536
    for _ in range(3000):  # 200 MB
        exchange.raw(block)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 503 X\r\nContent-Length: 1000000000\r\n\r\n",
        b"HTTP/1.1 400 X\r\nContent-Type: application/json\r\n\r\n",
        b"HTTP/1.1 302 X\r\nLocation: /elsewhere\r\n\r\n",
        b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n40000000\r\n",
    ],
)
def test_an_answer_without_end_takes_little_memory(server: IngestServer, client: ClientMaker, head: bytes) -> None:
    server.on_request = lambda exchange: pours(exchange, head)
    sender = client(timeout=20)
    tracemalloc.start()
    try:
        outcome = sender.send([b"{}"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000
    if head.startswith(b"HTTP/1.1 302"):
        assert "redirects are not followed" in failed(outcome).reason
    server.on_request = answer(204)
    assert sender.send([b"{}"]) == Delivered()


def test_an_answer_that_unpacks_to_very_much_takes_little_memory(server: IngestServer, client: ClientMaker) -> None:
    bomb = gzip.compress(b"x" * 100_000_000)
    server.on_request = answer(503, bomb, {"Content-Encoding": "gzip"})
    sender = client()
    tracemalloc.start()
    try:
        failed(sender.send([b"{}"]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", " GZip"])
def test_words_that_the_endpoint_has_packed_are_read(server: IngestServer, client: ClientMaker, coding: str) -> None:
    problem = b'{"detail": "Error at \\"/1/subject\\": it is empty"}'
    server.on_request = answer(400, gzip.compress(problem), {"Content-Encoding": coding})
    refusal = rejected(client().send([b"{}"] * 3))
    assert "it is empty" in refusal.reason
    assert refusal.indexes == (1,)


def test_packed_words_that_break_off_are_read_as_far_as_they_go(server: IngestServer, client: ClientMaker) -> None:
    packed = gzip.compress(b"the subject is empty", compresslevel=0)
    server.on_request = answer(400, packed[:-12], {"Content-Encoding": "gzip"})
    assert "the subject is" in rejected(client().send([b"{}"])).reason


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(b"")[:10] + b"\xff" * 20, gzip.compress(b"words")[:10], b"\x1f\x8b\xff"],
    ids=["damaged", "nothing but a head", "no head"],
)
def test_packed_words_that_cannot_be_read_are_no_gibberish(
    server: IngestServer, client: ClientMaker, packed: bytes
) -> None:
    server.on_request = answer(400, packed, {"Content-Encoding": "gzip"})
    assert rejected(client().send([b"{}"])).reason.endswith(f"answered 400: {len(packed)} bytes of gzip")


def test_words_that_are_not_packed_are_read_whatever_the_endpoint_says(
    server: IngestServer, client: ClientMaker
) -> None:
    server.on_request = answer(400, b"the subject is empty", {"Content-Encoding": "gzip"})
    assert "the subject is empty" in rejected(client().send([b"{}"])).reason


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [302, 400, 401, 500])
def test_an_endpoint_that_echoes_the_token_does_not_bring_it_into_a_reason(
    server: IngestServer, client: ClientMaker, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def echo(exchange: Exchange) -> None:
        words = f"{'x' * 190}{exchange.headers['Authorization']}".encode()
        exchange.reply(status, words, {"Location": f"/?token={TOKEN}"})

    server.on_request = echo
    with caplog.at_level(logging.DEBUG):
        outcome = client().send([b"{}"])
    assert isinstance(outcome, Failed | Rejected)
    assert TOKEN[:6] not in outcome.reason
    assert TOKEN[:6] not in outcome.words
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("padding", range(4096 - 20, 4096 + 2))
def test_no_part_of_the_token_is_left_where_long_words_are_cut(
    server: IngestServer, client: ClientMaker, padding: int
) -> None:
    server.on_request = answer(400, f"{'x' * padding}{TOKEN}".encode())
    assert TOKEN[:2] not in rejected(client().send([b"{}"])).words


@pytest.mark.parametrize("unfit", ["\r\n", "\n", "\0", "\x7f", "\N{SNOWMAN}"])
def test_a_token_that_no_header_can_hold_is_a_trouble_of_the_configuration_and_is_not_shown(
    server: IngestServer, client: ClientMaker, unfit: str
) -> None:
    sender = client()
    sender._endpoint = replace(sender.endpoint, token=f"kpat{unfit}s3cr3t")
    failure = failed(sender.send([b"{}"]))
    assert failure.is_misconfigured
    assert failure.reason == f"{server.url}: ValueError: Authorization holds characters that cannot stand in a header"
    assert server.requests == []


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls_server(tls_context: ssl.SSLContext) -> Iterator[IngestServer]:
    with running(IngestServer(tls_context)) as server:
        yield server


def test_a_certificate_of_an_unknown_authority_is_refused(tls_server: IngestServer, client: ClientMaker) -> None:
    failure = failed(client(tls_server.url).send([b"{}"]))
    assert "self-signed certificate" in failure.reason.replace("self signed", "self-signed")
    assert failure.is_misconfigured
    assert tls_server.requests == []


def test_without_ssl_verify_any_certificate_will_do(
    tls_server: IngestServer, client: ClientMaker, recwarn: pytest.WarningsRecorder
) -> None:
    sender = client(tls_server.url, verify=False)
    assert [sender.send([b"{}"]) for _ in range(2)] == [Delivered()] * 2
    assert tls_server.connections == 1
    assert list(recwarn) == []


def test_a_bundle_of_authorities_is_used_to_verify(
    tls_server: IngestServer, client: ClientMaker, certificate: Path
) -> None:
    assert client(tls_server.url, verify=f"{certificate}.public").send([b"{}"]) == Delivered()


def test_a_certificate_for_another_name_is_refused(
    tls_server: IngestServer, client: ClientMaker, certificate: Path
) -> None:
    url = tls_server.url.replace("127.0.0.1", "localhost")
    failure = failed(client(url, verify=f"{certificate}.public").send([b"{}"]))
    assert failure.is_misconfigured
    assert "localhost" in failure.reason


def test_a_bundle_that_is_gone_is_a_trouble_of_the_configuration(
    tls_server: IngestServer, client: ClientMaker, tmp_path: Path
) -> None:
    failure = failed(client(tls_server.url, verify=str(tmp_path / "gone.pem")).send([b"{}"]))
    assert "gone.pem" in failure.reason
    assert failure.is_misconfigured


def test_tls_answers_in_drips_are_bounded_too(tls_server: IngestServer, client: ClientMaker) -> None:
    tls_server.on_request = drips_the_status_line
    started = time.monotonic()
    assert "timed out" in failed(client(tls_server.url, verify=False, timeout=SHORT).send([b"{}"])).reason
    assert time.monotonic() - started < BOUNDED


def ends_without_a_word(data: bytes, ended: threading.Event | None = None) -> Callable[[Exchange], None]:
    """Answer with these bytes, and end the TCP connection without TLS's close-notify."""

    def talk(exchange: Exchange) -> None:
        if data:
            exchange.raw(data)
        exchange.close_connection = True
        exchange.connection.shutdown(socket.SHUT_RDWR)
        if ended:
            ended.set()

    return talk


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", ["2xx", "2xx"]),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", ["2xx", "2xx"]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}", ["2xx", "2xx"]),
        (b"HTTP/1.1 503 Busy\r\n\r\nlater", ["503", "503"]),
    ],
    ids=["without a body", "until the end", "less than it says", "a failure"],
)
def test_a_tls_endpoint_that_ends_without_close_notify_is_told_by_its_answer(
    tls_server: IngestServer, client: ClientMaker, data: bytes, kinds: list[str]
) -> None:
    ended = threading.Event()
    tls_server.on_request = ends_without_a_word(data, ended)
    sender = client(tls_server.url, verify=False)
    for kind in kinds:
        assert kind_of(sender.send([b"{}"])) == kind
        assert ended.wait(BOUNDED)
        ended.clear()
    assert tls_server.connections == 2


def test_a_tls_endpoint_that_ends_without_close_notify_and_an_answer_may_have_the_events(
    tls_server: IngestServer, client: ClientMaker
) -> None:
    tls_server.on_request = ends_without_a_word(b"")
    sender = client(tls_server.url, verify=False)
    assert failed(sender.send([b"{}"])).may_have_arrived
    tls_server.on_request = answer(204)
    assert sender.send([b"{}"]) == Delivered()


def test_an_idle_tls_connection_that_ended_without_close_notify_is_replaced(
    tls_server: IngestServer, client: ClientMaker
) -> None:
    ended = threading.Event()

    def ends_a_little_later(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 204 No Content\r\n\r\n")
        exchange.server.stopping.wait(0.02)
        ends_without_a_word(b"", ended)(exchange)

    tls_server.on_request = ends_a_little_later
    sender = client(tls_server.url, verify=False)
    for _ in range(3):
        assert sender.send([b"{}"]) == Delivered()
        assert ended.wait(BOUNDED)
        ended.clear()
    assert tls_server.connections == 3


def test_an_endpoint_without_tls_is_a_failure_for_https(server: IngestServer, client: ClientMaker) -> None:
    assert "SSL" in failed(client(server.url.replace("http:", "https:")).send([b"{}"])).reason


# -- the environment ---------------------------------------------------------------------------------------------------


def test_the_environment_changes_nothing(  # noqa: PLR0913, PLR0917 - fixtures
    tls_server: IngestServer,
    server: IngestServer,
    client: ClientMaker,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password something\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:1")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(tmp_path / "gone.pem"))
    assert client().send([b"{}"]) == Delivered()
    assert client(tls_server.url, verify=f"{certificate}.public").send([b"{}"]) == Delivered()
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {TOKEN}"}


# -- the endpoint of a configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "timeout", "keepalive"),
    [
        ({}, 10.0, 60.0),
        ({"timeout": 2500, "keepalive": 1500}, 2.5, 1.5),
        ({"timeout": 0, "keepalive": 0}, 60.0, 0.0),
        ({"timeout": -1, "keepalive": -1}, 60.0, 0.0),
        ({"timeout": 1e18}, 2_147_483.0, 60.0),
    ],
)
def test_milliseconds_of_the_configuration_become_seconds(
    changes: dict[str, float], timeout: float, keepalive: float
) -> None:
    config = PluginConfig.model_validate({"ingest_endpoint": "https://ingest.test", "api_token": TOKEN} | changes)
    endpoint = Endpoint.of(config, None)
    assert (endpoint.url, endpoint.token) == ("https://ingest.test", TOKEN)
    assert (endpoint.timeout, endpoint.keepalive) == (timeout, keepalive)


@pytest.mark.parametrize(
    ("ssl_verify", "ca_bundle", "verify"),
    [(True, None, True), (True, "/ca.pem", "/ca.pem"), (False, None, False), (False, "/ca.pem", False)],
)
def test_a_bundle_counts_only_where_certificates_are_verified(
    ca_bundle: str | None, verify: str | None, *, ssl_verify: bool
) -> None:
    config = PluginConfig(ingest_endpoint="https://ingest.test", api_token=TOKEN, ssl_verify=ssl_verify)
    assert Endpoint.of(config, ca_bundle).verify == verify
