"""Reading Kong's log record, which is data from outside."""

from __future__ import annotations

import json
import unicodedata
from itertools import permutations
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import asdict

from kong_metering.record import (
    Record,
    Request,
    Service,
    first_not_blank,
    header_values,
    integer,
    is_blank,
    legible,
    milliseconds,
    parse_record,
    query_values,
    readable,
    record_of,
    section,
    subject_text,
    text,
)
from tests.support.records import recorded, recorded_scenarios

# Any string that Python can hold: lone surrogates too, and those that stand for bytes that are not UTF-8.
any_text = st.text(alphabet=st.characters(codec=None, categories=None), max_size=20)
raw_bytes = st.binary(max_size=12).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
hostile_text = any_text | raw_bytes
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

# What Python alone takes for white space.
NO_WHITE_SPACE = (0x1C, 0x1D, 0x1E, 0x1F, 0x85)


def from_wire(raw: bytes) -> str:
    """Decode as the host decodes what Kong sends."""
    return raw.decode("utf-8", "surrogateescape")


# -- the record itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", recorded_scenarios())
def test_every_record_of_a_real_kong_is_read(scenario: str) -> None:
    text = recorded(scenario)
    record, whole = parse_record(text), json.loads(text)
    assert record is not None
    assert record.request.id == whole["response"]["headers"]["x-kong-request-id"]
    assert record.request.headers == whole["request"]["headers"]
    for name, value in asdict(record).items():
        if isinstance(value, Struct):
            there = whole.get(name, {})
            expected = {key: there[key] for key in value.__struct_fields__ if key in there}
            assert {key: item for key, item in asdict(value).items() if item is not None} == expected
        else:
            assert value == whole.get(name)


