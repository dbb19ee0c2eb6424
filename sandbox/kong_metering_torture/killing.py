"""Keeps a process in its place while somebody kills it again and again, and starts the next one at once.

Contract: `Lane.run` belongs to one thread. All processes of a lane are forked from one program that has imported
everything: what kills and begins meets the spool, not the interpreter.
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
_LONG_LIFE_SECONDS = 1.5
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Setting:
    """What all processes have in common."""

    directory: Path
    inbox: str
    url: str
    rate: float


class Nursery:
    """The program of `victim.py`, from which processes are forked one after the other."""

    def __init__(self, setting: Setting) -> None:
        words = [str(setting.directory), setting.inbox, setting.url, str(setting.rate)]
        with (setting.directory / "stderr").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kong_metering_torture.victim", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def order(self, words: str) -> str:
        """Give an order and return the answer. Raises `RuntimeError` if there is none."""
        if self._process.stdin:
            self._process.stdin.write(f"{words}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the program of the processes ended by itself, with {self._process.wait()}")
        return line.strip()

    def end(self, seconds: float) -> None:
        """Let it end; kill it if it takes longer."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


class Lane:
    """One process after the other, each killed at a random moment."""

    def __init__(self, name: str, setting: Setting, seed: int) -> None:
        self.kills: dict[str, float] = {}
        self._name = name
        self._setting = setting
        self._chance = random.Random(seed)  # noqa: S311

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Kill one after the other, as long as `goes_on` says so; none is left. Raises `RuntimeError` if one dies."""
        nursery = Nursery(self._setting)
        try:
            while goes_on():
                name = f"{self._name}{len(self.kills)}"
                nursery.order(f"start {name}")
                time.sleep(self._life())
                killed = nursery.order("kill")
                if killed == "dead":
                    raise RuntimeError(f"{name} ended by itself")
                self.kills[name] = float(killed)
            # What the last one left in memory goes with the program.
            nursery.order(f"succeed {self._name}-last")
        finally:
            nursery.end(_PATIENCE_SECONDS)

    def _life(self) -> float:
        longest = self._chance.choice([_SHORT_LIFE_SECONDS, _LONG_LIFE_SECONDS])
        return self._chance.uniform(0, longest)


def killed_by(lanes: Sequence[Lane]) -> dict[str, float]:
    """Put together who was killed when."""
    return {name: at for lane in lanes for name, at in list(lane.kills.items())}
