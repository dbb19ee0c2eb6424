"""Which queues and dead letters a command is about. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kong_metering.commands import words
from kong_metering.errors import KongMeteringError
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Filters:
    """What is asked for; None asks for nothing in particular."""

    plugin_id: str | None = None
    endpoint: str | None = None
    reason: str | None = None

    def match_queue(self, queue: QueueIdentity | None) -> bool:
        """Whether a queue is meant; None is one of which nobody knows whose it is."""
        plugin_id = queue.entity_id if queue else ""
        if self.plugin_id is not None and self.plugin_id != (plugin_id or UNKNOWN):
            return False
        return self.endpoint is None or (queue is not None and is_endpoint(self.endpoint, queue))

    def match_letter(self, queue: QueueIdentity, reason: str) -> bool:
        """Whether a queue's dead letters for a reason are meant."""
        return self.match_queue(queue) and self.reason in (None, reason)


def is_endpoint(url: str, queue: QueueIdentity) -> bool:
    """Return whether this is the queue's endpoint, with or without credentials."""
    return without_credentials(url) == without_credentials(queue.endpoint)


def chosen_endpoint(queues: Iterable[QueueIdentity], plugin_id: str, url: str | None, option: str) -> str:
    """Find which endpoint of a plugin is meant: the one with this URL, or the only one. `option` names the URL.

    Raises `KongMeteringError` when that is not clear.
    """
    queues = list(queues)
    mine = {queue.endpoint: queue for queue in queues if queue.entity_id == plugin_id}
    if not mine:
        raise KongMeteringError(f"nothing waits for the plugin {plugin_id}; {_plugins_told(queues)}")
    there = ", ".join(sorted(map(without_credentials, mine)))
    if url is None and len(mine) > 1:
        raise KongMeteringError(f"its events were accepted for several endpoints: choose one with {option}: {there}")
    chosen = [endpoint for endpoint, queue in mine.items() if url is None or is_endpoint(url, queue)]
    if len(chosen) != 1:
        raise KongMeteringError(
            f"no events were accepted for {without_credentials(url or '')}, and events never leave "
            f"for another endpoint than their own; {option} can be: {there}"
        )
    return chosen[0]


def _plugins_told(queues: Sequence[QueueIdentity]) -> str:
    names = sorted({words.plugin(queue) for queue in queues})
    return f"there are events of {', '.join(names)}" if names else "the spool is empty"


def by_reason(counts: Counter[tuple[QueueIdentity, str]]) -> Counter[str]:
    """Sum up over all queues."""
    reasons: Counter[str] = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    return reasons


def reasons_told(reasons: Mapping[str, int]) -> str:
    """Tell how many for which reason, such as `3 rejected, 1 ambiguous`."""
    return ", ".join(f"{reasons[reason]:,} {reason}" for reason in sorted(reasons)) or "none"
