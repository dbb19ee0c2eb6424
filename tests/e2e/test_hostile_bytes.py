"""Whatever bytes a client sends: the right one is billed, and nothing breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.e2e.declarative import consumer, document, metering, metering_at_once, service
from tests.e2e.hostile import ACME, MANY, TENANT, Till, is_printable_line, open_till
from tests.e2e.traffic import request
from tests.support.settings import attribute

if TYPE_CHECKING:
    from pathlib import Path

    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import OpenEchoTill
    from tests.e2e.traffic import Header

pytestmark = pytest.mark.e2e

ALICE = "b32379d9-3d28-5683-a79c-72139be6e34f"
# With its name, a line of 8 KB: the longest that nginx takes. The other is one byte longer.
LONGEST, TOO_LONG = "a" * 8177, "a" * 8178


@dataclass(frozen=True)
class Sent:
    """Header lines, the subject that they mean, and what they mean as an attribute, if that is something else.

    `early` is the subject where no access phase reads them; Kong's log record, which is all there is then, has only the
    first 100 headers. `refused`: nginx answers 400 before any plugin of a service runs.
    """

    headers: list[Header]
    subject: str | None
    attribute: str | None = None
    refused: bool = False
    is_seen_early: bool = True

    @property
    def expected_attribute(self) -> str | None:
        return self.subject if self.attribute is None else self.attribute

    @property
    def early(self) -> str | None:
        return self.subject if self.is_seen_early else None


CASES = {
    # -- bytes
    "latin-1": Sent([(TENANT, b"caf\xe9")], "café", "caf\ufffd"),
    "UTF-8": Sent([(TENANT, "café")], "café"),
    "no UTF-8 at all": Sent([(TENANT, b"\xff\xfe\x80")], "ÿþ\u241b80;", "\ufffd\ufffd\ufffd"),
    "overlong UTF-8": Sent([(TENANT, b"a\xc0\xafb")], "aÀ¯b", "a\ufffd\ufffdb"),
    "a surrogate as if it were UTF-8": Sent([(TENANT, b"a\xed\xa0\x80b")], "aí\xa0\u241b80;b", "a\ufffd\ufffd\ufffdb"),
    "a byte order mark": Sent([(TENANT, "\ufeffacme")], "\ufeffacme"),
    "bidirectional": Sent([(TENANT, "\u202eemca\u202c")], "\u202eemca\u202c"),
    "zero width": Sent([(TENANT, "ac\u200bme")], "ac\u200bme"),
    "zero width only": Sent([(TENANT, "\u200b")], "\u200b"),
    "an emoji": Sent([(TENANT, "\U0001f4b8")], "\U0001f4b8"),
    "control bytes": Sent([(TENANT, b"ac\x01\x1b[31m\x7fme")], "ac\u241b1;\u241b1B;[31m\u241b7F;me"),
    "a tab inside": Sent([(TENANT, "ac\tme")], "ac\u241b9;me"),
    "tabs around": Sent([(TENANT, "\tacme\t")], "acme", "\u241b9;acme\u241b9;"),
    "NUL": Sent([(TENANT, b"ac\x00me")], None, refused=True),
    "NUL first": Sent([(TENANT, b"\x00acme")], None, refused=True),
    "a carriage return": Sent([(TENANT, b"ac\rme")], None, refused=True),
    "a folded line": Sent([(TENANT, b"ac\r\n me")], "ac", refused=True),
    "as long as can be": Sent([(TENANT, LONGEST)], LONGEST),
    "too long": Sent([(TENANT, TOO_LONG)], None, refused=True),
    "junk in another header": Sent([ACME, ("X-Junk", b"\xff\xfe\x80")], "acme"),
    "junk in the user agent": Sent([ACME, ("User-Agent", b"\xff")], "acme"),
    # -- blank
    "empty": Sent([(TENANT, "")], None),
    "spaces and tabs": Sent([(TENANT, " \t ")], None),
    "a space that does not break": Sent([(TENANT, "\u00a0")], None),
    "a space that does not break, latin-1": Sent([(TENANT, b"\xa0")], None),
    "blank, then not": Sent([(TENANT, ""), ACME], "acme"),
    "white space, then not": Sent([(TENANT, "\t"), ACME], "acme"),
    "not blank, then blank": Sent([ACME, (TENANT, "")], "acme"),
    # -- more than one
    "twice": Sent([ACME, (TENANT, "globex")], "acme"),
    "twice, with a comma in the second": Sent([ACME, (TENANT, "globex, x")], "acme"),
    "twice, with a comma in the first": Sent([(TENANT, "acme, inc"), (TENANT, "globex")], "acme, inc"),
    "a list": Sent([(TENANT, "acme, globex")], "acme, globex"),
    "a list without spaces": Sent([(TENANT, "acme,globex")], "acme,globex"),
    # -- the name
    "lower case": Sent([("x-tenant-id", "acme")], "acme"),
    "mixed case": Sent([("x-TENANT-iD", "acme")], "acme"),
    "underscores": Sent([("x_tenant_id", "acme")], "acme"),
    "an underscore": Sent([("X-Tenant_Id", "acme")], "acme"),
    "underscores, then dashes": Sent([("x_tenant_id", "forged"), ACME], "acme"),
    "dashes, then underscores": Sent([ACME, ("x_tenant_id", "forged")], "acme"),
    "blank, then underscores": Sent([(TENANT, ""), ("x_tenant_id", "acme")], "acme"),
    "underscores, then blank": Sent([("x_tenant_id", "acme"), (TENANT, "")], "acme"),
    "a tab, then an underscore": Sent([(TENANT, "\t"), ("x-tenant_id", "acme")], "acme"),
    "a dot in a similar name": Sent([("x.tenant.id", "forged"), ACME], "acme"),
    "a space behind the name": Sent([(f"{TENANT} ", "acme")], None, refused=True),
    "named as one to drop": Sent([ACME, ("Connection", "x-tenant-id")], "acme"),
    # -- how many others
    "after 150 others": Sent([*MANY, ACME], "acme", is_seen_early=False),
    "twice, after 150 others": Sent([*MANY, ACME, (TENANT, "globex")], "acme", is_seen_early=False),
    "blank, then underscores, after 150 others": Sent(
        [*MANY, (TENANT, ""), ("x_tenant_id", "acme")], "acme", is_seen_early=False
    ),
    "a comma, after 150 others": Sent([*MANY, (TENANT, "acme, inc")], "acme, inc", is_seen_early=False),
    "once before and once after 150 others": Sent([ACME, *MANY, (TENANT, "globex")], "acme"),
    # Kong 3.9.3 answers 400 to more than 1,000 lines, before it looks at any.
    "in more lines than Kong takes": Sent([*[("a", "")] * 1200, ACME], None, refused=True),
    "after 980 others, twice": Sent([*[("a", "")] * 980, ACME, ACME], "acme", is_seen_early=False),
}

QUERIES: dict[str, tuple[str | bytes, str | None]] = {
    # What is usual is in test_metering.py; the attribute of an argument that is not UTF-8 is compared below.
    "an escaped NUL": ("tenant=ac%00me", "ac\u241b0;me"),
    "escaped line breaks": ("tenant=ac%0D%0Ame%0d%0aX-Admin:%201", "ac\u241bD;\u241bA;me\u241bD;\u241bA;X-Admin: 1"),
    "escaped control bytes": ("tenant=%1b[31mred%07", "\u241b1B;[31mred\u241b7;"),
    "escaped twice": ("tenant=%2541", "%41"),
    "an escaped separator": ("tenant=a%26tenant%3Db", "a&tenant=b"),
    "an escaped bidirectional override": ("tenant=%E2%80%AEemca", "\u202eemca"),
    "raw UTF-8": ("tenant=café", "café"),
    "an escape of another kind": ("tenant=%u0061", "%u0061"),
    "a broken escape at the end": ("tenant=acme%", "acme%"),
    "a question mark": ("tenant=acme?tenant=b", "acme?tenant=b"),
    "an equals sign": ("tenant==acme", "=acme"),
    "a fragment": ("tenant=acme#&tenant=globex", "acme"),
    "only a fragment": ("a=1#&tenant=globex", None),
    "a semicolon before": (";tenant=acme", None),
    "another letter case": ("TENANT=acme", None),
    "a NUL behind the name": ("tenant%00=acme", None),
    "an array": ("tenant[]=acme&tenant%5B%5D=acme&tenant[0]=acme", None),
    "an escaped tab": ("tenant=%09", None),
    "an escaped space that does not break": ("tenant=%C2%A0", None),
    "blank ones before": ("tenant&tenant=&tenant=+&tenant=%20&tenant=acme&tenant=globex", "acme"),
    "after 1,200 others": ("&".join(["a"] * 1200) + "&tenant=acme", "acme"),
    "long": ("tenant=" + "a" * 7900, "a" * 7900),
}
NOT_UTF8: dict[str, tuple[str | bytes, str, str]] = {
    "one byte": ("tenant=caf%E9", "café", "caf\ufffd"),
    "overlong": ("tenant=a%C0%AFb", "aÀ¯b", "a\ufffd\ufffdb"),
    "a surrogate": ("tenant=a%ED%A0%80b", "aí\xa0\u241b80;b", "a\ufffd\ufffd\ufffdb"),
    "raw": (b"tenant=caf\xe9", "café", "caf\ufffd"),
    "in the name of another": ("%FF=1&tenant=acme", "acme", "acme"),
}


@pytest.fixture(scope="module")
def till(open_echo_till: OpenEchoTill, shared_collector: CollectorProcess) -> Iterator[Till]:
    """Meter by header, but on `/query` by an argument, and on `/attribute` with the header as an attribute."""
    url = shared_collector.ingest_v1
    by_query = metering_at_once(
        url,
        subject={"look_up_value_in": "query", "field": "tenant"},
        attributes=[attribute("query", "tenant", "tenant")],
    )
    with_attribute = metering_at_once(
        url,
        subject={"look_up_value_in": "query", "field": "who"},
        attributes=[attribute("header", "x-tenant-id", "tenant")],
    )
    by_consumer = [metering_at_once(url, subject={"look_up_value_in": "consumer"}), {"name": "key-auth"}]
    routes = {"query": [by_query], "attribute": [with_attribute], "consumer": by_consumer}
    with open_echo_till(routes, consumer("alice", id=ALICE)) as till:
        yield till


@pytest.mark.parametrize("sent", CASES.values(), ids=CASES.keys())
def test_every_way_to_write_the_subject_header_is_billed_to_the_right_one(sent: Sent, till: Till) -> None:
    bill = till.bill(request("/echo", *sent.headers))
    # The upstream refuses some of them, with a 400: that is its answer, and it is metered like any other.
    assert bill.status == 400 if sent.refused else bill.status in (200, 400)
    assert bill.subjects == ([] if sent.subject is None else [sent.subject])
    assert bill.skipped == ({"no_subject": 1} if sent.subject is None else {})
    assert all((event.data or {})["subject_type"] == "header" for event in bill.events)


@pytest.mark.parametrize("sent", CASES.values(), ids=CASES.keys())
def test_every_way_to_write_a_header_gives_the_right_attribute(sent: Sent, till: Till) -> None:
    bill = till.bill(request("/attribute?who=payer", *sent.headers))
    if sent.refused:
        assert bill.subjects == ([] if sent.subject is None else [sent.subject])
        assert all("tenant" not in (event.data or {}) for event in bill.events)
    else:
        assert bill.subjects == ["payer"]
        assert bill.data.get("tenant") == sent.expected_attribute


@pytest.mark.parametrize("sent", CASES.values(), ids=CASES.keys())
def test_a_request_that_kong_answers_itself_is_billed_by_the_first_100_headers(sent: Sent, till: Till) -> None:
    bill = till.bill(request("/nowhere", *sent.headers))
    assert bill.status in (400, 404)
    assert bill.subjects == ([] if sent.early is None else [sent.early])
    assert bill.skipped == ({"no_subject": 1} if sent.early is None else {})


def test_a_blank_header_does_not_hide_one_after_150_others(till: Till) -> None:
    assert till.bill(request("/echo", (TENANT, ""), *MANY, ACME)).subjects == ["acme"]


@pytest.mark.real_kong
def test_kong_can_be_told_to_record_more_headers(
    gateway_class: type[Gateway], tmp_path: Path, upstream: UpstreamProcess, collector: CollectorProcess
) -> None:
    """`lua_max_req_headers` is a setting of Kong's, which also ends its own notices about them."""
    declarative = document(service(upstream.url), plugins=[metering(collector.ingest_v1)])
    gateway = gateway_class(tmp_path / "gateway", declarative, settings={"lua_max_req_headers": "1000"})
    with open_till(gateway, collector, "/echo") as till:
        assert till.bill(request("/nowhere", *MANY, ACME)).subjects == ["acme"]
        assert till.bill(request("/echo", (TENANT, ""), *MANY, ACME)).subjects == ["acme"]
        assert "headers truncated" not in gateway.error_log


