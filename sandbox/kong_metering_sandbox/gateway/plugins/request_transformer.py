"""request-transformer: changes headers and query arguments on their way to the service.

Bodies, methods and paths are left alone, and a value is taken as it is: no templates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kong_metering_sandbox.gateway.query import decode_args, encode_args

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kong_metering_sandbox.gateway.context import Exchange
    from kong_metering_sandbox.gateway.values import Table

    from .base import Identities

_ACTIONS = ("remove", "rename", "replace", "add", "append")


class RequestTransformer:
    """Removes, renames, replaces, adds and appends, in this order."""

    priority = 801

    async def access(self, exchange: Exchange, config: Table, identities: Identities) -> None:  # noqa: ARG002
        """Change the request's headers and query."""
        _transform_headers(exchange, config)
        if any(config[action]["querystring"] for action in _ACTIONS):
            query = dict(decode_args(exchange.args))
            _transform(query, config, "querystring")
            exchange.args = encode_args(query)


def _transform_headers(exchange: Exchange, config: Table) -> None:
    before = exchange.headers.table()
    after = {name: value for name, value in before.items() if name != b"host"}
    _transform(after, config, "headers")
    for name in before:
        if name != b"host" and name not in after:
            exchange.headers.remove(name)
    for name, value in after.items():
        if before.get(name) != value:
            exchange.headers.set(name, *(value if isinstance(value, list) else [value]))


def _transform(table: dict[bytes, Any], config: Table, part: str) -> None:
    fold = part == "headers"
    for name, _ in _entries(config["remove"][part], fold=fold):
        table.pop(name, None)
    for name, new_name in _entries(config["rename"][part], fold=fold):
        if name in table and new_name:
            table[new_name.lower() if fold else new_name] = table.pop(name)
    for name, value in _entries(config["replace"][part], fold=fold):
        if name in table:
            table[name] = value
    for name, value in _entries(config["add"][part], fold=fold):
        table.setdefault(name, value)
    for name, value in _entries(config["append"][part], fold=fold):
        known = table.get(name)
        table[name] = [*known, value] if isinstance(known, list) else [value] if known is None else [known, value]


def _entries(pairs: list[str], *, fold: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the value of each `name:value`; header names in lower case."""
    for pair in pairs:
        name, _, value = pair.partition(":")
        yield (name.lower() if fold else name).encode(), value.encode()
