"""Events over `ProtoBuf:1`, at once and in steps, whatever Kong sends and whatever the plugin does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kong_pdk.exception import PDKException

from kong_metering.host.errors import ConnectionEnd, ProtocolError
from kong_metering.host.pb_codec import MAX_FRAME_BYTES
from kong_metering.steps import AtOnce
from kong_metering.steps import call as pdk_call
from tests.support.clock import FakeClock
from tests.support.protobuf import message, value_of
from tests.unit.host.hosting import NAME, Host, hosting
from tests.unit.host.talking import (
    END,
    NIL,
    Talk,
    arguments,
    call,
    event,
    event_last,
    frame,
    returned,
    string,
    table,
    value,
)

Phase = Callable[[Any], object]


class Recording:
    """Asks `calls` at once in its phases, and keeps what it gets; `plan` may be replaced, None is for steps."""

    def __init__(self, *calls: object) -> None:
        self.got: list[Sequence[Any]] = []
        self.given_up = 0
        self.closed = 0
        self.happened: list[str] = []
        self.plan: AtOnce | None = self.asking(*calls)

    def asking(self, *calls: Any) -> AtOnce:
        return AtOnce(tuple(calls), self._finish, self._give_up)

    def _finish(self, results: Sequence[Any]) -> None:
        self.got.append(list(results))
        self.happened.append("finish")

    def _give_up(self) -> None:
        self.given_up += 1
        self.happened.append("give up")

    def access(self, kong: Any) -> None:
        self.got.append([kong.request.get_header("in-steps")])
        self.happened.append("steps")

    log = access

    def access_at_once(self) -> AtOnce | None:
        return self.plan

    log_at_once = access_at_once

    def close(self) -> None:
        self.closed += 1
        self.happened.append("close")


GET_TENANT = pdk_call("kong.request.get_header", "x-tenant-id")
GET_ID = pdk_call("kong.nginx.get_var", "kong_request_id")
SERIALIZE = pdk_call("kong.log.serialize")
ASKS_TENANT = [b"kong.request.get_header", b"\x0a\x0bx-tenant-id"]
ASKS_ID = [b"kong.nginx.get_var", b"\x0a\x0fkong_request_id"]
ASKS_RECORD = [b"kong.log.serialize", b""]


def hosted(clock: FakeClock, plugin: object) -> tuple[Host, Talk, int]:
    """Host one plugin that is already made; it must have an instance only once."""
    host = Host(lambda _: plugin, clock)
    talk = Talk(host)
    return host, talk, talk.start()


def hosted_phase(clock: FakeClock, phase: Phase) -> tuple[Host, Talk, int]:
    host, instance = hosting(phase, clock)
    return host, Talk(host), instance


def events_under_way(host: Host, instance: int) -> int:
    found = host.dispatcher.instances.get(instance)
    assert found is not None
    return found.events


# -- at once -----------------------------------------------------------------------------------------------------------


def test_a_phase_that_asks_nothing_is_over_at_once(clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    written = talk.conversation.receive(event(5, instance))
    assert written == b"\x00\x00\x00\x00\x02\x00\x00\x00\x08\x05"
    assert plugin.got == [[]]
    assert events_under_way(host, instance) == 0
    assert talk.conversation.is_quiet


def test_a_phase_that_asks_one_thing_has_asked_and_returned_in_one_write(clock: FakeClock) -> None:
    plugin = Recording(SERIALIZE)
    host, talk, instance = hosted(clock, plugin)
    written = talk.conversation.receive(event(300, instance))
    assert written == (
        b"\x12\x00\x00\x00kong.log.serialize\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x08\xac\x02"
    )
    assert (plugin.got, talk.conversation.is_quiet, events_under_way(host, instance)) == ([], False, 1)
    assert talk.answer(string("the record")) == []
    assert (plugin.got, talk.conversation.is_quiet, events_under_way(host, instance)) == ([["the record"]], True, 0)


def test_a_phase_that_asks_several_things_gets_the_answers_in_their_order(clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT, GET_ID, SERIALIZE)
    _, talk, instance = hosted(clock, plugin)
    assert talk.send(event(7, instance)) == [*ASKS_TENANT, *ASKS_ID, *ASKS_RECORD, END, b"\x08\x07"]
    assert talk.answer(string("acme")) == []
    assert talk.answer(NIL, string("{}")) == []
    assert plugin.got == [["acme", None, "{}"]]


def test_answers_of_every_kind_are_what_a_plugin_gets(clock: FakeClock) -> None:
    plugin = Recording(
        GET_TENANT,
        pdk_call("kong.request.get_headers", 1000),
        pdk_call("kong.response.get_status"),
        pdk_call("kong.client.get_consumer"),
        pdk_call("kong.log.warn", "said"),
        pdk_call("kong.ctx.shared.get", "key"),
    )
    _, talk, instance = hosted(clock, plugin)
    talk.send(event(7, instance))
    consumer = message("Consumer", id=b"c1", username=b"caf\xe9").SerializeToString()
    talk.answer(string(b"caf\xe9"), table({"x": ["1", "2"]}), b"\x08\xc8\x01", consumer, NIL, value({"a": [1]}))
    assert plugin.got == [
        ["caf\udce9", {"x": ["1", "2"]}, 200, {"id": "c1", "username": "caf\udce9"}, None, {"a": [1]}]
    ]


def test_the_answers_of_one_event_and_the_next_call_may_come_in_one_piece(clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT, GET_ID)
    _, talk, instance = hosted(clock, plugin)
    asked = [*ASKS_TENANT, *ASKS_ID, END]
    assert talk.send(event(7, instance)) == [*asked, b"\x08\x07"]
    assert talk.send(frame(string("a")), frame(string("1")), event(8, instance)) == [*asked, b"\x08\x08"]
    assert talk.send(frame(string("b")), frame(string("2")), event(9, instance), frame(string("c"))) == [
        *asked,
        b"\x08\x09",
    ]
    assert talk.answer(string("3")) == []
    assert plugin.got == [["a", "1"], ["b", "2"], ["c", "3"]]


def test_a_message_that_comes_byte_by_byte_is_taken_with_its_last_one(clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT, SERIALIZE)
    _, talk, instance = hosted(clock, plugin)
    stream = event(7, instance) + frame(string("acme")) + frame(string("x" * 500)) + event(8, instance)
    written = [talk.conversation.receive(stream[at : at + 1]) for at in range(len(stream))]
    first, second = [at for at, data in enumerate(written) if data]
    assert (first, second) == (len(event(7, instance)) - 1, len(stream) - 1)
    assert written[first][:-1] == written[second][:-1]
    assert plugin.got == [["acme", "x" * 500]]


@given(cuts=st.lists(st.integers(0, 3000), max_size=8), subjects=st.lists(st.binary(max_size=200), max_size=5))
def test_events_are_the_same_however_their_bytes_are_cut(cuts: list[int], subjects: list[bytes]) -> None:
    plugin = Recording(GET_TENANT, SERIALIZE)
    _, talk, instance = hosted(FakeClock(), plugin)
    stream = b"".join(
        [
            (event if number % 2 else event_last)(number + 1, instance)
            + frame(string(subject))
            + frame(string(b"{}" * number))
            for number, subject in enumerate(subjects)
        ]
    )
    whole = Talk(Host(lambda _: plugin, FakeClock()), talk.shared).conversation.receive(stream)
    inner = sorted(cut for cut in cuts if cut < len(stream))
    written = b"".join(
        talk.conversation.receive(stream[start:end])
        for start, end in zip([0, *inner], [*inner, len(stream)], strict=True)
    )
    assert written == whole
    expected = [
        [subject.decode("utf-8", "surrogateescape") or None, "{}" * number or None]
        for number, subject in enumerate(subjects)
    ]
    assert plugin.got == expected * 2


def test_a_call_may_have_its_sequence_number_in_front_or_at_the_end(clock: FakeClock) -> None:
    """Which one differs between Kong's workers."""
    plugin = Recording()
    _, talk, instance = hosted(clock, plugin)
    for sequence in (1, 127, 128, 300, 2**31, 2**53):
        for made in (event, event_last):
            end, content = talk.send(made(sequence, instance))
            assert (end, returned(content)) == (END, message("Return", sequence=sequence))
    assert len(plugin.got) == 12


