"""How many descriptors this process may have, for those who keep some open."""

from __future__ import annotations

import resource


def most_of_descriptors(most: int, part: int) -> int:
    """Return `most`, or one in `part` of the descriptors that this process may have where that is less; at least 1."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // part))
