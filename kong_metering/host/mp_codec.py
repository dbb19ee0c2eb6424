"""Bytes to messages and back: the frames of Kong's plugin-server protocol `MsgPack:1`. No sockets here.

A request is `[0, id, method, [argument]]`, an answer `[1, id, error, result]`, both MessagePack
(`kong/runloop/plugin_servers/rpc/mp_rpc.lua`). Strings are whatever bytes a client sent: those that are not UTF-8
become Python's surrogate escapes on the way in, and the same bytes again on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgpack

from kong_metering.host.errors import ProtocolError

MAX_FRAME_BYTES = 16 * 1024 * 1024
# A header of 5 bytes can announce 4 billion elements, for which memory would be set aside at once.
_MAX_ELEMENTS = 4096
_REQUEST, _ANSWER, _NOTIFICATION = 0, 1, 2
_REQUEST_PARTS = 4
_BYTES = "surrogateescape"
_unpackb = msgpack.unpackb


# One RPC from Kong: its id, its method, and the only argument that any of them has. A plain tuple, for it is made for
# each RPC, and a class of its own costs more than the rest of reading one.
Request = tuple[int, str, Any]


class FrameReader:
    """Cuts the bytes of one connection into requests, however they arrive."""

    def __init__(self) -> None:
        self._unpacker: msgpack.Unpacker | None = None
        self._fed = 0
        self._read = 0

    @property
    def is_amid_frame(self) -> bool:
        """Whether a frame has begun that is not whole yet."""
        return self._unpacker is not None

    def feed(self, data: bytes) -> Iterable[Request]:
        """Take bytes and give the requests that they complete.

        Raises `ProtocolError`, at the latest while they are gone through, for a frame that is not a request, too large
        or too deep.
        """
        if self._unpacker is None:
            # Kong has one RPC at a time on a connection: nearly always, this is one whole frame. Here msgpack sets
            # nothing aside that the length of the data does not warrant.
            try:
                kind, request_id, method, arguments = _unpackb(data, unicode_errors=_BYTES, strict_map_key=False)
                if kind == _REQUEST and type(request_id) is int and type(method) is str and type(arguments) is list:
                    return ((request_id, method, arguments[0] if arguments else None),)
            except Exception:  # noqa: BLE001, S110 - part of a frame, several, or none: the unpacker tells
                pass
            self._unpacker = msgpack.Unpacker(
                unicode_errors=_BYTES,
                strict_map_key=False,
                max_array_len=_MAX_ELEMENTS,
                max_map_len=_MAX_ELEMENTS,
                max_buffer_size=MAX_FRAME_BYTES,
            )
        return self._unpacked(self._unpacker, data)

    def _unpacked(self, unpacker: msgpack.Unpacker, data: bytes) -> Iterator[Request]:
        self._fed += len(data)
        try:
            unpacker.feed(data)
            for message in unpacker:
                self._read = unpacker.tell()
                yield _request(message)
        except ProtocolError:
            raise
        except Exception as error:
            # msgpack raises a dozen types, down to TypeError for a map key that cannot be one.
            raise ProtocolError(f"not a MessagePack frame: {type(error).__name__}: {error}") from error
        if self._fed == self._read:
            self._unpacker, self._fed, self._read = None, 0, 0
        # msgpack's own limit is only for the bytes that it has not looked at yet.
        elif self._fed - self._read > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of more than {MAX_FRAME_BYTES} bytes")


def _request(message: Any) -> Request:
    if not isinstance(message, list) or len(message) != _REQUEST_PARTS:
        raise ProtocolError("not a request: expected an array of four")
    kind, request_id, method, arguments = message
    if kind != _REQUEST or type(request_id) is not int or not isinstance(method, str):
        raise ProtocolError("not a request: expected 0, an id and a method")
    if not isinstance(arguments, list):
        raise ProtocolError("not a request: expected an array of arguments")
    return request_id, method, arguments[0] if arguments else None


class AnswerWriter:
    """Turns answers into bytes."""

    def __init__(self) -> None:
        self._pack: Callable[[object], bytes] = msgpack.Packer(unicode_errors=_BYTES).pack

    def result(self, request_id: int, result: object) -> bytes:
        """Write the answer of an RPC that worked; raises TypeError or ValueError for what MessagePack cannot say."""
        return self._pack((_ANSWER, request_id, None, result))

    def error(self, request_id: int, error: str) -> bytes:
        """Write the answer of an RPC that did not."""
        return self._pack((_ANSWER, request_id, error, None))

    def notification(self, label: str, argument: object) -> bytes:
        """Write what Kong is told without having asked, before an answer."""
        return self._pack((_NOTIFICATION, label, argument))
