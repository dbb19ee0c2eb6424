"""Fuzzing of what comes over the socket: frames, whole, damaged and made up, into the host with the plugin in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, cast

import msgpack
from hypothesis import strategies as st

from kong_metering import PLUGIN_NAME
from kong_metering.app import PHASES, plugin_information
from kong_metering.host.dispatch import Dispatcher
from kong_metering.host.errors import ProtocolError
from kong_metering.host.instances import PluginDefinition
from kong_metering.host.mp_codec import FrameReader
from kong_metering.host.mp_rpc import Answers
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
        "config": configs,
        "operations": st.lists(_operations, min_size=1, max_size=12),
        "damage": st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)).map(list), max_size=3),
        "cuts": st.lists(st.integers(1, 2000), max_size=6),
    }
)


class _Kong:
    """Sends operations in frames, with the ids that the host gave, and reads every answer."""

    def __init__(self, runtime: Runtime) -> None:
        definition = PluginDefinition(
            PLUGIN_NAME, PHASES, lambda config: Plugin(config, runtime), plugin_information(), dict
        )
        self.dispatcher = Dispatcher(definition, clock=runtime.clock, troubles=runtime.troubles)
        self.errors: list[str] = []
        self._answers = Answers(self.dispatcher, runtime.troubles)
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


def check(case: Case) -> None:
    """Send operations as a stream of bytes: each frame is answered, and nothing but the connection breaks."""
    LOGGER.setLevel("CRITICAL")
    clock, delivery = FakeClock(), _Delivery()
    runtime = replace(make_runtime(clock), delivery=cast("Delivery", delivery))
    kong = _Kong(runtime)
    for number, operation in enumerate([{"do": "start", "config": case["config"]}, *case["operations"]]):
        data = bytearray(kong.frame(operation))
        for position, value in case["damage"]:
            if number == position % 7 and data:
                data[position % len(data)] = value
        for piece in _pieces(bytes(data), case["cuts"]):
            kong.send(piece)
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
