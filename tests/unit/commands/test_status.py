"""`kong-metering status`, on terminals of several widths and in a pipe."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from kong_metering.commands.main import program
from tests.unit.commands.helpers import NOW, answering

if TYPE_CHECKING:
    from pathlib import Path

ORDERS, PAYMENTS = "878715eb-ff5f-4bc3-b2ce-a52b1cd3b907", "b1f6c7a2-19d4-4c0b-8f0e-3c5e8a90d2e7"
OLD = "https://eu.api.konghq.com/v3/openmeter/events"
LONG = "https://us.api.konghq.com/v3/openmeter/organisations/customer-facing-apis/events?workspace=eu-central-1"
REFUSED = f"{LONG} answered 503: no room"


def plugin(entity: str, name: str, **requests: int) -> dict[str, Any]:
    events = {"kong.api_request": requests["metered"]}
    return {entity: {"name": f"{name} ({entity})", "requests": requests, "events": events, "last_request_at": None}}


def queue(entity: str, name: str, endpoint: str, **told: Any) -> dict[str, Any]:
    return {"entity": entity, "name": f"{name} ({entity})", "endpoint": endpoint} | told


FIGURES = {
    "pid": 31207,
    "version": "0.1.0",
    "plugins": plugin(ORDERS, "orders-and-returns-production", metered=1_234_567, no_subject=89, error=0)
    | plugin(PAYMENTS, "payments-production", metered=4_820),
    "queue_details": [
        queue(ORDERS, "orders-and-returns-production", LONG, delivered=1_234_000, delivered_at=NOW / 1000),
        queue(
            PAYMENTS,
            "payments-production",
            LONG,
            waiting=4_817,
            oldest_seconds=93_600,
            condition="nothing_gets_through",
            next_try_in_seconds=3_540,
            last_failure={"at": NOW / 1000, "reason": REFUSED},
            dead_letters={"rejected": 3, "ambiguous": 12_000},
        ),
        queue(PAYMENTS, "payments-production", OLD, waiting=1, oldest_seconds=1, dropped={"queue_full": 7}),
    ],
}


def status(prefix: Path, *flags: str, width: int | None = None) -> str:
    """Give what the command prints where a server tells the figures; without a width, in a pipe."""
    path = prefix / "plugin.sock"
    with answering(path, {"servers": [FIGURES]}):
        runner = CliRunner(env={"COLUMNS": None if width is None else str(width)})
        result = runner.invoke(program, ["status", "--socket", str(path), *flags])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("width", [80, 100, 120])
def test_numbers_and_names_are_whole_however_narrow_the_terminal_is(prefix: Path, width: int) -> None:
    shown = status(prefix, width=width)
    assert max(map(len, shown.splitlines())) <= width
    for whole in (
        f"orders-and-returns-production ({ORDERS})",
        "1,234,567 metered, 89 no_subject",
        "1,234,000 events",
        "takes nothing, next try in 59 min",
        "4,817 events, the oldest for 1 d 2 h",
        "12,000 ambiguous, 3 rejected",
        "1 event, the oldest for 1 s",
        "7 queue_full",
    ):
        assert whole in shown
    assert "error" not in shown


def test_an_endpoint_that_is_folded_is_whole_in_json(prefix: Path) -> None:
    shown = status(prefix, width=80)
    assert LONG not in shown
    assert LONG in re.sub(r"\s", "", shown)
    assert "answered 503: no room" in shown
    (told, *_) = json.loads(status(prefix, "--json", width=80))["queues"]
    assert told["endpoint"] == LONG


def test_all_endpoints_of_a_plugin_are_in_its_block(prefix: Path) -> None:
    head, orders, payments = status(prefix, width=80).split("\n\n")
    assert head == "server 31207 (0.1.0); 0 instances; 4,818 events wait"
    assert orders.startswith("orders-and-returns-production")
    assert payments.count(PAYMENTS) == 1
    assert payments.count("\n  endpoint ") == 2
    assert OLD in payments


def test_a_pipe_gets_tables(prefix: Path) -> None:
    shown = status(prefix)
    (heads,) = [line for line in shown.splitlines() if "endpoint" in line]
    assert re.split(r" {2,}", heads.strip()) == [
        "plugin", "endpoint", "state", "waiting", "oldest", "delivered", "last", "dead letters", "dropped", "read back"
    ]  # fmt: skip
    assert re.search(r"  4817 +1 d 2 h  0 +never +3 rejected, 12000 ambiguous", shown)
    assert re.search(r"\) +never +1234567 +89 no_subject +1234567", shown)
    assert f"payments-production ({PAYMENTS}): last failure" in shown
