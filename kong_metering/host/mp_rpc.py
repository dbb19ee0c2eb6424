"""One connection of Kong's that speaks `MsgPack:1`: an RPC and its answer, and the next. No sockets here.

Contract: `receive` takes what came and gives what is to be written; it never waits. Steps of one event come over any
connection, so that a connection which ends takes none with it.

A worker of Kong's that is told a `serverPid` forgets all its instances if that is not the one that it was told last;
the first one it only remembers. So it is told one with each instance that it starts, and the next one, at the beginning
of an event, on each of its connections once: no event is lost by it, and the next one starts an instance (`renewal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kong_metering.host.errors import RPCError
from kong_metering.host.mp_codec import AnswerWriter, FrameReader
from kong_metering.log import LOGGER, cause_of, trouble

if TYPE_CHECKING:
    from kong_metering.host.dispatch import Dispatcher

_GO_ON = b"plugin.Step"
_START, _BEGIN = "plugin.StartInstance", "plugin.HandleEvent"
_METHOD_WITHIN = 64


class Answers:
    """Answers RPCs in bytes; the connections share it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._writer = AnswerWriter()

    @property
    def number(self) -> int:
        """What Kong is to be told now; it changes when Kong is to start its instances anew."""
        return self._dispatcher.renewal.number

    @property
    def first_number(self) -> int:
        """The first of these numbers."""
        return self._dispatcher.renewal.first

    def told(self) -> bytes:
        """Return the bytes that tell it."""
        return self._writer.notification("serverPid", self.number)

    def answer(self, request_id: int, method: str, argument: object) -> bytes:
        """Give the bytes that answer one RPC, whatever happens in it."""
        try:
            result = self._dispatcher.answer(method, argument)
        except RPCError as error:
            return self._writer.error(request_id, str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - Kong gets an answer within the call
            LOGGER.error("an RPC failed: %s", cause_of(error), extra=trouble(f"rpc:{type(error).__name__}"))
            return self._writer.error(request_id, f"{type(error).__name__} in the plugin server, see its log")
        try:
            return self._writer.result(request_id, result)
        except (TypeError, ValueError, OverflowError) as error:
            return self._writer.result(request_id, self._dispatcher.unsayable(argument, result, error))


class MPConversation:
    """What Kong and the host say to each other on one connection.

    `own` are methods that the connection itself does, in place of any answer.
    """

    def __init__(self, answers: Answers, own: Mapping[str, Callable[[], None]]) -> None:
        self._answers = answers
        self._own = own
        self._told = answers.first_number
        self._reader = FrameReader()

    @property
    def is_quiet(self) -> bool:
        """True if no frame has begun that is not whole yet."""
        return not self._reader.is_amid_frame

    def begins_something(self, data: bytes) -> bool:
        """Tell whether this is no step of an event under way; Kong has one RPC at a time on a connection."""
        return not (self._reader.is_amid_frame or _GO_ON in data[:_METHOD_WITHIN])

    def receive(self, data: bytes) -> bytes:
        """Take bytes and return the answers to the RPCs that they complete. Raises `ProtocolError`."""
        written: list[bytes] = []
        for request_id, method, argument in self._reader.feed(data):
            if method in self._own:
                self._own[method]()
            else:
                if method == _START or (method == _BEGIN and self._told != self._answers.number):
                    self._told = self._answers.number
                    written.append(self._answers.told())
                written.append(self._answers.answer(request_id, method, argument))
        return b"".join(written)

    def lose(self) -> None:
        """Do nothing: events do not belong to a connection."""
