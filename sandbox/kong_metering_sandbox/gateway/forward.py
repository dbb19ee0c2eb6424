"""Sending a request on to its service: headers as Kong sets them, retries, and the notes about every try."""

from __future__ import annotations

import asyncio
import socket
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from .context import Target, wall_ms
from .headers import Headers
from .outbound import UpstreamError, UpstreamRequest, UpstreamResponse
from .record import upstream_uri
from .values import as_bytes

if TYPE_CHECKING:
    from .context import Exchange
    from .outbound import Upstreams
    from .router import Match
    from .values import Table

_DEFAULT_PORTS = {"http": 80, "https": 443}
_IDEMPOTENT = (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PROPFIND", b"PROPPATCH")
_SET_BY_KONG = frozenset(
    b"host connection keep-alive te transfer-encoding content-length expect upgrade via x-real-ip"
    b" x-kong-request-id x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port"
    b" x-forwarded-path x-forwarded-prefix".split()
)
_KEPT_TOKENS = (b"close", b"keep-alive", b"upgrade")


class NameResolutionError(Exception):
    """The service's host name has no address."""


def service_target(match: Match, host: bytes) -> Target | None:
    """Return where a matched request goes; None when its route has no service."""
    service = match.service
    if service is None:
        return None
    port = service["port"]
    is_default = _DEFAULT_PORTS.get(service["protocol"]) == port
    own_name = as_bytes(service["host"] if is_default else f"{service['host']}:{port}")
    return Target(
        scheme=service["protocol"],
        host=service["host"],
        port=port,
        path=match.upstream_path,
        host_header=host if match.route["preserve_host"] else own_name,
        retries=service["retries"],
        connect_timeout=service["connect_timeout"] / 1000,
        read_timeout=service["read_timeout"] / 1000,
    )


def drop_connection_headers(headers: Headers) -> None:
    """Take the fields away that are meant for this hop only: those named in Connection, and Proxy ones."""
    for token in (headers.variable(b"connection") or b"").lower().split(b","):
        if token.strip() and token.strip() not in _KEPT_TOKENS:
            headers.remove(token.strip())
    headers.remove(b"Proxy")
    headers.remove(b"Proxy-Connection")


async def forward(exchange: Exchange, target: Target, upstreams: Upstreams) -> UpstreamResponse:
    """Send the request to its service, again and again within its retries, and return the response.

    Raises:
        UpstreamError: no try gave a response.

    """
    tries: list[Table] = []
    exchange.tries = tries
    address = await _resolve(target)
    request = UpstreamRequest(exchange.method, upstream_uri(exchange), _headers(exchange, target), exchange.body)
    while True:
        tries.append(_new_try(address, target.port))
        exchange.latencies.kong = exchange.elapsed_ms()
        waiting_since = time.monotonic()
        try:
            response = await upstreams.send(target, request)
        except UpstreamError as error:
            exchange.latencies.proxy = _ms_since(waiting_since)
            exchange.upstream_statuses.append(str(int(error.status)))
            tries[-1].update(state="failed", code=int(error.status))
            if len(tries) > target.retries or (error.sent and exchange.method not in _IDEMPOTENT):
                raise
        else:
            exchange.latencies.proxy = _ms_since(waiting_since)
            exchange.upstream_statuses.append(str(response.status))
            if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR and len(tries) > target.retries:
                tries[-1].update(state="failed", code=response.status)
            return response


def local_try(exchange: Exchange, target: Target) -> None:
    """Note a try that needed no service, because a plugin makes the response itself."""
    exchange.tries = [_new_try("127.0.0.1", target.port)]
    exchange.latencies.kong = exchange.elapsed_ms()
    exchange.latencies.proxy = 0
    exchange.upstream_statuses = [str(int(HTTPStatus.OK))]


def _ms_since(moment: float) -> int:
    return int((time.monotonic() - moment) * 1000)


async def _resolve(target: Target) -> str:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NameResolutionError(target.host) from error
    return str(found[0][4][0])


def _new_try(address: str, port: int) -> Table:
    started = time.time_ns()
    return {
        "ip": address,
        "port": port,
        "balancer_start": wall_ms(),
        "balancer_start_ns": float(started),
        "balancer_latency": 0,
        "balancer_latency_ns": time.time_ns() - started,
    }


def _headers(exchange: Exchange, target: Target) -> Headers:
    own = exchange.headers
    known = {
        b"Host": target.host_header,
        b"Connection": b"keep-alive",
        b"X-Forwarded-For": _forwarded_for(exchange),
        b"X-Forwarded-Proto": b"http",
        b"X-Forwarded-Host": exchange.head.host,
        b"X-Forwarded-Port": b"%d" % exchange.server_port,
        b"X-Forwarded-Path": exchange.head.path,
        b"X-Forwarded-Prefix": (exchange.match.stripped_prefix if exchange.match else None) or b"",
        b"X-Real-IP": exchange.client_ip.encode(),
        b"X-Kong-Request-Id": (exchange.kong_request_id or "").encode(),
        b"Via": _via(exchange),
    }
    headers = Headers((name, value) for name, value in known.items() if value)
    has_body = own.get(b"content-length") is not None or own.get(b"transfer-encoding") is not None
    if exchange.body or has_body:
        headers.add(b"Content-Length", b"%d" % len(exchange.body))
    for name, value in own:
        if name.lower() not in _SET_BY_KONG:
            headers.add(name, value)
    return headers


def _forwarded_for(exchange: Exchange) -> bytes:
    before = exchange.headers.variable(b"x-forwarded-for")
    own = exchange.client_ip.encode()
    return before + b", " + own if before else own


def _via(exchange: Exchange) -> bytes:
    before = exchange.headers.variable(b"via")
    own = f"{exchange.head.version} kong/3.9.1".encode()
    return before + b", " + own if before else own
