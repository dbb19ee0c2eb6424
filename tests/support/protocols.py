"""The two protocols that Kong may speak with the plugin server, for tests that hold for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tests.support.pb_rpc import FrameConnection, PBKongClient, write_as_kong
from tests.support.rpc import Connection, KongClient, Write, write_whole

Client: TypeAlias = "KongClient | PBKongClient"


@dataclass(frozen=True)
class Protocol:
    """What plays Kong in one protocol; `write` is how Kong writes a frame."""

    client: Callable[..., Client]
    connection: Callable[..., Connection]
    write: Write


PROTOCOLS: Mapping[str, Protocol] = {
    "MsgPack:1": Protocol(KongClient, Connection, write_whole),
    "ProtoBuf:1": Protocol(PBKongClient, FrameConnection, write_as_kong),
}
