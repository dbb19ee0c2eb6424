"""The figures of all servers together: each shows its own to the others, and any of them can tell the sum.

Contract: used from the event loop's thread only. A server's own figures are those of the moment, the others' at most
about a second old; a server that has just been started may have none yet.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from kong_metering.host.workers import is_living

if TYPE_CHECKING:
    from kong_metering.host.board import Slot
    from kong_metering.host.station import Station

_TRIES = 10
_DETAILS = "details"


class Figures:
    """The figures of one server, `own`, and of those beside it.

    Numbers add up over all servers, also within figures of figures; but those whose names are among `alike` are the
    same thing seen by each, of which the greatest is told. `details` are told of each server by itself.
    """

    def __init__(
        self,
        station: Station,
        own: Callable[[], Mapping[str, Any]],
        details: Callable[[], Mapping[str, Any]] = dict,
        alike: Collection[str] = (),
    ) -> None:
        self._station = station
        self._own = own
        self._details = details
        self._alike = alike

    def publish(self) -> None:
        """Show this server's own to the others; of figures that are too many the single ones only."""
        own = self._own()
        for told in (
            {**own, _DETAILS: self._details()},
            own,
            {n: one for n, one in own.items() if isinstance(one, int)},
        ):
            if self._station.slot.publish(orjson.dumps(told)):
                return

    def told(self) -> dict[str, Any]:
        """Tell the sums, and under `servers` those of each server, with its process and how many workers it has.

        One that is alone does not tell workers apart.
        """
        slots = self._station.slots
        if len(slots) == 1:
            own = self._own()
            return {**own, "servers": [{"pid": slots[0].pid, **own, **self._details()}]}
        each = [self._of(index) for index in range(len(slots))]
        servers = [
            {"pid": slot.pid, "workers": len(self._station.workers.of(index)), **figures, **details}
            for index, (slot, (figures, details)) in enumerate(zip(slots, each, strict=True))
        ]
        return {**added([figures for figures, _ in each], self._alike), "servers": servers}

    def _of(self, index: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if index == self._station.index:
            return self._own(), self._details()
        figures = published(self._station.slots[index])
        return figures, figures.pop(_DETAILS, {})


def added(figures: Sequence[Mapping[str, Any]], alike: Collection[str] = ()) -> dict[str, Any]:
    """Add figures up, name by name; of those that are alike give the greatest."""
    names = dict.fromkeys(name for one in figures for name in one)
    return {name: _together([one[name] for one in figures if name in one], name in alike) for name in names}


def _together(values: Sequence[Any], is_alike: bool) -> Any:  # noqa: FBT001
    if all(isinstance(value, Mapping) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _together([value[name] for value in values if name in value], is_alike) for name in names}
    return max(values) if is_alike else sum(values)


def published(slot: Slot) -> dict[str, Any]:
    """Return what a server shows to the others, nothing if it is gone or has shown nothing yet."""
    if not is_living(slot.pid):
        return {}
    for _ in range(_TRIES):
        if (text := slot.read()) is not None:
            figures: dict[str, Any] = orjson.loads(text)
            return figures
    return {}
