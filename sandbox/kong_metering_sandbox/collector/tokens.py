"""Which bearer tokens open the ingest paths. Only hashes are kept, so that no token can be shown or stored."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHORT: Final = 12


@dataclass(frozen=True)
class Tokens:
    """A set of accepted tokens, as SHA-256 digests in hexadecimal. An empty set accepts everyone."""

    digests: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokens: Iterable[str]) -> Tokens:
        """Make the set from the tokens themselves."""
        return cls(tuple(_digest(token) for token in tokens))

    def accept(self, authorization: str | None) -> bool:
        """Whether an Authorization header opens the door. Takes the same time for every wrong token."""
        if not self.digests:
            return True
        offered = _digest(_bearer(authorization) or "")
        matches = [hmac.compare_digest(offered, digest) for digest in self.digests]
        return any(matches)


def fingerprint(authorization: str | None) -> str | None:
    """Return a short hash that tells tokens apart but does not give them away; None without a bearer token."""
    token = _bearer(authorization)
    return None if token is None else _digest(token)[:_SHORT]


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
