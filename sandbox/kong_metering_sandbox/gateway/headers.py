"""Header fields of one message: in order, in the client's bytes, looked up in the ways that nginx and Kong do."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .values import MultiMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .values import Value

HeaderTable: TypeAlias = "dict[bytes, bytes | list[bytes]]"

DEFAULT_LIMIT = 100  # how many fields Kong looks at unless it is asked for more


class Headers:
    """The fields of a message; a mutable sequence of name and value."""

    def __init__(self, fields: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._fields = list(fields)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._fields)

    def get(self, name: bytes) -> bytes | None:
        """Return the first value under exactly this name, in any letter case."""
        wanted = name.lower()
        return next((value for key, value in self._fields if key.lower() == wanted), None)

    def count(self, name: bytes) -> int:
        """Return how many fields have exactly this name, in any letter case."""
        return sum(key.lower() == name.lower() for key, _ in self._fields)

    def variable(self, name: bytes) -> bytes | None:
        """Return nginx's variable `$http_<name>`.

        A dash counts as an underscore, repeated fields are joined with a comma (cookies with a semicolon).
        """
        wanted = _variable_name(name)
        values = [value for key, value in self._fields if _variable_name(key) == wanted]
        if not values:
            return None
        return (b"; " if wanted == b"cookie" else b", ").join(values)

    def table(self, limit: int = DEFAULT_LIMIT) -> HeaderTable:
        """Return the first `limit` fields by lower-case name; a name that is repeated has a list."""
        table: HeaderTable = {}
        for key, value in self._fields[:limit]:
            name = key.lower()
            known = table.get(name)
            if known is None:
                table[name] = value
            elif isinstance(known, list):
                known.append(value)
            else:
                table[name] = [known, value]
        return table

    def add(self, name: bytes, value: bytes) -> None:
        """Append a field, whether or not there is one of that name."""
        self._fields.append((name, value))

    def set(self, name: bytes, *values: bytes) -> None:
        """Give the name these values only: in the place of its first field, or at the end."""
        wanted = name.lower()
        place = next((i for i, (key, _) in enumerate(self._fields) if key.lower() == wanted), len(self._fields))
        kept = [(key, value) for key, value in self._fields[place:] if key.lower() != wanted]
        self._fields[place:] = [*((name, value) for value in values), *kept]

    def remove(self, name: bytes) -> None:
        """Take every field of that name away."""
        self._fields = [(key, value) for key, value in self._fields if key.lower() != name.lower()]

    def copy(self) -> Headers:
        """Return fields that can be changed without changing these."""
        return Headers(self._fields)

    def encode(self) -> bytes:
        """Return the fields as they go over the wire, each line ended."""
        return b"".join(key + b": " + value + b"\r\n" for key, value in self._fields)


def _variable_name(name: bytes) -> bytes:
    return name.lower().replace(b"-", b"_")


def look_up(table: HeaderTable, name: bytes) -> bytes | None:
    """Return what Lua finds under `name` in a header table: any letter case, underscores as dashes too."""
    lowered = name.lower()
    value = table.get(lowered)
    if value is None:
        value = table.get(lowered.replace(b"_", b"-"))
    return value[0] if isinstance(value, list) else value


def pdk_get_header(headers: Headers, name: bytes) -> bytes | None:
    """Return what `kong.request.get_header` answers while the request runs.

    It reads nginx's variable; only a value that might be several (it has a comma and a space) is looked up
    among the first 100 fields, so that the first of several is given, and nothing when it lies beyond them.
    """
    value = headers.variable(name)
    if value is None or b", " not in value:
        return value
    return look_up(headers.table(), name)


def multi_map(table: Mapping[bytes, Value]) -> MultiMap:
    """Return a table as `StepMultiMap` carries it: every value a list, a flag an empty one."""
    result = MultiMap()
    for name, value in table.items():
        if isinstance(value, bytes):
            result[name] = [value]
        else:
            result[name] = value if isinstance(value, list) else []
    return result