def test_a_call_without_a_sequence_number_has_0(clock: FakeClock) -> None:
    plugin = Recording()
    _, talk, instance = hosted(clock, plugin)
    for _ in range(2):
        end, content = talk.send(event(0, instance))
        assert (end, returned(content)) == (END, message("Return"))
    assert len(plugin.got) == 2


parts = st.one_of(
    st.integers(0, 2**40),
    st.tuples(st.integers(0, 1), st.sampled_from(["access", "log"])),
    st.sampled_from([b"\xa2\x06\x01x", b"\x18\x08"]),
)


@given(st.lists(st.lists(parts, max_size=5), min_size=1, max_size=3))
def test_a_call_in_any_form_runs_the_phase_that_it_names_last(sent: list[list[Any]]) -> None:
    """Fields repeated, or such that nobody knows: nobody sends them; that phase is run, and no other one later."""
    got: list[tuple[int, str]] = []
    host = Host(lambda config: Noting(config["number"], got), FakeClock())
    talk = Talk(host)
    instances = [talk.start(number=number) for number in range(2)]
    for fields in [*sent, *sent]:
        content = b"".join(_field(one, instances) for one in fields)
        events = [one for one in fields if isinstance(one, tuple)]
        sequences = [one for one in fields if isinstance(one, int)]
        got.clear()
        if events:
            end, answered = talk.send(frame(content))
            assert (end, returned(answered).sequence) == (END, (sequences or [0])[-1])
            assert got == events[-1:]
        else:
            with pytest.raises(ProtocolError):
                talk.send(frame(content))


