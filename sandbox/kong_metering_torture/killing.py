"""Keeps a process in its place while somebody kills it again and again, and starts the next one at once.

Contract: `Lane.run` belongs to one thread. The next process is started and has imported everything before its
predecessor is killed, and begins when that has been reaped: what kills and begins meets the spool, not the interpreter.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Half of the lives are as short as this: they end in the start, in the taking over of what others left.
_SHORT_LIFE_SECONDS = 0.08
_LONG_LIFE_SECONDS = 1.0


@dataclass(frozen=True)
class Setting:
    """What all processes have in common."""

    directory: Path
    inbox: str
    url: str
    rate: float


class Victim:
    """A process of `victim.py`, which waits for `begin`."""

    def __init__(self, name: str, setting: Setting, rate: float) -> None:
        self.name = name
        words = [name, str(setting.directory), setting.inbox, setting.url, str(rate)]
        with (setting.directory / "stderr").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kong_metering_torture.victim", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until it has imported everything. Raises `RuntimeError` if it ends before."""
        if self.read() is None:
            raise RuntimeError(f"{self.name} ended by itself, with {self._process.wait()}")

    def begin(self) -> None:
        """Let it begin."""
        if self._process.stdin:
            self._process.stdin.write("begin\n")
            self._process.stdin.flush()

    def read(self) -> str | None:
        """Read the next line that it says; None at its end."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        return line.strip() or None

    def kill(self) -> float:
        """Kill it and tell when; raises `RuntimeError` if it was dead."""
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended by itself, with {self._process.returncode}")
        at = time.monotonic()
        self._process.kill()
        self._process.wait()
        self._close()
        return at

    def end(self, seconds: float) -> None:
        """Let it close; kill it if it takes longer."""
        self._close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()


class Lane:
    """One process after the other, each killed at a random moment."""

    def __init__(self, name: str, setting: Setting, seed: int) -> None:
        self.kills: dict[str, float] = {}
        self._name = name
        self._setting = setting
        self._chance = random.Random(seed)  # noqa: S311

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Kill one after the other, as long as `goes_on` says so; the last one is killed as well."""
        current = self._started()
        try:
            current.begin()
            while goes_on():
                following = self._started()
                time.sleep(self._life())
                self.kills[current.name] = current.kill()
                current = following
                current.begin()
            time.sleep(self._life())
            self.kills[current.name] = current.kill()
        finally:
            current.end(0)

    def _started(self) -> Victim:
        victim = Victim(f"{self._name}{len(self.kills)}", self._setting, self._setting.rate)
        victim.wait_until_ready()
        return victim

    def _life(self) -> float:
        longest = self._chance.choice([_SHORT_LIFE_SECONDS, _LONG_LIFE_SECONDS])
        return self._chance.uniform(0, longest)


def killed_by(lanes: Sequence[Lane]) -> dict[str, float]:
    """Put together who was killed when."""
    return {name: at for lane in lanes for name, at in list(lane.kills.items())}
