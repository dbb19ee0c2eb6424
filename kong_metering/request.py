"""One finished request, as the log phase knows it: Kong's record, and what the access phase captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kong_metering.record import header_values, is_blank, milliseconds, query_values, section

if TYPE_CHECKING:
    from kong_metering.record import Record


class FinishedRequest:
    """Answers what the event wants to know of a request.

    `captured` holds the header values that the access phase read, by the header's configured name; None when it kept
    none. `serving_since` is when this process began to serve, in milliseconds since 1970.
    """

    __slots__ = ("_captured", "_serving_since", "record")

    def __init__(self, record: Record, captured: object = None, serving_since: float = 0) -> None:
        self.record = record
        self._captured: Mapping[str, Any] | None = captured if isinstance(captured, dict) and captured else None
        self._serving_since = serving_since

    def header(self, name: str) -> str | None:
        """Give the first value of a request header that is not blank, as the client sent it."""
        if self._captured is not None:
            value = self._captured.get(name)
            if not isinstance(value, str):
                return None
            # A blank first value must not hide a second one; only the record has all of them.
            return self._first_of_several(name) if is_blank(value) else value
        if self._access_phase_ran():
            return None
        return next((value for value in header_values(self.record, name) if not is_blank(value)), None)

    def argument(self, name: str) -> str | None:
        """Give the first value of a query argument that is not blank, from the target that the client asked for."""
        uri = section(self.record, "request").get("uri")
        values = query_values(uri, name) if isinstance(uri, str) else iter(())
        return next((value for value in values if not is_blank(value)), None)

    def _first_of_several(self, name: str) -> str | None:
        values = header_values(self.record, name)
        return next((value for value in values if not is_blank(value)), None) if len(values) > 1 else None

    def _access_phase_ran(self) -> bool:
        """Whether our access phase saw this request, and kept nothing because there was nothing to keep.

        Saying so in `kong.ctx.shared` would cost every such request another RPC, 25-30 µs of Kong's time. The record
        tells it as well: a request that reached an upstream passed our access phase, unless it came before this
        process served. Then the record's headers count, as for requests that an earlier plugin or Kong answered;
        else they do not, for a later plugin may have added one.
        """
        reached_upstream = bool(self.record.get("tries"))
        started_at = milliseconds(self.record.get("started_at"))
        return reached_upstream and started_at is not None and started_at >= self._serving_since
