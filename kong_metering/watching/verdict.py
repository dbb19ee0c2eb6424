"""Whether a plugin server is well: one judgement, for `/healthz` and for `kong-metering health`. Pure.

It serves when somebody answers Kong, and no worker of Kong that is to be seen is kept from connecting. Delivery is
alive when no thread stands still. An endpoint that fails is no illness of the server: events wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Health(Enum):
    """How well it is, by the exit status of `kong-metering health`."""

    WELL = 0
    DOES_NOT_SERVE = 1
    DELIVERY_IS_NOT_ALIVE = 3


@dataclass(frozen=True)
class Verdict:
    """How well it is, and why it is not."""

    health: Health
    why: str = ""


def judged(silence: str | None, hindered: str | None, stalled: Sequence[str] = ()) -> Verdict:
    """Judge by why nobody serves, who cannot connect (None: all is well there), and which threads stand still."""
    if silence is not None:
        return Verdict(Health.DOES_NOT_SERVE, silence)
    if hindered is not None:
        return Verdict(Health.DOES_NOT_SERVE, f"nothing is metered: {hindered}")
    if stalled:
        why = f"serves, and delivery is not alive: {', '.join(stalled)} stalled for two minutes"
        return Verdict(Health.DELIVERY_IS_NOT_ALIVE, why)
    return Verdict(Health.WELL)
