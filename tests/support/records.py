"""Kong's log records, made up or recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kong_metering.record import Record, record_of
from kong_metering.request import FinishedRequest

DATA = Path(__file__).parents[1] / "data"

REQUEST_ID = "f37e446f27097b739946db19e1f6e447"
STARTED_AT = 1_795_359_970_019
STARTED_AT_RFC3339 = "2026-11-22T15:06:10.019Z"


def log_record(*, request: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Make the record of a request that reached its upstream; `None` takes a field away."""
    record: dict[str, Any] = {
        "client_ip": "192.0.2.7",
        "request": {
            "id": REQUEST_ID,
            "method": "GET",
            "uri": "/anything",
            "url": "http://gateway.example:8000/anything",
            "size": 135,
            "headers": {"host": "gateway.example:8000", "user-agent": "curl/7.88.1"},
            "querystring": {},
            **(request or {}),
        },
        "response": {"status": 200, "size": 779, "headers": {}},
        "route": {"id": "21f7817b-d909-5895-b81b-ac9ed0a6d09d", "name": "anything"},
        "service": {
            "id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
            "name": "echo",
            "port": 9000,
            "protocol": "http",
        },
        "upstream_status": "200",
        "tries": [{"ip": "127.0.0.1", "port": 9000}],
        "started_at": STARTED_AT,
        **changes,
    }
    return {name: value for name, value in record.items() if value is not None}


def answered_early(**changes: Any) -> dict[str, Any]:
    """Make the record of a request that Kong or a plugin answered before our access phase, as with a 401."""
    return log_record(**{"response": {"status": 401, "size": 377}, "upstream_status": "", "tries": [], **changes})


def finished(record: Mapping[str, Any] | Record, captured: object = None) -> FinishedRequest:
    """Take a record, made up or read, for that of a finished request."""
    return FinishedRequest(record if isinstance(record, Record) else record_of(record), captured)


def recorded_scenarios() -> list[str]:
    return sorted(path.stem for path in (DATA / "records").glob("*.json"))


def recorded(scenario: str) -> str:
    """Give what `kong.log.serialize` of a real Kong 3.9.1 answered, as the host hands it to a plugin."""
    return (DATA / "records" / f"{scenario}.json").read_bytes().decode("utf-8", "surrogateescape")
