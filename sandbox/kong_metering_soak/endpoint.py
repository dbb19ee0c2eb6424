"""What an endpoint does to a soak, and what is done to its URL and its tokens.

Contract: used by one thread at a time. Every fault ends what it began.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from kong_metering_sandbox.gateways import wait_for
from kong_metering_soak.schedule import Kind
from kong_metering_soak.shop import TOLD, VAULTED
from kong_metering_soak.traffic import REFUSED_SUBJECT, SUSPICIOUS_AGENT

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_soak.shop import Shop

_REFUSES_CHOSEN = FaultRule(status=400, match=FaultMatch(subject=REFUSED_SUBJECT))
_RULES: Mapping[Kind, FaultRule] = {
    Kind.STATUS_500: FaultRule(status=500),
    Kind.STATUS_500_STORED: FaultRule(status=500, store=True),
    Kind.STATUS_503: FaultRule(status=503),
    Kind.STATUS_429: FaultRule(status=429, headers={"Retry-After": "1"}),
    Kind.RESET_IN_BODY: FaultRule(reset="in_body"),
    Kind.RESET_AFTER_STORING: FaultRule(reset="after_store"),
    Kind.RESET_IN_ANSWER: FaultRule(reset="after_headers"),
}
_FIREWALL = FaultMatch(contains=SUSPICIOUS_AGENT)
_LEAST_RANDOM, _MOST_RANDOM = 0.7, 0.95
_INTERIM = ((102,), (103,), (102, 103, 103))
_INTERIM_PAUSES = (0.0, 0.05)
# Paths of the collector that answer 404, and 400, to every event.
_WRONG_PATHS = ("/nowhere", "/faults")
_RENEWAL_SECONDS = 90.0
_ENOUGH_REQUESTS = 200


class EndpointFaults:
    """Lets the collector misbehave. `configure` tells the gateway the shop's configuration; `hang` is in seconds."""

    def __init__(self, collector: CollectorProcess, shop: Shop, configure: Callable[[], None], *, hang: float) -> None:
        self._collector = collector
        self._shop = shop
        self._configure = configure
        self._hang_seconds = hang
        self._rotated_at = 0.0
        self._faults: dict[Kind, Callable[[float, random.Random], str]] = {
            Kind.HANG: self._hang,
            Kind.REFUSED: self._refuse_connections,
            Kind.FIREWALL: self._take_offence,
            Kind.RANDOM_503: self._fail_at_random,
            Kind.INTERIM: self._answer_twice,
            Kind.WRONG_TOKEN: self._change_token,
            Kind.ROTATION: self._rotate_secret,
            Kind.WRONG_URL: self._mistake_url,
        }
        self.behave()

    def behave(self) -> None:
        """Let it refuse the chosen events, and do nothing else wrong."""
        self._collector.client.faults(_REFUSES_CHOSEN)

    def befall(self, kind: Kind, seconds: float, chance: random.Random) -> str:
        """Let a fault happen from its beginning to its end; returns what else is to be told of it."""
        rule = _RULES.get(kind)
        if rule is None:
            return self._faults[kind](seconds, chance)
        return self._misbehave(rule, seconds)

    @contextmanager
    def rule(self, rule: FaultRule) -> Iterator[None]:
        """Have a rule while the context lasts."""
        self._collector.client.faults(rule, _REFUSES_CHOSEN)
        try:
            yield
        finally:
            self.behave()

    def wait_for_secret(self) -> None:
        """Wait until the endpoint has taken events with the newest secret of the vault; there must be requests."""
        wait_for(self._is_secret_used, "the rotated secret has arrived", timeout=_RENEWAL_SECONDS)

    def _is_secret_used(self) -> bool:
        path = self._shop.path_of(VAULTED)
        return any(
            found.path == path and found.status == 204 and found.received_at > self._rotated_at  # noqa: PLR2004
            for found in self._collector.client.requests(_ENOUGH_REQUESTS)
        )

    def _misbehave(self, rule: FaultRule, seconds: float) -> str:
        with self.rule(rule):
            time.sleep(seconds)
        return ""

    def _hang(self, seconds: float, chance: random.Random) -> str:
        stores = chance.choice((True, False))
        self._misbehave(FaultRule(hang=self._hang_seconds, store=stores), seconds)
        return f"{self._hang_seconds:g} s each, events {'stored' if stores else 'not stored'}"

    def _refuse_connections(self, seconds: float, _chance: random.Random) -> str:
        self._collector.pause()
        try:
            time.sleep(seconds)
        finally:
            self._collector.resume()
        return ""

    def _take_offence(self, seconds: float, chance: random.Random) -> str:
        ways = {
            "403": FaultRule(
                match=_FIREWALL, status=403, headers={"Content-Type": "text/html"}, body="<h1>Blocked</h1>"
            ),
            "406": FaultRule(match=_FIREWALL, status=406),
            "a reset": FaultRule(match=_FIREWALL, reset="in_body"),
            "a hang": FaultRule(match=_FIREWALL, hang=self._hang_seconds),
        }
        way = chance.choice(list(ways))
        self._misbehave(ways[way], seconds)
        return f"with {way}"

    def _fail_at_random(self, seconds: float, chance: random.Random) -> str:
        share = chance.uniform(_LEAST_RANDOM, _MOST_RANDOM)
        self._misbehave(FaultRule(status=503, chance=share), seconds)
        return f"{share:.0%} of the requests"

    def _answer_twice(self, seconds: float, chance: random.Random) -> str:
        statuses, pause = chance.choice(_INTERIM), chance.choice(_INTERIM_PAUSES)
        self._misbehave(FaultRule(interim=list(statuses), interim_pause=pause), seconds)
        return f"{', '.join(map(str, statuses))}, {pause:g} s before each"

    def _change_token(self, seconds: float, _chance: random.Random) -> str:
        self._shop.rotate(TOLD)
        self._collector.client.set_tokens(self._shop.tokens)
        time.sleep(seconds)
        self._configure()
        return "then the gateway is told the new one"

    def _rotate_secret(self, seconds: float, _chance: random.Random) -> str:
        self._shop.rotate(VAULTED)
        self._collector.client.set_tokens(self._shop.tokens)
        # What the old token was accepted for is answered by now.
        self._rotated_at = time.time()
        time.sleep(seconds)
        self._shop.put_secret()
        return "then the vault has the new one"

    def _mistake_url(self, seconds: float, chance: random.Random) -> str:
        path = chance.choice(_WRONG_PATHS)
        self._shop.mistake_url(path)
        self._configure()
        time.sleep(seconds)
        self._shop.correct_url()
        self._configure()
        return f"{path}, then the right one"
