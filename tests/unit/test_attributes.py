"""What both kinds of event have in common: attributes, allowed status codes, applications and the portal's fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import parse_config
from kong_metering.events import API_REQUEST, EVENT_FIELDS, LLM_REQUEST, Meter
from kong_metering.reasons import Skipped
from tests.support.clock import FakeClock
from tests.support.openmeter import valid_event
from tests.support.records import DATA, answered_early, finished, log_record
from tests.support.settings import BY_HEADER, attribute

BY_APPLICATION = {"look_up_value_in": "application"}
ACME = {"x-tenant-id": "acme"}
META = {"plugin_id": "6e7c40f6", "provider_name": "openai", "request_model": "gpt-4o-mini"}
AI = {"proxy": {"meta": META, "usage": {"prompt_tokens": 25, "completion_tokens": 12}}}
PORTAL_FIELDS = (
    "api_id",
    "api_package_id",
    "api_product_version_id",
    "application_id",
    "control_plane_id",
    "portal_id",
)


def meter(**settings: Any) -> Meter:
    raw = {"ingest_endpoint": "https://openmeter.example/events", "api_token": "om_token", "subject": BY_HEADER}
    return Meter(parse_config(raw | settings), FakeClock())


def ai_record(**changes: Any) -> dict[str, Any]:
    """Make the record of a request to a model; it gives an event of the request, and two of the model's tokens."""
    return log_record(ai=AI, **changes)


def events_of(record: dict[str, Any], captured: object = None, **settings: Any) -> list[dict[str, Any]]:
    """Build the three events of a request to a model, of the subject acme unless told otherwise, and check them."""
    events = meter(**settings).events(finished(record, ACME if captured is None else captured))
    assert not isinstance(events, Skipped)
    names = frozenset(item["event_property_name"] for item in settings.get("attributes", ()))
    checked = [valid_event(event, attributes=names) for event in events]
    assert [event["type"] for event in checked] == [API_REQUEST, LLM_REQUEST, LLM_REQUEST]
    return checked


def data_of(record: dict[str, Any], captured: object = None, **settings: Any) -> list[dict[str, Any]]:
    return [event["data"] for event in events_of(record, captured, **settings)]


# -- attributes ----------------------------------------------------------------------------------------------------


def test_attributes_stand_in_every_event_of_a_request() -> None:
    attributes = [attribute("header", "x-department", "department"), attribute("query", "plan", "pricing_plan")]
    record = ai_record(request={"uri": "/chat?plan=gold"})
    for data in data_of(record, {**ACME, "x-department": "engineering"}, attributes=attributes):
        assert data["department"] == "engineering"
        assert data["pricing_plan"] == "gold"


def test_attributes_change_nothing_else() -> None:
    captured = {**ACME, "x-department": "engineering"}
    with_one = data_of(ai_record(), captured, attributes=[attribute("header", "x-department", "department")])
    for data in with_one:
        assert data.pop("department") == "engineering"
    assert with_one == data_of(ai_record(), captured)


@pytest.mark.parametrize("value", [None, "", " \t"])
def test_an_attribute_that_is_absent_or_blank_is_left_out(value: str | None) -> None:
    attributes = [attribute("header", "x-department", "department"), attribute("query", "plan", "plan")]
    record = ai_record(request={"uri": f"/chat?plan={value or ''}"})
    for data in data_of(record, {**ACME, "x-department": value}, attributes=attributes):
        assert {"department", "plan"}.isdisjoint(data)


def test_of_two_attributes_with_one_name_the_last_that_has_a_value_counts() -> None:
    attributes = [attribute("header", "x-plan", "plan"), attribute("query", "plan", "plan")]
    captured = {**ACME, "x-plan": "silver"}
    both = data_of(ai_record(request={"uri": "/chat?plan=gold"}), captured, attributes=attributes)
    only_the_first = data_of(ai_record(), captured, attributes=attributes)
    assert {data["plan"] for data in both} == {"gold"}
    assert {data["plan"] for data in only_the_first} == {"silver"}


def test_one_header_may_be_the_subject_and_an_attribute() -> None:
    for event in events_of(ai_record(), attributes=[attribute("header", "x-tenant-id", "tenant")]):
        assert event["subject"] == event["data"]["tenant"] == "acme"


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    attributes = [attribute("header", "x-city", "city"), attribute("query", "city", "other_city")]
    record = ai_record(request={"uri": "/chat?city=K%F6ln"})
    for data in data_of(record, {**ACME, "x-city": "K\udcf6ln"}, attributes=attributes):
        assert data["city"] == data["other_city"] == "K\ufffdln"


def test_the_fields_that_no_attribute_may_take_are_the_vendors() -> None:
    catalogue = json.loads((DATA / "event-fields.json").read_text("utf-8"))
    assert {kind: sorted(names) for kind, names in EVENT_FIELDS.items()} == {
        kind: sorted(field["name"] for field in fields) for kind, fields in catalogue.items()
    }


