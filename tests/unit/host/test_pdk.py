"""The `kong` object of our host behaves as that of kong-pdk in its python style; and the greenlets that run phases."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pytest
from greenlet import GreenletExit, greenlet
from kong_pdk.exception import PDKException
from kong_pdk.pdk import Kong

from kong_metering.host.pdk import Done, PhaseRunner
from kong_metering.steps import PDKCall

Reply = tuple[object, object]  # a value and an error


@dataclass
class Trace:
    """What a phase asked Kong for, what it got or caught, and how it ended."""

    calls: list[tuple[str, list[object]]] = field(default_factory=list)
    seen: list[object] = field(default_factory=list)
    error: str | None = None


class Channel:
    """The other end of kong-pdk's `Kong`."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self.calls: list[tuple[str, list[object]]] = []
        self._replies = iter(replies)

    def put(self, message: dict[str, Any]) -> None:
        self.calls.append((message["Method"], list(message["Args"])))

    def get(self) -> Reply:
        return next(self._replies)


Phase = Callable[[Any, list[object]], object]


def under_kong_pdk(phase: Phase, replies: Sequence[Reply]) -> Trace:
    trace, channel = Trace(), Channel(replies)
    try:
        phase(Kong(channel, lua_style=False).kong, trace.seen)
    except Exception as error:  # noqa: BLE001 - it is what is compared
        trace.error = repr(error)
    trace.calls = channel.calls
    return trace


def under_our_host(phase: Phase, replies: Sequence[Reply]) -> Trace:
    trace, runner, left = Trace(), PhaseRunner(), iter(replies)
    wants = runner.start(lambda kong: phase(kong, trace.seen))
    while isinstance(wants, PDKCall):
        trace.calls.append((wants.method, list(wants.arguments)))
        wants = runner.resume(*next(left))
    trace.error = repr(wants.error) if wants.error else None
    return trace


def call_everything(kong: Any, seen: list[object]) -> None:
    seen.append(kong.request.get_header("x-tenant-id"))
    seen.append(kong.request.get_headers(1000))
    seen.append(kong.client.get_consumer())
    seen.append(kong.ctx.shared.set("key", {"a": [1, None]}))
    seen.append(kong.ctx.shared.get("key"))
    seen.append(kong.service.request.set_header("x", 1.5))
    seen.append(kong.nginx.get_var("request_id"))


def log_things_that_messagepack_cannot_say(kong: Any, seen: list[object]) -> None:
    seen.append(kong.log("plain", 1, [2], {"a": 3}))
    seen.append(kong.log.err(ValueError("bad"), None, True, 1.5, b"\xff", (1, 2), object))  # noqa: FBT003 - a value to log
    seen.append(kong.log.inspect.something(Exception))
    seen.append(kong.log.serialize())
    seen.append(kong.logger(None))


def catch_an_error_and_go_on(kong: Any, seen: list[object]) -> None:
    try:
        kong.request.get_raw_body()
    except PDKException as error:
        seen.append(str(error))
    seen.append(kong.request.get_method())


def let_an_error_through(kong: Any, seen: list[object]) -> None:
    seen.append(kong.request.get_method())
    kong.request.get_raw_body()
    seen.append("not reached")


def keep_functions(kong: Any, seen: list[object]) -> None:
    get_header = kong.request.get_header
    seen.append(get_header("a"))
    seen.append(get_header("b"))
    request = kong.request
    seen.append(request.get_header("c"))


def raise_at_once(_kong: Any, _seen: list[object]) -> None:
    raise ZeroDivisionError("at once")


def return_early(_kong: Any, _seen: list[object]) -> str:
    return "early"


@pytest.mark.parametrize(
    ("phase", "replies"),
    [
        (
            call_everything,
            [("acme", None), ({"a": ["b"]}, None), (None, None), (None, None), ({"a": [1]}, None), (None, ""), (0, 0)],
        ),
        (log_things_that_messagepack_cannot_say, [(None, None)] * 5),
        (catch_an_error_and_go_on, [(None, "no body"), ("GET", None)]),
        (catch_an_error_and_go_on, [("a body", {"Code": 1}), ("GET", None)]),
        (let_an_error_through, [("GET", None), ("a body", "an error all the same")]),
        (keep_functions, [("1", None), ("2", None), ("3", None)]),
        (raise_at_once, []),
        (return_early, []),
    ],
)
def test_a_phase_asks_and_sees_the_same_as_under_kong_pdk(phase: Phase, replies: Sequence[Reply]) -> None:
    ours, theirs = under_our_host(phase, replies), under_kong_pdk(phase, replies)
    assert ours == theirs


def test_looking_for_special_methods_does_not_call_kong() -> None:
    def phase(kong: Any) -> None:
        with pytest.raises(AttributeError):
            _ = kong.request.__len__
        assert not hasattr(kong, "__iter__")

    assert PhaseRunner().start(phase) == Done()


