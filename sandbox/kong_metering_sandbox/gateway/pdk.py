"""The plugin development kit as an external plugin can call it: one set of functions per phase.

While a request runs, functions read the request itself. The log phase runs in a timer after the response:
there they read what was saved (`Saved`), and whatever would need the request itself raises, as in Kong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .context import Exchange, LuaError, PluginExit, Reply, Saved
from .errorpages import error_message, refusal
from .headers import look_up, pdk_get_header
from .query import DEFAULT_LIMIT, decode_args, normalize_path
from .record import method as request_method
from .values import Table, Value, as_bytes, as_text, encode_json, format_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from .headers import Headers, HeaderTable
    from .query import Query

Function: TypeAlias = "Callable[[list[Value]], Value]"
Logger: TypeAlias = "Callable[[str, str], None]"  # level and text

_MAX_HEADERS = 1000
_STATUS_RANGE = range(100, 600)
_ERROR_RANGE = range(400, 600)
_LEVELS = {
    "debug": "debug",
    "info": "info",
    "notice": "notice",
    "warn": "warn",
    "err": "error",
    "crit": "crit",
    "alert": "alert",
    "emerg": "emerg",
}


def access_functions(exchange: Exchange, say: Logger, config: Table) -> dict[str, Function]:
    """Return the PDK functions for a request that is still running."""
    return {
        **_common(exchange, say, config),
        **_request(exchange),
        **_client(exchange),
        **_service_request(exchange),
        **dict.fromkeys(_RESPONSE_FUNCTIONS, _wrong_phase("access", _RESPONSE_PHASES)),
        "kong.response.exit": _exit,
        "kong.response.error": lambda args: _error(exchange, args),
        "kong.nginx.get_var": lambda args: nginx_variable(exchange, _text(args, 0, "variable name")),
        "kong.nginx.req_start_time": lambda _: exchange.started_at / 1000,
    }


def log_functions(saved: Saved, say: Logger, config: Table) -> dict[str, Function]:
    """Return the PDK functions for the log phase, where the request itself is gone."""
    exchange = saved.exchange
    gone = {
        **_request(exchange),
        **_client(exchange),
        **_service_request(exchange),
        "kong.response.exit": _exit,
    }
    return {
        **dict.fromkeys(gone, _gone),
        "kong.nginx.get_var": _no_variables,
        **_common(exchange, say, config),
        "kong.log.serialize": lambda _: encode_json(saved.record),
        "kong.nginx.req_start_time": lambda _: exchange.started_at / 1000,
        "kong.response.error": _wrong_phase("log", _ERROR_PHASES),
        "kong.request.get_headers": lambda _: saved.request_headers,
        "kong.request.get_header": lambda args: look_up(saved.request_headers, _text(args, 0, "header name")),
        "kong.response.get_headers": lambda _: saved.response_headers,
        "kong.response.get_header": lambda args: look_up(saved.response_headers, _text(args, 0, "header name")),
        "kong.response.get_status": lambda _: saved.status,
        "kong.response.get_source": lambda _: exchange.source,
    }


def _common(exchange: Exchange, say: Logger, config: Table) -> dict[str, Function]:
    """Return what works in every phase: it needs Kong's own notes about the request only."""
    match = exchange.match
    return {
        "kong.ctx.shared.get": lambda args: exchange.shared.get(_argument(args, 0)),
        "kong.ctx.shared.set": lambda args: _set(exchange.shared, args),
        "kong.nginx.get_ctx": lambda args: _note_of(exchange, _argument(args, 0)),
        "kong.nginx.set_ctx": lambda args: _set(exchange.nginx_ctx, args),
        "kong.client.get_consumer": lambda _: exchange.consumer,
        "kong.client.get_credential": lambda _: exchange.credential,
        "kong.router.get_route": lambda _: match.route if match else None,
        "kong.router.get_service": lambda _: match.service if match else None,
        "kong.plugin.get_id": lambda _: config["__plugin_id"],
        "kong.log.set_serialize_value": lambda args: exchange.serialize_values.append(
            (_text(args, 0, "key").decode("utf-8", "replace"), _argument(args, 1))
        ),
        "kong.log": _logger(say, "notice"),
        **{f"kong.log.{name}": _logger(say, level) for name, level in _LEVELS.items()},
    }


