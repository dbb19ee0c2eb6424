"""Token usage of AI plugins: every shape that Kong's versions give it, and whatever else may stand in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.ai import ai_usages
from kong_metering.config import parse_config
from kong_metering.events import LLM_REQUEST, Meter
from kong_metering.reasons import Skipped
from kong_metering.record import Record, parse_record, record_of
from tests.support.clock import FakeClock
from tests.support.openmeter import valid_event
from tests.support.records import DATA, STARTED_AT_RFC3339, finished, log_record, recorded
from tests.support.settings import BY_HEADER

CASES = sorted((DATA / "ai").glob("*.json"))
SUBJECT = {"x-tenant-id": "acme"}
PLUGIN_ID = "6e7c40f6-ce96-48e4-a366-d109c169e444"
META = {"plugin_id": PLUGIN_ID, "provider_name": "openai", "request_model": "asked", "response_model": "answered"}
USAGE = {"prompt_tokens": 25, "completion_tokens": 12, "total_tokens": 37}


def meter(**settings: Any) -> Meter:
    defaults = {
        "ingest_endpoint": "https://openmeter.example/events",
        "api_token": "om_token",
        "meter_api_requests": False,
        "subject": BY_HEADER,
    }
    return Meter(parse_config(defaults | settings), FakeClock())


AI_ONLY = meter()
ALL = meter(meter_api_requests=True)


def events_of(record: dict[str, Any] | Record, by: Meter = AI_ONLY) -> list[dict[str, Any]]:
    """Build the events of a request, and check each."""
    events = by.events(finished(record, SUBJECT))
    assert not isinstance(events, Skipped)
    return [valid_event(event) for event in events]


def events_with(ai: object) -> list[dict[str, Any]]:
    return events_of(log_record(ai=ai))


def tokens_with(usage: object) -> dict[str, int]:
    """Give the tokens by the kind of event that ai-proxy's usage leads to."""
    return {
        event["data"]["type"]: event["data"]["tokens"]
        for event in events_with({"proxy": {"meta": META, "usage": usage}})
    }


# -- the shapes that Kong's versions give --------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_record_of_this_version_gives_exactly_these_events(path: Path) -> None:
    case = json.loads(path.read_text("utf-8"))
    events = events_of(log_record(**case["record"]))
    assert [{"id": event["id"], "data": event["data"]} for event in events] == case["events"]
    for event in events:
        assert (event["type"], event["source"], event["subject"]) == (LLM_REQUEST, "echo", "acme")
        assert event["time"] == STARTED_AT_RFC3339


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_they_come_beside_the_event_of_the_api_request(path: Path) -> None:
    record = log_record(**json.loads(path.read_text("utf-8"))["record"])
    of_the_request, *of_models = events_of(record, ALL)
    assert of_the_request["id"] == f"{record['request']['id']}:api_request"
    assert of_models == events_of(record)
    assert {event["data"]["api_request_id"] for event in of_models} <= {record["request"]["id"]}


def test_a_recorded_chat_gives_a_pair_of_events() -> None:
    record = parse_record(recorded("ai_proxy_chat"))
    assert record is not None
    prompt, completion = events_of(record)
    assert (prompt["data"]["type"], prompt["data"]["tokens"]) == ("request", 11)
    assert (completion["data"]["type"], completion["data"]["tokens"]) == ("response", 7)
    assert prompt["id"] != completion["id"]
    assert prompt["data"]["api_request_id"] == completion["data"]["api_request_id"] == record.request.id


def test_several_plugins_on_one_request_give_a_pair_each() -> None:
    names = ("proxy", "ai-request-transformer", "ai-response-transformer")
    events = events_with({name: {"meta": META, "usage": USAGE} for name in names})
    found = [(event["data"]["ai_plugin_name"], event["data"]["type"]) for event in events]
    plugins = ("ai-proxy", "ai-request-transformer", "ai-response-transformer")
    assert found == [(name, kind) for name in plugins for kind in ("request", "response")]
    assert len({event["id"] for event in events}) == 6


def test_the_same_request_always_has_the_same_ids() -> None:
    ai = {"proxy": {"meta": META, "usage": USAGE}}
    assert [event["id"] for event in events_with(ai)] == [event["id"] for event in events_with(ai)]


def test_a_request_without_an_id_is_still_one_request() -> None:
    record = log_record(request={"id": None}, ai={"proxy": {"meta": META, "usage": USAGE}})
    of_the_request, *of_models = events_of(record, ALL)
    (request_id,) = {event["data"]["api_request_id"] for event in of_models}
    assert of_the_request["id"] == f"{request_id}:api_request"


