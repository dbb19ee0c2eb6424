"""Which route a request takes, and what path its service is asked for (Kong's `v0` path handling)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .query import escape_path, normalize_path
from .values import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .values import Table


@dataclass(frozen=True)
class Match:
    """A request's route, the service behind it (None when it has none), and the path for the service."""

    route: Table
    service: Table | None
    upstream_path: bytes
    stripped_prefix: bytes | None


@dataclass(frozen=True)
class _Path:
    """How one path of a route fits a request: what it matched and what follows."""

    prefix: bytes
    postfix: bytes
    rank: tuple[int, int, int]


@dataclass(frozen=True)
class _Request:
    method: bytes
    host: bytes
    port: int
    path: bytes


class Router:
    """Finds the route for a request among routes that are complete entities without nulls."""

    def __init__(self, routes: Iterable[Table], services: Mapping[str, Table]) -> None:
        self._routes = [route for route in routes if {"http", "https"} & set(route["protocols"])]
        self._services = services

    def match(self, method: bytes, host: bytes, port: int, raw_path: bytes) -> Match | None:
        """Return the most specific route for a request; None when no route fits.

        More kinds of criteria win first, then exact hosts over wildcards, regular expressions (by their
        `regex_priority`) over prefixes, longer paths over shorter ones, and older routes over younger ones.
        """
        request = _Request(method, host, port, normalize_path(raw_path))
        if not _is_utf8(request.path):  # Kong's router, which is written in Rust, looks at no other path
            return None
        best: tuple[tuple[int, ...], Table, _Path] | None = None
        for route in self._routes:
            found = _fit(route, request)
            if found and (best is None or found[0] > best[0]):
                best = (found[0], route, found[1])
        if best is None:
            return None
        return self._result(best[1], best[2], request.path)

    def _result(self, route: Table, path: _Path, request_path: bytes) -> Match | None:
        reference = route.get("service")
        service = self._services.get(reference["id"]) if reference else None
        if service is not None and not service["enabled"]:
            return None
        base = as_bytes((service or {}).get("path") or "/")
        upstream = _upstream_path(base, request_path, path.postfix if route["strip_path"] else None)
        stripped = path.prefix if route["strip_path"] and path.prefix not in (b"", b"/") else None
        return Match(route, service, escape_path(upstream), stripped)


def _is_utf8(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fit(route: Table, request: _Request) -> tuple[tuple[int, ...], _Path] | None:
    methods, hosts, paths = route.get("methods"), route.get("hosts"), route.get("paths")
    if methods and request.method.decode("latin-1") not in methods:
        return None
    host_rank = max((_host_rank(host, request) for host in hosts), default=0) if hosts else 0
    if hosts and not host_rank:
        return None
    path = _best_path(paths, request.path, route["regex_priority"]) if paths else _Path(b"", b"", (0, 0, 0))
    if path is None:
        return None
    kinds = sum(map(bool, (methods, hosts, paths)))
    return (kinds, host_rank, *path.rank), path


def _host_rank(pattern: str, request: _Request) -> int:
    """Return how well a host fits: 2 exactly, 1 by a wildcard, 0 not at all."""
    wanted = pattern.lower().encode()
    name, _, port = wanted.partition(b":")
    if port and int(port) != request.port:
        return 0
    if name == request.host:
        return 2
    if b"*" not in name:
        return 0
    return int(bool(re.fullmatch(re.escape(name).replace(rb"\*", b".+"), request.host)))


def _best_path(paths: list[str], request_path: bytes, regex_priority: int) -> _Path | None:
    found = (_fit_path(path, request_path, regex_priority) for path in paths)
    return max((path for path in found if path), key=lambda path: path.rank, default=None)


def _fit_path(path: str, request_path: bytes, regex_priority: int) -> _Path | None:
    if path.startswith("~"):
        found = re.match(path[1:].encode(), request_path)
        if found is None:
            return None
        return _Path(found.group(), request_path[found.end() :], (1, regex_priority, len(path)))
    prefix = path.encode()
    if not request_path.startswith(prefix):
        return None
    return _Path(prefix, request_path[len(prefix) :], (0, 0, len(prefix)))


def _upstream_path(base: bytes, request_path: bytes, postfix: bytes | None) -> bytes:
    """Return the path for the service; `postfix` is what is left of the request's when its prefix is stripped."""
    if postfix is None:
        if base.endswith(b"/"):
            return base + request_path[1:]
        return base if request_path == b"/" else base + request_path
    if postfix:
        return base.rstrip(b"/") + (postfix if postfix.startswith(b"/") else b"/" + postfix)
    if base == b"/":
        return base
    ends_with_slash = len(request_path) > 1 and request_path.endswith(b"/")
    return base.rstrip(b"/") + b"/" if ends_with_slash else base.rstrip(b"/")