class Noting:
    """Notes which phases are run."""

    def __init__(self, number: int, got: list[tuple[int, str]]) -> None:
        self.access = lambda _: got.append((number, "access"))
        self.log = lambda _: got.append((number, "log"))


def _field(one: int | bytes | tuple[int, str], instances: list[int]) -> bytes:
    if isinstance(one, int):
        return b"\x08" + _varint(one)
    if isinstance(one, bytes):
        return one
    number, phase = one
    handled: bytes = message("Event", instance_id=instances[number], event_name=phase.encode()).SerializeToString()
    return b"\xa2\x02" + _varint(len(handled)) + handled


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


def test_two_connections_may_each_have_an_event_of_the_same_phase_under_way(clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT, GET_ID)
    host, first, instance = hosted(clock, plugin)
    second = first.beside(host)
    first.send(event(1, instance))
    second.send(event(2, instance))
    first.answer(string("a"))
    second.answer(string("b"), string("2"))
    first.answer(string("1"))
    assert plugin.got == [["b", "2"], ["a", "1"]]


def test_a_phase_may_ask_something_else_while_answers_to_the_same_phase_are_due(clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT, GET_ID)
    host, first, instance = hosted(clock, plugin)
    second = first.beside(host)
    assert first.send(event(1, instance)) == [*ASKS_TENANT, *ASKS_ID, END, b"\x08\x01"]
    plugin.plan = plugin.asking(pdk_call("kong.response.get_status"))
    assert second.send(event(2, instance)) == [b"kong.response.get_status", b"", END, b"\x08\x02"]
    first.answer(string("acme"), string("1"))
    second.answer(b"\x08\xc8\x01")
    plugin.plan = None
    assert first.send(event(3, instance)) == [b"kong.request.get_header", b"\x0a\x08in-steps"]
    assert first.answer(string("x")) == [END, b"\x08\x03"]
    assert plugin.got == [["acme", "1"], [200], ["x"]]


@pytest.mark.parametrize(
    "answer", [b"\x0a", b"\x0a\x05ab", b"\x0a\xff", b"\x08\x05", b"\xff", b"\x0a\x01ab"], ids=bytes.hex
)
@pytest.mark.parametrize("asked", [GET_TENANT, pdk_call("kong.response.get_status")], ids=["string", "integer"])
def test_an_answer_that_is_none_ends_the_connection_and_the_event(
    asked: object, answer: bytes, clock: FakeClock
) -> None:
    plugin = Recording(asked, GET_ID)
    host, talk, instance = hosted(clock, plugin)
    talk.send(event(1, instance))
    talk.answer(answer)
    try:
        talk.answer(string("1"))
    except ProtocolError:
        assert (plugin.got, plugin.given_up) == ([], 1)
    else:  # as a status, it is a number
        assert (plugin.got, plugin.given_up) == ([[5 if answer == b"\x08\x05" else None, "1"]], 0)
        assert asked != GET_TENANT
    talk.conversation.lose()
    assert plugin.given_up + len(plugin.got) == 1
    assert events_under_way(host, instance) == 0


@given(st.lists(st.binary(max_size=20), min_size=2, max_size=2))
def test_any_answers_give_results_or_a_protocol_error(answers: list[bytes]) -> None:
    plugin = Recording(GET_TENANT, pdk_call("kong.request.get_headers", 1000))
    host, talk, instance = hosted(FakeClock(), plugin)
    talk.send(event(1, instance))
    try:
        talk.answer(*answers)
    except ProtocolError:
        assert plugin.given_up == 1
    assert len(plugin.got) + plugin.given_up == 1
    assert events_under_way(host, instance) == 0


# -- connections that end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_an_event_whose_answers_do_not_come_is_given_up(answered: int, clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT, GET_ID)
    host, talk, instance = hosted(clock, plugin)
    talk.send(event(1, instance))
    talk.answer(*[string("acme")] * answered)
    talk.conversation.lose()
    talk.conversation.lose()
    assert plugin.happened == (["finish"] if answered == 2 else ["give up"])
    assert events_under_way(host, instance) == 0
    assert host.troubles == []


