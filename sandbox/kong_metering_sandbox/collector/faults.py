"""Failures on request: rules that say which ingest requests fail, how, and how often.

A rule is a JSON object; all of its members are optional. The first rule that applies to a request decides
about it. Rules change answers and connections only, never what a request would be worth without them: events
that the endpoint refuses are not stored, whatever a rule says.
"""

from __future__ import annotations

import random
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kong_metering_sandbox.collector.dialects import Answer
from kong_metering_sandbox.collector.validation import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kong_metering_sandbox.collector.dialects import Dialect
    from kong_metering_sandbox.collector.ingest import Body

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FaultMatch(BaseModel):
    """Picks events: an event is meant when it has everything that is given here.

    ``contains`` is looked for in the event's JSON text, written without spaces.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str | None = None
    id: str | None = None
    contains: str | None = None

    def indexes(self, items: Iterable[object]) -> list[int]:
        """Return the places of the events that are meant."""
        return [index for index, item in enumerate(items) if isinstance(item, dict) and self._means(item)]

    def problem(self, index: int | None) -> Problem:
        """Return the objection to an event that is meant, against the attribute that it was picked by."""
        attribute = "subject" if self.subject is not None else "id" if self.id is not None else "data"
        return Problem((attribute,), "invalid", "value is refused by a fault rule", index=index)

    def _means(self, event: dict[str, object]) -> bool:
        return (
            self.subject in (None, event.get("subject"))
            and self.id in (None, event.get("id"))
            and (self.contains is None or self.contains in orjson.dumps(event).decode())
        )


class FaultRule(BaseModel):
    """One way to fail.

    When it applies:

    - ``match``: only to requests with an event that it picks.
    - ``max_events``, ``max_bytes``: only to bodies over one of these limits.
    - ``chance``: to each request with this probability only, thrown anew each time.
    - ``times``: to so many requests, and then no more; without it, until it is removed.

    What happens, all of it optional:

    - ``delay``: the answer, or the reset, comes so many seconds late.
    - ``interim``: interim answers (102, 103) that come before the answer, each ``interim_pause`` seconds after what was
      before it. They come after ``delay``.
    - ``status``, ``headers``, ``body``: the answer. The status defaults to 413 with a limit and to 400 with
      ``no_index``, and otherwise to what the request would get without the rule. A 400 without ``body`` points at the
      events that ``match`` picks, in the manner of the endpoint.
    - ``no_index``: a 400 that points at no event. Without ``match``, only for requests that have an invalid event.
    - ``reset``: the connection is reset (TCP RST). ``before``: as soon as the request's head has arrived; its
      body stays unread when the rule is the first of the list, with no condition but ``times``. ``in_body``: after
      the whole request. ``after_store``: after its events have been stored. ``after_headers``: after the head
      of the answer, in place of its body (a 204 has no body, so it arrives whole).
    - ``hang``: no answer; the connection is reset after so many seconds.

    ``lose``: the events that it picks are lost on the quiet, whatever the answer: as OpenMeter's are, which answers
    before its Kafka confirms.

    ``store`` says whether the events are stored all the same. It defaults to true for an answer of 2xx and to false
    for everything else, and has no say with ``before``, ``in_body`` and ``after_store``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Annotated[int, Field(ge=200, le=599)] | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    body: str | None = None
    delay: Seconds = 0
    interim: list[Annotated[int, Field(ge=102, le=199)]] = Field(default_factory=list)
    interim_pause: Seconds = 0
    reset: Literal["before", "after_headers", "in_body", "after_store"] | None = None
    hang: Seconds | None = None
    store: bool | None = None
    times: Annotated[int, Field(ge=1)] | None = None
    chance: Annotated[float, Field(gt=0, le=1)] = 1
    match: FaultMatch | None = None
    lose: FaultMatch | None = None
    max_events: Annotated[int, Field(ge=0)] | None = None
    max_bytes: Annotated[int, Field(ge=0)] | None = None
    no_index: bool = False

    @model_validator(mode="after")
    def _agree(self) -> FaultRule:
        if self.reset and self.hang is not None:
            raise ValueError("reset and hang exclude each other: give one of them")
        if self.silent and (self.status or self.headers or self.body is not None or self.no_index):
            raise ValueError(
                "a rule that sends no answer (hang, reset) takes no status, headers, body or no_index: remove them"
            )
        if self.store is not None and self.reset in {"before", "in_body", "after_store"}:
            raise ValueError(f"reset {self.reset!r} says itself whether events are stored: remove store")
        return self

    @property
    def silent(self) -> bool:
        """Whether the client gets no answer at all."""
        return self.hang is not None or self.reset in {"before", "in_body", "after_store"}

    @property
    def unconditional(self) -> bool:
        """Whether it applies to a request whose body nobody has seen."""
        return self.match is None and not self._has_limit and not self.no_index and self.chance == 1

    def applies(self, body: Body, usual: Answer) -> bool:
        """Whether a request is meant, given its body and the answer that it would get otherwise."""
        if self._has_limit and not self._exceeded(body):
            return False
        if self.match is not None:
            return bool(self.match.indexes(body.items))
        return not self.no_index or usual.status == HTTPStatus.BAD_REQUEST

    def answer(self, body: Body, usual: Answer, dialect: Dialect) -> Answer:
        """Return the answer of a request that the rule applies to."""
        answer = self._base(body, usual, dialect)
        headers = {**answer.headers, **{name.title(): value for name, value in self.headers.items()}}
        if self.body is None:
            return Answer(answer.status, headers, answer.body)
        return Answer(answer.status, {**headers, "Content-Type": self._body_type()}, self.body.encode())

    def stores(self, answer: Answer) -> bool:
        """Whether the events of a request that gets this answer are stored."""
        if self.reset == "after_store":
            return True
        if self.reset in {"before", "in_body"}:
            return False
        return self.store if self.store is not None else answer.accepted and self.hang is None

    def spared(self, events: Sequence[dict[str, object]]) -> list[dict[str, object]]:
        """Return the events that are not lost."""
        lost = self.lose.indexes(events) if self.lose else ()
        return [event for index, event in enumerate(events) if index not in lost]

    @property
    def _has_limit(self) -> bool:
        return self.max_events is not None or self.max_bytes is not None

    def _exceeded(self, body: Body) -> bool:
        many = self.max_events is not None and len(body.items) > self.max_events
        return many or (self.max_bytes is not None and body.size > self.max_bytes)

    def _base(self, body: Body, usual: Answer, dialect: Dialect) -> Answer:
        status = self._status()
        if status is None:
            return usual
        if status == HTTPStatus.BAD_REQUEST and self.match is not None and not self.no_index:
            indexes = self.match.indexes(body.items)
            return dialect.invalid([self.match.problem(index if body.is_batch else None) for index in indexes])
        if status < HTTPStatus.BAD_REQUEST:
            return Answer(status)
        return dialect.refusal(status, "A fault rule of the collector asked for this answer")

    def _status(self) -> int | None:
        if self.status is not None:
            return self.status
        if self.no_index:
            return HTTPStatus.BAD_REQUEST
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE if self._has_limit else None

    def _body_type(self) -> str:
        return next((value for name, value in self.headers.items() if name.title() == "Content-Type"), "text/plain")


