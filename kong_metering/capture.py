"""What the plugin asks Kong for: headers for the events, and the record where Kong cannot give it.

Headers can be asked for step by step (`capture_headers`), where a step depends on the one before it, or all at once
(`header_calls`, `headers_in`), where Kong does not wait for us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kong_pdk.exception import PDKException

from kong_metering.record import Record, header_values, is_blank
from kong_metering.steps import PDKCall, Steps, call

GET_REQUEST_ID = call("kong.nginx.get_var", "kong_request_id")
_MAX_HEADERS = 1000  # the most that kong.request.get_headers gives
_LIST_SEPARATOR = ", "


class HeadersRead(NamedTuple):
    """Headers by name; `are_certain` is False when one may be a single value or the first of several."""

    values: dict[str, str]
    are_certain: bool


def header_calls(names: Sequence[str]) -> tuple[PDKCall, ...]:
    """List the calls that tell headers at once: Kong's look-up of each, and nginx's variable for what it does not see.

    Kong 3.9 looks up a header that was sent twice, or that contains a comma and a space, only among the first 100
    (`kong/tools/http.lua`). nginx has all lines of a header, joined.
    """
    looked_up = (call("kong.request.get_header", name) for name in names)
    return (*looked_up, *(_variable_of(name) for name in names))


def headers_in(names: Sequence[str], results: Sequence[Any]) -> HeadersRead:
    """Read the results of `header_calls`; headers that the request does not have, or only blank ones, are left out."""
    values: dict[str, str] = {}
    are_certain = True
    looked_up, variables = results[: len(names)], results[len(names) :]
    for name, value, joined in zip(names, looked_up, variables, strict=True):
        if isinstance(value, str) and not is_blank(value):
            values[name] = value
        elif isinstance(joined, str):
            lines = joined.split(_LIST_SEPARATOR)
            are_certain = are_certain and len(lines) == 1
            first = _first(lines)
            if first is not None:
                values[name] = first
    return HeadersRead(values, are_certain)


def capture_headers(names: tuple[str, ...]) -> Steps[dict[str, str]]:
    """Read request headers by name; those that the request does not have, or only blank ones, are left out."""
    values: dict[str, str] = {}
    missing = []
    for name in names:
        value = yield call("kong.request.get_header", name)
        if isinstance(value, str) and not is_blank(value):
            values[name] = value
        else:
            missing.append(name)
    if missing:
        values |= yield from hidden_headers(missing)
    return values


def hidden_headers(names: list[str]) -> Steps[dict[str, str]]:
    """Find headers that `kong.request.get_header` does not see, or does not see past a blank one.

    Kong 3.9 looks up a header that was sent twice, or that contains a comma and a space, only among the first 100
    (`kong/tools/http.lua`): without this, a client with many headers would not be billed.
    """
    headers = yield call("kong.request.get_headers", _MAX_HEADERS)
    if not isinstance(headers, dict):
        return {}
    record: Record = {"request": {"headers": headers}}
    found = {name: _first(header_values(record, name)) for name in names}
    if sum(len(values) if isinstance(values, list) else 1 for values in headers.values()) >= _MAX_HEADERS:
        for name in (name for name in names if found[name] is None):
            value = yield _variable_of(name)
            if isinstance(value, str):
                found[name] = _first(value.split(_LIST_SEPARATOR))
    return {name: value for name, value in found.items() if value is not None}


def piecewise_record() -> Steps[Record]:
    """Put together what is billable of a request whose log record Kong could not serialise."""
    return {
        "request": {
            "id": (yield from attempt("kong.response.get_header", "x-kong-request-id")),
            "headers": (yield from attempt("kong.request.get_headers")),
        },
        "response": {"status": (yield from attempt("kong.response.get_status"))},
        "route": (yield from attempt("kong.router.get_route")),
        "service": (yield from attempt("kong.router.get_service")),
        "consumer": (yield from attempt("kong.client.get_consumer")),
    }


def attempt(method: str, *arguments: object) -> Steps[Any]:
    """Ask for something that can be done without."""
    try:
        return (yield call(method, *arguments))
    except PDKException:
        return None


def _variable_of(name: str) -> PDKCall:
    return call("kong.nginx.get_var", "http_" + name.lower().replace("-", "_"))


def _first(values: list[str]) -> str | None:
    """Give the first value of a header that was sent several times; a blank one does not hide the next."""
    return next((value for value in values if not is_blank(value)), None)
