"""The process that tells those who watch; beside the servers, so that nobody who looks slows an answer to Kong.

Contract: `watch` runs in a process of its own, forked by the supervisor, until SIGTERM or the supervisor's death. It
reads what the servers show about once a second, and waits for no disk; it changes nothing.
While the address is taken, as by the process before at a reload, it tries again each second, and says so once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kong_metering import __version__
from kong_metering.host.board import State
from kong_metering.host.figures import published
from kong_metering.host.kongs import who_cannot_connect
from kong_metering.log import LOGGER, cause_of, trouble
from kong_metering.watching.continuity import Continuity
from kong_metering.watching.exposition import Surroundings, exposed
from kong_metering.watching.page import LastHour, status_page
from kong_metering.watching.sizes import SpoolSizes
from kong_metering.watching.verdict import judged
from kong_metering.watching.view import View
from kong_metering.watching.web import Answer, Web
from kong_metering.watching.words import servers_serve

if TYPE_CHECKING:
    from kong_metering.host.board import Slot
    from kong_metering.quantities import Listen

_ROUND_SECONDS = 1.0
_MINUTE_SECONDS = 60.0
_MINUTES = 60
# A loop that has not come round for so long does not serve.
_STILL_SECONDS = 5.0


def watch(slots: Sequence[Slot], path: Path, listen: Listen, supervisor: int) -> None:
    """Serve those who watch until this process is told to end, or the supervisor is gone.

    `path`: where Kong connects to the servers.
    """
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    watcher = Watcher(slots, path)
    web = None
    while not ending.is_set() and os.getppid() == supervisor:
        watcher.look()
        web = web or _opened(listen, watcher)
        ending.wait(_ROUND_SECONDS)
    if web is not None:
        web.end()


def _opened(listen: Listen, watcher: Watcher) -> Web | None:
    try:
        web = Web(listen, watcher.pages)
    except OSError as error:
        LOGGER.error("metrics cannot be served at %s, for now: %s", listen, cause_of(error), extra=trouble("metrics"))
        return None
    threading.Thread(target=web.serve, name="metering web", daemon=True).start()
    LOGGER.info("metrics and status page at %s", web.address)
    return web


class Watcher:
    """What is known of the servers; `look` and the pages may run on different threads."""

    def __init__(self, slots: Sequence[Slot], path: Path) -> None:
        self._slots = slots
        self._path = path
        self._continuity = Continuity(len(slots))
        self._lock = threading.Lock()
        self._beats: dict[int, tuple[int, int, float]] = {}
        # Counters as they were each minute, for the last hour.
        self._minutes: deque[tuple[float, View]] = deque(maxlen=_MINUTES + 1)
        self._spool = SpoolSizes()
        self.pages = {
            "/": self._page,
            "/metrics": self._metrics,
            "/healthz": self._health,
            "/readyz": self._readiness,
        }

    def look(self) -> None:
        """Take what the servers show now."""
        told = [_told(slot) for slot in self._slots]
        now = time.monotonic()
        with self._lock:
            self._continuity.look(told)
            view = self._continuity.view()
            for index, slot in enumerate(self._slots):
                pid, beats = slot.pid, slot.beats
                if self._beats.get(index, (0, -1, 0.0))[:2] != (pid, beats):
                    self._beats[index] = pid, beats, now
            if not self._minutes or now - self._minutes[-1][0] >= _MINUTE_SECONDS:
                self._minutes.append((now, view))
        if view.spool is not None:
            self._spool.look_at(Path(view.spool["directory"]))

    # -- pages --------------------------------------------------------------------------------------------------------

    def _metrics(self, accept: str | None) -> Answer:
        body, content_type = exposed(self._view(), self._surroundings(), accept)
        return Answer(body, content_type)

    def _page(self, _accept: str | None) -> Answer:
        page = status_page(self._view(), self._surroundings(), self._last_hour(), time.time())
        return Answer(page, "text/html; charset=utf-8", HTTPStatus.OK)

    def _health(self, _accept: str | None) -> Answer:
        silence = None if self._serving() else "no server serves Kong"
        return Answer.judged(judged(silence, who_cannot_connect(self._path)).why)

    def _readiness(self, _accept: str | None) -> Answer:
        serving, expected = self._serving(), len(self._slots)
        return Answer.judged("" if serving == expected else f"{servers_serve(serving, expected)} Kong")

    def _view(self) -> View:
        with self._lock:
            return self._continuity.view()

    def _surroundings(self) -> Surroundings:
        sizes = self._spool.sizes
        return Surroundings(
            __version__,
            self._serving(),
            len(self._slots),
            self._continuity.deaths,
            sizes.spool,
            sizes.dead_letters,
            sizes.delivered,
            sizes.free,
        )

    def _serving(self) -> int:
        """Return how many servers serve: they say so, and their loop comes round."""
        now = time.monotonic()
        with self._lock:
            fresh = {i for i, (_, _, at) in self._beats.items() if now - at < _STILL_SECONDS + _ROUND_SECONDS}
        return sum(slot.pid != 0 and slot.state is State.SERVING and i in fresh for i, slot in enumerate(self._slots))

    def _last_hour(self) -> LastHour:
        view = self._view()
        with self._lock:
            since, before = self._minutes[0] if self._minutes else (time.monotonic(), View())
        requests = {
            entity: plugin.requests - before.plugins[entity].requests if entity in before.plugins else plugin.requests
            for entity, plugin in view.plugins.items()
        }
        return LastHour(time.monotonic() - since, requests, _delivered(view) - _delivered(before))


def _told(slot: Slot) -> Mapping[str, Any]:
    figures = published(slot)
    return {"pid": slot.pid, **figures, **figures.pop("details", {})} if figures else {}


def _delivered(view: View) -> Counter[str]:
    delivered: Counter[str] = Counter()
    for queue in view.queues.values():
        delivered[queue.entity] += queue.counts["delivered"]
    return delivered
