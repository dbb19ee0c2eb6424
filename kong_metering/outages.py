"""Since when something does not work, so that it is said once when it does again, with how long that was. Pure."""

from __future__ import annotations

# What passes sooner is not worth a line.
_WORTH_SAYING_SECONDS = 1.0
_UNITS = ((86_400, "days"), (3600, "h"), (60, "min"))


class Outage:
    """One thing that may fail for a while; times are monotonic."""

    def __init__(self) -> None:
        self._since: float | None = None

    def fails(self, now: float) -> None:
        """Note that it does not work."""
        if self._since is None:
            self._since = now

    def works(self, now: float) -> float | None:
        """Note that it works; return for how many seconds it did not, None if that is nothing to be said."""
        since, self._since = self._since, None
        return None if since is None or now - since < _WORTH_SAYING_SECONDS else now - since


def in_words(seconds: float) -> str:
    """Say a length of time in the largest unit of which it has at least two, such as `12 min`."""
    unit, name = next(((unit, name) for unit, name in _UNITS if seconds >= 2 * unit), (1, "s"))
    return f"{seconds / unit:.0f} {name}"
