"""What each RPC does, whatever Kong sends and whatever the plugin does."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from greenlet import GreenletExit
from hypothesis import given
from hypothesis import strategies as st
from kong_pdk.exception import PDKException

from kong_metering.host.dispatch import Limits
from tests.support.clock import FakeClock
from tests.support.rpc import RPCFailedError
from tests.unit.host.hosting import NAME, Host, hosting

FORMS = ["Step", "StepMultiMap", "StepConsumer", "StepRoute", "StepService", "StepCredential", "StepMemoryStats"]
NO_IDS: list[object] = [None, "", "7", "7\n", b"7", 7.0, 0, -1, 2**63, True, [], [7], {}, {"Id": 7}]
RET = {"Data": "ret"}


class Plugin:
    """Keeps what it was given, and what was done to it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.busy = False
        self.closed = 0
        self.got: list[object] = []

    def access(self, kong: Any) -> None:
        self.got.append(kong.request.get_header("x-tenant-id"))

    def log(self, kong: Any) -> None:
        self.got.append(kong.ctx.shared.get("key"))
        self.got.append(kong.log.serialize())

    def close(self) -> None:
        self.closed += 1


class Plugins:
    """Makes plugins and keeps them."""

    def __init__(self) -> None:
        self.made: list[Plugin] = []

    def __call__(self, config: Mapping[str, Any]) -> Plugin:
        self.made.append(Plugin(config))
        return self.made[-1]


@pytest.fixture
def plugins() -> Plugins:
    return Plugins()


@pytest.fixture
def host(plugins: Plugins, clock: FakeClock) -> Host:
    return Host(plugins, clock)


# Instances


def test_an_instance_starts_with_the_configuration_that_kong_sends(
    host: Host, plugins: Plugins, clock: FakeClock
) -> None:
    answer = host.call("StartInstance", {"Name": NAME, "Config": '{"a": {"b": [1, null]}}'})
    assert plugins.made[0].config == {"a": {"b": [1, None]}}
    assert answer == {"Name": NAME, "Id": answer["Id"], "Config": {}, "StartTime": int(clock.wall())}


def test_the_configuration_is_never_given_back(host: Host) -> None:
    """It has the token in it, and Kong does not read it."""
    host.start(api_token="om_secret")
    assert "om_secret" not in str(host.answer("plugin.GetStatus"))


@pytest.mark.parametrize(
    "config", [None, "", "nonsense", "[]", "7", "null", b"\xff", 7, {}, [], "[" * 100_000, '{"a":' * 100_000, "\udcff"]
)
def test_a_configuration_that_cannot_be_read_starts_an_instance_without_one(
    config: object, host: Host, plugins: Plugins
) -> None:
    """The plugin says what is wrong with it; the requests on the route go on."""
    answer = host.answer("plugin.StartInstance", {"Name": NAME, "Config": config})
    if config is None:
        assert answer.error == "Config is missing"
        return
    assert answer.error is None
    assert plugins.made[0].config == {}


@pytest.mark.parametrize("name", [None, "another", "hosted\n", 7, ["hosted"], {}])
def test_another_plugin_is_not_served(name: object, host: Host, plugins: Plugins) -> None:
    assert host.answer("plugin.StartInstance", {"Name": name, "Config": "{}"}).error
    assert plugins.made == []


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(1)], ids=repr)
def test_a_plugin_that_cannot_be_made_is_an_error_for_kong(error: BaseException, clock: FakeClock) -> None:
    def create(_: Mapping[str, Any]) -> object:
        raise error

    host = Host(create, clock)
    assert host.answer("plugin.StartInstance", {"Name": NAME, "Config": "{}"}).error
    assert any(type(error).__name__ in line for line in host.troubles)
    assert host.instance_ids() == []