class FaultTable:
    """The rules in force, in the order in which they are asked."""

    def __init__(self) -> None:
        self._rules: list[FaultRule] = []
        self._dice = random.Random()  # noqa: S311 - it decides about faults, not about secrets

    @property
    def rules(self) -> list[FaultRule]:
        """The rules that are left, each with the number of times that it has left."""
        return list(self._rules)

    def replace(self, rules: Iterable[FaultRule]) -> None:
        """Put these rules in the place of all others."""
        self._rules = list(rules)

    def take_unread(self) -> FaultRule | None:
        """Return the rule that resets a request before its body is read, if that is what comes first."""
        first = self._rules[0] if self._rules else None
        return self._use(0) if first and first.reset == "before" and first.unconditional else None

    def take(self, body: Body, usual: Answer) -> FaultRule:
        """Return the first rule that applies to a request, and count it as used; without one, an empty rule."""
        for place, rule in enumerate(self._rules):
            if rule.applies(body, usual) and self._dice.random() < rule.chance:
                return self._use(place)
        return FaultRule()

    def _use(self, place: int) -> FaultRule:
        rule = self._rules[place]
        if rule.times == 1:
            del self._rules[place]
        elif rule.times is not None:
            self._rules[place] = rule.model_copy(update={"times": rule.times - 1})
        return rule
