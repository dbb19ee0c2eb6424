"""Numbers with what they count, in the singular or the plural. Pure."""

from __future__ import annotations


def form(count: float, one: str, many: str = "") -> str:
    """Return the form of a word, or of several, that fits a number; without `many` the plural has an s."""
    return one if count == 1 else many or f"{one}s"


def counted(count: int, one: str, many: str = "") -> str:
    """Tell a number with what it counts, such as `1 event` or `4,820 events`."""
    return f"{count:,} {form(count, one, many)}"