def test_a_closed_instance_is_gone(host: Host, plugins: Plugins) -> None:
    kept, closed = host.start(), host.start()
    assert host.call("CloseInstance", closed)["Id"] == closed
    assert [plugin.closed for plugin in plugins.made] == [0, 1]
    assert host.instance_ids() == [kept]
    with pytest.raises(RPCFailedError, match=rf"^no plugin instance #{closed}$"):
        host.handle(closed)
    with pytest.raises(RPCFailedError, match=r"^no plugin instance"):
        host.call("CloseInstance", closed)


@pytest.mark.parametrize("instance_id", NO_IDS, ids=repr)
def test_an_instance_that_is_not_there_is_said_in_the_words_that_kong_looks_for(
    instance_id: object, host: Host
) -> None:
    """Kong then starts the instance again and sends the event once more."""
    host.start()
    error = host.answer("plugin.CloseInstance", instance_id).error
    assert error is not None
    assert error.startswith("no plugin instance")
    error = host.answer("plugin.HandleEvent", {"InstanceId": instance_id, "EventName": "log"}).error
    assert error is not None
    assert error.startswith("no plugin instance")


def test_an_event_without_any_instance_id_makes_kong_start_one(host: Host) -> None:
    """Kong 3.9 sends it so when two configurations of an entity meet; other words make it drop the event (measured)."""
    host.start()
    error = host.answer("plugin.HandleEvent", {"EventName": "log"}).error
    assert error is not None
    assert error.startswith("no plugin instance")


def test_ids_are_random_exact_in_kongs_doubles_and_never_the_same_in_two_processes(
    plugins: Plugins, clock: FakeClock
) -> None:
    """So an id of a process that is gone never means another instance in the next one."""
    hosts = [Host(plugins, clock) for _ in range(20)]
    ids = [host.start() for _ in range(50) for host in hosts]
    ids += [host.handle(host.start())["EventId"] for host in hosts]
    assert len(set(ids)) == len(ids)
    assert all(0 < number <= 2**53 and int(float(number)) == number for number in ids)
    firsts = sorted(ids[:20])
    # Of 31 bits, two may be neighbours by chance (1 in 5,000 times), but not half of them.
    assert statistics.median(later - earlier for earlier, later in itertools.pairwise(firsts)) > 1000


def test_instances_that_kong_does_not_use_any_more_are_closed_unless_they_are_busy(
    host: Host, plugins: Plugins, clock: FakeClock
) -> None:
    """Kong never closes the instances of a deleted plugin; while events of one wait to be delivered, it stays."""
    unused, busy, used = host.start(), host.start(), host.start()
    plugins.made[1].busy = True
    clock.advance(3599)
    host.dispatcher.sweep()
    assert host.instance_ids() == [unused, busy, used]
    event = host.handle(used, "access")["EventId"]
    host.step(event, "acme")
    clock.advance(1)
    host.dispatcher.sweep()
    assert host.instance_ids() == [busy, used]
    assert [plugin.closed for plugin in plugins.made] == [1, 0, 0]
    plugins.made[1].busy = False
    host.dispatcher.sweep()
    assert host.instance_ids() == [used]
    clock.advance(3599)
    host.dispatcher.sweep()
    assert host.instance_ids() == []
    assert [plugin.closed for plugin in plugins.made] == [1, 1, 1]


def test_an_instance_is_closed_after_its_last_event(host: Host, plugins: Plugins, clock: FakeClock) -> None:
    """Kong may close an instance while a log phase of it still runs: its event must find the plugin open."""
    instance = host.start()
    first, second = host.handle(instance)["EventId"], host.handle(instance, "access")["EventId"]
    host.call("CloseInstance", instance)
    assert plugins.made[0].closed == 0
    assert host.step(second, "acme") == RET
    host.step(first)
    assert plugins.made[0].closed == 0
    assert host.step(first, "{}") == RET
    assert plugins.made[0].closed == 1
    clock.advance(4000)
    host.dispatcher.sweep()
    assert plugins.made[0].closed == 1


