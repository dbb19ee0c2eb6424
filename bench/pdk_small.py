"""The plugin of the benchmark on kong-pdk's own server: it does what goplugin/main.go does.

It reads a header in access, keeps it for the log phase, and builds a small CloudEvent there, which it throws away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from kong_pdk.cli import start_dedicated_server

NAME = "bench-pdk"
_VERSION = "0.1.0"
_PRIORITY = 850  # after authentication, as ours
_SCHEMA = [{"header": {"type": "string", "required": True}}]


class Plugin:
    """One instance; `config` has the header that tells who is billed."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._header = config["header"]

    def access(self, kong: Any) -> None:
        """Keep the client's value of the header."""
        kong.ctx.shared.set(NAME, kong.request.get_header(self._header))

    def log(self, kong: Any) -> None:
        """Build the event."""
        _encode(kong.ctx.shared.get(NAME), json.loads(kong.log.serialize()))


def _encode(subject: str, record: Mapping[str, Any]) -> str:
    started = datetime.fromtimestamp(record["started_at"] / 1000, timezone.utc)
    return json.dumps(
        {
            "specversion": "1.0",
            "id": record["request"]["id"],
            "source": "kong-gateway",
            "type": "kong.api_request",
            "subject": subject,
            "time": started.isoformat(),
            "data": {
                "request_method": record["request"]["method"],
                "request_uri": record["request"]["uri"],
                "response_http_status": record["response"]["status"],
                "response_size_bytes": record["response"]["size"],
                "route_id": record["route"]["id"],
            },
        }
    )


if __name__ == "__main__":
    start_dedicated_server(NAME, Plugin, _VERSION, _PRIORITY, _SCHEMA)
