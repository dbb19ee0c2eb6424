"""Pages of the Admin API's lists: `size`, `offset` and `tags`, as Kong reads them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from .entities import EntityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .values import Table

_DEFAULT_SIZE, _LARGEST_SIZE = 100, 1000
_INVALID_OFFSET, _INVALID_SIZE, _INVALID_OPTIONS = 7, 9, 11

# Collections that Kong 3.9 has and the stand-in keeps nothing in: whoever lists all that there is finds them empty.
EMPTY_COLLECTIONS = frozenset(
    {
        *("acls", "basic-auths", "ca_certificates", "certificates", "hmac-auths", "jwts", "key-sets", "keys", "oauth2"),
        *("oauth2_tokens", "snis", "upstreams", "vaults"),
    }
)


@dataclass(frozen=True)
class Page:
    """Which part of a list is asked for: so many entities from the one at `start` on, of those with the tags."""

    size: int
    start: int
    tags: frozenset[str]
    all_tags: bool

    @classmethod
    def asked_for(cls, query: Mapping[str, str]) -> Page:
        """Read a request's arguments.

        Raises:
            EntityError: the size or the offset is none, or there are no tags in `tags`.

        """
        tags = query.get("tags", "")
        if "tags" in query and not tags:
            raise _refused(_INVALID_OPTIONS, "invalid options", "invalid option (tags: cannot be null)")
        names = frozenset(name for name in tags.replace("/", ",").split(",") if name)
        return cls(_size(query.get("size")), _start(query.get("offset")), names, all_tags="/" not in tags)

    def of(self, path: str, entities: Sequence[Table], query: Mapping[str, str]) -> Table:
        """Return the page, and where the next one is."""
        found = [entity for entity in entities if self._has_tags(entity)]
        end = self.start + self.size
        page: Table = {"data": found[self.start : end], "next": None}
        if end < len(found):
            page["offset"] = _offset(end)
            kept = "".join(f"&{name}={quote(query[name], safe='')}" for name in ("tags", "size") if name in query)
            page["next"] = f"/{path.strip('/')}?offset={quote(page['offset'], safe='')}{kept}"
        return page

    def _has_tags(self, entity: Table) -> bool:
        own = set(entity.get("tags") or ())
        return self.tags <= own if self.all_tags else not self.tags.isdisjoint(own)


def _size(text: str | None) -> int:
    if text is None:
        return _DEFAULT_SIZE
    if not text.isdigit():
        raise _refused(_INVALID_SIZE, "invalid size", "size must be a number")
    if not 1 <= int(text) <= _LARGEST_SIZE:
        raise _refused(_INVALID_SIZE, "invalid size", f"size must be an integer between 1 and {_LARGEST_SIZE}")
    return int(text)


def _offset(start: int) -> str:
    return base64.b64encode(json.dumps(start).encode()).decode()


def _start(text: str | None) -> int:
    try:
        start = json.loads(base64.b64decode(text, validate=True)) if text is not None else 0
    except ValueError:
        start = -1
    if type(start) is not int or start < 0:
        raise _refused(_INVALID_OFFSET, "invalid offset", f"'{text}' is not a valid offset: bad json encoding")
    return start


def _refused(code: int, name: str, message: str) -> EntityError:
    return EntityError(400, {"code": code, "name": name, "message": message})
