"""One connection of Kong's that speaks `ProtoBuf:1`: its events, one after another. No sockets here.

Kong sends a call and then, for an event, answers PDK calls on the same connection until an empty name ends them; what
follows is what the call returns. It reads these frames as they are there: where a phase knows beforehand what it asks
(`AtOnce`), all of them, the end and the return go out in one write, Kong runs through them without waiting, and its
answers arrive afterwards. A phase in steps is asked and answered one PDK call at a time.

Contract: `receive` takes what came and gives what is to be written; it never waits. `lose` is called when the
connection ends: an event whose answers are not all there yet is given up. The protocol has no place for an error: an
instance that is not there, or that cannot be started, is answered by closing the connection (`ConnectionEnd`). Kong
then forgets its instances of the plugin, starts one, and sends the event again (measured on 3.9.3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kong_pdk.exception import PDKException

from kong_metering.host import pb_messages
from kong_metering.host.errors import ConnectionEnd, ProtocolError, RPCError
from kong_metering.host.pb_codec import LENGTH, MAX_FRAME_BYTES, frame, read_varint, varint
from kong_metering.host.pdk import TERMINAL_METHODS
from kong_metering.log import LOGGER, cause_of, printable, trouble

if TYPE_CHECKING:
    from kong_metering.host.instances import Instance, Instances, Phase
    from kong_metering.steps import AtOnce, PDKCall, Steps

_HEADER = LENGTH.size
_END = frame(b"")
_unpack_length = LENGTH.unpack_from
_SEQUENCE_TAG = b"\x08"
_SEQUENCE = re.compile(rb"\x08[\x80-\xff]*[\x00-\x7f]")
_HANDLE_EVENT_TAG = b"\xa2\x02"
_HANDLE_EVENT_HEAD = 3  # the tag, and a length below 128
_VARINT_MORE = 0x80
_STRING_TAG = 0x0A
# What arguments of a plugin raise that the message of a PDK function cannot hold.
_UNSAYABLE = (TypeError, ValueError, IndexError, OverflowError, AttributeError, RecursionError)
_STRING_FUNCTIONS = frozenset({"kong.request.get_header", "kong.nginx.get_var", "kong.log.serialize"})


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a phase asks at once: the frames of its calls and their end, and what reads each answer."""

    plan: AtOnce
    frames: bytes
    readers: tuple[Callable[[bytes], Any], ...]


@dataclass(eq=False)
class _Known:
    """A phase of an instance, found by the very bytes with which Kong asks for it."""

    instance: Instance
    phase: Phase
    asked: _Asked | None = None

    def asks(self) -> _Asked | None:
        """Return what the phase asks at once; it is kept, for it is nearly always the same.

        Raises `_UNSAYABLE`, and whatever the plugin raises.
        """
        plan = self.phase.at_once()
        if plan is None:
            return None
        if self.asked is None or self.asked.plan is not plan:
            frames = b"".join(_call_frames(call) for call in plan.calls) + _END
            self.asked = _Asked(plan, frames, tuple(_reader_of(call.method) for call in plan.calls))
        return self.asked


@dataclass
class KnownPhases:
    """What the connections share: the instances, and their phases by the bytes that name them in a call."""

    instances: Instances
    by_bytes: dict[bytes, _Known] = field(default_factory=dict)

    def forget_closed(self) -> None:
        """Let go of the instances that have been closed; to be called every few seconds."""
        closed = [key for key, known in self.by_bytes.items() if known.instance.is_closed]
        for key in closed:
            del self.by_bytes[key]


