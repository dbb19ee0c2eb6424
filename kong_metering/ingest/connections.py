"""Kept connections to ingest endpoints: lent to one borrower at a time, closed when nobody needs them.

Contract: couriers `borrow` a client for one request and `give_back` it, from any thread; the configurations' owner
calls `forget` when an endpoint is configured no more; one thread that may do I/O calls `sweep` once a second. An idle
client is closed when it was idle for `keepalive` (0: not for that), when the endpoint has ended its connection, and
when more than `max_idle` are idle, the longest idle first. One without an open connection is not kept at all. So an
endpoint that is sent nothing costs no descriptor after `keepalive`, and no connection stays in CLOSE_WAIT for much
longer than a second. An endpoint that has once answered 2xx when nothing had been asked gets a new connection for each
request from then on: such an answer could be taken for that to a request. The lock is a short one: it is held for
memory only, never while a connection is opened, used, looked at or closed. A client belongs to whoever has taken it,
`sweep` included.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.log import LOGGER, printable
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.clock import Clock
    from kong_metering.ingest.client import Endpoint, IngestClient

MAX_IDLE = 128


@dataclass(frozen=True, eq=False)
class _Idle:
    client: IngestClient
    since: float


class Connections:
    """Lends clients, each with a connection of its own."""

    def __init__(self, clock: Clock, connect: Callable[[Endpoint], IngestClient], max_idle: int = MAX_IDLE) -> None:
        """Hold none so far; `connect` makes a client, without I/O, and `max_idle` bounds those that nobody uses."""
        self._clock = clock
        self._connect = connect
        self._max_idle = max_idle
        self._lock = threading.Lock()
        self._idle: dict[Endpoint, list[_Idle]] = {}  # the longest idle first
        self._lent: set[IngestClient] = set()  # those to keep when they come back
        self._is_closed = False
        # Endpoints that answer what nobody asked.
        self._talkative: set[Endpoint] = set()

    def borrow(self, endpoint: Endpoint) -> IngestClient:
        """Return a client that nobody else has, the one used last if one is idle; it comes back by `give_back`."""
        with self._lock:
            idle = self._idle.get(endpoint)
            client = self._taken(idle[-1]) if idle else self._connect(endpoint)
            if not self._is_closed:
                self._lent.add(client)
        return client

    def give_back(self, client: IngestClient) -> None:
        """Keep a borrowed client for the next one who needs its endpoint, or close it."""
        self._note_unasked(client)
        self._put_back(_Idle(client, self._clock.monotonic()), is_usable=client.is_connected)

    def sweep(self, now: float) -> None:
        """Close what was idle for too long at `now`, and what endpoints have ended."""
        with self._lock:
            idle = [each for of_endpoint in self._idle.values() for each in of_endpoint]
        for each in idle:
            with self._lock:
                if each not in self._idle.get(each.client.endpoint, ()):
                    continue
                self._lent.add(self._taken(each))
            is_stale = 0 < each.client.endpoint.keepalive <= now - each.since
            self._put_back(each, is_usable=not is_stale and not each.client.has_ended)

    def forget(self, endpoint: Endpoint) -> None:
        """Close the connections to an endpoint; those that are borrowed, when they come back."""
        with self._lock:
            idle = self._idle.pop(endpoint, [])
            self._lent = {client for client in self._lent if client.endpoint != endpoint}
            self._talkative.discard(endpoint)
        _close(each.client for each in idle)

    def close(self) -> None:
        """Close all idle connections, and keep none that comes back."""
        with self._lock:
            self._is_closed = True
            idle = [each for of_endpoint in self._idle.values() for each in of_endpoint]
            self._idle.clear()
            self._lent.clear()
        _close(each.client for each in idle)

    def _put_back(self, each: _Idle, *, is_usable: bool) -> None:
        with self._lock:
            is_kept = is_usable and each.client in self._lent and each.client.endpoint not in self._talkative
            self._lent.discard(each.client)
            unneeded = self._kept(each) if is_kept else [each.client]
        _close(unneeded)
        self._note_unasked(each.client)

    def _note_unasked(self, client: IngestClient) -> None:
        if not client.said_unasked:
            return
        with self._lock:
            is_new = client.endpoint not in self._talkative
            self._talkative.add(client.endpoint)
        if is_new:
            url = printable(without_credentials(client.endpoint.url))
            LOGGER.warning("%s gives more answers than were asked for: no connection to it is kept any more", url)

    def _taken(self, each: _Idle) -> IngestClient:
        endpoint = each.client.endpoint
        self._idle[endpoint].remove(each)
        if not self._idle[endpoint]:
            del self._idle[endpoint]
        return each.client

    def _kept(self, each: _Idle) -> list[IngestClient]:
        """Add an idle client, and return the one that is too many now, if any."""
        insort(self._idle.setdefault(each.client.endpoint, []), each, key=lambda other: other.since)
        if sum(map(len, self._idle.values())) <= self._max_idle:
            return []
        return [self._taken(min((idle[0] for idle in self._idle.values()), key=lambda other: other.since))]


def _close(clients: Iterable[IngestClient]) -> None:
    for client in clients:
        client.close()
