"""What the transcripts' requests must give, worked out from the recorded record and not with the plugin's own code."""

from __future__ import annotations

import json
import secrets
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.support.records import log_record
from tests.support.rpc import KongRequest, PhaseRun
from tests.support.transcripts import RecordedFrame, RecordedRequest, load
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.support.ingest import IngestServer
    from tests.support.pb_rpc import PBKongClient
    from tests.support.protocols import Client
    from tests.support.rpc import Frame

# Where Kong's own start of an instance was recorded: with the subject in a header, and with an attribute as well.
LIFECYCLE = "lifecycle_create_update_delete_on_postgres"
VAULT = "start_instance_dbless_vault_reference"

ALICE = "b32379d9-3d28-5683-a79c-72139be6e34f"
# The subject of the scenario's requests by the header x-tenant-id; in those that are not here, it is acme.
HEADER_SUBJECTS: dict[str, str | None] = {
    "bad_request_400_malformed": None,
    "empty_subject_header": None,
    "get_no_subject": None,
    "latin1_subject_header_invalid_utf8": "café",
    "long_subject_header_7000_bytes": "a" * 7000,
    "utf8_subject_header": "Zoë-株式会社",
}
# By the consumer, and by the query argument `tenant`; in scenarios that are not here, there is none.
CONSUMER_SUBJECTS = {"consumer_key_auth_hidden_credentials": f"consumer:{ALICE}"}
QUERY_SUBJECTS = {
    "get_header_subject": "acme",
    "query_repeated_flag_and_array_args": "acme",
    "request_transformer_removes_subject": "acme",
}

_CATALOGUE = Path(__file__).parents[1] / "data" / "event-fields.json"
_TYPES: dict[str, type] = {"string": str, "integer": int}


def recorded_start(scenario: str = LIFECYCLE) -> RecordedFrame:
    return load(scenario).frames_of("StartInstance")[0]


def start_frame(recorded: RecordedFrame, ingest: IngestServer) -> Frame:
    """Give a recorded StartInstance for today's ingest endpoint."""
    return recorded.with_member(b"Config", _config(recorded, ingest).encode())


def start_instance(client: Client, ingest: IngestServer, recorded: RecordedFrame, **changes: object) -> int:
    """Start an instance with a recorded configuration, and `changes` in it."""
    return client.start_instance(_config(recorded, ingest, **changes))


def _config(recorded: RecordedFrame, ingest: IngestServer, **changes: object) -> str:
    return json.dumps(json.loads(recorded.argument[b"Config"]) | {"ingest_endpoint": ingest.url} | changes)


def warm_up(client: PBKongClient, instance: int, requests: int = 110) -> list[PhaseRun]:
    """Let an instance see so many requests whose headers leave no question open: then its phases ask at once.

    Returns their access phases.
    """
    warm = [_clear_request() for _ in range(requests)]
    with client.connection() as connection:
        accesses, logs = ([PhaseRun(instance, phase, request) for request in warm] for phase in ("access", "log"))
        client.run_together(accesses, connection)
        client.run_together(logs, connection)
    drain(client)
    return accesses


def _clear_request() -> KongRequest:
    record = log_record(request={"id": secrets.token_hex(16), "headers": {"x-tenant-id": "warm"}})
    return KongRequest({"kong.request.get_header(x-tenant-id)": "warm", "kong.log.serialize": json.dumps(record)})


def drain(client: Client) -> dict[str, Any]:
    """Wait until no event waits for delivery any more, and give the plugin's account."""
    return wait_until(lambda: _account(client), "an empty queue")


def _account(client: Client) -> dict[str, Any] | None:
    account: dict[str, Any] = client.status()["Status"]
    return account if account["waiting"] == 0 else None


def expected_event(
    request: RecordedRequest | dict[str, Any], subject: str, subject_type: str = "header"
) -> dict[str, Any]:
    """Give the event of a request, or of its record, whole."""
    record = request if isinstance(request, dict) else request.record
    service = record.get("service") or {}
    started_at = datetime.fromtimestamp(record["started_at"] / 1000, timezone.utc)
    return {
        "specversion": "1.0",
        "id": f"{record['request']['id']}:api_request",
        "source": service.get("name", "kong-gateway"),
        "type": "kong.api_request",
        "subject": subject,
        "time": started_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": expected_data(record) | {"subject_type": subject_type},
    }


def expected_data(record: dict[str, Any]) -> dict[str, Any]:
    request, response = record["request"], record["response"]
    route, service = record.get("route") or {}, record.get("service") or {}
    statuses = str(record["upstream_status"]).split(", ")
    fields = {
        "client_ip": record["client_ip"],
        "request_host": urlsplit(request["url"]).hostname,
        "request_method": request["method"],
        "request_size_bytes": request["size"],
        "request_uri": request["uri"].split("?")[0],
        "request_user_agent": request["headers"].get("user-agent"),
        "response_http_status": response["status"],
        "response_size_bytes": response["size"],
        "route_id": route.get("id"),
        "route_name": route.get("name"),
        "service_id": service.get("id"),
        "service_name": service.get("name"),
        "service_port": service.get("port"),
        "service_protocol": service.get("protocol"),
        "upstream_status": int(statuses[-1]) if statuses[-1] else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


@cache
def _catalogue(event_type: str) -> dict[str, str]:
    fields = json.loads(_CATALOGUE.read_text(encoding="utf-8"))[event_type]
    return {item["name"]: item["type"] for item in fields}


def assert_fits_catalogue(event: dict[str, Any], *attributes: str) -> None:
    """Check that an event has only fields of the vendor's catalogue, with its types, and these attributes."""
    catalogue = _catalogue(event["type"])
    for name, value in event["data"].items():
        if name not in attributes:
            assert type(value) is _TYPES[catalogue[name]], f"{name}: {value!r} is no {catalogue[name]}"