def _note_of(exchange: Exchange, name: Value) -> Value:
    """Give a note about the request: one that a plugin made, or the one of Kong's that there is here."""
    if name in exchange.nginx_ctx:
        return exchange.nginx_ctx[name]
    is_target = name in (b"request_uri", "request_uri")
    return exchange.head.target if is_target else None


def _logger(say: Logger, level: str) -> Function:
    return lambda args: say(level, "".join(map(_printed, args)))


def _printed(value: Value) -> str:
    if isinstance(value, (bytes, str)):
        return as_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    return format_number(value) if isinstance(value, (int, float)) else as_text(encode_json(value))


def _request(exchange: Exchange) -> dict[str, Function]:
    head = exchange.head
    return {
        "kong.request.get_scheme": lambda _: "http",
        "kong.request.get_host": lambda _: head.host,
        "kong.request.get_port": lambda _: exchange.server_port,
        "kong.request.get_forwarded_scheme": lambda _: "http",
        "kong.request.get_forwarded_host": lambda _: head.host,
        "kong.request.get_forwarded_port": lambda _: exchange.server_port,
        "kong.request.get_http_version": lambda _: float(head.version),
        "kong.request.get_method": lambda _: request_method(exchange),
        "kong.request.get_path": lambda _: normalize_path(head.path),
        "kong.request.get_raw_path": lambda _: head.path,
        "kong.request.get_path_with_query": lambda _: head.target,
        "kong.request.get_raw_query": lambda _: exchange.args,
        "kong.request.get_query": lambda args: _query(exchange, args),
        "kong.request.get_query_arg": lambda args: _first(
            decode_args(exchange.args).get(_text(args, 0, "query argument name"))
        ),
        "kong.request.get_header": lambda args: pdk_get_header(exchange.headers, _text(args, 0, "header name")),
        "kong.request.get_headers": lambda args: _header_table(exchange.headers, args),
        "kong.request.get_start_time": lambda _: exchange.started_at,
    }


def _client(exchange: Exchange) -> dict[str, Function]:
    return {
        "kong.client.get_ip": lambda _: exchange.client_ip,
        "kong.client.get_forwarded_ip": lambda _: exchange.client_ip,
        "kong.client.get_port": lambda _: exchange.client_port,
        "kong.client.get_forwarded_port": lambda _: exchange.client_port,
        "kong.client.get_protocol": lambda _: "http",
    }


def _service_request(exchange: Exchange) -> dict[str, Function]:
    headers = exchange.headers

    def name(args: list[Value]) -> bytes:
        return _text(args, 0, "header")

    def value(args: list[Value]) -> bytes:
        given = _argument(args, 1)
        return as_bytes(given) if isinstance(given, (bytes, str)) else _printed(given).encode()

    return {
        "kong.service.request.set_header": lambda args: headers.set(name(args), value(args)),
        "kong.service.request.add_header": lambda args: headers.add(name(args), value(args)),
        "kong.service.request.clear_header": lambda args: headers.remove(name(args)),
    }


_ERROR_PHASES = "rewrite, access, balancer, response, header_filter, error, admin_api"
_RESPONSE_PHASES = "response, header_filter, body_filter, log, error, admin_api"
_RESPONSE_FUNCTIONS = (
    "kong.log.serialize",
    "kong.response.get_status",
    "kong.response.get_header",
    "kong.response.get_headers",
    "kong.response.get_source",
)


def _wrong_phase(phase: str, right: str) -> Function:
    def fail(_args: list[Value]) -> Value:
        raise LuaError(f"function cannot be called in {phase} phase (only in: {right})")

    return fail


def _gone(_args: list[Value]) -> Value:
    raise LuaError("API disabled in the context of ngx.timer")


def _no_variables(_args: list[Value]) -> Value:
    raise LuaError("API disabled in the current context")


