"""The paths of Unix sockets, which the system takes up to a length that Kong's prefix can exceed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Of `sun_path`, without the zero at its end. nginx, and with it Kong, has the same limit.
MOST_BYTES = 107


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Give a path to the same place that the system takes for a socket's, while the context lasts.

    Raises `OSError` when the directory cannot be opened. A name of more than 80 bytes stays too long.
    """
    if len(os.fsencode(path)) <= MOST_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
