"""Asks for events by their ids, whatever of it fails.

OpenMeter answers 500 for a whole page that holds a subject with U+0000, and for everything while its Postgres is down.
A question that fails is halved, so that the one event that makes it fail is known alone; while nothing at all is
answered, questions are not halved, so that an endpoint that is down is not asked more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kong_metering.proof.web import CannotAsk, NotThere, Unanswered

if TYPE_CHECKING:
    from kong_metering.proof.api import EventsApi, Stored
    from kong_metering.proof.web import Web

_CANNOT_BE_NAMED = "its id cannot be asked for"
_MOST_PAGES = 20
# Questions in a row of which nothing is answered, until it is given up.
MOST_FAILURES = 5


@dataclass
class Asked:
    """What came of it: what is stored, by id (several where it is stored more than once); why others are unknown."""

    stored: dict[str, list[Stored]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


class Asker:
    """Asks one endpoint."""

    def __init__(self, api: EventsApi, web: Web) -> None:
        self._api = api
        self._web = web
        # How many questions in a row no part of which was answered.
        self._failures = 0

    def ask(self, ids: Sequence[str]) -> Asked:
        """Look for events; an id that is in neither part of the answer is not stored.

        Raises `CannotAsk`, also when nothing has been answered for a while.
        """
        asked = Asked()
        try:
            self._ask_all(ids, asked)
        except NotThere:
            older = self._api.older
            if older is None:
                raise
            self._api, asked = older, Asked()
            self._ask_all(ids, asked)
        return asked

    def _ask_all(self, ids: Sequence[str], asked: Asked) -> None:
        askable: set[str] = set()
        for question in self._api.questions(ids):
            askable.update(question)
            self._ask(question, asked)
        asked.unknown.update({each: _CANNOT_BE_NAMED for each in ids if each not in askable})

    def _ask(self, ids: list[str], asked: Asked) -> None:
        before = len(asked.unknown)
        self._ask_part(ids, asked, may_halve=not self._failures)
        if len(asked.unknown) - before < len(ids):
            self._failures = 0
            return
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise CannotAsk(f"nothing is answered: {asked.unknown[ids[-1]]}")

    def _ask_part(self, ids: list[str], asked: Asked, *, may_halve: bool) -> None:
        try:
            found = self._pages(ids)
        except Unanswered as error:
            if len(ids) == 1 or error.status is None or not may_halve:
                asked.unknown.update(dict.fromkeys(ids, str(error)))
                return
            middle = len(ids) // 2
            for half in (ids[:middle], ids[middle:]):
                self._ask_part(half, asked, may_halve=may_halve)
            return
        wanted = set(ids)
        for event in found:
            if event.id in wanted:
                asked.stored.setdefault(event.id, []).append(event)

    def _pages(self, ids: list[str]) -> list[Stored]:
        found: list[Stored] = []
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            document = self._web.get(self._api.page_url(ids, cursor))
            try:
                page = self._api.page(document)
            except ValueError as error:
                raise CannotAsk(str(error)) from None
            found += page.events
            cursor = page.cursor
            if not cursor or not page.events:
                break
        return found
