"""Which subjects are no customer's, as OpenMeter's customers API knows them, and customers to be made for them.

A subject belongs to the customer whose key, or one of whose subjects, equals it, case and blanks included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from kong_metering.proof.api import PAGE, customer_of
from kong_metering.proof.web import CannotAsk, Unanswered

if TYPE_CHECKING:
    from kong_metering.proof.api import CustomersApi
    from kong_metering.proof.web import Web

_MOST_PAGES = 20


@dataclass
class Unassigned:
    """Subjects that are no customer's, in order; and those that could not be asked for, with the reason."""

    subjects: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)


class Customers:
    """The customers of one OpenMeter."""

    def __init__(self, api: CustomersApi, web: Web) -> None:
        self._api = api
        self._web = web

    def without(self, subjects: Sequence[str]) -> Unassigned:
        """Return the subjects that belong to nobody. Raises `CannotAsk`."""
        unassigned = Unassigned()
        asked: set[str] = set()
        for question in self._api.questions(subjects):
            asked.update(question)
            try:
                known = {subject for by_key in (True, False) for subject in self._known(question, by_key=by_key)}
            except Unanswered as error:
                unassigned.unknown.update(dict.fromkeys(question, str(error)))
                continue
            unassigned.subjects += [subject for subject in question if subject not in known]
        unassigned.unknown.update({each: "it cannot be asked for" for each in subjects if each not in asked})
        return unassigned

    def create(self, subject: str) -> str | None:
        """Make a customer for a subject; return why not, if that was refused. Raises `CannotAsk`."""
        try:
            self._web.post(self._api.url, customer_of(subject))
        except Unanswered as error:
            return "there is one by now" if error.status == HTTPStatus.CONFLICT else str(error)
        return None

    def _known(self, subjects: Sequence[str], *, by_key: bool) -> Iterator[str]:
        """Give what is attributed to the customers that are found."""
        for number in range(1, _MOST_PAGES + 1):
            document = self._web.get(self._api.page_url(subjects, number, by_key=by_key))
            try:
                customers = self._api.subjects(document)
            except ValueError as error:
                raise CannotAsk(str(error)) from None
            for names in customers:
                yield from names
            if len(customers) < PAGE:
                return
