"""Fuzzing of what comes over the socket: frames, whole, damaged and made up, into the host with the plugin in it.

A case is in one of Kong's two protocols; those that do not say in which are in `MsgPack:1`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, cast

import msgpack
from hypothesis import strategies as st

from kong_metering import PLUGIN_NAME
from kong_metering.host.conversation import FIRST_BYTES, Conversation, Conversations
from kong_metering.host.dispatch import Dispatcher
from kong_metering.host.errors import ConnectionEnd, ProtocolError
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.mp_codec import FrameReader
from kong_metering.host.mp_rpc import Answers
from kong_metering.information import PHASES, plugin_information
from kong_metering.log import LOGGER
from kong_metering.plugin import Plugin
from kong_metering.runtime import Runtime, make_runtime
from tests.fuzz.cases import Case, Target
from tests.fuzz.headers import _Delivery
from tests.fuzz.invariants import check_events
from tests.fuzz.records import changed_records
from tests.fuzz.strategies import configs, json_values, texts, whole_config
from tests.fuzz.variation import varied_json, varied_list
from tests.support.clock import FakeClock
from tests.support.pb_rpc import answer_to, call_frame, frame
from tests.support.protobuf import as_bytes, parsed

if TYPE_CHECKING:
    from kong_metering.delivery.registry import Delivery

_PHASES = st.sampled_from([*PHASES, "certificate", None]) | texts
_FORMS = st.sampled_from(["Step", "StepMultiMap", "StepRoute", "StepError", "StepConsumer"])
_DATA = json_values() | changed_records()
_operations = st.one_of(
    st.fixed_dictionaries({"do": st.just("start"), "config": configs | json_values()}),
    st.fixed_dictionaries({"do": st.just("handle"), "phase": _PHASES}),
    st.fixed_dictionaries({"do": st.just("step"), "form": _FORMS, "data": _DATA}),
    st.fixed_dictionaries({"do": st.just("close")}),
    st.fixed_dictionaries({"do": st.just("call"), "method": texts, "argument": json_values()}),
    st.fixed_dictionaries(
        {
            "do": st.just("call"),
            "method": st.sampled_from(
                [f"plugin.{name}" for name in ("StartInstance", "HandleEvent", "Step", "CloseInstance", "GetStatus")]
            ),
            "argument": json_values(),
        }
    ),
    st.fixed_dictionaries({"do": st.just("bytes"), "hex": st.binary(max_size=60).map(bytes.hex)}),
)
_cases = st.fixed_dictionaries(
    {
        "protocol": st.sampled_from(["MsgPack:1", "ProtoBuf:1"]),
        "config": configs,
        "operations": st.lists(_operations, min_size=1, max_size=12),
        "damage": st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)).map(list), max_size=3),
        "cuts": st.lists(st.integers(1, 2000), max_size=6),
    }
)


def _dispatcher(runtime: Runtime) -> Dispatcher:
    definition = PluginDefinition(
        PLUGIN_NAME, PHASES, lambda config: Plugin(config, runtime), plugin_information(), dict
    )
    return Dispatcher(definition, clock=runtime.clock)


class _Kong:
    """Sends operations in frames, with the ids that the host gave, and reads every answer."""

    def __init__(self, runtime: Runtime) -> None:
        self.dispatcher = _dispatcher(runtime)
        self.errors: list[str] = []
        self._answers = Answers(self.dispatcher)
        self._reader = FrameReader()
        self._instance: object = 1
        self._event: object = 2
        self._number = 0

    def frame(self, operation: Case) -> bytes:
        """Give the bytes of an operation."""
        match operation["do"]:
            case "start":
                config = operation["config"]
                raw = json.dumps(whole_config(config)) if isinstance(config, dict) else config
                return self._request("plugin.StartInstance", {"Name": PLUGIN_NAME, "Config": raw})
            case "handle":
                wanted = {"InstanceId": self._instance, "EventName": operation["phase"]}
                return self._request("plugin.HandleEvent", wanted)
            case "step":
                result = {"EventId": self._event, "Data": operation["data"]}
                return self._request(f"plugin.{operation['form']}", result)
            case "close":
                return self._request("plugin.CloseInstance", self._instance)
            case "call":
                return self._request(operation["method"], operation["argument"])
        return bytes.fromhex(operation["hex"])

    def send(self, data: bytes) -> None:
        """Let the host read bytes; a connection that does not speak the protocol is replaced, as Kong would."""
        try:
            for request_id, method, argument in self._reader.feed(data):
                self._take(self._answers.answer(request_id, method, argument), request_id)
        except ProtocolError:
            self._reader = FrameReader()

    def _take(self, answer: bytes, request_id: int) -> None:
        kind, answered, error, result = msgpack.unpackb(answer, unicode_errors="surrogateescape", strict_map_key=False)
        assert (kind, answered) == (1, request_id)
        assert error is None or isinstance(error, str)
        if error is not None:
            self.errors.append(error)
        elif isinstance(result, dict):
            self._instance = result.get("Id", self._instance)
            self._event = result.get("EventId", self._event)

    def _request(self, method: str, argument: object) -> bytes:
        self._number += 1
        message = [0, self._number, method, [argument]]
        try:
            return cast("bytes", msgpack.packb(message, use_bin_type=False, unicode_errors="surrogateescape"))
        except (OverflowError, UnicodeEncodeError):  # MessagePack's integers have 64 bits, Kong's strings no surrogates
            return b""


class _PBKong:
    """Sends the same operations over the other protocol, on one connection; when that ends, it opens the next."""

    def __init__(self, runtime: Runtime) -> None:
        self.dispatcher = _dispatcher(runtime)
        self._conversations = Conversations(self.dispatcher)
        self._conversation: Conversation | None = None
        self._held = b""
        self._instance = 1
        self._sequence = 0
        self._asked: list[str] = []
        self._has_argument_next = False

    def frame(self, operation: Case) -> bytes:
        """Give the bytes of an operation; a step is the answer to the oldest PDK call that has none yet."""
        self._sequence += 1
        match operation["do"]:
            case "start":
                config = operation["config"]
                raw = json.dumps(whole_config(config) if isinstance(config, dict) else config)
                return self._call(start_instance={"name": _bytes(PLUGIN_NAME), "config": _bytes(raw)})
            case "handle":
                phase = operation["phase"]
                named = {} if phase is None else {"event_name": _bytes(phase)}
                return self._call(handle_event={"instance_id": self._instance, **named})
            case "step":
                return self._answer(operation["data"])
            case "close":
                return self._call(close_instance={"instance_id": self._instance})
            case "call":
                return self._call(get_plugin_info={"name": _bytes(operation["method"])})
        return bytes.fromhex(operation["hex"])

    def send(self, data: bytes) -> None:
        """Let the host read bytes, as a connection does."""
        if self._conversation is None:
            data, self._held = self._held + data, b""
            if len(data) < FIRST_BYTES:
                self._held = data
                return
            self._conversation = self._conversations.begin(data[:FIRST_BYTES], {})
        try:
            written = self._conversation.receive(data)
        except (ProtocolError, ConnectionEnd):
            self.end_connection()
        else:
            # What begins as a request of the other protocol is answered in it.
            if written[:1] != b"\x94":
                self._take(written)

    def end_connection(self) -> None:
        """End the connection, between whatever and whatever."""
        if self._conversation is not None:
            self._conversation.lose()
        self._conversation, self._held, self._asked, self._has_argument_next = None, b"", [], False

    def _take(self, written: bytes) -> None:
        while written:
            end = 4 + int.from_bytes(written[:4], "little")
            content, written = written[4:end], written[end:]
            if self._has_argument_next:
                self._has_argument_next = False
            elif content.startswith(b"kong."):
                self._asked.append(content.decode("ascii"))
                self._has_argument_next = True
            elif content:
                self._instance = parsed("Return", content).instance_status.instance_id or self._instance

    def _answer(self, data: Any) -> bytes:
        method = self._asked.pop(0) if self._asked else "kong.log.serialize"
        with suppress(TypeError, ValueError, AttributeError, AssertionError, OverflowError):
            return frame(answer_to(method, data))
        return frame(answer_to("kong.log.serialize", _bytes(data)))

    def _call(self, **fields: Any) -> bytes:
        return call_frame(self._sequence, **fields)


def _bytes(value: object) -> bytes:
    """Give text as Kong has it, and in the place of what is none its form in Python."""
    try:
        return as_bytes(value)
    except UnicodeEncodeError:
        return str(value).encode("utf-8", "replace")


class _Complaints(logging.Handler):
    """Keeps what is said of failures."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _complaints() -> Iterator[list[str]]:
    keeper = _Complaints()
    level, handlers, propagates = LOGGER.level, LOGGER.handlers[:], LOGGER.propagate
    LOGGER.handlers[:], LOGGER.propagate = [keeper], False
    LOGGER.setLevel(logging.ERROR)
    try:
        yield keeper.lines
    finally:
        LOGGER.handlers[:], LOGGER.propagate = handlers, propagates
        LOGGER.setLevel(level)


