"""What is tried while nothing gets through: whose turn it is, and the pauses between. Pure.

In each round the oldest event is tried alone; then, without a pause, one other event, so that an old one that is to
blame does not hold all others for good. The other is the one behind it, then those at twice the distance each time,
which reaches behind many bad ones in a row with few tries. Where a failure leaves it open whether the events have
arrived, others that were not sent before join only as the rounds double: an outage puts few in doubt.
"""

from __future__ import annotations

import math

# So many different events fail in a row before it is the endpoint, whatever it says about them.
IN_A_ROW = 10


class Silence:
    """How long nothing has got through."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Begin anew: something got through."""
        self.failures = 0
        self.rounds = 0
        self.pauses = 0
        self.others = 0
        self.until = -math.inf
        self.is_probing = False
        self.is_others_turn = False
        self.retry_after: float | None = None
        self.leaves_doubt = True

    def begin(self, *, leaves_doubt: bool) -> None:
        """Begin to probe, or note what a probe has come to."""
        self.is_probing = True
        self.leaves_doubt = leaves_doubt

    def pause(self, until: float) -> None:
        """End a round."""
        self.rounds += 1
        self.until = until
        self.is_others_turn = False
        self.retry_after = None

    def depth(self) -> int:
        """Return how far behind the oldest event the other one of this round stands, where that costs nothing."""
        return int(2 ** (self.others % (IN_A_ROW - 1)))

    def careful_depth(self) -> int:
        """Return the same where each further event is one more in doubt; 0: no other one in this round."""
        choices = self.rounds.bit_length() - 1
        return int(2 ** (self.others % choices)) if choices > 0 else 0