def test_a_connection_that_ends_amid_a_frame_takes_no_event_with_it(clock: FakeClock) -> None:
    plugin = Recording(GET_TENANT)
    host, talk, instance = hosted(clock, plugin)
    talk.conversation.receive(event(1, instance)[:-1])
    assert not talk.conversation.is_quiet
    talk.conversation.lose()
    assert plugin.happened == []
    assert events_under_way(host, instance) == 0


def test_a_phase_in_steps_is_ended_where_it_stands_when_the_connection_ends(clock: FakeClock) -> None:
    happened: list[str] = []

    def phase(kong: Any) -> None:
        try:
            kong.log.serialize()
        finally:
            happened.append("ended")

    host, talk, instance = hosted_phase(clock, phase)
    assert talk.send(event(1, instance)) == ASKS_RECORD
    assert not talk.conversation.is_quiet
    talk.conversation.lose()
    talk.conversation.lose()
    assert happened == ["ended"]
    assert events_under_way(host, instance) == 0


def test_a_phase_that_fails_while_it_is_ended_is_said(clock: FakeClock) -> None:
    def phase(kong: Any) -> None:
        try:
            kong.log.serialize()
        finally:
            raise ValueError("not willing")

    host, talk, instance = hosted_phase(clock, phase)
    talk.send(event(1, instance))
    talk.conversation.lose()
    assert "ValueError: not willing" in host.troubles[0]
    assert events_under_way(host, instance) == 0


# -- instances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance_id", [None, 0, -1, 1, 2**31 - 1, 2**62])
def test_an_instance_that_is_not_there_ends_the_connection(instance_id: int | None, clock: FakeClock) -> None:
    """Kong then forgets its instances, starts one and sends the event again (measured)."""
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    assert instance != instance_id
    handled: dict[str, Any] = {"event_name": b"log"} | ({} if instance_id is None else {"instance_id": instance_id})
    with pytest.raises(ConnectionEnd):
        talk.send(call(1, handle_event=handled))
    with pytest.raises(ConnectionEnd):
        talk.beside(host).send(call(1, get_instance_status={"instance_id": instance_id or 0}))
    assert plugin.happened == []
    assert host.troubles == []
    assert talk.shared.by_bytes == {}


