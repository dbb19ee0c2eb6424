"""When which fault happens in a soak. Pure: a length and a seed in, a plan out.

Contract: the same length and seed give the same plan, and every kind of fault is in it at least once (`kinds_of`). Two
lanes run at the same time, the endpoint's and the gateway's; in a lane one fault follows the other. While the disk is
in trouble the endpoint works but for one short outage: what comes meanwhile can be kept in memory only, and that is
bounded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

SHORTEST_SECONDS = 60.0

_GATEWAY_SLOT = 25.0
_ENDPOINT_SLOT = 18.0
_SETTLING_SECONDS = 1.0
# From this length on, one endpoint fault in ten lasts for several slots.
_LONG_RUN_SECONDS = 600.0
_LONG_FAULT_SHARE = 0.1
_LONG_FAULT_SLOTS = 4


class Kind(Enum):
    """A kind of fault, with the words for it."""

    STATUS_500 = "answers 500"
    STATUS_500_STORED = "answers 500 though it stored the events"
    STATUS_503 = "answers 503"
    STATUS_429 = "answers 429 with Retry-After"
    RESET_IN_BODY = "resets the connection in the body of the request"
    RESET_AFTER_STORING = "resets the connection after it stored the events"
    RESET_IN_ANSWER = "resets the connection in the body of the answer"
    HANG = "hangs"
    REFUSED = "refuses connections"
    FIREWALL = "has a firewall that takes offence at what one client sends"
    RANDOM_503 = "answers 503 at random"
    INTERIM = "sends interim answers before the answer"
    WRONG_TOKEN = "has changed a token"  # noqa: S105 - words for people
    ROTATION = "has changed a token that a vault keeps"
    WRONG_URL = "wrong URL"
    KILL = "SIGKILL of the plugin server"
    STOP = "stop and start of the gateway"
    RELOAD = "reload of the gateway"
    FULL_DISK = "full disk"
    READ_ONLY = "read-only disk"
    BROKEN_DISK = "disk with input/output errors"
    CLOCK_FORWARD = "clock a day ahead"
    CLOCK_BACK = "clock a day behind"
    BORN_AHEAD = "start with the clock a month ahead"
    BORN_BEHIND = "start with the clock a year behind"


# Meanwhile none of the endpoint's own faults happens.
CALM_KINDS = (Kind.FULL_DISK, Kind.READ_ONLY, Kind.BROKEN_DISK, Kind.BORN_AHEAD, Kind.BORN_BEHIND)
GATEWAY_KINDS = (Kind.KILL, Kind.STOP, Kind.RELOAD, Kind.CLOCK_FORWARD, Kind.CLOCK_BACK, *CALM_KINDS)
ENDPOINT_KINDS = tuple(kind for kind in Kind if kind not in GATEWAY_KINDS)
_LONG_RUN_KINDS = (Kind.BORN_AHEAD,)


@dataclass(frozen=True)
class Planned:
    """A fault: what, when (seconds from the start), for how long, and a seed for what else is up to chance."""

    kind: Kind
    start: float
    seconds: float
    seed: int

    @property
    def end(self) -> float:
        """When it ends."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Plan:
    """The two lanes, each in order of time."""

    endpoint: tuple[Planned, ...]
    gateway: tuple[Planned, ...]


def kinds_of(seconds: float) -> tuple[Kind, ...]:
    """Tell the kinds that a soak of this length has: a short one does not start with the clock ahead."""
    return tuple(kind for kind in Kind if seconds >= _LONG_RUN_SECONDS or kind not in _LONG_RUN_KINDS)


def make_plan(seconds: float, seed: int) -> Plan:
    """Plan a soak of at least `SHORTEST_SECONDS`."""
    if seconds < SHORTEST_SECONDS:
        raise ValueError(
            f"a soak of {seconds:g} s has no room for every kind of fault: {SHORTEST_SECONDS:g} s at least"
        )
    rng = random.Random(seed)  # noqa: S311 - a plan that can be repeated
    # A kill is what costs most: there are two for each of the others.
    kinds = (*(kind for kind in GATEWAY_KINDS if kind in kinds_of(seconds)), Kind.KILL)
    gateway = tuple(_lane(rng, _whole(seconds), kinds, _GATEWAY_SLOT, long_share=0.0))
    busy = [
        (fault.start - _SETTLING_SECONDS, fault.end + _SETTLING_SECONDS)
        for fault in gateway
        if fault.kind in CALM_KINDS
    ]
    free = list(_gaps(_whole(seconds), busy))
    long_share = _LONG_FAULT_SHARE if seconds >= _LONG_RUN_SECONDS else 0.0
    return Plan(tuple(_lane(rng, free, ENDPOINT_KINDS, _ENDPOINT_SLOT, long_share=long_share)), gateway)


def _whole(seconds: float) -> list[tuple[float, float]]:
    return [(_SETTLING_SECONDS, seconds)]


def _gaps(spans: list[tuple[float, float]], busy: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Give what is left of the spans without the busy times, which are in order."""
    for first, last in spans:
        start = first
        for busy_from, busy_to in busy:
            if busy_from > start:
                yield start, min(busy_from, last)
            start = max(start, busy_to)
        if start < last:
            yield start, last


def _lane(
    rng: random.Random, spans: list[tuple[float, float]], kinds: tuple[Kind, ...], slot: float, *, long_share: float
) -> Iterator[Planned]:
    """Deal the kinds out over slots of equal length, all of them before any comes again."""
    while sum(_slots_in(span, slot) for span in spans) < len(kinds):
        slot *= 0.95
    dealt = _deal(rng, kinds)
    missing = set(kinds)
    for first, last in spans:
        number, count = 0, _slots_in((first, last), slot)
        while number < count:
            # Only once every kind has had its turn: a long fault takes the place of others.
            is_long = not missing and rng.random() < long_share
            length = slot * (min(_LONG_FAULT_SLOTS, count - number) if is_long else 1)
            kind = next(dealt)
            missing.discard(kind)
            yield _placed(rng, kind, first + number * slot, length, slot)
            number += round(length / slot)


def _slots_in(span: tuple[float, float], slot: float) -> int:
    return int((span[1] - span[0]) / slot)


def _deal(rng: random.Random, kinds: tuple[Kind, ...]) -> Iterator[Kind]:
    while True:
        yield from rng.sample(kinds, len(kinds))


def _placed(rng: random.Random, kind: Kind, start: float, length: float, slot: float) -> Planned:
    """Place a fault in its slot, with a rest at the end in which things can get well again."""
    delay = slot * rng.uniform(0, 0.15)
    return Planned(kind, start + delay, (length - slot) + slot * rng.uniform(0.35, 0.6), rng.randrange(2**32))
