"""Which of Kong's two protocols a connection speaks; one socket serves both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from kong_metering.host.mp_rpc import Answers, MPConversation
from kong_metering.host.pb_rpc import KnownPhases, PBConversation

if TYPE_CHECKING:
    from kong_metering.host.dispatch import Dispatcher

FIRST_BYTES = 4


class Conversation(Protocol):
    """What Kong and the host say to each other on one connection, in bytes."""

    @property
    def is_quiet(self) -> bool:
        """True if nothing is under way on this connection."""
        ...

    def begins_something(self, data: bytes) -> bool:
        """Tell whether these bytes are no part of an event that is under way."""
        ...

    def receive(self, data: bytes) -> bytes:
        """Take bytes and return those to write. Raises `ProtocolError` and `ConnectionEnd`."""
        ...

    def lose(self) -> None:
        """Let go of what is under way: the connection has ended."""
        ...


class Conversations:
    """What all connections share, whichever protocol they speak."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.answers = Answers(dispatcher)
        self._known = KnownPhases(dispatcher.instances)

    def begin(self, first: bytes, own: Mapping[str, Callable[[], None]]) -> Conversation:
        """Begin a conversation by its first four bytes; `own` are methods that the connection itself does."""
        return MPConversation(self.answers, own) if _is_messagepack(first) else PBConversation(self._known)

    def sweep(self) -> None:
        """Forget what is closed; to be called every few seconds."""
        self._known.forget_closed()


def _is_messagepack(first: bytes) -> bool:
    """Tell whether these bytes begin a request of `MsgPack:1`: an array of four, 0, an id, and the method's name.

    As the length of a message they would mean one of over 13 MB.
    """
    kind, zero, number, name = first
    return (kind, zero) == (0x94, 0) and (number >= 0xCC or name != 0)  # noqa: PLR2004 - larger integers have two bytes
