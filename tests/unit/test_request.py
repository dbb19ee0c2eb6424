"""What is known of a finished request: which of captured value and record counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.record import parse_record
from kong_metering.request import ASKED
from tests.support.records import answered_early, finished, log_record, recorded

TENANT = "x-tenant-id"
BLANKS = ["", " ", "\t ", "\u3000", "\udca0"]  # the last one is a byte: latin-1's space that does not break


def with_header(value: object, **changes: Any) -> dict[str, Any]:
    return log_record(request={"headers": {TENANT: value}}, **changes)


def early_with_header(value: object, **changes: Any) -> dict[str, Any]:
    return answered_early(request={"headers": {TENANT: value}}, **changes)


def with_target(uri: object) -> dict[str, Any]:
    return log_record(request={"uri": uri})


# -- headers: the access phase ran ---------------------------------------------------------------------------------


def test_the_captured_value_counts_and_not_what_another_plugin_made_of_it() -> None:
    assert finished(with_header("changed"), {TENANT: "acme"}).header(TENANT) == "acme"


def test_a_captured_value_counts_when_a_later_plugin_removed_the_header() -> None:
    record = parse_record(recorded("request_transformer_removes_subject"))
    assert record is not None
    assert TENANT not in record.request.headers
    assert finished(record, {TENANT: "acme"}).header(TENANT) == "acme"


def test_a_header_that_a_later_plugin_added_does_not_count() -> None:
    request = finished(with_header("added"), {"x-department": "engineering"})
    assert request.header(TENANT) is None


def test_a_header_that_a_later_plugin_added_does_not_count_when_nothing_was_captured() -> None:
    assert finished(with_header("added"), {ASKED: TENANT}).header(TENANT) is None


@pytest.mark.parametrize("blank", BLANKS)
def test_a_blank_header_is_absent(blank: str) -> None:
    assert finished(with_header(blank), {TENANT: blank}).header(TENANT) is None


@pytest.mark.parametrize("blank", BLANKS)
def test_a_blank_first_value_does_not_hide_a_second_one(blank: str) -> None:
    record = with_header([blank, "acme"])
    assert finished(record, {TENANT: blank}).header(TENANT) == "acme"


def test_a_blank_header_does_not_become_what_a_later_plugin_made_of_it() -> None:
    assert finished(with_header("changed"), {TENANT: ""}).header(TENANT) is None


@pytest.mark.parametrize("value", [None, 5, True, [], {}, [5], [None], {"acme": 1}])
def test_a_captured_value_that_is_no_string_is_absent(value: object) -> None:
    assert finished(with_header("changed"), {TENANT: value}).header(TENANT) is None


# -- headers: it did not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [None, {}, [], "x", 5])
def test_the_record_counts_when_the_access_phase_did_not_run(captured: object) -> None:
    assert finished(early_with_header("acme"), captured).header(TENANT) == "acme"


@pytest.mark.parametrize("scenario", ["key_auth_rejected_401", "no_route_404"])
def test_the_record_of_a_real_early_answer_counts(scenario: str) -> None:
    record = parse_record(recorded(scenario))
    assert record is not None
    assert finished(record).header("X-Tenant-ID") == "acme"


def test_the_record_counts_when_the_plugin_server_was_not_there_for_the_access_phase() -> None:
    """It was just killed, or started; the request went on to the upstream, and the log phase met the next process."""
    record = with_header("acme")
    assert record["tries"]
    assert finished(record, None).header(TENANT) == "acme"


def test_the_record_counts_when_it_was_put_together_piece_by_piece() -> None:
    record = {"request": {"headers": {TENANT: ["acme"]}}}
    assert finished(record, None).header(TENANT) == "acme"


@pytest.mark.parametrize("blank", BLANKS)
def test_the_first_value_that_is_not_blank_counts(blank: str) -> None:
    assert finished(early_with_header([blank, "acme", "globex"])).header(TENANT) == "acme"
    assert finished(early_with_header([blank, blank])).header(TENANT) is None


# -- query arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a?tenant=acme", "acme"),
        ("/a?tenant=acme&tenant=globex", "acme"),
        ("/a?tenant=&tenant=+&tenant=%20&tenant=%A0&tenant&tenant=acme", "acme"),
        ("/a?tenant=&tenant", None),
        ("/a", None),
        ("", None),
    ],
)
def test_the_first_argument_that_is_not_blank_counts(uri: str, expected: str | None) -> None:
    assert finished(with_target(uri)).argument("tenant") == expected


@pytest.mark.parametrize("uri", [None, 5, [], {}, ["/a?tenant=acme"]])
def test_a_target_that_is_no_string_has_no_arguments(uri: object) -> None:
    assert finished(with_target(uri)).argument("tenant") is None


def test_arguments_are_the_clients_own_and_not_those_sent_upstream() -> None:
    record = log_record(request={"uri": "/a?tenant=acme", "querystring": {"tenant": "b"}}, upstream_uri="/a?tenant=c")
    assert finished(record).argument("tenant") == "acme"


def test_a_recorded_query_is_read() -> None:
    record = parse_record(recorded("query_repeated_flag_and_array_args"))
    assert record is not None
    request = finished(record)
    assert [request.argument(name) for name in ("tenant", "flag", "empty", "a[]", "none")] == [
        "acme",
        None,
        None,
        "1",
        None,
    ]


def test_a_record_without_anything_has_nothing() -> None:
    request = finished({})
    assert request.header(TENANT) is None
    assert request.argument("tenant") is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(json_values, json_values)
def test_nothing_in_a_record_makes_it_raise(headers: object, captured: object) -> None:
    record = log_record(request={"headers": headers, "uri": headers}, tries=captured)
    for kept in (captured, {TENANT: captured}):
        request = finished(record, kept)
        assert isinstance(request.header(TENANT), str | None)
        assert isinstance(request.argument(TENANT), str | None)
