"""What is found in a configuration. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from kong_metering.log import printable

Path = tuple[str | int, ...]

_LONGEST_NAME = 80
_PLAIN = re.compile(r"[A-Za-z_$][\w$-]*")


class Level(Enum):
    """How bad it is: refused or of no use at all; works, but is surely not meant; good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    `rule` is a name that stays the same, for `--ignore` and for programs; `document` says which of several in a file,
    `line` counts from 1. No text of it holds a token.
    """

    level: Level
    rule: str
    path: Path
    problem: str
    remedy: str
    document: str = ""
    line: int | None = None

    @property
    def place(self) -> str:
        """Where it is in the document, such as `services[0].plugins[1].config.subject.field`."""
        return told(self.path)


def told(path: Sequence[str | int]) -> str:
    """Write a path as people do."""
    parts: list[str] = []
    for part in path:
        if isinstance(part, int):
            parts.append(f"[{part}]")
        elif _PLAIN.fullmatch(part) or not path[1:]:
            parts.append(f".{printable(part, _LONGEST_NAME)}")
        else:
            parts.append(f'["{printable(part, _LONGEST_NAME)}"]')
    return "".join(parts).removeprefix(".")
