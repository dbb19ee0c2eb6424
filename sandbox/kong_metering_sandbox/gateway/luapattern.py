"""Lua patterns, for the `match` rules of Kong schemas, run by what Kong runs them with: LuaJIT 2.1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from lupa.luajit21 import LuaError, LuaRuntime


class PatternError(ValueError):
    """The pattern is malformed, or too much for Lua; the text is Lua's own message."""


def lua_match(text: str, pattern: str) -> str | None:
    """Return the first part of `text` that `pattern` matches, or None.

    Raises:
        PatternError: the pattern is malformed, or too complex.

    """
    strings, source, rule = _strings(), text.encode(), pattern.encode()
    try:
        # `find` takes a pattern without magic characters as plain text; `match` refuses it if it is malformed.
        if strings[b"match"](source, rule) is None:
            return None
        first, last, *_ = strings[b"find"](source, rule)
    except LuaError as error:
        raise PatternError(str(error).partition("\n")[0]) from None
    return source[first - 1 : last].decode("utf-8", "replace")


@cache
def _strings() -> Mapping[bytes, Callable[[bytes, bytes], Any]]:
    """Return Lua's string library."""
    lua = LuaRuntime(encoding=None, register_eval=False, register_builtins=False)
    library: Mapping[bytes, Callable[[bytes, bytes], Any]] = lua.globals()[b"string"]
    return library