@pytest.mark.parametrize(("query", "expected"), QUERIES.values(), ids=QUERIES.keys())
def test_every_way_to_write_an_argument_gives_the_right_subject_and_attribute(
    query: str | bytes, expected: str | None, till: Till
) -> None:
    bill = till.bill(request(f"/query?{query if isinstance(query, str) else query.decode()}"))
    assert bill.subjects == ([] if expected is None else [expected])
    assert bill.skipped == ({"no_subject": 1} if expected is None else {})
    if expected is not None:
        assert (bill.data["tenant"], bill.data["subject_type"]) == (expected, "query")


@pytest.mark.parametrize(("query", "subject", "attribute"), NOT_UTF8.values(), ids=NOT_UTF8.keys())
def test_an_argument_that_is_not_utf8_once_decoded_costs_nothing(
    query: str | bytes, subject: str, attribute: str, till: Till
) -> None:
    bill = till.bill(request(b"/query?" + (query.encode() if isinstance(query, str) else query)))
    assert bill.subjects == [subject]
    assert bill.data["tenant"] == attribute


# -- forgery ---------------------------------------------------------------------------------------------------------


def test_a_header_that_says_consumer_can_be_told_from_the_consumer(till: Till) -> None:
    """The subject is the client's text, as with the vendor's plugin; `subject_type` tells that it is only a claim."""
    real = till.bill(request("/consumer", ("apikey", "key-alice")))
    forged = till.bill(request("/echo", (TENANT, f"consumer:{ALICE}")))
    claimed = till.bill(request(f"/query?tenant=consumer:{ALICE}"))
    assert real.subjects == forged.subjects == claimed.subjects == [f"consumer:{ALICE}"]
    types = [bill.data["subject_type"] for bill in (real, forged, claimed)]
    assert types == ["consumer_id", "header", "query"]