def _exit(args: list[Value]) -> Value:
    status, body, headers = _argument(args, 0), _argument(args, 1), _argument(args, 2)
    if not isinstance(status, (int, float)) or int(status) not in _STATUS_RANGE:
        raise LuaError("code must be a number between 100 and 599")
    fields = [
        (as_bytes(name), as_bytes(single) if isinstance(single, (bytes, str)) else _printed(single).encode())
        for name, value in (headers or {}).items()
        for single in (value if isinstance(value, list) else [value])
    ]
    if isinstance(body, (dict, list)):
        if not any(name.lower() == b"content-type" for name, _ in fields):
            fields.insert(0, (b"Content-Type", b"application/json; charset=utf-8"))
        body = encode_json(body)
    raise PluginExit(Reply(int(status), body or b"", tuple(fields)))


def _error(exchange: Exchange, args: list[Value]) -> Value:
    status, text = _argument(args, 0), _argument(args, 1)
    if not isinstance(status, (int, float)) or int(status) not in _ERROR_RANGE:
        raise LuaError("code must be a number between 400 and 599")
    raise PluginExit(refusal(exchange, int(status), error_message(int(status)) if text is None else as_text(text)))


def _argument(args: list[Value], index: int) -> Value:
    return args[index] if index < len(args) else None


def _text(args: list[Value], index: int, what: str) -> bytes:
    value = _argument(args, index)
    if not isinstance(value, (bytes, str)):
        raise LuaError(f"{what} must be a string")
    return as_bytes(value)


def _set(table: dict[Value, Value], args: list[Value]) -> None:
    key, value = _argument(args, 0), _argument(args, 1)
    if key is None:
        raise LuaError("index is nil")
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def _first(value: Value) -> Value:
    return value[0] if isinstance(value, list) else value


def _limit(args: list[Value], what: str) -> int:
    limit = _argument(args, 0)
    if limit is None:
        return DEFAULT_LIMIT
    if not isinstance(limit, (int, float)):
        raise LuaError(f"{what} must be a number")
    if limit < 1:
        raise LuaError(f"{what} must be >= 1")
    if limit > _MAX_HEADERS:
        raise LuaError(f"{what} must be <= {_MAX_HEADERS}")
    return int(limit)


def _query(exchange: Exchange, args: list[Value]) -> Query:
    return decode_args(exchange.args, _limit(args, "max_args"))


def _header_table(headers: Headers, args: list[Value]) -> HeaderTable:
    return headers.table(_limit(args, "max_headers"))


def nginx_variable(exchange: Exchange, name: bytes) -> bytes | str | None:
    """Return one of nginx's variables; None for one that it does not have."""
    name = name.lower()
    if name.startswith(b"http_"):
        # A dash in a header counts as an underscore; one in the variable's name matches nothing.
        return None if b"-" in name else exchange.headers.variable(name.removeprefix(b"http_"))
    if name.startswith(b"arg_"):
        return _raw_argument(exchange.args, name.removeprefix(b"arg_"))
    known = _VARIABLES.get(name.decode("latin-1"))
    return known(exchange) if known else None


def _raw_argument(args: bytes, name: bytes) -> bytes | None:
    for part in args.split(b"&"):
        key, equals, value = part.partition(b"=")
        if equals and key.lower() == name:
            return value
    return None


_VARIABLES: dict[str, Callable[[Exchange], bytes | str | None]] = {
    "request_id": lambda exchange: exchange.nginx_request_id,
    "kong_request_id": lambda exchange: exchange.kong_request_id,
    "remote_addr": lambda exchange: exchange.client_ip,
    "realip_remote_addr": lambda exchange: exchange.client_ip,
    "remote_port": lambda exchange: str(exchange.client_port),
    "request_uri": lambda exchange: exchange.head.target,
    "request_method": lambda exchange: exchange.method,
    "request": lambda exchange: exchange.head.line,
    "request_length": lambda exchange: str(exchange.request_size),
    "uri": lambda exchange: normalize_path(exchange.head.path),
    "args": lambda exchange: exchange.args or None,
    "query_string": lambda exchange: exchange.args or None,
    "is_args": lambda exchange: "?" if exchange.args else "",
    "host": lambda exchange: exchange.head.host,
    "scheme": lambda _: "http",
    "server_port": lambda exchange: str(exchange.server_port),
    "server_protocol": lambda exchange: f"HTTP/{exchange.head.version}",
    "content_type": lambda exchange: exchange.headers.get(b"content-type"),
    "content_length": lambda exchange: exchange.headers.get(b"content-length"),
    "upstream_uri": lambda exchange: exchange.upstream_uri,
}