def test_a_closed_instance_whose_event_kong_forgets_is_closed_with_it(
    host: Host, plugins: Plugins, clock: FakeClock
) -> None:
    instance = host.start()
    host.handle(instance)
    host.call("CloseInstance", instance)
    clock.advance(60)
    host.dispatcher.sweep()
    assert plugins.made[0].closed == 1


def test_instances_that_fail_when_they_are_closed_do_not_keep_others_from_it(clock: FakeClock) -> None:
    class Failing(Plugin):
        def close(self) -> None:
            super().close()
            raise ValueError("cannot close")

    made: list[Failing] = []

    def create(config: Mapping[str, Any]) -> Failing:
        made.append(Failing(config))
        return made[-1]

    host = Host(create, clock)
    assert host.call("CloseInstance", host.start())
    host.start()
    host.start()
    clock.advance(3600)
    host.dispatcher.sweep()
    host.start()
    host.start()
    host.dispatcher.close()
    assert [plugin.closed for plugin in made] == [1] * 5
    assert "ValueError: cannot close" in host.troubles[0]


def test_a_plugin_without_close_or_busy_can_be_hosted(clock: FakeClock) -> None:
    host, instance = hosting(lambda _: None, clock)
    host.call("CloseInstance", instance)
    host.start()
    clock.advance(3600)
    host.dispatcher.sweep()
    assert host.instance_ids() == []


# Events


def test_a_phase_runs_call_by_call(host: Host, plugins: Plugins) -> None:
    first = host.handle(host.start())
    assert first["Data"] == {"Method": "kong.ctx.shared.get", "Args": ["key"]}
    assert host.step(first["EventId"], {"x": "y"}) == {"Data": {"Method": "kong.log.serialize"}}
    assert host.step(first["EventId"], "the record") == RET
    assert plugins.made[0].got == [{"x": "y"}, "the record"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "value", ["acme", "", 0, 7.5, False, [], {}, {"host": ["a", "b"]}, {"id": "x", "tags": ["y"]}, b"\xff", "\udcff"]
)
def test_every_form_of_step_brings_the_result(form: str, value: object, host: Host, plugins: Plugins) -> None:
    event = host.handle(host.start(), "access")["EventId"]
    assert host.step(event, value, form) == RET
    assert plugins.made[0].got == [value]
    assert type(plugins.made[0].got[0]) is type(value)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_without_data_brings_none(form: str, host: Host, plugins: Plugins) -> None:
    event = host.handle(host.start(), "access")["EventId"]
    assert host.step(event, None, form) == RET
    assert plugins.made[0].got == [None]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("no such header", "exception from kong.request.get_header: no such header"),
        ({"Code": 1}, "exception from kong.request.get_header: {'Code': 1}"),
        ("", "exception from kong.request.get_header: unknown error"),
        (None, "exception from kong.request.get_header: unknown error"),
    ],
)
def test_an_error_of_kongs_is_a_pdk_exception_in_the_plugin(data: object, text: str, clock: FakeClock) -> None:
    caught: list[str] = []

    def phase(kong: Any) -> None:
        try:
            kong.request.get_header("x")
        except PDKException as error:
            caught.append(str(error))

    host, instance = hosting(phase, clock)
    assert host.step(host.handle(instance)["EventId"], data, "StepError") == RET
    assert caught == [text]
    assert host.troubles == []


def test_a_pdk_exception_that_the_plugin_lets_through_ends_its_phase_only(host: Host) -> None:
    event = host.handle(host.start())["EventId"]
    assert host.step(event, "an error", "StepError") == RET
    assert "the log phase failed, the request goes on: PDKException" in host.troubles[0]


@pytest.mark.parametrize("event_id", NO_IDS, ids=repr)
@pytest.mark.parametrize("form", [*FORMS, "StepError"])
def test_a_step_of_an_event_that_is_not_there_is_an_error(event_id: object, form: str, host: Host) -> None:
    waiting = host.handle(host.start())["EventId"]
    error = host.answer(f"plugin.{form}", {"EventId": event_id, "Data": "x"}).error
    assert error is not None
    assert error.startswith("EventId is missing" if event_id is None else "event id ")
    assert host.step(waiting)


