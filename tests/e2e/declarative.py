"""Declarative configurations for the end-to-end tests."""

from __future__ import annotations

import json
from typing import Any

PLUGIN = "metering-and-billing"


def metering(endpoint: str, **config: Any) -> dict[str, Any]:
    """Give a plugin entity that meters by the header x-tenant-id, unless `config` says otherwise."""
    settings = {
        "ingest_endpoint": endpoint,
        "api_token": "om_token",
        "meter_ai_token_usage": False,
        "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
        "queue": {"max_batch_size": 100, "max_coalescing_delay": 0.1},
    }
    return {"name": PLUGIN, "config": settings | config}


def metering_at_once(endpoint: str, **config: Any) -> dict[str, Any]:
    """Give the same, with a queue in which no event waits for others."""
    return metering(endpoint, queue={"max_batch_size": 1}, **config)


def service(upstream: str, name: str = "echo", *routes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Give a service with routes; without any, one on `/NAME`."""
    return {"name": name, "url": upstream, "routes": list(routes) or [route(name)], **fields}


def route(name: str, **fields: Any) -> dict[str, Any]:
    """Give a route on the path `/NAME`."""
    return {"name": name, "paths": [f"/{name}"], **fields}


def document(
    *services: dict[str, Any],
    plugins: list[dict[str, Any]] | None = None,
    consumers: list[dict[str, Any]] | None = None,
) -> str:
    """Give a kong.yaml (JSON is YAML)."""
    content = {
        "_format_version": "3.0",
        "services": list(services),
        "plugins": plugins or [],
        "consumers": consumers or [],
    }
    return json.dumps(content)


def consumer(username: str, **fields: Any) -> dict[str, Any]:
    """Give a consumer whose API key is `key-USERNAME`."""
    return {"username": username, "keyauth_credentials": [{"key": f"key-{username}"}], **fields}
