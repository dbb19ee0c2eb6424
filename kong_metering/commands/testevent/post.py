"""One event that bills nobody, and its POST by the client that the plugin server has. Knows nothing of people."""

from __future__ import annotations

import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import orjson

from kong_metering.config import parse_config
from kong_metering.ingest.client import Endpoint, IngestClient
from kong_metering.trial.outcome import Delivered, Failed

if TYPE_CHECKING:
    from kong_metering.clock import Clock

# No meter counts it, unless somebody makes one for it: meters name their event type.
EVENT_TYPE = "kong.metering_test"
REFUSED = "refused"


@dataclass(frozen=True)
class Target:
    """Where the event goes, and how; `timeout` in milliseconds, as in the plugin's configuration."""

    ingest_endpoint: str
    api_token: str
    timeout: float
    ssl_verify: bool
    ca_bundle: str | None

    def __repr__(self) -> str:
        """Leave the token out."""
        return f"Target({self.ingest_endpoint!r})"


@dataclass(frozen=True)
class TestEvent:
    """The event, and how it is found again."""

    id: str
    subject: str
    body: bytes

    @classmethod
    def made(cls, subject: str, clock: Clock) -> TestEvent:
        """Make one; its id is like no other."""
        event_id = f"{uuid.uuid4()}:metering_test"
        event = {
            "specversion": "1.0",
            "id": event_id,
            "source": "kong-metering-test",
            "type": EVENT_TYPE,
            "subject": subject,
            "time": datetime.fromtimestamp(int(clock.wall()), timezone.utc).isoformat().replace("+00:00", "Z"),
            "data": {"test": True, "note": "sent by hand with kong-metering send-test-event; no usage"},
        }
        return cls(event_id, subject, orjson.dumps(event))


@dataclass(frozen=True)
class Answer:
    """What came of it.

    `kind`: the status, `refused` for a status that is about the event, or the name of the error that kept an answer
    away; empty for a 2xx. `said`: in words of the endpoint or the system, without secrets; empty for an acceptance.
    """

    kind: str
    said: str

    @property
    def is_accepted(self) -> bool:
        """True for a 2xx that looks like an acceptance."""
        return not self.kind and not self.said

    @property
    def has_arrived(self) -> bool:
        """True if the endpoint answered at all."""
        return self.kind in ("", REFUSED) or self.kind.isdigit()


def send(target: Target, event: TestEvent, clock: Clock) -> Answer:
    """Post the event. Raises `ConfigError` if URL or token cannot be used."""
    config = parse_config(
        {
            "ingest_endpoint": target.ingest_endpoint,
            "api_token": target.api_token,
            "timeout": target.timeout,
            "ssl_verify": target.ssl_verify,
        }
    )
    with closing(IngestClient(Endpoint.of(config, target.ca_bundle), clock)) as client:
        outcome = client.send([event.body])
    if isinstance(outcome, Delivered):
        return Answer("", outcome.note)
    return Answer(outcome.kind if isinstance(outcome, Failed) else REFUSED, outcome.reason)