def test_an_event_that_is_over_cannot_be_continued(host: Host) -> None:
    event = host.handle(host.start(), "access")["EventId"]
    host.step(event)
    with pytest.raises(RPCFailedError, match=f"^event id {event} not found$"):
        host.step(event)


@pytest.mark.parametrize("phase", ["rewrite", "certificate", "close", "__init__", "config", "", None, 7, ["log"], {}])
def test_a_phase_that_the_plugin_does_not_have_is_an_error(phase: object, host: Host) -> None:
    assert host.answer("plugin.HandleEvent", {"InstanceId": host.start(), "EventName": phase}).error


def test_events_of_many_instances_interleave(host: Host, plugins: Plugins) -> None:
    instances = [host.start() for _ in range(10)]
    events = [host.handle(instance, "access")["EventId"] for _ in range(20) for instance in instances]
    for number, event in enumerate(reversed(events)):
        assert host.step(event, number) == RET
    assert [len(plugin.got) for plugin in plugins.made] == [20] * 10
    assert plugins.made[-1].got == list(range(0, 200, 10))


def test_no_event_waits_while_another_phase_is_under_way(host: Host) -> None:
    """Nothing is locked while plugin code waits for Kong."""
    waiting = host.handle(host.start())["EventId"]
    event = host.handle(host.start(), "access")["EventId"]
    assert host.step(event) == RET
    assert host.step(waiting)


# Whatever the plugin does


class BadLineError(Exception):
    def __str__(self) -> str:
        return "bad\nline"


def raising(error: type[BaseException], calls: int = 0) -> Callable[[Any], None]:
    def phase(kong: Any) -> None:
        for _ in range(calls):
            kong.request.get_header("x")
        raise error

    return phase


@pytest.mark.parametrize("error", [BadLineError, SystemExit, KeyboardInterrupt, GreenletExit])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_phase_that_raises_is_answered_and_said_once(
    error: type[BaseException], calls: int, clock: FakeClock
) -> None:
    host, instance = hosting(raising(error, calls), clock)
    for _ in range(300):
        first = answer = host.handle(instance)
        for _ in range(calls):
            answer = host.step(first["EventId"])
        assert answer == RET
    assert len(host.troubles) == 1
    assert f"the log phase failed, the request goes on: {error.__name__}" in host.troubles[0]
    assert "\n" not in host.troubles[0]
    clock.advance(60)
    host.repeats.summarise()
    assert "299 more like this" in host.troubles[1]
    assert host.plugin_status["Events"] == 0


def test_the_cause_is_said_with_the_place_where_it_was_raised(clock: FakeClock) -> None:
    host, instance = hosting(lambda _: 1 / 0, clock)
    host.handle(instance)
    assert "ZeroDivisionError: division by zero at test_dispatch.py:" in host.troubles[0]


def test_a_phase_that_returns_without_a_call_is_over_at_once(clock: FakeClock) -> None:
    host, instance = hosting(lambda _: "something", clock)
    assert host.handle(instance) == RET
    assert host.plugin_status["Events"] == 0


@pytest.mark.parametrize("function", ["exit", "error"])
def test_a_call_that_ends_the_request_in_kong_ends_the_phase(function: str, clock: FakeClock) -> None:
    """Kong sends nothing more for it; what the phase has to clean up, it does."""
    seen: list[str] = []

    def phase(kong: Any) -> None:
        try:
            getattr(kong.response, function)(403, "no")
            seen.append("never")
        finally:
            seen.append("cleaned up")

    host, instance = hosting(phase, clock)
    answer = host.handle(instance)
    assert answer["Data"] == {"Method": f"kong.response.{function}", "Args": [403, "no"]}
    assert isinstance(answer["EventId"], int)
    assert seen == ["cleaned up"]
    assert host.plugin_status["Events"] == 0
    with pytest.raises(RPCFailedError, match="not found"):
        host.step(answer["EventId"])


