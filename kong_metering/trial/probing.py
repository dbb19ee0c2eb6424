"""What is tried while nothing gets through: whose turn it is, and the pauses between. Pure.

In each round the oldest event is tried alone; then one other event, so that an old one that is to blame does not hold
all others for good. The other is the one behind it, then those at twice the distance each time, which reaches behind
many bad ones in a row with few tries.

Where events are kept and a failure leaves it open whether they have arrived, the others are those that are in doubt
already, because they were sent together with the oldest. One more joins them only where these are so few that all may
be bad, and then it is always the same, so far behind that it reaches over bad ones in a row; one more after a minute,
and after an hour. So an outage leaves in doubt what was under way when it began, and one; what joined later counts only
if it lasts so much longer than the endpoint recognises duplicate ids.

Where the answer is about who sends (401, 407, 429) a round has one request, so that a limit on the rate, or a token
that is refused, gets no more of them for it: the other's turn is in every second round; after some rounds, when it has
most likely to do with no event, in every tenth, so that it is the oldest one that is tried when it works again.
"""

from __future__ import annotations

import math

# So many different events fail in a row before it is the endpoint, whatever it says about them.
IN_A_ROW = 10
# Silent for so many seconds, one more event may be put in doubt.
_JOINS_AFTER = (60.0, 3600.0)
# In the first rounds none is: most troubles are over by then.
_ROUNDS_WITHOUT_JOINING = 2


class Silence:
    """How long nothing has got through; `since` is monotonic."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Begin anew: something got through."""
        self.failures = 0
        self.rounds = 0
        self.pauses = 0
        self.others = 0
        self.joined = 0
        self.since = math.inf
        self.until = -math.inf
        self.is_probing = False
        self.is_others_turn = False
        self.is_about_the_sender = False
        self.leaves_doubt = False
        self.retry_after: float | None = None

    def ask(self) -> None:
        """Begin to probe though nothing has failed."""
        self.is_probing = True

    def begin(self, now: float, *, leaves_doubt: bool, is_about_the_sender: bool) -> None:
        """Begin to probe, or note what a probe has come to."""
        self.is_probing = True
        self.since = min(self.since, now)
        self.leaves_doubt = self.leaves_doubt or leaves_doubt
        self.is_about_the_sender = is_about_the_sender

    def failed(self) -> None:
        """Count a failure that is nobody's so far."""
        self.failures += 1

    def search(self) -> None:
        """Probe no more: what fails is cut up."""
        self.is_probing = False

    def other_failed(self) -> None:
        """Note that the other one of this round has failed."""
        self.others += 1

    def let_other_try(self, retry_after: float | None) -> None:
        """Have the other one of this round tried, now that the oldest has failed; the pause it was told comes after."""
        self.is_others_turn = True
        self.retry_after = retry_after

    def other_is_sent(self, *, joins: bool) -> None:
        """Note that the other one goes out; `joins`: it was not in doubt before."""
        self.joined += joins

    def joined_of(self, in_doubt: int, *, reaches_far: bool) -> None:
        """Note how many are in doubt now: some may have been settled since."""
        self.joined = min(in_doubt, max(int(reaches_far), self.joined))

    def lengthen(self) -> None:
        """Have the pauses grow: this is more than failing at random."""
        self.pauses += 1

    def wait(self, until: float) -> None:
        """Send nothing before a moment."""
        self.until = until

    def end_pause(self, now: float) -> None:
        """Have what is next be tried from now on."""
        self.until = min(self.until, now)

    def pause(self, until: float) -> None:
        """End a round."""
        self.rounds += 1
        self.until = until
        between = 2 if self.rounds <= 2 * IN_A_ROW else IN_A_ROW
        self.is_others_turn = self.is_about_the_sender and self.rounds % between == 0
        self.retry_after = None

    def depth(self) -> int:
        """Return how far behind the oldest event the other one of this round stands, where that costs nothing."""
        return int(2 ** (self.others % (IN_A_ROW - 1)))

    def careful_depth(self) -> int:
        """Return the same where the events have a time in which they are tried, which begins with the first try."""
        choices = self.rounds.bit_length() - 1
        return int(2 ** (self.others % choices)) if choices > 0 else 0

    def choice(self, count: int) -> int:
        """Return which is the other one of this round, of so many that are in doubt already."""
        return int(2 ** (self.others % count.bit_length())) - 1

    def lets_join(self, now: float) -> bool:
        """Return whether one more event may be put in doubt, by how many have joined so far."""
        allowed = 1 + sum(now - self.since >= seconds for seconds in _JOINS_AFTER)
        return self.rounds >= _ROUNDS_WITHOUT_JOINING and self.joined < allowed
