"""`python -m tests.fuzz --seconds 600`: tries new inputs for so long; exits with 1 if it found one that does harm.

A finding is made as small as can be, kept in `tests/fuzz/corpus/`, and runs with the tests from then on. With `--grow`,
inputs that reach lines of the package in a new order are kept as well.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import kong_metering
from tests.fuzz.cases import Case, Target, load, save, saved
from tests.fuzz.targets import TARGETS

_PACKAGE = str(Path(kong_metering.__file__).parent) + os.sep
_EXAMPLES = 100
_VARIATIONS = 20
_LARGEST_KEPT = 1500


def main() -> int:
    """Fuzz all targets in turn until the time is over."""
    options = _options()
    deadline = time.monotonic() + options.seconds
    targets = [target for target in TARGETS if target.name in (options.target or target.name)]
    tried = dict.fromkeys((target.name for target in targets), 0)
    findings: dict[str, Path] = {}
    reach = _Reach(targets) if options.grow else None
    while time.monotonic() < deadline and len(findings) < len(targets):
        for target in targets:
            if target.name not in findings and time.monotonic() < deadline:
                attempt = _Attempt(target, deadline, reach)
                found = attempt.run(random.SystemRandom().getrandbits(64))
                tried[target.name] += attempt.tried
                if found is not None:
                    findings[target.name] = found
    for name, count in tried.items():
        _say(f"{name:8} {count:8} inputs, {f'FOUND {findings[name]}' if name in findings else 'nothing found'}")
    return 1 if findings else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long to try (default: 600)")
    parser.add_argument("--target", choices=[target.name for target in TARGETS], help="only this target")
    parser.add_argument("--grow", action="store_true", help="keep inputs that reach something new")
    return parser.parse_args()


class _Attempt:
    """One run of hypothesis on one target."""

    def __init__(self, target: Target, deadline: float, reach: _Reach | None) -> None:
        self.tried = 0
        self._target = target
        self._deadline = deadline
        self._reach = reach
        self._failed: Case | None = None

    def run(self, chance: int) -> Path | None:
        """Try some inputs; gives the file of the smallest one that fails."""
        limits = settings(
            max_examples=_EXAMPLES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        try:
            tried = given(self._target.cases, st.integers(0, 2**32))(self._try)
            seed(chance)(limits(tried))()
        except Exception:
            if self._failed is None:
                raise
            path = save(self._target.name, self._failed)
            _say(f"{self._target.name}: {path}\n{traceback.format_exc()}")
            return path
        return None

    def _try(self, case: Case, chance: int) -> None:
        """Try a case, and others that are made of it."""
        self._check(case)
        varies = random.Random(chance)  # noqa: S311 - hypothesis repeats it by its number
        for _ in range(_VARIATIONS):
            varied = self._target.vary(case, varies)
            self._check(varied)
            if varies.random() < 0.5:
                case = varied

    def _check(self, case: Case) -> None:
        if time.monotonic() > self._deadline and self._failed is None:
            return
        self.tried += 1
        try:
            if self._reach is None:
                self._target.check(case)
            else:
                self._reach.follow(self._target, case)
        except BaseException:
            self._failed = case
            raise


class _Reach:
    """Which steps from line to line of the package have been seen, and keeps each input that takes a new one."""

    def __init__(self, targets: list[Target]) -> None:
        self._seen: set[tuple[str, CodeType, int, int]] = set()
        for target in targets:
            for path in saved(target.name):
                self._seen |= self._steps(target, load(path))

    def follow(self, target: Target, case: Case) -> None:
        """Check a case, and keep it if it went where none went before."""
        steps = self._steps(target, case)
        if steps - self._seen and len(str(case)) <= _LARGEST_KEPT:
            self._seen |= steps
            _say(f"{target.name}: kept {save(target.name, case)}")

    def _steps(self, target: Target, case: Case) -> set[tuple[str, CodeType, int, int]]:
        steps: set[tuple[str, CodeType, int, int]] = set()

        def trace(frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
            path = frame.f_code.co_filename
            if not path.startswith(_PACKAGE):
                return None
            before = frame.f_lineno

            def step(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
                nonlocal before
                if event == "line":
                    steps.add((target.name, frame.f_code, before, frame.f_lineno))
                    before = frame.f_lineno
                return step

            return step

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            target.check(case)
        finally:
            sys.settrace(before)
        return steps


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