class Unsayable:
    def __repr__(self) -> str:
        return "unsayable"


@pytest.mark.parametrize("argument", [Unsayable(), {1}, 2**64, "\ud800", {"a": [Unsayable()]}], ids=repr)
@pytest.mark.parametrize("method", ["kong.ctx.shared.set", "kong.response.exit"])
@pytest.mark.parametrize("calls_before", [0, 1])
def test_an_argument_that_cannot_be_sent_ends_its_own_event_only(
    argument: object, method: str, calls_before: int, clock: FakeClock
) -> None:
    answers: list[object] = []

    def phase(kong: Any) -> None:
        first = kong.request.get_header("x")
        for _ in range(calls_before):
            kong.request.get_method()
        answers.append(first)
        if first == "good":
            answers.append(kong.request.get_method())
        else:
            function = kong.ctx.shared.set if method == "kong.ctx.shared.set" else kong.response.exit
            function("key", argument)

    host, instance = hosting(phase, clock)
    good = host.handle(instance)["EventId"]
    bad = host.handle(instance)["EventId"]
    also_good = host.handle(instance)["EventId"]
    last = host.step(bad, "bad")
    assert (host.step(bad) if calls_before else last) == RET
    for event in (good, also_good):
        for _ in range(calls_before + 1):
            assert host.step(event, "good")["Data"] == {"Method": "kong.request.get_method"}
        assert host.step(event, "GET") == RET
    with pytest.raises(RPCFailedError, match="not found"):
        host.step(bad)
    assert len(host.troubles) == 1
    assert "cannot be sent to Kong" in host.troubles[0]
    assert host.plugin_status["Events"] == 0


def test_a_status_that_cannot_be_sent_ends_no_event(plugins: Plugins, clock: FakeClock) -> None:
    host = Host(plugins, clock, status=lambda: {"figure": Unsayable()})
    event = host.handle(host.start(), "access")["EventId"]
    host.answer("plugin.GetStatus")
    assert host.step(event, "acme") == RET
    assert plugins.made[0].got == ["acme"]


def test_a_status_that_fails_is_an_error_and_not_the_end(plugins: Plugins, clock: FakeClock) -> None:
    def status() -> dict[str, Any]:
        sys.exit("no status")

    host = Host(plugins, clock, status=status)
    assert host.answer("plugin.GetStatus").error
    assert host.start()


def test_an_exception_that_cannot_even_be_told_is_answered(clock: FakeClock) -> None:
    class WithoutWordsError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    host, instance = hosting(raising(WithoutWordsError), clock)
    answer = host.answer("plugin.HandleEvent", {"InstanceId": instance, "EventName": "log"})
    assert answer.error is not None or answer.result == RET
    assert host.troubles
    assert host.plugin_status["Events"] == 0


# Events that Kong does not finish


def test_abandoned_events_are_forgotten_those_that_go_on_are_not(clock: FakeClock) -> None:
    ended: list[str] = []

    def phase(kong: Any) -> None:
        try:
            while kong.request.get_header("x"):
                pass
        finally:
            ended.append("ended")

    host, instance = hosting(phase, clock)
    abandoned, goes_on = host.handle(instance)["EventId"], host.handle(instance)["EventId"]
    clock.advance(59)
    host.step(goes_on, "more")
    host.dispatcher.sweep()
    assert host.plugin_status["Events"] == 2
    clock.advance(1)
    host.dispatcher.sweep()
    assert host.plugin_status["Events"] == 1
    assert ended == ["ended"]
    with pytest.raises(RPCFailedError, match="not found"):
        host.step(abandoned)
    assert host.step(goes_on) == RET
    assert host.troubles == ["a pending log phase was forgotten: Kong did not go on with it for 60 s"]


