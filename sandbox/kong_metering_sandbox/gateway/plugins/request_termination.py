"""request-termination: answers with a fixed response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kong_metering_sandbox.gateway.context import PluginExit, Reply
from kong_metering_sandbox.gateway.query import decode_args

if TYPE_CHECKING:
    from kong_metering_sandbox.gateway.context import Exchange
    from kong_metering_sandbox.gateway.values import Table

    from .base import Identities

_MESSAGES = {
    401: "Unauthorized",
    404: "Not found",
    405: "Method not allowed",
    500: "An unexpected error occurred",
    502: "Bad Gateway",
    503: "Service unavailable",
}


class RequestTermination:
    """Ends every request, or those with the `trigger` among their headers or query arguments."""

    priority = 2

    async def access(self, exchange: Exchange, config: Table, identities: Identities) -> None:  # noqa: ARG002
        """Answer the request."""
        trigger = config.get("trigger")
        if trigger is not None and not _is_triggered(exchange, trigger.encode()):
            return
        status = int(config["status_code"])
        if config.get("body") is not None:
            kind = config.get("content_type")
            headers = ((b"Content-Type", kind.encode()),) if kind else ()
            raise PluginExit(Reply(status, config["body"].encode(), headers))
        message = config.get("message") or _MESSAGES.get(status)
        raise PluginExit(Reply.json(status, {"message": message}) if message else Reply(status))


def _is_triggered(exchange: Exchange, name: bytes) -> bool:
    return name.lower() in exchange.headers.table() or name in decode_args(exchange.args)