def test_headers_that_a_gateway_would_set_make_nobody_a_consumer(till: Till) -> None:
    forged: list[Header] = [
        ("X-Consumer-Id", ALICE),
        ("X-Consumer-Username", "alice"),
        ("X-Consumer-Custom-Id", "alice"),
        ("X-Credential-Identifier", ALICE),
        ("X-Authenticated-Userid", "alice"),
        ACME,
    ]
    assert till.bill(request(f"/consumer?consumer={ALICE}", *forged)).skipped == {"no_subject": 1}
    assert till.bill(request("/consumer", *forged, ("apikey", "wrong"))).skipped == {"no_subject": 1}
    paid = till.bill(request("/consumer", *forged, ("apikey", "key-alice")))
    assert (paid.subjects, paid.data["subject_type"]) == ([f"consumer:{ALICE}"], "consumer_id")


def test_requests_that_claim_the_same_id_are_billed_each(till: Till) -> None:
    """An endpoint counts an event id once: a client that could choose it would pay for one request."""
    names = (
        "X-Kong-Request-Id",
        "Kong-Request-Id",
        "X-Request-Id",
        "X-Correlation-Id",
        "Traceparent",
        "Idempotency-Key",
    )
    same: list[Header] = [(name, "f37e446f27097b739946db19e1f6e447") for name in names]
    ids = {event.id for _ in range(3) for event in till.bill(request("/echo", ACME, *same)).events}
    assert len(ids) == 3
    assert not any("f37e446f27097b739946db19e1f6e447" in event_id for event_id in ids)


