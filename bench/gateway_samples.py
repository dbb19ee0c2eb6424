"""What was measured in rounds, the figures that it gives, and whether they are what was wanted.

A figure is the median of the rounds. A ratio is the median of the ratios within each round, whose parts were measured
right after each other. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Sample:
    """What one candidate did in one round; times in microseconds, CPU for each request."""

    per_second: float
    kong_us: float
    plugin_us: float
    p50_us: float
    p99_us: float
    p50_alone_us: float
    p99_alone_us: float

    @property
    def cpu_us(self) -> float:
        """CPU of Kong and of the plugin together."""
        return self.kong_us + self.plugin_us


Value = Callable[[Sample], float]
Samples = Mapping[str, Sequence[Sample]]


def ratio(ones: Sequence[Sample], others: Sequence[Sample], value: Value) -> float:
    """Compare two candidates."""
    return median(_divided(value(one), value(other)) for one, other in zip(ones, others, strict=True))


def ratio_of_added(ones: Sequence[Sample], others: Sequence[Sample], nothing: Sequence[Sample], value: Value) -> float:
    """Compare what two candidates add to what it takes without either; infinite if the other one adds nothing."""
    rounds = zip(ones, others, nothing, strict=True)
    return median(_divided(value(one) - value(base), value(other) - value(base)) for one, other, base in rounds)


def _divided(one: float, other: float) -> float:
    return one / other if other > 0 else math.inf


@dataclass(frozen=True)
class Target:
    """A figure that is wanted of ours: `limit` at most, or at least. `others` are the candidates that it needs.

    Any other candidate can be held against it in the place of ours, as the floor is.
    """

    what: str
    others: tuple[str, ...]
    figure: Callable[[Sequence[Sample], Samples], float]
    limit: float
    at_least: bool = False

    @property
    def wanted(self) -> str:
        """The limit, in words."""
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}"

    def verdict(self, ours: Sequence[Sample], samples: Samples) -> str:
        """Tell the figure and whether it is met; nothing if one of the candidates was not measured."""
        if not ours or not samples.keys() >= set(self.others):
            return ""
        figure = self.figure(ours, samples)
        met = figure >= self.limit if self.at_least else figure <= self.limit
        return f"{figure:.2f} {'met' if met else 'MISSED'}"


def _against(other: str, value: Value) -> Callable[[Sequence[Sample], Samples], float]:
    return lambda ours, samples: ratio(ours, samples[other], value)


TARGETS = (
    Target("requests/s / Go's", ("go",), _against("go", lambda one: one.per_second), 1.7, at_least=True),
    Target(
        "requests/s / http-log's",
        ("http-log-100",),
        _against("http-log-100", lambda one: one.per_second),
        0.5,
        at_least=True,
    ),
    Target("CPU of Kong and plugin / Go's and its Kong's", ("go",), _against("go", lambda one: one.cpu_us), 0.6),
    Target(
        "CPU of the plugin / kong-pdk's with gevent",
        ("kong-pdk",),
        _against("kong-pdk", lambda one: one.plugin_us),
        0.2,
    ),
    Target(
        "what it adds to p50, 1 connection / what Go adds",
        ("go", "nothing"),
        lambda ours, samples: ratio_of_added(ours, samples["go"], samples["nothing"], lambda one: one.p50_alone_us),
        0.5,
    ),
    # Both add to the same, so what adds no more has no more; a ratio of what is added would be one of noise.
    Target("p99, 1 connection / Go's", ("go",), _against("go", lambda one: one.p99_alone_us), 1.0),
)
