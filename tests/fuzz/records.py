"""Fuzzing of the log record: whatever text Kong gives, and whatever the access phase kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from hypothesis import strategies as st

from kong_metering.config import parse_config
from kong_metering.errors import ConfigError
from kong_metering.events import Meter
from kong_metering.reasons import Skipped
from kong_metering.record import Record, parse_record, parsed_leniently
from kong_metering.request import ASKED, FinishedRequest
from tests.fuzz.cases import Case, Target
from tests.fuzz.invariants import check_events
from tests.fuzz.strategies import TENANT, TEXTS, configs, json_values, scalars, texts, whole_config
from tests.fuzz.variation import varied_json, varied_text
from tests.support.clock import FakeClock
from tests.support.records import answered_early, log_record, recorded, recorded_scenarios

_AI = {"meta": {"plugin_id": "5d3a", "provider_name": "openai", "request_model": "gpt-4o", "response_model": "gpt-4o"}}
_USAGE = {"usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}, "cache": {"cache_status": "Hit"}}
_CONSUMER = {"id": "b32379d9", "username": "alice", "custom_id": "A-1"}
_MADE_UP = [
    log_record(consumer=_CONSUMER, application={"id": "a"}, request={"uri": "/a?tenant=acme&x-plan=gold"}),
    log_record(ai={"proxy": {**_AI, **_USAGE}}, consumer=_CONSUMER),
    log_record(ai={"ai-proxy": {**_AI, **_USAGE}, "ai-request-transformer": {**_AI, **_USAGE}}, portal_id="p"),
    log_record(ai={**_AI, **_USAGE, "tokens": {"prompt_tokens": 1}}),
    answered_early(request={"headers": {TENANT: ["", "acme"], "x-plan": "gold"}}),
]
_BASES = [*_MADE_UP, *(json.loads(recorded(name)) for name in recorded_scenarios())]


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the way to each value in a record."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _is_read(path: tuple[Any, ...]) -> bool:
    """Whether the plugin looks at this place: most of a record is of no interest to it."""
    return path[0] not in ("latencies", "workspace", "workspace_name", "source") and path[:2] != ("response", "headers")


_RECORDS = [(record, [path for path in _places(record) if _is_read(path)]) for record in _BASES]


@st.composite
def changed_records(draw: st.DrawFn) -> str:
    """Take a record of Kong's, put something else in a few of its places, and write it as text."""
    base, places = draw(st.sampled_from(_RECORDS))
    record = copy.deepcopy(base)
    for path in draw(st.lists(st.sampled_from(places), max_size=4)):
        node: Any = record
        for key in path[:-1]:
            node = node[key] if isinstance(node, dict) and key in node else {}
        if isinstance(node, dict):
            node[path[-1]] = draw(scalars | json_values())
    return json.dumps(record, ensure_ascii=draw(st.booleans()))


@st.composite
def _damaged_texts(draw: st.DrawFn) -> str:
    """Take the text of a record, and damage it."""
    text = draw(changed_records())
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.integers(0, 20)))
    return text[:start] + draw(texts) + text[end:]


_captured = st.one_of(
    st.just({TENANT: "acme", "X_Tenant_ID": "acme", "x-plan": "gold"}),
    st.none(),
    st.just({ASKED: TENANT}),
    st.dictionaries(st.sampled_from([TENANT, "X_Tenant_ID", "x-plan"]), texts, max_size=3),
    st.dictionaries(texts, json_values(3), max_size=3),
    json_values(3),
)
_cases = st.fixed_dictionaries(
    {
        "config": configs,
        "record": changed_records() | _damaged_texts() | json_values().map(json.dumps),
        "captured": _captured,
    }
)


def check(case: Case) -> None:
    """Give the events of a record, read in both ways, and check that they are in order and the same."""
    try:
        settings = parse_config(whole_config(case["config"]))
    except ConfigError:
        return  # a name that nothing can have
    meter = Meter(settings, FakeClock())
    record, whole = parse_record(case["record"]) or Record(), parsed_leniently(case["record"]) or Record()
    events, again = (meter.events(FinishedRequest(read, case["captured"])) for read in (record, whole))
    if isinstance(events, Skipped) or isinstance(again, Skipped):
        assert events is again
        return
    found = check_events(events, case["config"])
    if record.request.id:
        assert events == again
    else:  # each time they are made, they are events of another request
        assert _without_id(check_events(again, case["config"])) == _without_id(found)


def _without_id(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**event["data"], "api_request_id": None} for event in events]


def vary(case: Case, chance: Random) -> Case:
    """Change something in the record, or in what was kept of the request."""
    if chance.random() < 0.2:
        return {**case, "captured": varied_json(case["captured"], chance)}
    try:
        record = json.loads(case["record"])
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or chance.random() < 0.1:
        return {**case, "record": varied_text(case["record"], chance, TEXTS)}
    return {**case, "record": json.dumps(varied_json(record, chance), ensure_ascii=chance.random() < 0.5)}


TARGET = Target("records", _cases, vary, check)
