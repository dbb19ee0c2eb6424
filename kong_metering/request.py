"""One finished request, as the log phase knows it: Kong's record, and what the access phase captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kong_metering.record import (
    LINE_SEPARATOR,
    REDACTED,
    first_not_blank,
    header_lines,
    header_values,
    is_blank,
    may_hide_headers,
    query_values,
)

if TYPE_CHECKING:
    from kong_metering.record import Record

# Under this name, which no header can have, the access phase keeps which headers it asked for, commas between them.
ASKED = ":asked"


class FinishedRequest:
    """Answers what the event wants to know of a request.

    `captured` holds the header values that the access phase read, by the header's configured name, and under `ASKED`
    which ones it asked for (without it, all of them); None when it did not run: the plugin server was just not there,
    or an earlier plugin or Kong itself answered. Then the record's headers count, and so does that of a header that was
    not asked for: while a configuration changes, Kong may have run the access phase with the other one. Else they do
    not: a later plugin may have added one. A value in a list is one that may be several lines, which nginx has joined.

    """

    __slots__ = ("_captured", "record")

    def __init__(self, record: Record, captured: object = None) -> None:
        self.record = record
        # An empty table may come back from Kong as a list.
        self._captured: Mapping[str, Any] | None = captured if isinstance(captured, dict) and captured else None

    def header(self, name: str) -> str | None:
        """Give the first value of a request header that is not blank, as the client sent it."""
        value = self._captured.get(name) if self._captured is not None else None
        if value is None and not self._was_asked_for(name):
            return first_not_blank(header_values(self.record.request.headers, name))
        if isinstance(value, list):
            return self._first_line(name, value[0]) if value and isinstance(value[0], str) else None
        if not isinstance(value, str):
            return None
        # A blank first value must not hide a second one; only the record has all of them.
        return self._first_of_several(name) if is_blank(value) else value

    def _was_asked_for(self, name: str) -> bool:
        if self._captured is None:
            return False
        asked = self._captured.get(ASKED)
        return not isinstance(asked, str) or name in asked.split(",")

    @property
    def has_odd_headers(self) -> bool:
        """Whether a value that was captured looks like several, or a later plugin changed or removed it."""
        if not self._captured:
            return False
        shown = self.record.request.headers
        for name, value in self._captured.items():
            if name == ASKED:
                continue
            if isinstance(value, list) or (isinstance(value, str) and LINE_SEPARATOR in value):
                return True
            lowered = name.lower()
            # What nearly always holds is found out without going through all headers.
            if shown.get(lowered) == value or lowered in REDACTED or value in header_lines(shown, name):
                continue
            return not may_hide_headers(shown)
        return False

    def argument(self, name: str) -> str | None:
        """Give the first value of a query argument that is not blank, from the target that the client asked for."""
        uri = self.record.request.uri
        return first_not_blank(query_values(uri, name)) if uri is not None else None

    def _first_line(self, name: str, joined: str) -> str | None:
        """Give the first line that is not blank, of those that nginx has joined.

        The record has them one by one, unless a later plugin changed them or they stand behind too many others. Then
        the first part counts, so that nobody becomes somebody else by sending a header twice.
        """
        lines, headers = joined.split(LINE_SEPARATOR), self.record.request.headers
        shown = LINE_SEPARATOR.join(header_lines(headers, name)).split(LINE_SEPARATOR)
        is_shown = sorted(lines) == sorted(shown)
        return first_not_blank(header_values(headers, name) if is_shown else lines)

    def _first_of_several(self, name: str) -> str | None:
        values = header_values(self.record.request.headers, name)
        return first_not_blank(values) if len(values) > 1 else None
