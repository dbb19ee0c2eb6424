"""rate-limiting with policy "local": fixed windows on the wall clock, counted for all workers together."""

from __future__ import annotations

import calendar
import time
from typing import TYPE_CHECKING

from kong_metering_sandbox.gateway.context import PluginExit
from kong_metering_sandbox.gateway.errorpages import refusal
from kong_metering_sandbox.gateway.query import normalize_path
from kong_metering_sandbox.gateway.values import as_text, format_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from kong_metering_sandbox.gateway.context import Exchange
    from kong_metering_sandbox.gateway.values import Table

    from .base import Identities

_WINDOWS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86400,
    "month": 2592000,
    "year": 31536000,
}
_MAX_COUNTS = 10_000  # beyond that, windows that have passed are forgotten
_FIXED = ("second", "minute", "hour", "day")


class RateLimiting:
    """Counts requests and answers 429 when a limit is reached; `clock` tells the seconds since 1970."""

    priority = 910

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counts: dict[tuple[str, str, str, int], int] = {}

    async def access(self, exchange: Exchange, config: Table, identities: Identities) -> None:  # noqa: ARG002
        """Count the request, or refuse it."""
        now = int(self._clock())
        limits = {period: config[period] for period in _WINDOWS if period in config}
        keys = {period: self._key(exchange, config, period, now) for period in limits}
        left = {period: limits[period] - self._counts.get(keys[period], 0) for period in limits}
        exceeded = next((period for period in limits if left[period] <= 0), None)
        reset = self._announce(exchange, config, (limits, left), now, exceeded)
        if exceeded is not None:
            headers = {} if config["hide_client_headers"] else {"Retry-After": str(reset)}
            reply = refusal(exchange, int(config["error_code"]), config["error_message"], headers)
            raise PluginExit(reply)
        for key in keys.values():
            self._counts[key] = self._counts.get(key, 0) + 1
        if len(self._counts) > _MAX_COUNTS:
            current = {(period, _window_start(period, now)) for period in _WINDOWS}
            self._counts = {key: count for key, count in self._counts.items() if key[2:] in current}

    @staticmethod
    def _key(exchange: Exchange, config: Table, period: str, now: int) -> tuple[str, str, str, int]:
        entity = f"{config.get('route_id', '')}:{config.get('service_id', '')}"
        return entity, _identifier(exchange, config), period, _window_start(period, now)

    @staticmethod
    def _announce(
        exchange: Exchange,
        config: Table,
        state: tuple[dict[str, float], dict[str, float]],
        now: int,
        exceeded: str | None,
    ) -> int:
        """Put the headers that tell the client where it stands on the response; return seconds to the reset."""
        limits, left = state
        headers: dict[str, str] = {}
        tightest: tuple[float, int, str] | None = None
        for period, limit in limits.items():
            counted = exceeded in (None, period)
            remaining = max(0, left[period] - counted)
            headers[f"X-RateLimit-Limit-{period.title()}"] = format_number(limit)
            headers[f"X-RateLimit-Remaining-{period.title()}"] = format_number(remaining)
            candidate = (remaining, -_WINDOWS[period], period)
            tightest = candidate if tightest is None else min(tightest, candidate)
        if tightest is None:
            return 1
        period = tightest[2]
        reset = max(1, _WINDOWS[period] - (now - _window_start(period, now)))
        headers["RateLimit-Limit"] = format_number(limits[period])
        headers["RateLimit-Remaining"] = format_number(tightest[0])
        headers["RateLimit-Reset"] = str(reset)
        if not config["hide_client_headers"]:
            exchange.extra_headers += [(name.encode(), value.encode()) for name, value in headers.items()]
        return reset


def _window_start(period: str, now: int) -> int:
    if period in _FIXED:
        return now - now % _WINDOWS[period]
    moment = time.gmtime(now)
    month = moment.tm_mon if period == "month" else 1
    return calendar.timegm((moment.tm_year, month, 1, 0, 0, 0))


def _identifier(exchange: Exchange, config: Table) -> str:
    """Return what the requests are counted by; the client's address where the configured thing is absent."""
    ways: dict[str, Callable[[], bytes | str | None]] = {
        "service": lambda: exchange.service_id,
        "consumer": lambda: exchange.consumer_id or (exchange.credential or {}).get("id"),
        "credential": lambda: (exchange.credential or {}).get("id"),
        "header": lambda: exchange.headers.variable(config.get("header_name", "").encode()),
        "path": lambda: _path(exchange, config),
        "ip": lambda: None,
    }
    found = ways[config["limit_by"]]()
    return as_text(found) if found else exchange.client_ip


def _path(exchange: Exchange, config: Table) -> bytes | None:
    path = normalize_path(exchange.head.path)
    return path if path.decode("utf-8", "replace") == config.get("path") else None
