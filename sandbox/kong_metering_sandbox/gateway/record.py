"""The record of a request: what `kong.log.serialize` gives to plugins that log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .context import LuaError
from .query import decode_args
from .values import as_text

if TYPE_CHECKING:
    from .context import Exchange
    from .headers import Headers, HeaderTable
    from .query import Query
    from .values import Table, Value

_REDACTED = (b"authorization", b"proxy-authorization")
_SOURCES = {"service": "upstream", "exit": "kong", "error": "kong"}


def build_record(exchange: Exchange) -> Table:
    """Return the record of a request whose response has been sent.

    Raises:
        LuaError: a plugin set a value in a place where there is no table.

    """
    record: Table = {
        "request": _request(exchange),
        "upstream_uri": upstream_uri(exchange),
        "upstream_status": exchange.buffered_status or ", ".join(exchange.upstream_statuses),
        "response": {
            "status": exchange.status,
            "headers": response_table(exchange.response_headers),
            "size": exchange.bytes_sent,
        },
        "latencies": {
            "kong": exchange.latencies.kong,
            "proxy": exchange.latencies.proxy,
            "request": exchange.elapsed_ms(),
            "receive": exchange.latencies.receive,
        },
        "client_ip": exchange.client_ip,
        "started_at": exchange.started_at,
        "source": _SOURCES[exchange.source],
        "workspace": exchange.workspace,
        "workspace_name": "default",
        **_entities(exchange),
    }
    for key, value in exchange.serialize_values:
        _set(record, key, value)
    return record


def _request(exchange: Exchange) -> Table:
    head = exchange.head
    authority = b"http://%s:%d" % (head.host or b"kong", exchange.server_port)
    request_id = {} if exchange.kong_request_id is None else {"id": exchange.kong_request_id}
    return {
        **request_id,
        "uri": head.target,
        "url": authority + head.target,
        "querystring": querystring(exchange),
        "method": method(exchange),
        "headers": request_table(exchange.headers),
        "size": exchange.request_size,
    }


def _entities(exchange: Exchange) -> Table:
    entities: dict[str, Any] = {
        "tries": exchange.tries,
        "route": exchange.match.route if exchange.match else None,
        "service": exchange.match.service if exchange.match else None,
        "consumer": exchange.consumer,
    }
    if exchange.credential is not None:
        entities["authenticated_entity"] = {"id": exchange.credential["id"]}
    return {name: entity for name, entity in entities.items() if entity is not None}


def request_table(headers: Headers) -> HeaderTable:
    """Return the request headers of the record: the first 100, credentials made unreadable."""
    table = headers.table()
    return {name: b"REDACTED" if name in _REDACTED else value for name, value in table.items()}


def response_table(headers: Headers) -> HeaderTable:
    """Return the response headers as the log phase sees them.

    nginx has no Connection header by then, and says "close" because the request no longer keeps it open;
    nor has it the Date that it makes itself, which is why the caller leaves that out.
    """
    copy = headers.copy()
    copy.set(b"connection", b"close")
    return copy.table()


def upstream_uri(exchange: Exchange) -> bytes:
    """Return the path and query that the service was, or would have been, asked for."""
    uri = exchange.upstream_uri
    if not uri or b"?" in uri:
        return uri
    if exchange.head.target.endswith(b"?"):
        return uri + b"?"
    return uri + b"?" + exchange.args if exchange.args else uri


def method(exchange: Exchange) -> bytes:
    """Return the request's method; after an error in the gateway, what stands first in the request line."""
    if not exchange.unexpected:
        return exchange.method
    return exchange.head.line.partition(b" ")[0] if b" " in exchange.head.line else exchange.method


def querystring(exchange: Exchange) -> Query:
    """Return the decoded query; after an error in the gateway, the one in the request line."""
    if not exchange.unexpected:
        return decode_args(exchange.args)
    query = exchange.head.line.partition(b"?")[2].partition(b" ")
    return decode_args(query[0]) if query[1] else {}


def _set(record: Table, key: str, value: Value) -> None:
    *path, last = key.split(".")
    node: Table = record
    for name in path:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise LuaError(
                f"The key '{key}' could not be used as a serialize value. "
                f"Subkey '{name}' is not a table. It's {as_text(str(node))}"
            )
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value