def test_headers_about_the_way_of_a_request_change_nothing_in_its_event(till: Till) -> None:
    forged: list[Header] = [
        ("X-Forwarded-For", "203.0.113.9"),
        ("X-Real-IP", "203.0.113.9"),
        ("Forwarded", "for=203.0.113.9;host=forged.example"),
        ("X-Forwarded-Host", "forged.example"),
        ("X-Forwarded-Path", "/forged"),
        ("X-Http-Method-Override", "DELETE"),
        ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ]
    plain, other = (till.bill(request("/echo", ACME, *headers)) for headers in ([], forged))
    for bill in (plain, other):
        data = {name: value for name, value in bill.data.items() if "size" not in name}
        assert data == {name: value for name, value in plain.data.items() if "size" not in name}
        assert (data["client_ip"], data["request_host"]) == ("127.0.0.1", "api.example")
    assert (other.events[0].time or "") >= (plain.events[0].time or "")


# -- the log -----------------------------------------------------------------------------------------------------------


def test_nothing_of_all_this_is_in_the_log(till: Till) -> None:
    secrets: list[Header] = [
        ("Authorization", "Bearer hush-1"),
        ("Cookie", "session=hush-2"),
        ("X-Junk", b"hush-3\xff"),
    ]
    for sent in CASES.values():
        for target in ("/echo", "/attribute?who=payer", "/nowhere"):
            till.bill(request(target, *secrets, *sent.headers))
    lines = till.log_lines()
    # When a worker asks for the first time, it starts its instances.
    assert [line for line in lines if "instance" not in line] == []
    assert all(is_printable_line(line) for line in lines)
    assert len(lines) <= 8