def end_with(error: BaseException) -> Callable[[Any], NoReturn]:
    def phase(_kong: Any) -> NoReturn:
        raise error

    return phase


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GreenletExit(), GeneratorExit(), StopIteration(7)],
    ids=repr,
)
def test_whatever_a_phase_raises_ends_the_phase_only(error: BaseException) -> None:
    """The runner can be used for the next phase."""
    runner = PhaseRunner()
    done = runner.start(end_with(error))
    assert isinstance(done, Done)
    assert done.error is error
    assert runner.start(lambda kong: kong.a()) == PDKCall("kong.a", ())
    assert runner.resume(None) == Done()


def test_a_phase_that_calls_sys_exit_after_a_pdk_call_ends_only_itself() -> None:
    def phase(kong: Any) -> None:
        kong.a()
        sys.exit("out")

    runner = PhaseRunner()
    runner.start(phase)
    done = runner.resume(None)
    assert isinstance(done, Done)
    assert isinstance(done.error, SystemExit)


def test_a_runner_runs_many_phases_one_after_another() -> None:
    runner = PhaseRunner()
    for number in range(100):
        assert runner.start(lambda kong: kong.count(number)) == PDKCall("kong.count", (number,))  # noqa: B023 - runs now
        assert runner.resume("ok") == Done()


def test_phases_of_many_runners_interleave() -> None:
    seen: list[object] = []

    def phase(kong: Any) -> None:
        seen.append(kong.first() + kong.second())

    runners = [PhaseRunner() for _ in range(50)]
    for runner in runners:
        assert runner.start(phase) == PDKCall("kong.first", ())
    for number, runner in enumerate(runners):
        assert runner.resume(number) == PDKCall("kong.second", ())
    for runner in reversed(runners):
        assert runner.resume(1000) == Done()
    assert seen == [1000 + number for number in reversed(range(50))]


def test_an_abandoned_phase_can_clean_up() -> None:
    cleaned: list[str] = []

    def phase(kong: Any) -> None:
        try:
            kong.wait()
        finally:
            cleaned.append("yes")

    runner = PhaseRunner()
    runner.start(phase)
    runner.abandon()
    runner.abandon()
    assert cleaned == ["yes"]


def stubborn(kong: Any) -> None:
    """Go on whatever happens."""
    while True:
        try:
            kong.wait()
        except BaseException:  # noqa: BLE001, S112 - that is what is tried
            continue


def swallow(kong: Any) -> None:
    try:
        kong.wait()
    except BaseException:  # noqa: BLE001 - that is what is tried
        return


def raise_another(kong: Any) -> None:
    try:
        kong.wait()
    except BaseException as error:
        raise SystemExit(1) from error


@pytest.mark.parametrize("phase", [stubborn, swallow, raise_another])
def test_a_phase_that_does_not_want_to_be_abandoned_is_left_behind(phase: Callable[[Any], None]) -> None:
    for _ in range(3):
        runner = PhaseRunner()
        assert isinstance(runner.start(phase), PDKCall)
        with suppress(SystemExit):
            runner.abandon()
        del runner
        gc.collect()
    assert PhaseRunner().start(lambda _: None) == Done()


class Plugin:
    """A plugin whose log phase fails when it is told to."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def log(self, kong: Any) -> None:
        kong.wait()
        if self.fails:
            raise ValueError("as told")


@pytest.mark.parametrize("fails", [False, True])
def test_an_idle_runner_keeps_nothing_of_a_phase_alive(*, fails: bool) -> None:
    plugin = Plugin(fails=fails)
    gone = weakref.ref(plugin)
    runner = PhaseRunner()
    for _ in range(2):
        runner.start(plugin.log)
        done = runner.resume(None)
        assert isinstance(done, Done)
        assert (done.error is not None) == fails
    del plugin, done
    assert gone() is None, "not even a cycle that only the garbage collector would find"
    assert runner.start(lambda _: None) == Done()


def test_a_pdk_call_from_another_thread_fails_there_and_does_no_harm_here() -> None:
    errors: list[Exception] = []

    def phase(kong: Any) -> None:
        def elsewhere() -> None:
            try:
                kong.wait()
            except Exception as error:  # noqa: BLE001 - it is looked at below
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    assert PhaseRunner().start(phase) == Done()
    assert len(errors) == 1


def test_a_runner_belongs_to_the_greenlet_that_made_it() -> None:
    """The loop's own greenlet need not be the first one."""

    def host() -> PDKCall | Done:
        runner = PhaseRunner()
        runner.start(lambda kong: kong.a())
        return runner.resume(None)

    assert greenlet(host).switch() == Done()
