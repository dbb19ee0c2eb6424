"""Plain data as Lua source: what Konnect, and a control plane without this package, read a schema from."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_RESERVED = frozenset(
    (
        *("and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in", "local"),
        *("nil", "not", "or", "repeat", "return", "then", "true", "until", "while"),
    )
)
_ESCAPES = {'"': '\\"', "\\": "\\\\"}
_INDENT = "  "
_WIDTH = 110


def lua_source(value: object, indent: str = "") -> str:
    """Write mappings, sequences, texts, numbers and booleans as a Lua expression, without a call or a `require`.

    `indent` is what its lines begin with, but the first. A member that is None is left out, as Lua's nil would be.

    Raises `TypeError` if there is something else in it.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    inner = indent + _INDENT
    if isinstance(value, Mapping):
        items = [f"{_key(name)} = {lua_source(item, inner)}" for name, item in value.items() if item is not None]
    elif isinstance(value, (list, tuple)):
        items = [lua_source(item, inner) for item in value]
    else:
        raise TypeError(f"a {type(value).__name__} is no plain data")
    return _table(items, indent)


def _table(items: list[str], indent: str) -> str:
    line = "{ " + ", ".join(items) + " }" if items else "{}"
    if len(indent) + len(line) <= _WIDTH and "\n" not in line:
        return line
    lines = [f"{indent}{_INDENT}{item},\n" for item in items]
    return "{\n" + "".join(lines) + indent + "}"


def _key(name: str) -> str:
    return name if _NAME.match(name) and name not in _RESERVED else f"[{_text(name)}]"


def _text(value: str) -> str:
    """Write a text in quotes; a control character by its number, the others as UTF-8."""
    return (
        '"' + "".join(_ESCAPES.get(char) or (char if char.isprintable() else _numbered(char)) for char in value) + '"'
    )


def _numbered(char: str) -> str:
    return "".join(f"\\{byte:03}" for byte in char.encode())
