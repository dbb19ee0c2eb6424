"""A clock that moves only when a test moves it."""

from __future__ import annotations


class FakeClock:
    """Both clocks in one; they run together, but start apart, so that mixing them up shows."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._wall_set_by = 0.0

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds

    def set_wall(self, seconds: float) -> None:
        """Set the system's time; no time passes."""
        self._wall_set_by += seconds - self.wall()

    def monotonic(self) -> float:
        return 1000.0 + self._elapsed

    def since_boot(self) -> float:
        return self.monotonic()

    def boot_id(self) -> str:
        return "one"

    def wall(self) -> float:
        return 1_800_000_000.0 + self._elapsed + self._wall_set_by