def test_an_instance_that_was_closed_ends_the_connection_at_its_next_event(clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    talk.send(event(1, instance))
    talk.close(instance)
    with pytest.raises(ConnectionEnd):
        talk.send(event(3, instance))
    assert plugin.happened == ["finish", "close"]
    assert len(talk.shared.by_bytes) == 1
    talk.shared.forget_closed()
    assert talk.shared.by_bytes == {}
    talk.beside(host).close(instance)
    talk.beside(host).close(7)


def test_what_is_known_of_instances_that_live_on_is_kept(clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, first = hosted(clock, plugin)
    second = host.start()
    talk.send(event(1, first), event(2, first, "access"), event(3, second))
    host.dispatcher.instances.close(first)
    talk.shared.forget_closed()
    assert len(talk.shared.by_bytes) == 1


def test_an_instance_is_closed_after_the_last_of_its_events_at_once(clock: FakeClock) -> None:
    """Kong may close an instance while a log phase still runs; what that asks for must find the plugin open."""
    plugin = Recording(SERIALIZE)
    host, first, instance = hosted(clock, plugin)
    second, third = first.beside(host), first.beside(host)
    for talk in (first, second, third):
        talk.send(event(1, instance))
    first.beside(host).close(instance)
    assert plugin.closed == 0
    first.answer(string("{}"))
    second.conversation.lose()
    assert plugin.closed == 0
    third.answer(string("{}"))
    assert plugin.happened == ["finish", "give up", "finish", "close"]


@pytest.mark.parametrize("how", ["lose", "answer", "garbage"])
def test_the_end_of_a_closed_instances_last_event_comes_before_its_own(how: str, clock: FakeClock) -> None:
    plugin = Recording(SERIALIZE)
    host, talk, instance = hosted(clock, plugin)
    talk.send(event(1, instance))
    host.dispatcher.instances.close(instance)
    if how == "lose":
        talk.conversation.lose()
    elif how == "answer":
        talk.answer(string("{}"))
    else:
        with pytest.raises(ProtocolError):
            talk.answer(b"\x0a")
    assert plugin.happened == ["finish" if how == "answer" else "give up", "close"]


def test_a_phase_that_closes_its_own_instance_is_over_before(clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    plugin.plan = AtOnce((), lambda _: host.dispatcher.instances.close(instance))
    talk.send(event(1, instance))
    assert plugin.closed == 1


def test_an_instance_whose_phase_in_steps_runs_is_closed_after_it(clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    plugin.plan = None
    talk.send(event(1, instance))
    host.dispatcher.instances.close(instance)
    assert plugin.closed == 0
    assert talk.answer(string("x")) == [END, b"\x08\x01"]
    assert plugin.happened == ["steps", "close"]


def test_an_instance_that_events_use_is_not_closed_as_unused(clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    for sequence in range(3):
        clock.advance(3000)
        talk.send(event(sequence, instance))
        host.dispatcher.sweep()
    assert plugin.closed == 0
    clock.advance(3600)
    host.dispatcher.sweep()
    assert plugin.closed == 1


def test_an_instance_is_started_with_the_configuration_that_kong_sends(clock: FakeClock) -> None:
    configs: list[Mapping[str, Any]] = []

    def create(config: Mapping[str, Any]) -> object:
        configs.append(config)
        return Recording()

    host = Host(create, clock)
    start = {"name": NAME.encode(), "config": b'{"api_token":"om_secret","x":["caf\xe9"]}'}
    (content,) = Talk(host).send(call(5, start_instance=start))
    status = returned(content).instance_status
    assert configs == [{"api_token": "om_secret", "x": ["caf\udce9"]}]
    assert (returned(content).sequence, status.name) == (5, NAME.encode())
    assert (status.instance_id, status.started_at) == (host.instance_ids()[0], int(clock.wall()))
    assert b"secret" not in content
    assert 0 < status.instance_id < 2**31


@pytest.mark.parametrize(
    "config", [b"", b"nonsense", b"[]", b"\xff", b"[" * 100_000], ids=["", "text", "list", "byte", "deep"]
)
def test_a_configuration_that_cannot_be_read_starts_an_instance_without_one(config: bytes, clock: FakeClock) -> None:
    configs: list[Mapping[str, Any]] = []

    def create(config: Mapping[str, Any]) -> object:
        configs.append(config)
        return Recording()

    host = Host(create, clock)
    (content,) = Talk(host).send(call(5, start_instance={"name": NAME.encode(), "config": config}))
    assert returned(content).instance_status.instance_id in host.instance_ids()
    assert configs == [{}]


@pytest.mark.parametrize("name", [b"another", b"", b"hosted\n", b"\xff"])
def test_an_instance_of_another_plugin_ends_the_connection_and_is_said(name: bytes, clock: FakeClock) -> None:
    host = Host(lambda _: Recording(), clock)
    with pytest.raises(ConnectionEnd):
        Talk(host).send(call(1, start_instance={"name": name, "config": b"{}"}))
    (said,) = host.troubles
    assert "is not served here" in said
    assert "\n" not in said
    assert host.instance_ids() == []


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(1), RecursionError()], ids=repr)
def test_a_plugin_that_cannot_be_made_ends_the_connection_and_leaves_nothing(
    error: BaseException, clock: FakeClock
) -> None:
    """Kong takes its claim on the instance back, and tries again at the next request."""

    def create(config: Mapping[str, Any]) -> object:
        if config["fails"]:
            raise error
        return Recording()

    host = Host(create, clock)
    talk = Talk(host)
    with pytest.raises(ConnectionEnd):
        talk.start(fails=True)
    assert any(type(error).__name__ in line for line in host.troubles)
    assert host.instance_ids() == []
    assert talk.beside(host).start(fails=False) in host.instance_ids()


# -- in steps ----------------------------------------------------------------------------------------------------------


def test_an_ordinary_phase_runs_call_by_call(clock: FakeClock) -> None:
    """All kinds of functions, over greenlets; each value is what MsgPack:1 would give."""
    got: list[object] = []

    def phase(kong: Any) -> None:
        got.extend(
            [
                kong.request.get_header("x-tenant-id"),
                kong.request.get_headers(1000),
                kong.client.get_consumer(),
                kong.router.get_route(),
                kong.router.get_service(),
                kong.ctx.shared.set("key", {"a": [1, "caf\udce9", {"b": None}]}),
                kong.ctx.shared.get("key"),
                kong.log.err("text", 1, {"a": 1}, [True], None, 2.5),
                kong.response.get_status(),
                kong.request.get_http_version(),
                kong.ip.is_trusted("127.0.0.1"),
                kong.service.request.set_headers({"x-a": "1"}),
                kong.request.get_query(),
                kong.nginx.req_start_time(),
                kong.log.serialize(),
            ]
        )

    host, talk, instance = hosted_phase(clock, phase)
    shared = {"a": [1, "caf\udce9", {"b": None}]}
    answers = [
        string(b"caf\xe9"),
        table({"x": ["1", "2"], "y": "3"}),
        message("Consumer", id=b"c1", tags=[b"a"]).SerializeToString(),
        message("Route", id=b"r1", name=b"anything", service={"id": b"s1"}).SerializeToString(),
        message("Service", id=b"s1", port=9000).SerializeToString(),
        NIL,
        value(shared),
        NIL,
        b"\x08\xc8\x01",
        message("Number", v=1.1).SerializeToString(),
        b"\x08\x01",
        NIL,
        table({"a": True}),
        message("Number", v=1_795_359_970.019).SerializeToString(),
        string("{}"),
    ]
    made, sequence = talk.step_through(event(9, instance), answers)
    assert sequence == 9
    assert got == [
        "caf\udce9",
        {"x": ["1", "2"], "y": ["3"]},
        {"id": "c1", "tags": ["a"]},
        {"id": "r1", "name": "anything", "service": {"id": "s1"}},
        {"id": "s1", "port": 9000},
        None,
        shared,
        None,
        200,
        1.1,
        True,
        None,
        {"a": []},
        1_795_359_970.019,
        "{}",
    ]
    said = dict(made)
    assert arguments(*made[0]).v == b"x-tenant-id"
    assert arguments(*made[1]).v == 1000
    pair = arguments(b"kong.ctx.shared.set", said[b"kong.ctx.shared.set"])
    assert (pair.k, value_of(pair.v)) == (b"key", shared)
    assert arguments(b"kong.log.err", said[b"kong.log.err"]) == ["text", 1, {"a": 1}, [True], "None", "2.5"]
    assert arguments(b"kong.service.request.set_headers", said[b"kong.service.request.set_headers"]) == {"x-a": "1"}
    assert host.troubles == []
    assert events_under_way(host, instance) == 0


def test_a_phase_in_steps_that_asks_nothing_is_over_at_once(clock: FakeClock) -> None:
    host, talk, instance = hosted_phase(clock, lambda _: None)
    assert talk.send(event(3, instance)) == [END, b"\x08\x03"]
    assert events_under_way(host, instance) == 0


def test_the_end_of_a_phase_in_steps_and_the_next_call_may_come_in_one_piece(clock: FakeClock) -> None:
    host, talk, instance = hosted_phase(clock, lambda kong: kong.log.serialize())
    assert talk.send(event(3, instance)) == ASKS_RECORD
    assert talk.send(frame(string("{}")), event_last(4, instance)) == [END, b"\x08\x03", *ASKS_RECORD]
    assert talk.answer(NIL) == [END, b"\x08\x04"]
    assert host.troubles == []


def test_an_exit_ends_the_phase_and_kong_the_connection(clock: FakeClock) -> None:
    happened: list[str] = []

    def phase(kong: Any) -> None:
        try:
            kong.response.exit(403, "no", {"x-a": "1"})
            happened.append("went on")
        finally:
            happened.append("ended")

    host, talk, instance = hosted_phase(clock, phase)
    method, argument = talk.send(event(3, instance, "access"))
    given_exit = arguments(method, argument)
    assert (method, given_exit.status, given_exit.body) == (b"kong.response.exit", 403, b"no")
    assert happened == ["ended"]
    assert events_under_way(host, instance) == 0
    talk.conversation.lose()
    assert host.troubles == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda kong: kong.response.error(500),
        lambda kong: kong.no.such("x"),
        lambda kong: kong.log("x"),
        lambda kong: kong.ctx.shared.set("key", object()),
        lambda kong: kong.ctx.shared.set("key", {1}),
        lambda kong: kong.ctx.shared.set("key"),
        lambda kong: kong.ctx.shared.set("key", "\ud800"),
        lambda kong: kong.ctx.shared.set("key", [10**400]),
        lambda kong: kong.ctx.shared.set("key", endless_list()),
        lambda kong: kong.response.set_status(2**70),
    ],
    ids=["error", "unknown", "log itself", "object", "set", "none", "surrogate", "large", "endless", "integer"],
)
def test_what_the_protocol_cannot_say_is_an_error_in_the_plugin_and_the_phase_goes_on(
    ask: Callable[[Any], object], clock: FakeClock
) -> None:
    errors: list[str] = []

    def phase(kong: Any) -> None:
        for _ in range(2):
            try:
                ask(kong)
            except PDKException as error:
                errors.append(str(error))
        kong.log.serialize()

    host, talk, instance = hosted_phase(clock, phase)
    assert talk.send(event(3, instance)) == ASKS_RECORD
    assert talk.answer(NIL) == [END, b"\x08\x03"]
    assert len(errors) == 2
    assert all("cannot be sent to Kong" in error for error in errors)
    assert events_under_way(host, instance) == 0


def endless_list() -> list[object]:
    endless: list[object] = []
    endless.append(endless)
    return endless


def test_a_phase_that_cannot_say_what_it_wants_ends_as_one_that_raises(clock: FakeClock) -> None:
    host, talk, instance = hosted_phase(clock, lambda kong: kong.response.error(500))
    assert talk.send(event(3, instance)) == [END, b"\x08\x03"]
    assert "PDKException: exception from kong.response.error: cannot be sent to Kong" in host.troubles[0]
    assert events_under_way(host, instance) == 0


@pytest.mark.parametrize("error", [ValueError("at once"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("calls", [0, 1])
def test_a_phase_that_raises_is_over_and_said(calls: int, error: BaseException, clock: FakeClock) -> None:
    def phase(kong: Any) -> None:
        for _ in range(calls):
            kong.log.serialize()
        if isinstance(error, SystemExit):
            sys.exit(1)
        raise error

    host, talk, instance = hosted_phase(clock, phase)
    _, sequence = talk.step_through(event(3, instance), [NIL] * calls)
    assert sequence == 3
    assert type(error).__name__ in host.troubles[0]
    assert "the log phase failed, the request goes on" in host.troubles[0]
    assert events_under_way(host, instance) == 0


def test_an_answer_that_is_none_ends_the_connection_and_the_phase_in_steps(clock: FakeClock) -> None:
    host, talk, instance = hosted_phase(clock, lambda kong: kong.log.serialize())
    talk.send(event(3, instance))
    with pytest.raises(ProtocolError):
        talk.answer(b"\x0a")
    talk.conversation.lose()
    assert events_under_way(host, instance) == 0


# -- at once, when the plugin fails ------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("calls", [(), (SERIALIZE,)], ids=["no calls", "one call"])
def test_a_phase_that_fails_on_its_answers_is_said(calls: Any, error: BaseException, clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    plugin.plan = AtOnce(calls, failing(error), failing(error))
    for sequence in (1, 2):
        assert talk.send(event(sequence, instance))[-2:] == [END, bytes([8, sequence])]
        talk.answer(*[string("{}")] * len(calls))
    assert len(host.troubles) == 1
    assert type(error).__name__ in host.troubles[0]
    assert events_under_way(host, instance) == 0
    talk.send(event(3, instance))
    talk.conversation.lose()
    assert events_under_way(host, instance) == 0


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(1)], ids=repr)
def test_a_phase_that_fails_to_say_what_it_asks_is_run_in_steps(error: BaseException, clock: FakeClock) -> None:
    plugin = Recording()
    host, talk, instance = hosted(clock, plugin)
    plugin.access_at_once = plugin.log_at_once = failing(error)  # type: ignore[method-assign]
    instance = talk.start()
    made, _ = talk.step_through(event(3, instance), [string("acme")])
    assert made == [(b"kong.request.get_header", b"\x0a\x08in-steps")]
    assert type(error).__name__ in host.troubles[0]
    assert plugin.got == [["acme"]]


@pytest.mark.parametrize(
    "asked",
    [
        pdk_call("kong.response.error", 500),
        pdk_call("kong.ctx.shared.set", "key", object()),
        pdk_call("kong.ctx.shared.set", "key", endless_list()),
        pdk_call("kong.request.get_header", "\ud800"),
    ],
    ids=["unknown", "object", "endless", "surrogate"],
)
def test_a_phase_that_asks_at_once_what_cannot_be_said_is_run_in_steps(asked: Any, clock: FakeClock) -> None:
    """Not an end of the connection: Kong would send the event again and again."""
    plugin = Recording(GET_TENANT, asked)
    host, talk, instance = hosted(clock, plugin)
    for _ in range(2):
        made, _ = talk.step_through(event(3, instance), [string("acme")])
        assert made == [(b"kong.request.get_header", b"\x0a\x08in-steps")]
    assert "cannot be sent to Kong" in host.troubles[0]
    assert plugin.got == [["acme"], ["acme"]]
    assert events_under_way(host, instance) == 0


# -- other calls -------------------------------------------------------------------------------------------------------


def test_what_kong_may_ask_of_the_plugin_is_answered(clock: FakeClock) -> None:
    _, talk, instance = hosted(clock, Recording())
    (content,) = talk.send(call(4, get_plugin_names={}))
    assert returned(content) == message("Return", sequence=4, plugin_names={"names": [NAME.encode()]})
    (content,) = talk.send(call(5, get_plugin_info={"name": NAME.encode()}))
    info = returned(content).plugin_info
    assert (returned(content).sequence, info.name, info.priority) == (5, NAME.encode(), 1)
    assert info.loaded_at == info.updated_at == int(clock.wall())
    assert json.loads(info.schema) is None
    (content,) = talk.send(call(6, get_instance_status={"instance_id": instance}))
    status = returned(content).instance_status
    assert (returned(content).sequence, status.name) == (6, NAME.encode())
    assert (status.instance_id, status.started_at) == (instance, int(clock.wall()))


def test_what_is_asked_of_another_plugin_ends_the_connection(clock: FakeClock) -> None:
    _, talk, _ = hosted(clock, Recording())
    with pytest.raises(ConnectionEnd):
        talk.send(call(5, get_plugin_info={"name": b"another"}))


@pytest.mark.parametrize("phase", ["certificate", "", "caf\udce9"])
def test_a_phase_that_the_plugin_does_not_have_is_over_at_once_and_said(phase: str, clock: FakeClock) -> None:
    """A Kong that read another version's dump sends it. At an end of the connection it would do so for ever."""
    host, talk, instance = hosted(clock, Recording())
    handled = {"instance_id": instance, "event_name": phase.encode("utf-8", "surrogateescape")}
    for sequence in (1, 2):
        assert talk.send(call(sequence, handle_event=handled)) == [END, bytes([8, sequence])]
    (said,) = host.troubles
    assert "no phase" in said
    assert events_under_way(host, instance) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\x01",
        b"\x08",
        b"\x08\x80",
        b"\xa2\x02",
        b"\xa2\x02\x05",
        b"\xa2\x02\x01\x08",
        b"\xa2\x02\x80\x01",
        b"\xa2\x02\xff",
        b"GET / HTTP/1.1",
        b"\xff",
    ],
    ids=bytes.hex,
)
def test_what_is_no_call_is_a_protocol_error(content: bytes, clock: FakeClock) -> None:
    _, talk, _ = hosted(clock, Recording())
    with pytest.raises(ProtocolError):
        talk.send(frame(content))


def test_a_frame_of_more_than_16_mib_is_a_protocol_error_at_its_head(clock: FakeClock) -> None:
    host, talk, instance = hosted(clock, Recording(SERIALIZE))
    talk.send(event(1, instance))
    assert talk.conversation.receive((MAX_FRAME_BYTES).to_bytes(4, "little")) == b""
    with pytest.raises(ProtocolError):
        Talk(host).conversation.receive((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


def test_a_frame_of_16_mib_is_read(clock: FakeClock) -> None:
    plugin = Recording(SERIALIZE)
    _, talk, instance = hosted(clock, plugin)
    talk.send(event(1, instance))
    text = "x" * (MAX_FRAME_BYTES - 5)
    whole = frame(string(text))
    assert len(whole) == MAX_FRAME_BYTES + 4
    for start in range(0, len(whole), 256 * 1024):
        assert talk.conversation.receive(whole[start : start + 256 * 1024]) == b""
    assert plugin.got == [[text]]


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_in_any_pieces_end_the_connection_at_most(pieces: list[bytes]) -> None:
    plugin = Recording(GET_TENANT)
    host, talk, instance = hosted(FakeClock(), plugin)
    take(talk, pieces)
    assert events_under_way(host, instance) == 0


damages = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)
calls = st.one_of(
    st.tuples(st.sampled_from([event, event_last]), st.integers(0, 2**40), st.sampled_from(["access", "log", "x"])),
    st.binary(max_size=30),
)


@given(st.lists(calls, max_size=8), st.lists(st.integers(0, 400), max_size=6), damages)
def test_calls_that_are_damaged_end_the_connection_at_most(
    sent: list[Any], cuts: list[int], damage: list[tuple[int, int]]
) -> None:
    plugin = Recording(GET_TENANT)
    host, talk, instance = hosted(FakeClock(), plugin)
    stream = bytearray(
        b"".join(
            one[0](one[1], instance, one[2]) + frame(string("a")) if isinstance(one, tuple) else frame(one)
            for one in sent
        )
    )
    for place, byte in damage:
        if stream:
            stream[place % len(stream)] = byte
    inner = sorted(cut for cut in cuts if cut < len(stream))
    take(talk, [bytes(stream[a:b]) for a, b in zip([0, *inner], [*inner, len(stream)], strict=True)])
    found = host.dispatcher.instances.get(instance)
    assert found is None or found.events == 0


def take(talk: Talk, pieces: Sequence[bytes]) -> None:
    """Take bytes as a connection does, up to its end."""
    try:
        for piece in pieces:
            talk.conversation.receive(piece)
    except (ProtocolError, ConnectionEnd):
        pass
    talk.conversation.lose()


def test_nothing_but_an_event_begins_on_a_quiet_connection(clock: FakeClock) -> None:
    """While sockets are handed over, the answers to an event under way are taken, and what is new waits."""
    _, talk, instance = hosted(clock, Recording(GET_TENANT))
    assert talk.conversation.begins_something(event(1, instance))
    talk.send(event(1, instance))
    assert not talk.conversation.begins_something(frame(string("acme")))
    talk.answer(string("acme"))
    talk.conversation.receive(event(2, instance)[:3])
    assert not talk.conversation.begins_something(event(2, instance)[3:])