def test_a_plugin_that_stands_in_the_record_twice_counts_once() -> None:
    account = {"meta": META, "usage": USAGE}
    assert len(events_with({"proxy": account, "ai-proxy": account})) == 2
    assert len(events_with({"ai-proxy": {"meta": META, "usage": {}}, "proxy": account})) == 2
    assert len(events_with({"judge": account, "proxy": {**account, "judge": account}})) == 4


def test_what_another_plugin_notes_beside_the_accounts_does_not_hide_them() -> None:
    account = {"meta": META, "usage": USAGE}
    assert len(events_with({"meta": {"experiment": "b"}, "proxy": account})) == 2
    assert len(events_with({"usage": {}, "payload": {"usage": USAGE}, "proxy": account})) == 2


def test_token_usage_can_be_left_unmetered() -> None:
    record = log_record(ai={"proxy": {"meta": META, "usage": USAGE}})
    (event,) = events_of(record, meter(meter_api_requests=True, meter_ai_token_usage=False))
    assert event["type"] == "kong.api_request"


def test_a_request_to_no_model_gives_no_such_event() -> None:
    assert events_of(log_record()) == []


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "tokens"),
    [
        (1, 1),
        (12.0, 12),
        ("12", 12),
        (2**53, 2**53),
        (None, None),
        (0, None),
        (0.0, None),
        ("0", None),
        ("", None),
        ("many", None),
        ("-1", None),
        (-1, None),
        (1.5, None),
        (True, None),
        (2**53 + 1, None),
        (float("nan"), None),
        (float("inf"), None),
        ([], None),
        ({}, None),
        ([12], None),
    ],
)
def test_a_count_that_is_missing_or_zero_gives_no_event_of_its_kind(count: object, tokens: int | None) -> None:
    found = {} if tokens is None else {"response": tokens}
    assert tokens_with({**USAGE, "completion_tokens": count}) == {"request": 25} | found
    found = {} if tokens is None else {"request": tokens}
    assert tokens_with({**USAGE, "prompt_tokens": count}) == {"response": 12} | found


@pytest.mark.parametrize("usage", [{}, [], None, "", "no usage data returned from upstream", 5, {"total_tokens": 37}])
def test_usage_without_counts_gives_no_events(usage: object) -> None:
    assert tokens_with(usage) == {}


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 25, "completion_tokens": 12},
        {"prompt_token": 25, "completion_token": 12},
        {"input_tokens": 25, "output_tokens": 12},
        {"prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 25, "output_tokens": 12},
        {"prompt_tokens": None, "completion_tokens": None, "prompt_token": 25, "completion_token": 12},
        {"prompt_tokens": 25, "completion_tokens": 12, "input_tokens": 99, "output_tokens": 99},
    ],
)
def test_a_count_is_found_under_each_of_its_names_once(usage: dict[str, object]) -> None:
    assert tokens_with(usage) == {"request": 25, "response": 12}


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", [None, "", "UNSPECIFIED", "NOT_SPECIFIED", 5, True, [], {}, ["gpt"], {"a": 1}])
@pytest.mark.parametrize(("name", "field"), [("provider_name", "provider"), ("plugin_id", "ai_plugin_id")])
def test_a_name_that_is_unknown_is_left_out(name: str, field: str, unknown: object) -> None:
    if name == "plugin_id" and unknown in ("UNSPECIFIED", "NOT_SPECIFIED"):
        return
    for event in events_with({"proxy": {"meta": {**META, name: unknown}, "usage": USAGE}}):
        assert field not in event["data"]


def test_a_name_that_a_client_or_a_model_chose_has_no_control_characters() -> None:
    meta = {**META, "provider_name": "open\x85ai", "request_model": "a\x00b", "response_model": "a\u241bb"}
    asked, answered = (event["data"] for event in events_with({"proxy": {"meta": meta, "usage": USAGE}}))
    assert (asked["model"], answered["model"]) == ("a␛0;b", "a␛241B;b")
    assert asked["provider"] == answered["provider"] == "open␛85;ai"


@pytest.mark.parametrize("unknown", [None, "", "UNSPECIFIED", "NOT_SPECIFIED", 5, [], {}])
def test_a_model_that_is_unknown_is_the_one_that_is_known(unknown: object) -> None:
    def models(**meta: object) -> list[object]:
        return [
            event["data"].get("model") for event in events_with({"proxy": {"meta": {**META, **meta}, "usage": USAGE}})
        ]

    assert models() == ["asked", "answered"]
    assert models(request_model=unknown) == ["answered", "answered"]
    assert models(response_model=unknown) == ["asked", "asked"]
    assert models(request_model=unknown, response_model=unknown) == [None, None]