def check(case: Case) -> None:
    """Send operations as a stream of bytes: each frame is answered, and nothing but the connection breaks."""
    if case.get("protocol") == "ProtoBuf:1":
        _check_protobuf(case)
    else:
        _check_messagepack(case)


def _check_protobuf(case: Case) -> None:
    clock, delivery = FakeClock(), _Delivery()
    with _complaints() as complaints:
        runtime = replace(make_runtime(clock), delivery=cast("Delivery", delivery))
        kong = _PBKong(runtime)
        _send(kong, case)
        kong.end_connection()
        instances = kong.dispatcher.instances.all().values()
        assert all(instance.events == 0 for instance in instances)
        clock.advance(10_000)
        kong.dispatcher.sweep()
        kong.dispatcher.close()
    failures = [line for line in complaints if " failed" in line]
    # A connection that ended, and an answer that is no record: anything else is a failure of our own.
    assert all("ConnectionError" in line or "could not serialise" in line for line in failures), failures
    for event in delivery.queue.events:
        check_events([event], case["config"])


def _send(kong: _Kong | _PBKong, case: Case) -> None:
    for number, operation in enumerate([{"do": "start", "config": case["config"]}, *case["operations"]]):
        data = bytearray(kong.frame(operation))
        for position, value in case["damage"]:
            if number == position % 7 and data:
                data[position % len(data)] = value
        for piece in _pieces(bytes(data), case["cuts"]):
            kong.send(piece)


