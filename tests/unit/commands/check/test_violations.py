"""What is refused, compared with the stand-in, whose rules are compared with Kong's own elsewhere."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from kong_metering.commands.check.settings import CONFIG
from kong_metering.commands.check.violations import violations
from kong_metering_sandbox.gateway.schema import Schema, validate_field

NAMES = ["", " ", "x", "x-tenant-id", "x tenant", "x:", " x", "x\n", "\x00", "header", "query", "consumer"]
OTHERS = [
    "200-299",
    "200",
    "true",
    "10",
    "{vault://env/x}",
    "https://x.example/events",
    "http://x",
    "https://",
    "ftp://x",
]
TEXTS = st.sampled_from([*NAMES, *OTHERS])
NUMBERS = st.sampled_from([-1, 0, 1, 1.5, 100, 3600, 3601, 1_000_000, 1_000_001, 0.001, 0.0001])
SIMPLE = st.one_of(TEXTS, NUMBERS, st.booleans(), st.none(), st.just([]), st.just({}))


def records(*names: str, values: st.SearchStrategy[Any] = SIMPLE) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from([*names, "unknown"]), values, max_size=4)


SUBJECTS = records("look_up_value_in", "field")
ATTRIBUTES = st.lists(records("source", "look_up_value_in", "event_property_name"), max_size=2)
QUEUES = records("max_batch_size", "max_coalescing_delay", "max_entries", "max_bytes", "concurrency_limit")
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "ingest_endpoint": st.one_of(st.just("https://x.example/events"), SIMPLE),
        "api_token": st.one_of(st.just("t"), SIMPLE),
        "meter_api_requests": SIMPLE,
        "subject": st.one_of(SUBJECTS, SIMPLE),
        "attributes": st.one_of(ATTRIBUTES, SIMPLE),
        "allow_status_codes": st.one_of(st.lists(TEXTS, max_size=2), SIMPLE),
        "timeout": SIMPLE,
        "queue": st.one_of(QUEUES, SIMPLE),
        "unknown": SIMPLE,
    },
)
VALID = {"ingest_endpoint": "https://x.example/events", "api_token": "t"}


@given(CONFIGS)
@example(VALID)
@example({**VALID, "subject": None})
@example({**VALID, "queue": None})
@example({**VALID, "attributes": None})
@example({**VALID, "subject": [], "queue": []})
@example({**VALID, "attributes": {}, "allow_status_codes": {}})
@example({**VALID, "subject": {"look_up_value_in": None}})
@example({**VALID, "subject": {"look_up_value_in": None, "field": "x y"}})
def test_it_is_refused_exactly_when_the_gateway_refuses_it(config: dict[str, Any]) -> None:
    spec = dict(CONFIG)
    refused = validate_field(spec, Schema.of(spec).fill(config))
    found = list(violations(CONFIG, config))
    assert bool(found) == bool(refused), (found, refused)