@pytest.mark.parametrize("meta", [{}, [], None, "", 5])
def test_counts_without_any_names_are_metered(meta: object) -> None:
    data = [event["data"] for event in events_with({"proxy": {"meta": meta, "usage": USAGE}})]
    assert [item["tokens"] for item in data] == [25, 12]
    assert all({"provider", "model", "ai_plugin_id"}.isdisjoint(item) for item in data)


@pytest.mark.parametrize("status", ["Hit", "Miss", "Bypass", "Refresh", "hit"])
def test_the_cache_status_is_kongs_own_word(status: str) -> None:
    ai = {"proxy": {"meta": META, "usage": USAGE, "cache": {"cache_status": status}}}
    assert [event["data"]["cache_status"] for event in events_with(ai)] == [status, status]


@pytest.mark.parametrize(
    "cache", [None, {}, [], "Hit", {"cache_status": None}, {"cache_status": ""}, {"cache_status": {}}]
)
def test_without_a_cache_there_is_no_cache_status(cache: object) -> None:
    for event in events_with({"proxy": {"meta": META, "usage": USAGE, "cache": cache}}):
        assert "cache_status" not in event["data"]


@pytest.mark.parametrize("missing", ["route", "service", "response"])
def test_what_the_record_does_not_have_is_left_out(missing: str) -> None:
    absent = {"route": "route_id", "service": "service_id", "response": "http_status"}[missing]
    events = events_of(log_record(ai={"proxy": {"meta": META, "usage": USAGE}}, **{missing: None}))
    assert len(events) == 2
    assert all(absent not in event["data"] for event in events)


# -- whatever stands there -----------------------------------------------------------------------------------------

any_text = st.text(alphabet=st.characters(codec=None, categories=None), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["proxy", "ai-proxy", "ai-proxy-advanced", "meta", "usage", "cache", "payload", ""]) | any_text
counts = st.integers(0, 2**54) | json_values
accounts = st.fixed_dictionaries(
    {},
    optional={
        "meta": json_values | st.dictionaries(st.sampled_from(sorted(META)), json_values),
        "usage": json_values | st.dictionaries(st.sampled_from([*USAGE, "prompt_token", "output_tokens"]), counts),
        "cache": json_values | st.fixed_dictionaries({"cache_status": json_values}),
        "ai-llm-as-judge": st.fixed_dictionaries({"usage": st.dictionaries(st.sampled_from(sorted(USAGE)), counts)}),
    },
)


def assert_valid_and_distinct(ai: object) -> None:
    events = events_of(log_record(ai=ai), ALL)
    assert len({event["id"] for event in events}) == len(events)
    assert all(event["data"]["tokens"] > 0 for event in events[1:])
    assert all(event["data"].get("ai_plugin_name") for event in events[1:])


@given(json_values)
def test_anything_under_ai_gives_valid_events(ai: object) -> None:
    assert_valid_and_distinct(ai)


@given(st.dictionaries(names, accounts | json_values, max_size=5))
def test_anything_in_an_account_gives_valid_events(ai: dict[str, Any]) -> None:
    assert_valid_and_distinct(ai)


@pytest.mark.parametrize("ai", [None, [], "", "proxy", 5, True, {}, {"proxy": []}, {"proxy": {}}, {"proxy": {"x": {}}}])
def test_what_is_no_account_gives_no_events(ai: object) -> None:
    assert events_with(ai) == []


def test_an_account_that_stands_too_deep_is_none_of_kongs() -> None:
    account = {"meta": META, "usage": USAGE}
    assert len(events_with({"proxy": {"judge": account}})) == 2
    assert events_with({"proxy": {"judge": {"deeper": account}}}) == []


def test_names_that_are_not_utf8_do_not_make_two_events_with_one_id() -> None:
    account = {"meta": META, "usage": USAGE}
    events = events_with({f"ai-{byte}": account for byte in ("\udce9", "\udcea")})
    assert [event["data"]["ai_plugin_name"] for event in events] == ["ai-\ufffd", "ai-\ufffd"]
    assert len({event["id"] for event in events}) == 2


def test_a_record_that_claims_thousands_of_plugins_gives_few_events() -> None:
    many = {f"ai-{number}": {"meta": META, "usage": USAGE} for number in range(5000)}
    assert len(events_with(many)) == 32
    assert len(ai_usages(record_of({"ai": {"proxy": many}}))) == 16


# -- the documentation ---------------------------------------------------------------------------------------------


def test_every_sample_stands_in_the_table_of_versions() -> None:
    page = (DATA.parents[1] / "docs" / "ai-usage.md").read_text("utf-8")
    assert [path.name for path in CASES if f"](../tests/data/ai/{path.name})" not in page] == []
