"""What became of one request to the ingest endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

# Statuses that say that the token is not, or no longer, one that may.
_ABOUT_THE_TOKEN = ("401", "403")
# Statuses that say who asks, or how often, and nothing about what was sent.
_ABOUT_THE_SENDER = ("401", "407", "429")


@dataclass(frozen=True)
class Delivered:
    """The endpoint took all events of the request.

    `note`, for people, is not empty if its 2xx does not look like an acceptance; it is the same for the same status and
    content type, so that it can be said once.
    """

    note: str = field(default="", compare=False)


class _Explained:
    """What is said of a failure: in short, and with the endpoint's own words where it said any."""

    reason: str
    words: str

    @property
    def explanation(self) -> str:
        """What the endpoint said, as fully as it is kept with a dead letter."""
        return self.words or self.reason


@dataclass(frozen=True)
class Failed(_Explained):
    """The endpoint did not take the request, for now.

    `reason` is for people, and short; `words` is the same with the endpoint's own words up to 4,096 characters, to be
    kept with a dead letter, empty if it said none. `kind`, the status or the type of error, is the same for the same
    trouble. `retry_after` is the pause that the endpoint asked for, in seconds. `is_misconfigured`: trying again will
    not help, until somebody changes the configuration here or there. `may_have_arrived`: the endpoint may hold the
    events all the same, some of them at least (OpenMeter hands them to Kafka one by one before it answers 500).
    `is_begun`: some of the request was written, though not all of it.
    """

    reason: str
    kind: str
    retry_after: float | None = None
    is_misconfigured: bool = False
    may_have_arrived: bool = True
    is_begun: bool = False
    words: str = field(default="", compare=False)

    @property
    def was_seen(self) -> bool:
        """True if the endpoint, or something in front of it, saw some of the request."""
        return self.may_have_arrived or self.is_begun or self.kind.isdigit()

    @property
    def is_about_the_sender(self) -> bool:
        """True if it says who asks, or how often; a firewall may say that of an event, too."""
        return self.kind in _ABOUT_THE_SENDER


@dataclass(frozen=True)
class Rejected(_Explained):
    """The endpoint refused the request because of an event in it; `indexes` are the ones it named.

    `reason` and `words` as with `Failed`, and so is what is the same for all of these.
    """

    was_seen: ClassVar[bool] = True
    is_about_the_sender: ClassVar[bool] = False
    may_have_arrived: ClassVar[bool] = False
    retry_after: ClassVar[float | None] = None

    reason: str
    indexes: tuple[int, ...] = ()
    words: str = field(default="", compare=False)

    def named(self, size: int) -> list[int]:
        """Return which of so many events it named; none if it named all."""
        named = sorted({index for index in self.indexes if index < size})
        return named if len(named) < size else []


Failure = Failed | Rejected
Outcome = Delivered | Failure


def kind_of(outcome: Outcome) -> str:
    """Return in a word what came of a request: `2xx`, `refused`, a status or a type of error."""
    if isinstance(outcome, Delivered):
        return "2xx"
    return outcome.kind if isinstance(outcome, Failed) else "refused"


def surely_did_not_arrive(outcome: Outcome) -> bool:
    """Return whether the endpoint surely holds none of the events."""
    return not (isinstance(outcome, Delivered) or outcome.may_have_arrived)


def is_about_no_event(failure: Failure) -> bool:
    """Return whether, by what it says, no event is the reason: none was seen, or it is about the sender."""
    return failure.is_about_the_sender or not failure.was_seen


def refuses_the_token(outcome: Outcome) -> bool:
    """Return whether the endpoint says that who has this token may not post."""
    return isinstance(outcome, Failed) and outcome.kind in _ABOUT_THE_TOKEN
