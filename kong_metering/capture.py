"""What the plugin asks Kong for, step by step: headers for the events, and the record where Kong cannot give it."""

from __future__ import annotations

from typing import Any

from kong_pdk.exception import PDKException

from kong_metering.record import Record, header_values, is_blank
from kong_metering.steps import Steps, call

_MAX_HEADERS = 1000  # the most that kong.request.get_headers gives


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
            value = yield call("kong.nginx.get_var", "http_" + name.lower().replace("-", "_"))
            if isinstance(value, str):
                found[name] = _first(value.split(", "))
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


def _first(values: list[str]) -> str | None:
    """Give the first value of a header that was sent several times; a blank one does not hide the next."""
    return next((value for value in values if not is_blank(value)), None)