@pytest.mark.parametrize("scenario", recorded_scenarios())
def test_what_a_real_kong_gives_needs_no_second_reading(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs several times as much; only bytes that are not UTF-8 are worth it."""
    text = recorded(scenario)
    expected = parse_record(text)
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("the record is read a second time"))
    if "utf8" not in scenario or text.isascii():
        assert parse_record(text) == expected


_parts = st.dictionaries(st.sampled_from(Request.__struct_fields__ + Service.__struct_fields__), json_values)
_records = st.dictionaries(
    st.sampled_from(Record.__struct_fields__), json_values | _parts | st.just({"size": 2**53, "port": 0})
)


@given(_records)
def test_both_ways_of_reading_give_the_same(found: dict[str, Any]) -> None:
    assert parse_record(json.dumps(found)) == record_of(json.loads(json.dumps(found)))


def test_bytes_that_are_not_utf8_survive_as_surrogate_escapes() -> None:
    record = parse_record(from_wire(b'{"request": {"headers": {"x-junk": "caf\xe9"}}}'))
    assert record == Record(request=Request(headers={"x-junk": "caf\udce9"}))


@pytest.mark.parametrize(
    "answer",
    [None, 5, b"{}", {}, "", "{", "[]", "5", "null", '"{}"', "NaN", "[" * 100_000, '{"a":' * 50_000, "9" * 5000],
    ids=lambda answer: repr(answer)[:20],
)
def test_what_is_no_object_is_no_record(answer: object) -> None:
    assert parse_record(answer) is None


def test_numbers_that_json_does_not_know_do_not_cost_the_record() -> None:
    record = parse_record('{"started_at": NaN, "response": {"size": -Infinity}, "request": {"size": 1e999}}')
    assert record is not None
    assert milliseconds(record.started_at) is None
    assert record.response.size is None
    assert record.request.size is None


@given(st.text() | raw_bytes)
def test_parsing_never_raises(answer: str) -> None:
    assert parse_record(answer) is None or answer.lstrip().startswith("{")


def test_a_record_of_a_megabyte_is_read() -> None:
    record = parse_record(json.dumps({"request": {"body": "x" * 1_000_000}, "client_ip": "192.0.2.1"}))
    assert record is not None
    assert record.client_ip == "192.0.2.1"


@pytest.mark.parametrize("value", [[], None, "x", 5, True, [{}]])
def test_a_section_that_is_no_object_is_empty(value: object) -> None:
    assert section({"route": value}, "route") == {}


def test_a_missing_section_is_empty() -> None:
    assert section({}, "route") == {}


@pytest.mark.parametrize(("value", "expected"), [("x", "x"), ("", None), (5, None), (None, None), ([], None)])
def test_text_is_a_string_that_holds_something(value: object, expected: str | None) -> None:
    assert text(value) == expected


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (200, 200),
        (2**53, 2**53),
        (200.0, 200),
        (1.795359970019e12, 1_795_359_970_019),
        ("200", 200),
        ("0", 0),
        ("9007199254740992", 2**53),
    ],
)
def test_a_count_is_a_whole_number(value: object, expected: int) -> None:
    assert integer(value) == expected
    assert type(integer(value)) is int


@pytest.mark.parametrize(
    "value",
    [
        -1,
        -200.0,
        2**53 + 1,
        1e300,
        0.5,
        float("nan"),
        float("inf"),
        "9007199254740993",
        "9" * 5000,
        "-1",
        "2e2",
        "200.0",
        " 200",
        "٢٠٠",
        "²",
        "",
        "OK",
        True,
        False,
        None,
        [],
        {},
        [200],
    ],
)
def test_what_is_no_count_is_nothing(value: object) -> None:
    assert integer(value) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5), (5.0, 5), (4.9998, 5), (5.0002, 5), ("5", 5), (-1.0, None), (1e300, None), (True, None), (None, None)],
)
def test_a_moment_is_rounded_to_the_millisecond(value: object, expected: int | None) -> None:
    assert milliseconds(value) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_moment_that_is_no_number_is_nothing(value: float) -> None:
    assert milliseconds(value) is None


# -- text from clients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"curl/7.88.1", "curl/7.88.1"),
        ("株式会社".encode(), "株式会社"),
        (b"caf\xe9", "caf\ufffd"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("é".encode() + b"\xff", "é\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate, encoded as if it were a character
    ],
)
def test_bytes_that_are_not_utf8_become_replacement_characters(raw: bytes, expected: str) -> None:
    assert readable(from_wire(raw)) == expected


@given(hostile_text)
def test_readable_text_fits_utf8_and_changes_nothing_else(value: str) -> None:
    shown = readable(value)
    shown.encode("utf-8")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        assert shown != value
    else:
        assert shown == value


@pytest.mark.parametrize(
    "raw", [b"", b" ", b"\t", b" \t\r\n", "\u3000".encode(), "\u00a0".encode(), b"\xa0", b" \xa0 "]
)
def test_a_blank_subject_is_none(raw: bytes) -> None:
    assert subject_text(from_wire(raw)) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"acme", "acme"),
        (b"  acme\t", "acme"),
        (b"acme corp", "acme corp"),
        ("Zoë-株式会社".encode(), "Zoë-株式会社"),
        (b"caf\xe9", "café"),
        ("é".encode() + b"\xff", "Ã©ÿ"),  # not UTF-8 as a whole: latin-1 as a whole
        (b"a\x00b\x1b[31m", "a\x00b\x1b[31m"),
        ("\u202eemca\u200b".encode(), "\u202eemca\u200b"),
        (b"a" * 8192, "a" * 8192),
    ],
)
def test_a_subject_is_read_as_utf8_or_else_as_latin1(raw: bytes, expected: str) -> None:
    assert subject_text(from_wire(raw)) == expected


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# Bytes of latin-1's own white space, which is none in a header.
near_misses = st.binary(max_size=4) | st.lists(st.sampled_from([b"\xa0", b"\x85", b"a", b"\xe9"]), max_size=4).map(
    b"".join
)


@given(near_misses, near_misses)
def test_two_subjects_that_are_not_utf8_stay_two(one: bytes, other: bytes) -> None:
    assume(not is_utf8(one))
    assume(one.strip() != other.strip())
    first, second = subject_text(from_wire(one)), subject_text(from_wire(other))
    if first is not None and not is_utf8(other):
        assert first != second


@given(hostile_text)
def test_a_subject_fits_utf8_and_holds_something(value: str) -> None:
    subject = subject_text(value)
    if subject is not None:
        subject.encode("utf-8")
        assert any(not char.isspace() or ord(char) in NO_WHITE_SPACE for char in subject)


@pytest.mark.parametrize("code", NO_WHITE_SPACE)
def test_a_control_character_is_no_white_space(code: int) -> None:
    """`str.strip` takes these off: who sends nothing else would not be billed, and two would be billed as one."""
    sent = chr(code)
    assert legible(subject_text(f" {sent}acme{sent}\t") or "") == f"␛{code:X};acme␛{code:X};"
    assert legible(subject_text(sent) or "") == f"␛{code:X};"
    assert not is_blank(sent)


# -- headers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x-tenant-id", "X-Tenant-ID", "x_tenant_id", "X_TENANT-id"])
@pytest.mark.parametrize("sent", ["x-tenant-id", "X-Tenant-Id", "x_tenant_id"])
def test_a_header_is_found_in_any_case_with_dashes_or_underscores(name: str, sent: str) -> None:
    assert header_values({"x-other": "no", sent: "acme"}, name) == ["acme"]


def test_the_exact_name_comes_before_a_similar_one() -> None:
    headers = {"x_tenant_id": "forged", "x-tenant-id": "acme"}
    assert header_values(headers, "x-tenant-id") == ["acme"]


@pytest.mark.parametrize("blank", ["", " ", "\xa0", ["", "\t"]])
def test_a_blank_line_does_not_hide_another_spelling(blank: object) -> None:
    """Kong passes both lines on, and what stands behind it may take them for one header."""
    headers = {"x-tenant-id": blank, "x_tenant_id": "acme"}
    assert first_not_blank(header_values(headers, "X-Tenant-ID")) == "acme"


def test_other_spellings_count_in_one_order_however_kong_lists_them() -> None:
    headers = {"x_tenant_id": "acme", "x-tenant_id": "", "x_tenant-id": ["", "globex"]}
    for order in permutations(headers):
        listed = {key: headers[key] for key in order}
        assert header_values(listed, "x-tenant-id") == ["", "", "globex", "acme"]


def test_a_header_that_was_sent_twice_has_its_values_in_order() -> None:
    assert header_values({"x-tenant-id": ["acme", "globex"]}, "x-tenant-id") == ["acme", "globex"]


@pytest.mark.parametrize("value", [None, 5, True, {}, [], [5, None, {}]])
def test_values_that_are_no_strings_are_none(value: object) -> None:
    assert header_values({"x-tenant-id": value}, "x-tenant-id") == []


@pytest.mark.parametrize(
    "found",
    [{}, {"request": []}, {"request": {"headers": None}}, {"request": {"headers": []}}, {"request": {"headers": "x"}}],
)
def test_a_record_without_headers_has_none(found: dict[str, Any]) -> None:
    assert record_of(found).request.headers == {}


# -- query arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a?tenant=acme", ["acme"]),
        ("/a?page=2&tenant=acme&x=y", ["acme"]),
        ("/a?tenant=acme&tenant=globex", ["acme", "globex"]),
        ("/a?tenant=", [""]),
        ("/a?tenant", [""]),
        ("/a?tenant&tenant=acme", ["", "acme"]),
        ("/a?tenant=a%20b", ["a b"]),
        ("/a?tenant=a+b", ["a b"]),
        ("/a?tenant=a%2Bb", ["a+b"]),
        ("/a?tenant=a%2bb%26c%3Dd", ["a+b&c=d"]),
        ("/a?tenant=a=b", ["a=b"]),
        ("/a?tenant=a;tenant=b", ["a;tenant=b"]),
        ("/a?tenant=%zz%4", ["%zz%4"]),
        ("/a?tenant=100%", ["100%"]),
        ("/a?tenant=%00acme", ["\x00acme"]),
        ("/a?tenant=caf%E9", ["caf\udce9"]),
        ("/a?tenant=%C3%A9", ["é"]),
        ("/a?tenant=a?b", ["a?b"]),
        ("/a?%74enant=acme", ["acme"]),
        ("/a?TENANT=acme", []),
        ("/a?tenant%20=acme", []),
        ("/a?tenant[]=acme", []),
        ("/a?xtenant=acme&tenantx=acme", []),
        ("/a?tenant=acme#fragment&tenant=no", ["acme"]),
        ("/a#?tenant=acme", []),
        ("/a", []),
        ("/a?", []),
        ("/a?&&=&=x&", []),
        ("", []),
        ("?tenant=acme", ["acme"]),
        ("/tenant=acme", []),
        ("http://gateway.example/a?tenant=acme", ["acme"]),
        ("//a//../b?tenant=acme", ["acme"]),
    ],
)
def test_a_query_argument_is_read_as_kong_reads_it(uri: str, expected: list[str]) -> None:
    assert list(query_values(uri, "tenant")) == expected


@pytest.mark.parametrize(
    ("uri", "name", "expected"),
    [
        ("/a?a[]=1&a[]=2", "a[]", ["1", "2"]),
        ("/a?a%5B%5D=1&a[]=2", "a[]", ["1", "2"]),
        ("/a?kundengr%C3%B6%C3%9Fe=acme", "kundengröße", ["acme"]),
        ("/a?tenant+id=acme", "tenant id", ["acme"]),
        ("/a?tenant+id=acme&tenant%2Bid=globex", "tenant+id", ["globex"]),
        ("/a?%41=acme&%2541=globex", "%41", ["globex"]),
    ],
)
def test_names_are_decoded_like_values(uri: str, name: str, expected: list[str]) -> None:
    assert list(query_values(uri, name)) == expected


def test_an_argument_is_found_after_many_others() -> None:
    uri = "/a?" + "&".join(f"p{number}={number}" for number in range(5000)) + "&tenant=acme"
    assert list(query_values(uri, "tenant")) == ["acme"]


def test_bytes_in_the_target_that_are_not_utf8_survive() -> None:
    assert list(query_values(from_wire(b"/a?tenant=caf\xe9%21"), "tenant")) == ["caf\udce9!"]


@given(hostile_text, hostile_text)
def test_reading_a_query_never_raises(uri: str, name: str) -> None:
    for value in query_values(f"/a?{uri}&%20{uri}={uri}%41", name):
        assert isinstance(value, str)


@given(st.binary(max_size=20))
def test_any_bytes_survive_percent_encoding(raw: bytes) -> None:
    encoded = "".join(f"%{byte:02X}" for byte in raw)
    (value,) = query_values(f"/a?x=y&tenant={encoded}", "tenant")
    assert value.encode("utf-8", "surrogateescape") == raw


illegible_texts = st.text(
    st.sampled_from("ab01;\u241b\x00\x1f\x7f\x85\x9f\ufdd0\ufffe\U0001ffff\U0010ffff") | st.characters()
)


@given(illegible_texts, illegible_texts)
def test_two_texts_stay_two_when_they_are_made_legible(one: str, other: str) -> None:
    assert (legible(one) == legible(other)) == (one == other)


@given(illegible_texts)
def test_a_legible_text_has_no_control_characters_and_no_noncharacters(value: str) -> None:
    for char in legible(value):
        assert unicodedata.category(char) != "Cc"
        assert ord(char) & 0xFFFE != 0xFFFE
        assert not 0xFDD0 <= ord(char) <= 0xFDEF


@pytest.mark.parametrize("value", ["", "acme", "Zoë-株式会社", "\u202eacme\u200b", "100%", "a\\b", "a b", "\ufffd"])
def test_what_is_legible_is_not_changed(value: str) -> None:
    assert legible(value) == value
