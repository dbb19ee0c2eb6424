"""Fuzzing of query strings: what we read in a request target is what another reader of the same rules reads."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

from kong_metering.config import parse_config
from kong_metering.errors import ConfigError
from kong_metering.events import Meter
from kong_metering.reasons import Skipped
from kong_metering.record import legible, query_values, subject_text
from kong_metering_sandbox.gateway.query import decode_args
from tests.fuzz.cases import Case, Target
from tests.fuzz.invariants import check_events
from tests.fuzz.strategies import as_client_text, client_texts, names, whole_config
from tests.fuzz.variation import varied_list, varied_text
from tests.support.clock import FakeClock
from tests.support.records import finished, log_record

_ALL = 10**9
_SYNTAX = st.sampled_from(
    [
        "&",
        "=",
        "&tenant=",
        "tenant",
        "?",
        "#",
        "+",
        "%",
        "%4",
        "%zz",
        "%41",
        "%26",
        "%3D",
        "%00",
        "%C3%A9",
        "%E9",
        ";",
        "/",
    ]
)
_cases = st.fixed_dictionaries(
    {
        "path": st.sampled_from(["", "/", "/a", "//a/../b", "/a;b=c", "http://host/a"]) | client_texts,
        "parts": st.lists(_SYNTAX | client_texts, max_size=12),
        "name": st.sampled_from(["tenant", "a[]", "Ä"]) | names,
    }
)


def check(case: Case) -> None:
    """Read an argument, compare with the gateway's own reading of the same bytes, and bill by it."""
    query = as_client_text("".join(case["parts"]))
    name: str = case["name"]
    uri = f"{case['path']}?{query}"
    found = list(query_values(uri, name))
    if "?" not in case["path"] and "#" not in case["path"]:
        assert found == _expected(query, name)
    assert all(isinstance(value, str) for value in found)
    config = {"subject": {"look_up_value_in": "query", "field": name}}
    try:
        settings = parse_config(whole_config(config))
    except ConfigError:
        return  # a name that nothing can have
    # Names are trimmed.
    found = list(query_values(uri, settings.subject.field or ""))
    meter = Meter(settings, FakeClock())
    events = meter.events(finished(log_record(request={"uri": uri})))
    subjects = [legible(subject) for value in found if (subject := subject_text(value))]
    if isinstance(events, Skipped):
        assert subjects == []
    else:
        (event,) = check_events(events, config)
        assert event["subject"] == subjects[0]


def _expected(query: str, name: str) -> list[str]:
    raw = _as_bytes(query.partition("#")[0])
    values = decode_args(raw, _ALL).get(_as_bytes(name), [])
    several = values if isinstance(values, list) else [values]
    return ["" if isinstance(value, bool) else value.decode("utf-8", "surrogateescape") for value in several]


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def vary(case: Case, chance: Random) -> Case:
    """Change one part of the query."""
    return {**case, "parts": varied_list(case["parts"], chance, varied_text)}


TARGET = Target("queries", _cases, vary, check)
