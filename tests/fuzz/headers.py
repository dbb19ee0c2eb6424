"""Fuzzing of request headers: both phases of the plugin, against Kong's side of the PDK."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, cast

from hypothesis import strategies as st

from kong_metering.log import LOGGER
from kong_metering.plugin import Plugin
from kong_metering.record import is_blank, legible, subject_text
from kong_metering.runtime import make_runtime
from tests.fuzz.cases import Case, Target
from tests.fuzz.invariants import check_events
from tests.fuzz.strategies import ATTRIBUTE, TENANT, as_client_text, attributes, client_texts, whole_config
from tests.fuzz.variation import varied_list, varied_text
from tests.support.clock import FakeClock
from tests.support.pdk import FakeKong
from tests.support.records import log_record

if TYPE_CHECKING:
    from kong_metering.delivery.registry import Delivery

_MOST_HEADERS = 1000
_names = st.sampled_from([TENANT, "X-Tenant-Id", "x_tenant_id", "X-TENANT_ID", ATTRIBUTE, "x_plan", "host", "cookie"])
_fillers = st.sampled_from([1, 99, 100, 120, 1000]).map(lambda number: [["x-filler", "1"]] * number)
_PIECES = [
    "kong.response.get_header",
    "kong.response.get_status",
    "kong.router.get_route",
    "kong.router.get_service",
    "kong.client.get_consumer",
]
_cases = st.fixed_dictionaries(
    {
        "field": st.sampled_from([TENANT, "X-Tenant-ID", "x_tenant_id"]),
        "attributes": st.lists(attributes, max_size=2),
        "headers": st.lists(
            _fillers | st.tuples(_names | client_texts, client_texts).map(lambda header: [list(header)]), max_size=8
        ).map(lambda groups: [header for group in groups for header in group]),
        "is_early": st.booleans(),
        "lua_style": st.booleans(),
        "asks_at_once": st.booleans(),
        "failing": st.lists(
            st.sampled_from(["kong.ctx.shared.get", "kong.log.serialize", "kong.request.get_headers"]), max_size=1
        ),
    }
)


@dataclass
class _Queue:
    events: list[bytes] = field(default_factory=list)

    def put(self, event: bytes) -> None:
        self.events.append(event)


@dataclass
class _Delivery:
    queue: _Queue = field(default_factory=_Queue)

    def open(self, *_: object) -> _Queue:
        return self.queue

    def release(self, queue: _Queue) -> None:
        assert queue is self.queue


def check(case: Case) -> None:
    """Run a request through the plugin: it gives one event or one counted skip, and the right one is billed."""
    LOGGER.setLevel("CRITICAL")  # what Kong was told to fail at is said, and that is right
    delivery = _Delivery()
    clock = FakeClock()
    runtime = replace(make_runtime(clock), delivery=cast("Delivery", delivery))
    config = {
        "subject": {"look_up_value_in": "header", "field": case["field"]},
        "attributes": case["attributes"],
        "meter_ai_token_usage": False,
    }
    plugin = Plugin(whole_config(config), runtime)
    headers = [(as_client_text(name), as_client_text(value)) for name, value in case["headers"]]
    kong = FakeKong(
        headers,
        json.dumps(_record(headers, clock)),
        lua_style=case["lua_style"],
        failing=dict.fromkeys(case["failing"], "fuzzed"),
        answers=dict.fromkeys(_PIECES),
    )
    asks_at_once = case.get("asks_at_once", False)
    runtime.captured.are_identified = True if asks_at_once else None
    for _ in range(100):
        plugin._experience.note(is_odd=False)
    for phase in ["log"] if case["is_early"] else ["access", "log"]:
        _run(plugin, phase, kong, asks_at_once=asks_at_once)
    skipped = runtime.stats.snapshot().skipped
    # Asked at once, Kong has gone on when the record turns out not to come.
    assert skipped.get("error", 0) == (asks_at_once and "kong.log.serialize" in case["failing"])
    assert len(delivery.queue.events) + sum(skipped.values()) == 1
    found = check_events(delivery.queue.events, config)
    if not case["failing"] and not case["is_early"]:
        _check_subject([event["subject"] for event in found], headers, 100 if asks_at_once else _MOST_HEADERS)


def _run(plugin: Plugin, phase: str, kong: FakeKong, *, asks_at_once: bool) -> None:
    asked = getattr(plugin, f"{phase}_at_once")() if asks_at_once else None
    if asked is None:
        getattr(plugin, phase)(kong.kong)
        return
    answers = [kong.answer(*called) for called in asked.calls]
    if any(error for _, error in answers):
        asked.give_up()
    else:
        asked.finish([value for value, _ in answers])


def _check_subject(found: list[str], headers: list[tuple[str, str]], seen: int) -> None:
    """Check what is billed where nothing is open to question: the first value, however many headers there are."""
    sent = [(name.lower(), value) for name, value in headers if name.lower().replace("_", "-") == TENANT]
    if not sent:
        assert found == []
    elif all(name == TENANT for name, _ in sent) and (len(sent) == 1 or not is_blank(sent[0][1])):
        # Behind so many others, a value with a comma and a space looks like two.
        first = sent[0][1] if len(headers) <= seen else sent[0][1].partition(", ")[0]
        assert found in (_billed(sent[0][1]), _billed(first))


def _billed(value: str) -> list[str]:
    subject = subject_text(value)
    return [legible(subject)] if subject else []


def _record(headers: list[tuple[str, str]], clock: FakeClock) -> dict[str, object]:
    table: dict[str, list[str]] = {}
    for name, value in headers[:100]:
        table.setdefault(name.lower(), []).append(value)
    shown = {name: values if len(values) > 1 else values[0] for name, values in table.items()}
    return log_record(request={"headers": shown}, started_at=int(clock.wall() * 1000))


def vary(case: Case, chance: Random) -> Case:
    """Change one header."""
    return {**case, "headers": varied_list(case["headers"], chance, _varied_header)}


def _varied_header(header: list[str], chance: Random) -> list[str]:
    name, value = header
    if chance.random() < 0.1:
        return [varied_text(name, chance), value]
    return [name, varied_text(value, chance)]


TARGET = Target("headers", _cases, vary, check)
