"""What a soak's gateway is configured with: two plugins, their endpoints and tokens, and how those change.

Contract: one thread at a time changes it. The plugin of `orders` has its token in its configuration, that of `invoices`
in a vault. No token is used twice.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from kong_metering import PLUGIN_NAME
from kong_metering_sandbox.collector.tokens import fingerprint
from kong_metering_soak.traffic import ROUTES, SUBJECT_HEADER

TOLD, VAULTED = ROUTES
_ENTITIES = {
    TOLD: "0b1f7c39-52b0-4b5e-9d0b-0e3d7a2f6c01",
    VAULTED: "0b1f7c39-52b0-4b5e-9d0b-0e3d7a2f6c02",
}
_PATHS = {TOLD: "/api/v3/openmeter/events", VAULTED: "/api/v1/events"}
_SECRET = "om-token"  # noqa: S105 - its name
# So many that a trouble of the disk is survived, so few that an outage leaves events on disk.
_MEMORY_SECONDS = 30


class Shop:
    """The declarative configuration, and whose endpoint and token is which."""

    def __init__(self, vault: Path, upstream_url: str, collector_url: str, *, rate: float, timeout_ms: int) -> None:
        vault.mkdir()
        self._vault = vault
        self._upstream_url = upstream_url
        self._collector_url = collector_url
        self._rate = rate
        self._timeout_ms = timeout_ms
        self._rotations: Counter[str] = Counter()
        self._wrong_path: str | None = None
        self.put_secret()

    @property
    def tokens(self) -> list[str]:
        """The tokens that are right now."""
        return [_token(route, self._rotations[route]) for route in ROUTES]

    def rotate(self, route: str) -> None:
        """Have another token for a route; the vault has it after `put_secret`, the gateway when it is told."""
        self._rotations[route] += 1

    def put_secret(self) -> None:
        """Put the right token into the vault."""
        draft = self._vault / "draft"
        draft.write_text(_token(VAULTED, self._rotations[VAULTED]), encoding="ascii")
        draft.replace(self._vault / _SECRET)

    def mistake_url(self, path: str) -> None:
        """Configure a path that is not the right one."""
        self._wrong_path = path

    def correct_url(self) -> None:
        """Configure the right one."""
        self._wrong_path = None

    def path_of(self, route: str) -> str:
        """Give the path of a route's right endpoint."""
        return _PATHS[route]

    def declarative(self) -> str:
        """Write it as it is now."""
        routes = [{"name": route, "paths": [f"/{route}"], "plugins": [self._plugin(route)]} for route in ROUTES]
        service = {"name": "shop", "url": self._upstream_url, "routes": routes}
        return json.dumps({"_format_version": "3.0", "services": [service]})

    def route_of(self, path: str, token: str | None) -> str | None:
        """Tell whose endpoint and token an event came with; None when they do not belong together."""
        for route in ROUTES:
            tokens = [fingerprint(f"Bearer {_token(route, number)}") for number in range(self._rotations[route] + 1)]
            if path == _PATHS[route] and token in tokens:
                return route
        return None

    def route_of_entity(self, entity_id: str, endpoint: str) -> str | None:
        """Tell whose dead letter it is, by its entity and endpoint; None when they do not belong together."""
        for route in ROUTES:
            if (entity_id, endpoint) == (_ENTITIES[route], self._collector_url + _PATHS[route]):
                return route
        return None

    def _plugin(self, route: str) -> dict[str, Any]:
        """Configure the entity of a route: one with a breaker and small batches, one without."""
        is_vaulted = route == VAULTED
        path = _PATHS[route] if is_vaulted else self._wrong_path or _PATHS[route]
        queue = {
            "max_batch_size": 20 if is_vaulted else 100,
            "max_coalescing_delay": 0.1,
            "max_entries": int(self._rate * _MEMORY_SECONDS),
            "max_retry_time": 2,
            "max_retry_delay": 0.5,
            "failure_threshold": 3 if is_vaulted else 0,
            "breaker_cooldown": 1,
        }
        config = {
            "ingest_endpoint": self._collector_url + path,
            "api_token": f"{{vault://file/{_SECRET}}}" if is_vaulted else _token(route, self._rotations[route]),
            "meter_ai_token_usage": False,
            "subject": {"look_up_value_in": "header", "field": SUBJECT_HEADER},
            "timeout": self._timeout_ms,
            "queue": queue,
        }
        return {"name": PLUGIN_NAME, "id": _ENTITIES[route], "config": config}


def _token(route: str, number: int) -> str:
    return f"om_{route}_{number}"
