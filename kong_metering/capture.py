"""What the plugin asks Kong for: headers for the events, and the record where Kong cannot give it.

Headers can be asked for step by step (`capture_headers`), where a step depends on the one before it, or all at once
(`header_calls`, `headers_in`), where Kong does not wait for us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kong_pdk.exception import PDKException

from kong_metering.record import LINE_SEPARATOR, REDACTED, first_not_blank, header_values, is_blank, record_of
from kong_metering.steps import PDKCall, Steps, call

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.record import Record

GET_REQUEST_ID = call("kong.nginx.get_var", "kong_request_id")
_REQUESTS_TO_LEARN = 100
_WARY_SECONDS = 600.0
_MAX_HEADERS = 1000  # the most that kong.request.get_headers gives


class HeaderExperience:
    """Whether the headers of an instance's requests are such that asking at once tells them for certain.

    At once, nginx joins the lines of a header, and the record tells them apart: not if the header stands behind 100
    others, or if a later plugin changed it. Step by step they are always told apart. So a new instance asks step by
    step, and any instance does for a while after a value that looks like several, or that was changed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left_to_learn = _REQUESTS_TO_LEARN
        self._wary_until = 0.0

    @property
    def are_plain(self) -> bool:
        """Whether nothing odd was seen for long enough."""
        return self._left_to_learn <= 0 and self._clock.monotonic() >= self._wary_until

    def note(self, *, is_odd: bool) -> None:
        """Learn from the headers of a request."""
        if is_odd:
            self._wary_until = self._clock.monotonic() + _WARY_SECONDS
        elif self._left_to_learn:
            self._left_to_learn -= 1


def header_calls(names: Sequence[str]) -> tuple[PDKCall, ...]:
    """List the calls that tell headers at once, one for each name.

    nginx's variable has all lines of a header, wherever they stand, for less than Kong's look-up takes. What Kong hides
    in its record is looked up, for nothing else could tell one value from several.
    """
    return tuple(
        call("kong.request.get_header", name) if name.lower() in REDACTED else _variable_of(name) for name in names
    )


def headers_in(names: Sequence[str], results: Sequence[Any]) -> dict[str, str | list[str]]:
    """Read the results of `header_calls`; headers that the request does not have, or only blank ones, are left out.

    What may be several lines, which nginx joins, comes as a list: `FinishedRequest` tells them apart.
    """
    values: dict[str, str | list[str]] = {}
    for name, value in zip(names, results, strict=True):
        if not isinstance(value, str) or is_blank(value):
            continue
        values[name] = [value] if LINE_SEPARATOR in value and name.lower() not in REDACTED else value
    return values


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
    found = {name: first_not_blank(header_values(headers, name)) for name in names}
    if sum(len(values) if isinstance(values, list) else 1 for values in headers.values()) >= _MAX_HEADERS:
        for name in (name for name in names if found[name] is None):
            value = yield _variable_of(name)
            if isinstance(value, str):
                found[name] = first_not_blank(value.split(LINE_SEPARATOR))
    return {name: value for name, value in found.items() if value is not None}


def piecewise_record() -> Steps[Record]:
    """Put together what is billable of a request whose log record Kong could not serialise."""
    found = {
        "request": {
            "id": (yield from attempt("kong.response.get_header", "x-kong-request-id")),
            "headers": (yield from attempt("kong.request.get_headers")),
            # What Kong's record is made of as well. In the log phase nginx cannot be asked for it any more.
            "uri": (yield from attempt("kong.nginx.get_ctx", "request_uri")),
        },
        "response": {"status": (yield from attempt("kong.response.get_status"))},
        "route": (yield from attempt("kong.router.get_route")),
        "service": (yield from attempt("kong.router.get_service")),
        "consumer": (yield from attempt("kong.client.get_consumer")),
    }
    return record_of(found)


def attempt(method: str, *arguments: object) -> Steps[Any]:
    """Ask for something that can be done without."""
    try:
        return (yield call(method, *arguments))
    except PDKException:
        return None


def _variable_of(name: str) -> PDKCall:
    return call("kong.nginx.get_var", "http_" + name.lower().replace("-", "_"))
