"""A file of memory that the supervisor keeps and lends to a server, and what for."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Use(Enum):
    """What a server does with a memory file."""

    EVENTS = "events"
    REQUESTS = "requests"


class MemoryFile(NamedTuple):
    """A memory file: what no other one was ever called, its descriptor, opened to append, and what it is used for."""

    name: str
    descriptor: int
    use: Use