def _check_messagepack(case: Case) -> None:
    LOGGER.setLevel("CRITICAL")
    clock, delivery = FakeClock(), _Delivery()
    runtime = replace(make_runtime(clock), delivery=cast("Delivery", delivery))
    kong = _Kong(runtime)
    _send(kong, case)
    assert not any("see its log" in error for error in kong.errors), "an RPC failed for a reason of our own"
    assert "error" not in runtime.stats.snapshot().skipped
    for event in delivery.queue.events:
        check_events([event], case["config"])
    clock.advance(10_000)
    kong.dispatcher.sweep()
    kong.dispatcher.close()


def _pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    start = 0
    for cut in sorted(set(cuts)):
        if start < cut < len(data):
            yield data[start:cut]
            start = cut
    yield data[start:]


def vary(case: Case, chance: Random) -> Case:
    """Change one operation, or damage one more byte."""
    if chance.random() < 0.2:
        return {**case, "damage": [*case["damage"][-2:], [chance.randrange(2000), chance.randrange(256)]]}
    return {**case, "operations": varied_list(case["operations"], chance, _varied_operation)}


def _varied_operation(operation: Case, chance: Random) -> Case:
    free = [key for key in ("config", "phase", "data", "argument") if key in operation]
    if not free:
        return operation
    key = chance.choice(free)
    return {**operation, key: varied_json(operation[key], chance)}


TARGET = Target("frames", _cases, vary, check)
