"""Quick changes to inputs: hypothesis makes an input in milliseconds, one of these takes microseconds.

Each function gives a changed copy and leaves what it was given alone.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from tests.fuzz.strategies import CLIENT_TEXTS, NUMBERS, TEXTS

T = TypeVar("T")

_WORTH_TRYING: list[Any] = [None, True, False, [], {}, [[]], {"": ""}, ["acme"], {"id": "x"}, *NUMBERS, *TEXTS]


def varied_text(text: str, chance: Random, pool: list[str] = CLIENT_TEXTS) -> str:
    """Cut something out of a text and put something else in its place."""
    start = chance.randint(0, len(text))
    end = chance.choice([start, start, start + 1, start + chance.randint(0, 8), len(text)])
    return text[:start] + chance.choice(["", chance.choice(pool)]) + text[end:]


def varied_list(items: list[T], chance: Random, vary: Callable[[T, Random], T]) -> list[T]:
    """Change, leave out, repeat or move one item."""
    if not items:
        return []
    items = list(items)
    place = chance.randrange(len(items))
    item = items[place]
    how = chance.randrange(6)
    if how == 0:
        del items[place]
    elif how == 1:
        items.insert(chance.randint(0, len(items)), item)
    elif how == 2:
        items.insert(chance.randrange(len(items)), items.pop(place))
    else:
        items[place] = vary(item, chance)
    return items


def varied_json(value: Any, chance: Random) -> Any:
    """Put something else into one place of a document."""
    if chance.random() < 0.1 or not isinstance(value, (dict, list)) or not value:
        if isinstance(value, str) and chance.random() < 0.5:
            return varied_text(value, chance, TEXTS)
        return chance.choice(_WORTH_TRYING)
    if isinstance(value, list):
        return varied_list(value, chance, varied_json)
    key = chance.choice(list(value))
    changed = {**value, key: varied_json(value[key], chance)}
    if chance.random() < 0.1:
        del changed[key]
    return changed