class PBConversation:
    """What Kong and the host say to each other on one connection."""

    def __init__(self, shared: KnownPhases) -> None:
        self._shared = shared
        self._parts: list[bytes] = []
        self._held = 0
        self._needed = _HEADER
        # The event under way: at once (where, what was asked, and the answers that have come) or in steps.
        self._known: _Known | None = None
        self._asked: _Asked | None = None
        self._due = 0
        self._answers: list[bytes] = []
        self._event: _SteppedEvent | None = None
        # When it began (monotonic).
        self._begun_at = 0.0

    @property
    def is_quiet(self) -> bool:
        """True if no event is under way, and no frame has begun."""
        return not (self._held or self._due or self._event)

    def begins_something(self, data: bytes) -> bool:  # noqa: ARG002 - the other protocol has to look
        """Tell whether what comes next is no part of an event that is under way."""
        return self.is_quiet

    def receive(self, data: bytes) -> bytes:
        """Take bytes and return what is to be written.

        Raises `ProtocolError` for bytes that are not the protocol, `ConnectionEnd` when Kong is to begin anew.
        """
        if self._held:
            self._parts.append(data)
            self._held += len(data)
            if self._held < self._needed:
                return b""
            data = b"".join(self._parts)
            self._parts, self._held = [], 0
        position, size, written = 0, len(data), b""
        while size - position >= _HEADER:
            (length,) = _unpack_length(data, position)
            end = position + _HEADER + length
            if end > size:
                if length > MAX_FRAME_BYTES:
                    raise ProtocolError(f"a frame of more than {MAX_FRAME_BYTES} bytes")
                self._hold(data[position:], _HEADER + length)
                return written
            message = data[position + _HEADER : end]
            position = end
            # Answers and calls are by far the most: they are taken without another call in between.
            if not self._due:
                written += self._take(message)
                continue
            self._answers.append(message)
            self._due -= 1
            if not self._due:
                self._take_answers()
        if position < size:
            self._hold(data[position:], _HEADER)
        return written

    def lose(self) -> None:
        """Give up the event that is under way; the connection has ended."""
        known, asked, event = self._known, self._asked, self._event
        self._known = self._event = None
        self._due = 0
        if known is not None and asked is not None:
            self._run(known, asked.plan.give_up)
        if event is not None:
            self._end(event)

    def _hold(self, rest: bytes, needed: int) -> None:
        self._parts, self._held, self._needed = [rest], len(rest), needed

    def _take(self, message: bytes) -> bytes:
        if self._event is not None:
            return self._go_on(self._event, message)
        # A call is its sequence number and the rest; the rest is the same for each event of an instance's phase.
        sequence, rest = _cut(message)
        known = self._shared.by_bytes.get(rest)
        if known is None or known.instance.is_closed or known.instance.is_outdated:
            return self._take_call(message, rest)
        return self._begin(known, sequence)

    # -- events at once -----------------------------------------------------------------------------------------------

    def _begin(self, known: _Known, sequence: bytes) -> bytes:
        self._shared.instances.enter(known.instance)
        self._begun_at = known.instance.used_at
        try:
            asked = known.asks()
        except BaseException as error:  # noqa: BLE001 - whatever a plugin does
            asked = None
            self._say_unsendable(known.phase.name, error)
        if asked is None:
            event = self._event = _SteppedEvent(known.instance, known.phase, known.phase.steps(), sequence)
            return self._go_on(event, None)
        if asked.readers:
            self._known, self._asked, self._due = known, asked, len(asked.readers)
        else:
            self._run(known, asked.plan.finish, ())
        return asked.frames + LENGTH.pack(len(sequence)) + sequence

    def _take_answers(self) -> None:
        """End an event at once: all that it asked is answered."""
        known, asked = self._known, self._asked
        answers, self._answers, self._known = self._answers, [], None
        if known is None or asked is None:
            return
        try:
            results = [read(answer) for read, answer in zip(asked.readers, answers, strict=True)]
        except ProtocolError:
            self._run(known, asked.plan.give_up)
            raise
        self._run(known, asked.plan.finish, results)

    def _run(self, known: _Known, end: Callable[..., None], *arguments: object) -> None:
        """End an event at once; its instance may be closed only afterwards."""
        try:
            end(*arguments)
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a plugin must not end the host
            self._report(known.phase, error)
        self._shared.instances.finish(known.instance, known.phase, self._begun_at)

    def _say_unsendable(self, phase: str, error: BaseException) -> None:
        LOGGER.error(
            "the %s phase is run in steps, what it asks at once cannot be sent to Kong: %s",
            phase,
            cause_of(error),
            extra=trouble(f"at once:{phase}:{type(error).__name__}"),
        )

    def _report(self, phase: Phase, error: BaseException) -> None:
        LOGGER.error(
            "the %s phase failed, the request goes on: %s",
            phase.name,
            cause_of(error),
            extra=trouble(f"phase:{phase.name}:{type(error).__name__}"),
        )

    # -- events in steps ----------------------------------------------------------------------------------------------

    def _go_on(self, event: _SteppedEvent, answer: bytes | None) -> bytes:
        """Let a phase go on with an answer; ask what it wants next, or end it."""
        value: object = None if answer is None else pb_messages.result_of(event.method, answer)
        error: PDKException | None = None
        while True:
            try:
                call = event.steps.send(value) if error is None else event.steps.throw(error)
            except StopIteration:
                break
            except BaseException as raised:  # noqa: BLE001 - sys.exit() in a plugin must not end the host
                self._report(event.phase, raised)
                break
            try:
                frames = _call_frames(call)
            except _UNSAYABLE as unsayable:
                error = _refused(call, unsayable)
                continue
            event.method = call.method
            if call.method in TERMINAL_METHODS:
                # Kong ends the request, and with it this conversation.
                self._event = None
                self._end(event)
            return frames
        self._event = None
        self._shared.instances.finish(event.instance, event.phase, self._begun_at)
        return _END + frame(event.sequence)

    def _end(self, event: _SteppedEvent) -> None:
        """End a phase where it stands."""
        try:
            event.steps.close()
        except BaseException as error:  # noqa: BLE001 - whatever a phase does when it is ended
            self._report(event.phase, error)
        self._shared.instances.leave(event.instance)

    # -- other calls --------------------------------------------------------------------------------------------------

    def _take_call(self, message: bytes, rest: bytes) -> bytes:
        call = pb_messages.CALL.decode(message)
        sequence = _SEQUENCE_TAG + varint(call.get("sequence", 0))
        if "handle_event" not in call:
            return frame(sequence + pb_messages.RETURN.encode(self._returned(call)))
        event = call["handle_event"]
        instance = self._shared.instances.get(event.get("instance_id"))
        if instance is None:
            raise ConnectionEnd
        if instance.is_outdated:
            self._shared.instances.close(event.get("instance_id", 0))
            raise ConnectionEnd
        name = event.get("event_name", "")
        phase = instance.phases.get(name)
        if phase is None:
            # Kong has read another version's dump. If the connection ended, it would send the event for ever.
            LOGGER.error("%s has no phase %s", self._plugin, printable(name), extra=trouble("no phase"))
            return _END + frame(sequence)
        known = _Known(instance, phase)
        if pb_messages.CALL.decode(rest) == {"handle_event": event}:
            self._shared.by_bytes[rest] = known
        return self._begin(known, sequence)

    @property
    def _plugin(self) -> str:
        return self._shared.instances.plugin.name

    def _returned(self, call: Mapping[str, Any]) -> dict[str, Any]:
        instances = self._shared.instances
        if "start_instance" in call:
            return {"instance_status": self._started(call["start_instance"])}
        if "close_instance" in call:
            instance_id = call["close_instance"].get("instance_id", 0)
            if instance_id in instances:
                instances.close(instance_id)
            return {}
        if "get_instance_status" in call:
            instance_id = call["get_instance_status"].get("instance_id", 0)
            instance = instances.get(instance_id)
            if instance is None:
                raise ConnectionEnd
            return {"instance_status": _status(self._plugin, instance_id, instance.started_at)}
        if "get_plugin_names" in call:
            return {"plugin_names": {"names": [self._plugin]}}
        if "get_plugin_info" in call:
            if call["get_plugin_info"].get("name") != self._plugin:
                raise ConnectionEnd
            return {"plugin_info": _plugin_info(instances)}
        raise ProtocolError("a call of an unknown kind")

    def _started(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        instances, name = self._shared.instances, wanted.get("name", "")
        try:
            instance_id = instances.start(name, wanted.get("config", ""))
        except RPCError as error:
            LOGGER.error("%s", error, extra=trouble("start"))
            raise ConnectionEnd from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - Kong must not wait for an answer that does not come
            LOGGER.error(
                "an instance cannot be started: %s", cause_of(error), extra=trouble(f"rpc:{type(error).__name__}")
            )
            raise ConnectionEnd from None
        return _status(name, instance_id, instances.times.last_start)


@dataclass(eq=False)
class _SteppedEvent:
    """A phase in steps: the PDK function that it waits for, and the return that it will end with."""

    instance: Instance
    phase: Phase
    steps: Steps[None]
    sequence: bytes
    method: str = ""


def _refused(call: PDKCall, error: Exception) -> PDKException:
    return PDKException(f"exception from {call.method}: cannot be sent to Kong: {error}")


def _cut(message: bytes) -> tuple[bytes, bytes]:
    """Cut a call into its sequence number, tag included, and the rest; Kong's encoder puts either first."""
    if found := _SEQUENCE.match(message):
        end = found.end()
        return message[:end], message[end:]
    if message[:2] == _HANDLE_EVENT_TAG and len(message) > _HANDLE_EVENT_HEAD and message[2] < _VARINT_MORE:
        end = _HANDLE_EVENT_HEAD + message[2]
        if _SEQUENCE.fullmatch(message, end):
            return message[end:], message[:end]
    return b"", message


def _call_frames(call: PDKCall) -> bytes:
    """Return the two frames that ask for a PDK function. Raises `_UNSAYABLE` when it cannot be asked for."""
    if not pb_messages.knows(call.method):
        raise ValueError("ProtoBuf:1 has no such function")
    arguments = pb_messages.arguments_of(call.method, call.arguments)
    return frame(call.method.encode("ascii")) + frame(arguments)


def _reader_of(method: str) -> Callable[[bytes], Any]:
    if method in _STRING_FUNCTIONS:
        return _string
    return partial(pb_messages.result_of, method)


def _string(answer: bytes) -> str | None:
    """Return the string in an answer, None if it is empty: what most answers are, without going through tables."""
    if not answer:
        return None
    if len(answer) > 1 and answer[1] < _VARINT_MORE:
        length, start = answer[1], 2
    else:
        length, start = read_varint(answer, 1)
    if answer[0] != _STRING_TAG or start + length != len(answer):
        raise ProtocolError("an answer that is no string")
    return answer[start:].decode("utf-8", "surrogateescape")


def _status(name: str, instance_id: int, started_at: float) -> dict[str, Any]:
    # The configuration is not given back: it holds the token, and Kong does not read it.
    return {"name": name, "instance_id": instance_id, "started_at": int(started_at)}


def _plugin_info(instances: Instances) -> dict[str, Any]:
    info, loaded = instances.plugin.info, int(instances.times.loaded)
    return {
        "name": info.get("Name"),
        "updated_at": loaded,
        "loaded_at": loaded,
        "phases": info.get("Phases", ()),
        "version": info.get("Version"),
        "priority": info.get("Priority"),
        "schema": json.dumps(info.get("Schema")),
    }
