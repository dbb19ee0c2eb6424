"""The bodies of the gateway's own error responses, in the type that the client accepts."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING

from .context import Reply
from .wire import HEADER_TOO_LARGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .context import Exchange

_MESSAGES = {
    400: "Bad request",
    404: "Not found",
    405: "Method not allowed",
    408: "Request timeout",
    411: "Length required",
    412: "Precondition failed",
    413: "Payload too large",
    414: "URI too long",
    417: "Expectation failed",
    HEADER_TOO_LARGE: "Request header or cookie too large",
    500: "An unexpected error occurred",
    502: "An invalid response was received from the upstream server",
    503: "The upstream server is currently unavailable",
    504: "The upstream server is timing out",
}

_JSON, _HTML, _PLAIN, _XML = "application/json", "text/html", "text/plain", "application/xml"
_KNOWN_TYPES = {
    _JSON: _JSON,
    "application/*": _JSON,
    "*/*": _JSON,
    _HTML: _HTML,
    _PLAIN: _PLAIN,
    "text/*": _PLAIN,
    _XML: _XML,
}
_TEMPLATES = {
    _JSON: '{\n  "message":"%s",\n  "request_id":"%s"\n}',
    _PLAIN: "%s\nrequest_id: %s\n",
    _XML: '<?xml version="1.0" encoding="UTF-8"?>\n<error>\n  <message>%s</message>\n'
    "  <requestid>%s</requestid>\n</error>\n",
    _HTML: '<!doctype html>\n<html>\n  <head>\n    <meta charset="utf-8">\n    <title>Error</title>\n'
    "  </head>\n  <body>\n    <h1>Error</h1>\n    <p>%s.</p>\n    <p>request_id: %s</p>\n  </body>\n</html>\n",
}
_QUALITY = re.compile(r"\s*;\s*q=([01](?:\.\d{0,3})?)")


def error_message(status: int) -> str:
    """Return what Kong says about a status when nobody else says anything."""
    return _MESSAGES.get(status, f"The upstream server responded with {status}")


def error_page(exchange: Exchange, status: int) -> Reply:
    """Return the response to a failure in the gateway or behind it; nginx's inner status codes are mapped."""
    accept = exchange.headers.variable(b"accept") or exchange.headers.variable(b"content-type") or b"text/plain"
    message = error_message(status)
    shown = HTTPStatus.BAD_REQUEST if status == HEADER_TOO_LARGE else status
    return _page(exchange, shown, message, _response_type(accept.decode("latin-1")))


def refusal(exchange: Exchange, status: int, message: str, headers: Mapping[str, str] | None = None) -> Reply:
    """Return what `kong.response.error` answers: a message that a plugin or the router gives."""
    accept = exchange.headers.variable(b"accept")
    return _page(exchange, status, message, _response_type((accept or b"*/*").decode("latin-1")), headers)


def _page(exchange: Exchange, status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Reply:
    body = _TEMPLATES[kind] % (message, exchange.kong_request_id or "")
    extra = tuple((name.encode(), value.encode()) for name, value in (headers or {}).items())
    content_type = (b"Content-Type", f"{kind}; charset=utf-8".encode())
    return Reply(status, body.encode(), (content_type, *extra))


def _response_type(accept: str) -> str:
    """Return the type that the client prefers among those that there are; JSON when it does not say."""
    best, best_quality = _JSON, 0.0
    for entry in accept.split(","):
        kind, found = entry.partition(";")[0].strip().lower(), _QUALITY.search(entry)
        quality = float(found[1]) if found else 1.0
        if quality > best_quality and "/" in kind:
            best, best_quality = _KNOWN_TYPES.get(kind, _JSON), quality
    return best