@pytest.mark.parametrize("name", sorted(EVENT_FIELDS[API_REQUEST] | EVENT_FIELDS[LLM_REQUEST]))
@pytest.mark.parametrize("source", ["header", "query"])
@pytest.mark.parametrize(
    "record", [ai_record(), {"ai": AI, "tries": [{}], "request": {"id": "1"}}], ids=["full", "bare"]
)
def test_an_attribute_never_takes_the_place_of_a_field(name: str, source: str, record: dict[str, Any]) -> None:
    forged = [attribute(source, "x-forged", name)]
    record = {**record, "request": {**record["request"], "uri": "/chat?x-forged=forged"}}
    captured = {**ACME, "x-forged": "forged"}
    with_it, without_it = events_of(record, captured, attributes=forged), events_of(record, captured)
    for forged_event, event in zip(with_it, without_it, strict=True):
        if name in EVENT_FIELDS[event["type"]]:
            assert forged_event == event
        else:
            assert forged_event["data"] == {**event["data"], name: "forged"}


# -- which requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "status", "metered"),
    [
        (["200-299"], 200, True),
        (["200-299"], 429, False),
        (["200-299", "404-404"], 404, True),
        (["200-299", "404-404"], 500, False),
        (["200-299"], None, False),
        ([], 500, True),
        ({}, 500, True),
        (None, 500, True),
        (None, None, True),
    ],
)
def test_allowed_status_codes_are_for_both_kinds_of_event(ranges: object, status: object, metered: bool) -> None:  # noqa: FBT001
    record = ai_record(response={"status": status})
    for settings in ({}, {"meter_api_requests": False}, {"meter_ai_token_usage": False}):
        found = meter(allow_status_codes=ranges, **settings).events(finished(record, ACME))
        assert isinstance(found, list) if metered else found is Skipped.STATUS_NOT_ALLOWED


@given(st.integers(100, 599), st.lists(st.tuples(st.integers(100, 599), st.integers(100, 599)), max_size=3))
def test_any_range_holds_what_lies_between_its_ends(status: int, pairs: list[tuple[int, int]]) -> None:
    ranges = [f"{min(pair)}-{max(pair)}" for pair in pairs]
    allowed = not pairs or any(min(pair) <= status <= max(pair) for pair in pairs)
    found = meter(allow_status_codes=ranges).events(finished(log_record(response={"status": status}), ACME))
    assert isinstance(found, list) == allowed


# -- applications and the portal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "application", "expected", "kind"),
    [
        (BY_APPLICATION, {"id": "b0ae7412"}, "app:b0ae7412", "application_id"),
        (BY_APPLICATION, {"id": 7}, "app:7", "application_id"),
        ({**BY_APPLICATION, "field": "id"}, {"id": "b0ae7412"}, "b0ae7412", "application_id"),
        ({**BY_APPLICATION, "field": "name"}, {"id": "b0ae7412", "name": "Shop"}, "Shop", "application_name"),
    ],
)
def test_an_application_is_the_subject_of_both_kinds_of_event(
    subject: object, application: object, expected: str, kind: str
) -> None:
    for event in events_of(ai_record(application=application), {}, subject=subject):
        assert event["subject"] == expected
        assert event["data"]["subject_type"] == kind


@pytest.mark.parametrize("application", [None, {}, [], "b0ae7412", {"id": ""}, {"id": None}, {"name": "Shop"}])
def test_without_an_application_there_is_no_subject(application: object) -> None:
    record = ai_record(application=application)
    assert meter(subject=BY_APPLICATION).events(finished(record, ACME)) is Skipped.NO_SUBJECT


def test_an_application_is_not_taken_from_what_a_client_sends() -> None:
    record = answered_early(request={"uri": "/?application=b0ae7412", "headers": {"x-application-id": "b0ae7412"}})
    assert meter(subject=BY_APPLICATION).events(finished(record)) is Skipped.NO_SUBJECT


@pytest.mark.parametrize("name", PORTAL_FIELDS)
@pytest.mark.parametrize("place", ["record", "application"])
def test_a_field_of_the_portal_stands_in_every_event(name: str, place: str) -> None:
    given_by_a_plugin = {name: "b0ae7412"} if place == "record" else {"application": {name: "b0ae7412"}}
    for data in data_of(ai_record(**given_by_a_plugin)):
        assert data[name] == "b0ae7412"


def test_the_id_of_the_application_is_its_field_too() -> None:
    assert [data["application_id"] for data in data_of(ai_record(application={"id": "b0ae7412"}))] == ["b0ae7412"] * 3


@pytest.mark.parametrize("value", [None, "", 5, True, [], {}, ["b0ae7412"]])
def test_a_field_of_the_portal_that_is_no_text_is_left_out(value: object) -> None:
    values = dict.fromkeys(PORTAL_FIELDS, value)
    for data in data_of(ai_record(**values, application={**values, "id": value})):
        assert set(PORTAL_FIELDS).isdisjoint(data)


def test_a_record_of_kong_itself_has_no_field_of_the_portal() -> None:
    for data in data_of(ai_record()):
        assert set(PORTAL_FIELDS).isdisjoint(data)
