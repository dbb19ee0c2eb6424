"""Who pays for a request."""

from __future__ import annotations

from typing import Any

import pytest

from kong_metering.config import Subject
from kong_metering.subject import ResolvedSubject, resolve_subject
from tests.support.records import answered_early, finished, log_record

HEADER = Subject(look_up_value_in="header", field="X-Tenant-ID")
QUERY = Subject(look_up_value_in="query", field="tenant")
CONSUMER = Subject()
ALICE = {"id": "b32379d9", "username": "alice", "custom_id": "alice-custom", "tags": ["gold"]}


def subject_of(settings: Subject, captured: object = None, **record: Any) -> ResolvedSubject | None:
    return resolve_subject(settings, finished(log_record(**record), captured))


def by_header(raw: bytes) -> ResolvedSubject | None:
    return subject_of(HEADER, {"X-Tenant-ID": raw.decode("utf-8", "surrogateescape")})


def by_query(query: str) -> ResolvedSubject | None:
    return subject_of(QUERY, request={"uri": f"/a?{query}"})


# -- header --------------------------------------------------------------------------------------------------------


def test_a_header_is_the_subject() -> None:
    assert by_header(b"acme") == ResolvedSubject("acme", "header")


@pytest.mark.parametrize("raw", [b"", b" ", b"\t", b"\xa0", "\u2003".encode()])
def test_a_blank_header_is_no_subject(raw: bytes) -> None:
    assert by_header(raw) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\tacme ", "acme"),
        (b"caf\xe9", "café"),
        ("Zoë-株式会社".encode(), "Zoë-株式会社"),
        (b"a" * 8192, "a" * 8192),
        (b"a\x01\x7fb", "a\u241b1;\u241b7F;b"),
        (b"a\x80b", "a\u241b80;b"),
        ("\u202eacme\u200b".encode(), "\u202eacme\u200b"),
        (b"consumer:b32379d9", "consumer:b32379d9"),
    ],
)
def test_a_header_counts_whatever_its_bytes(raw: bytes, expected: str) -> None:
    assert by_header(raw) == ResolvedSubject(expected, "header")


def test_a_header_that_says_consumer_is_still_of_type_header() -> None:
    forged, real = by_header(b"consumer:b32379d9"), subject_of(CONSUMER, consumer=ALICE)
    assert forged is not None
    assert real is not None
    assert forged.type != real.type


def test_the_header_of_a_request_that_was_answered_early_is_in_the_record() -> None:
    record = answered_early(request={"headers": {"x-tenant-id": ["", "acme"]}})
    assert resolve_subject(HEADER, finished(record)) == ResolvedSubject("acme", "header")


def test_no_header_is_no_subject() -> None:
    assert subject_of(HEADER) is None


# -- query ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("tenant=acme", "acme"),
        ("tenant=acme&tenant=globex", "acme"),
        ("tenant=&tenant=globex", "globex"),
        ("tenant=+acme+corp+", "acme corp"),
        ("tenant=caf%C3%A9", "café"),
        ("tenant=caf%E9", "café"),
        ("tenant=a%00b", "a\u241b0;b"),
        ("tenant=a%C2%85%EF%BF%BFb", "a\u241b85;\u241bFFFF;b"),
        ("tenant=a%E2%90%9B0;b", "a\u241b241B;0;b"),
        ("tenant=%zz", "%zz"),
        ("tenant=a;b", "a;b"),
    ],
)
def test_a_query_argument_is_the_subject(query: str, expected: str) -> None:
    assert by_query(query) == ResolvedSubject(expected, "query")


@pytest.mark.parametrize("query", ["", "tenant", "tenant=", "tenant=%20", "tenant=%A0", "tenant[]=acme", "other=acme"])
def test_no_or_a_blank_argument_is_no_subject(query: str) -> None:
    assert by_query(query) is None


# -- consumer and application --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("look_up", "field", "expected"),
    [
        ("consumer", None, ResolvedSubject("consumer:b32379d9", "consumer_id")),
        ("consumer", "username", ResolvedSubject("alice", "consumer_username")),
        ("consumer", "custom_id", ResolvedSubject("alice-custom", "consumer_custom_id")),
        ("consumer", "id", ResolvedSubject("b32379d9", "consumer_id")),
        ("consumer", "tags", None),
        ("consumer", "none", None),
        ("application", None, ResolvedSubject("app:b32379d9", "application_id")),
        ("application", "username", ResolvedSubject("alice", "application_username")),
    ],
)
def test_an_authenticated_entity_is_the_subject(look_up: Any, field: str | None, expected: object) -> None:
    settings = Subject(look_up_value_in=look_up, field=field)
    assert subject_of(settings, **{look_up: ALICE}) == expected


@pytest.mark.parametrize("look_up", ["consumer", "application"])
@pytest.mark.parametrize("field", [None, "username"])
@pytest.mark.parametrize(
    "entity", [None, {}, [], "alice", 5, {"id": "", "username": " "}, {"id": None, "username": {}}]
)
def test_nobody_authenticated_is_no_subject(look_up: Any, field: str | None, entity: object) -> None:
    settings = Subject(look_up_value_in=look_up, field=field)
    assert subject_of(settings, **{look_up: entity}) is None


def test_a_consumers_name_follows_the_same_rule() -> None:
    found = subject_of(Subject(field="username"), consumer={"username": "a\x00b"})
    assert found == ResolvedSubject("a\u241b0;b", "consumer_username")


@pytest.mark.parametrize("field", ["Authorization", "proxy-authorization"])
def test_kongs_word_for_a_header_that_it_hides_is_nobody(field: str) -> None:
    settings = Subject(look_up_value_in="header", field=field)
    record = answered_early(request={"headers": {field.lower(): "REDACTED"}})
    assert resolve_subject(settings, finished(record)) is None
    assert subject_of(settings, {field: "Bearer of-the-client"}) == ResolvedSubject("Bearer of-the-client", "header")


def test_any_other_header_may_say_redacted() -> None:
    record = answered_early(request={"headers": {"x-tenant-id": "REDACTED"}})
    assert resolve_subject(HEADER, finished(record)) == ResolvedSubject("REDACTED", "header")


def test_a_consumer_does_not_count_when_the_header_is_asked_for() -> None:
    assert subject_of(HEADER, consumer=ALICE) is None


@pytest.mark.parametrize(
    ("value", "expected"), [(42, "42"), (0, "0"), (True, None), (1.5, None), (["a"], None), ({}, None)]
)
def test_a_field_is_text_or_a_whole_number(value: object, expected: str | None) -> None:
    found = subject_of(Subject(field="custom_id"), consumer={"custom_id": value})
    assert (found.value if found else None) == expected
