"""key-auth: the caller is the consumer whose key is in a header or in the query."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kong_metering_sandbox.gateway.context import PluginExit
from kong_metering_sandbox.gateway.errorpages import refusal
from kong_metering_sandbox.gateway.query import decode_args, without_arg
from kong_metering_sandbox.gateway.values import as_text

if TYPE_CHECKING:
    from kong_metering_sandbox.gateway.context import Exchange
    from kong_metering_sandbox.gateway.values import Table, Value

    from .base import Identities

_UNAUTHORIZED = 401


class KeyAuth:
    """Authenticates by key; keys in bodies are not looked for."""

    priority = 1250

    async def access(self, exchange: Exchange, config: Table, identities: Identities) -> None:
        """Set the consumer, or answer 401; with `anonymous` the request goes on as that consumer instead."""
        if not config["run_on_preflight"] and exchange.method == b"OPTIONS":
            return
        anonymous = config.get("anonymous")
        if anonymous and exchange.credential is not None:
            return
        error = _authenticate(exchange, config, identities)
        if error is None:
            return
        if not anonymous:
            realm = config.get("realm")
            challenge = f'Key realm="{realm}"' if realm else "Key"
            reply = refusal(exchange, _UNAUTHORIZED, error, {"WWW-Authenticate": challenge})
            raise PluginExit(reply)
        _set_consumer(exchange, identities.consumer(anonymous), None)


def _authenticate(exchange: Exchange, config: Table, identities: Identities) -> str | None:
    """Return why the caller is not known; None when it is."""
    name, key = _find_key(exchange, config)
    if isinstance(key, list):
        return "Duplicate API key found"
    if name is not None and config["hide_credentials"]:
        exchange.args = without_arg(exchange.args, name)
        exchange.headers.remove(name)
    if not key:
        return "No API key found in request"
    credential = identities.credentials.get(as_text(key))
    if credential is None:
        return "Unauthorized"
    _set_consumer(exchange, identities.consumers.get(credential["consumer"]["id"]), credential)
    return None


def _find_key(exchange: Exchange, config: Table) -> tuple[bytes | None, Value]:
    headers, query = exchange.headers.table(), decode_args(exchange.args)
    for configured in config["key_names"]:
        name = configured.encode()
        value: Value = headers.get(name.lower()) if config["key_in_header"] else None
        if value is None and config["key_in_query"]:
            value = query.get(name)
        if isinstance(value, (bytes, list)):
            return name, value
    return None, None


def _set_consumer(exchange: Exchange, consumer: Table | None, credential: Table | None) -> None:
    exchange.consumer, exchange.credential = consumer, credential
    fields = {
        b"X-Consumer-ID": (consumer or {}).get("id"),
        b"X-Consumer-Custom-ID": (consumer or {}).get("custom_id"),
        b"X-Consumer-Username": (consumer or {}).get("username"),
        b"X-Credential-Identifier": (credential or {}).get("id"),
        b"X-Anonymous-Consumer": None if credential else "true",
    }
    for name, value in fields.items():
        if value is None:
            exchange.headers.remove(name)
        else:
            exchange.headers.set(name, value.encode())
