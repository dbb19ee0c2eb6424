"""One finished request, as the log phase knows it: Kong's record, and what the access phase captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kong_metering.record import header_values, is_blank, query_values, section

if TYPE_CHECKING:
    from kong_metering.record import Record

# What the access phase keeps when it found none of the headers: an empty table may come back from Kong as a list.
NO_HEADERS = "none"


class FinishedRequest:
    """Answers what the event wants to know of a request.

    `captured` holds the header values that the access phase read, by the header's configured name; `NO_HEADERS` when it
    found none, and None when it did not run: the plugin server was just not there, or an earlier plugin or Kong itself
    answered. Then the record's headers count, and else they do not: a later plugin may have added one.
    """

    __slots__ = ("_captured", "record")

    def __init__(self, record: Record, captured: object = None) -> None:
        self.record = record
        self._captured: Mapping[str, Any] | None = None
        if captured == NO_HEADERS:
            self._captured = {}
        elif isinstance(captured, dict) and captured:
            self._captured = captured

    def header(self, name: str) -> str | None:
        """Give the first value of a request header that is not blank, as the client sent it."""
        if self._captured is not None:
            value = self._captured.get(name)
            if not isinstance(value, str):
                return None
            # A blank first value must not hide a second one; only the record has all of them.
            return self._first_of_several(name) if is_blank(value) else value
        return next((value for value in header_values(self.record, name) if not is_blank(value)), None)

    def argument(self, name: str) -> str | None:
        """Give the first value of a query argument that is not blank, from the target that the client asked for."""
        uri = section(self.record, "request").get("uri")
        values = query_values(uri, name) if isinstance(uri, str) else iter(())
        return next((value for value in values if not is_blank(value)), None)

    def _first_of_several(self, name: str) -> str | None:
        values = header_values(self.record, name)
        return next((value for value in values if not is_blank(value)), None) if len(values) > 1 else None