def test_how_long_events_are_kept_can_be_set(clock: FakeClock) -> None:
    host, instance = hosting(lambda kong: kong.wait(), clock, Limits(phase_timeout=5, instance_ttl=10))
    host.handle(instance)
    clock.advance(5)
    host.dispatcher.sweep()
    assert host.plugin_status["Events"] == 0
    clock.advance(5)
    host.dispatcher.sweep()
    assert host.instance_ids() == []


def refuse_to_end(kong: Any) -> None:
    while True:
        try:
            kong.wait()
        except GreenletExit:
            continue


def end_otherwise(kong: Any) -> None:
    try:
        kong.wait()
    except GreenletExit:
        sys.exit("otherwise")


@pytest.mark.parametrize("phase", [refuse_to_end, end_otherwise])
def test_a_phase_that_catches_its_end_is_forgotten_all_the_same(phase: Callable[[Any], None], clock: FakeClock) -> None:
    host, instance = hosting(phase, clock)
    events = [host.handle(instance)["EventId"] for _ in range(10)]
    clock.advance(60)
    host.dispatcher.sweep()
    assert host.plugin_status["Events"] == 0
    for event in events:
        with pytest.raises(RPCFailedError, match="not found"):
            host.step(event)
    assert host.handle(instance)["Data"] == {"Method": "kong.wait"}
    host.dispatcher.close()  # else the garbage collector ends that last one, and nobody hears how


def test_the_end_of_the_process_ends_events_and_instances(host: Host, plugins: Plugins) -> None:
    instances = [host.start(), host.start()]
    host.handle(instances[0])
    host.dispatcher.close()
    assert host.plugin_status["Events"] == 0
    assert host.instance_ids() == []
    assert [plugin.closed for plugin in plugins.made] == [1, 1]


# Information


def test_status_tells_of_instances_events_and_the_plugins_own_figures(plugins: Plugins, clock: FakeClock) -> None:
    host = Host(plugins, clock, status=lambda: {"accepted": 7})
    loaded = int(clock.wall())
    clock.advance(10)
    instance, closed = host.start(), host.start()
    host.handle(instance)
    clock.advance(10)
    host.call("CloseInstance", closed)
    status = host.call("GetStatus")
    assert status["Pid"] == os.getpid()
    assert status["Plugins"] == {
        NAME: {
            "Name": NAME,
            "Modtime": loaded,
            "LoadTime": loaded,
            "Instances": [{"Name": NAME, "Id": instance, "Config": {}, "StartTime": loaded + 10}],
            "LastStartInstance": loaded + 10,
            "LastCloseInstance": loaded + 20,
            "Events": 1,
            "Status": {"accepted": 7},
        }
    }


def test_plugin_information_is_given_for_our_plugin_only(host: Host) -> None:
    assert host.call("GetPluginInfo", NAME) == {"Name": NAME, "Priority": 1}
    for name in ("another", None, 7, [NAME]):
        assert host.answer("plugin.GetPluginInfo", name).error


@pytest.mark.parametrize(
    "method",
    ["", "plugin", "plugin.", "plugin.Nothing", "plugin.step", "plugin.__init__", "kong.Step", "Step", "\udcff"],
)
def test_a_method_that_is_not_in_the_protocol_is_an_error(method: str, host: Host) -> None:
    error = host.answer(method).error
    assert error is not None
    assert error.endswith("is not supported")


@given(
    st.sampled_from(
        ["StartInstance", "CloseInstance", "HandleEvent", "StepError", "GetStatus", "GetPluginInfo", *FORMS]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["InstanceId", "EventName", "EventId", "Data", "Name", "Config"]) | st.text(),
                inner,
                max_size=6,
            )
        ),
        max_leaves=8,
    ),
)
def test_any_argument_of_any_rpc_is_answered(method: str, argument: object) -> None:
    clock = FakeClock()
    host = Host(Plugins(), clock)
    event = host.handle(host.start(), "access")["EventId"]
    answer = host.answer(f"plugin.{method}", argument)
    assert answer.error is None or "\n" not in answer.error
    assert host.step(event, "acme") == RET
