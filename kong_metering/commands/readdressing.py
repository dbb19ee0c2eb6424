"""Dead letters that become another endpoint's.

Contract: a letter is the new endpoint's, on the disk itself, before it is not the old one's any more; killed in
between, it is both, and the next time the one that is there already is not added again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from kong_metering.commands.letters import groups

if TYPE_CHECKING:
    from kong_metering.commands.interruption import Interruption
    from kong_metering.spool.deadletters import DeadLetters, StoredLetter
    from kong_metering.spool.identity import QueueIdentity


def readdress(
    dead_letters: DeadLetters, ids: Collection[int], target: QueueIdentity, interruption: Interruption
) -> int:
    """Give these letters to another queue, with all that they say; tell how many were there.

    Raises `Interrupted`, and what `DeadLetters` raises.
    """
    known = {_digest(stored) for stored in dead_letters.letters() if stored.letter.queue.key == target.key}
    moved = 0
    for group in groups(dead_letters, set(ids)):
        interruption.check()
        _add(dead_letters, [stored for stored in group if _digest(stored) not in known], target)
        moved += dead_letters.remove([stored.id for stored in group])
    return moved


def _add(dead_letters: DeadLetters, group: Sequence[StoredLetter], target: QueueIdentity) -> None:
    for time_ms, run in groupby(group, attrgetter("time_ms")):
        dead_letters.add([replace(stored.letter, queue=target) for stored in run], time_ms)
    dead_letters.unsynced().sync()


def _digest(stored: StoredLetter) -> bytes:
    """Return what two letters have in common that are one, but for whose they are."""
    letter = stored.letter
    told = repr((stored.time_ms, letter.reason, letter.answer, letter.accepted_ms)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(told + letter.event).digest()
