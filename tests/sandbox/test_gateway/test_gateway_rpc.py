"""What goes wrong between Kong and a plugin server, and who notices; as a real Kong 3.9.3 was seen to do it."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import requests

from kong_metering_sandbox.gateway.logphases import read_log_phases

from .fakes import (
    DEADLINE,
    MESSAGEPACK,
    METERED_ECHO,
    PROTOBUF,
    Gateway,
    both_protocols,
    check_unexpected_error,
    get,
    running_gateway,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOG: list[list[Any]] = [["kong.response.get_status"]]


over_messagepack = pytest.mark.parametrize("protocol", [MESSAGEPACK])
over_protobuf = pytest.mark.parametrize("protocol", [PROTOBUF])


@pytest.fixture(params=[MESSAGEPACK, PROTOBUF])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Gateway]]:
    """Give the running gateway of a protocol; it is started when the first test wants it."""
    with ExitStack() as stack:

        @cache
        def gateway_of(protocol: str) -> Gateway:
            prefix = tmp_path_factory.mktemp("gateway")
            settings = {"nginx_worker_processes": "1"}
            return stack.enter_context(running_gateway(prefix, METERED_ECHO, protocol=protocol, **settings))

        yield gateway_of


@pytest.fixture
def gateway(gateways: Callable[[str], Gateway], protocol: str) -> Gateway:
    """Give the running gateway, with an instance and nothing under way."""
    gateway = gateways(protocol)
    gateway.script(log=LOG)
    before = len(logged(gateway))
    get(gateway, "/echo")
    wait_for(lambda: len(logged(gateway)) > before)
    return gateway


def logged(gateway: Gateway) -> list[int]:
    """Give the statuses that finished log phases got."""
    found = [message[3][0].get(b"Data") for message in gateway.calls("plugin.Step")]
    return [status for status in found if isinstance(status, int)]


def said(gateway: Gateway, before: int) -> str:
    return gateway.log_text()[before:]


@pytest.mark.parametrize(
    ("protocol", "how", "status", "words"),
    [
        (MESSAGEPACK, "close", 200, "mp_rpc.lua: no data"),
        (MESSAGEPACK, "half", 500, "init.lua: missing bytes"),
        (MESSAGEPACK, "sequence", 500, "init.lua: unexpected RPC response ID from Go plugin server"),
        (PROTOBUF, "sequence", 500, "init.lua: assertion failed!"),
        (PROTOBUF, "garbage", 500, "init.lua: assertion failed!"),
        (PROTOBUF, "unknown", 500, 'pb_rpc.lua: pluginserver error: method "kong.no.such.method" not found'),
        (PROTOBUF, "close", 200, "pb_rpc.lua: closed"),
        (PROTOBUF, "half", 200, "pb_rpc.lua: closed"),
    ],
)
def test_an_event_that_breaks_in_access(gateway: Gateway, how: str, status: int, words: str) -> None:
    starts, events, before = len(gateway.calls("plugin.StartInstance")), len(gateway.calls()), len(gateway.log_text())
    count = len(logged(gateway))
    gateway.script(log=LOG, **{"break": {"plugin.HandleEvent": [how, 1]}})
    response = get(gateway, "/echo")
    wait_for(lambda: len(logged(gateway)) > count)
    assert response.status_code == status == logged(gateway)[-1]
    assert words in said(gateway, before)
    if status == 500:
        check_unexpected_error(response)
    # Only a ProtoBuf connection that was closed makes Kong start another instance and send the event again.
    again = "closed" in words
    assert len(gateway.calls("plugin.StartInstance")) - starts == again
    sent = [message[3][0][b"EventName"] for message in gateway.calls()[events:] if message[2] == b"plugin.HandleEvent"]
    assert sent == [b"access"] * (1 + again) + [b"log"]


@over_protobuf
def test_an_event_is_sent_again_as_often_as_the_connection_is_closed(gateway: Gateway) -> None:
    starts = len(gateway.calls("plugin.StartInstance"))
    gateway.script(log=LOG, **{"break": {"plugin.HandleEvent": ["close", 5]}})
    assert get(gateway, "/echo").status_code == 200
    assert len(gateway.calls("plugin.StartInstance")) - starts == 5


@over_protobuf
def test_a_server_that_ends_with_unread_bytes_makes_a_500(gateway: Gateway) -> None:
    before = len(gateway.log_text())
    gateway.script(**{"break": {"frame": "reset"}})
    check_unexpected_error(get(gateway, "/echo"))
    assert "pb_rpc.lua: pluginserver error: connection reset by peer" in said(gateway, before)


@over_protobuf
@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([["kong.request.get_query_arg", "flag"]], "string expected for field 'v', got boolean"),
        ([["kong.request.get_headers"]], "max_headers must be >= 1"),
        ([["kong.response.get_status"]], "function cannot be called in access phase"),
    ],
    ids=["an argument without a value", "no limit is a limit of 0", "in the wrong phase"],
)
def test_a_pdk_call_that_raises_makes_a_500(gateway: Gateway, calls: list[list[Any]], words: str) -> None:
    before = len(gateway.log_text())
    gateway.script(access=calls, log=LOG)
    check_unexpected_error(get(gateway, "/echo?flag"))
    assert words in said(gateway, before)


@over_protobuf
def test_a_server_that_leaves_before_it_has_its_answers_makes_a_500(gateway: Gateway) -> None:
    before = len(gateway.log_text())
    call = ["kong.request.get_header", "x-tenant-id"]
    gateway.script(access=[call], log=[call], pipelined=True, **{"break": {"plugin.HandleEvent": ["leave", 2]}})
    check_unexpected_error(get(gateway, "/echo"))
    # Whether Kong notices it when it sends or when it reads is a matter of which of the two is quicker.
    words = ("init.lua: broken pipe", "pluginserver error: connection reset by peer")
    assert any(word in said(gateway, before) for word in words)
    wait_for(lambda: "lua entry thread aborted: runtime error: " in said(gateway, before))


def test_a_plugin_answers_the_request(gateway: Gateway) -> None:
    gateway.script(access=[["kong.response.exit", 418, "tea", {"X-A": "1"}]], log=LOG)
    response = get(gateway, "/echo")
    assert (response.status_code, response.text, response.headers["X-A"]) == (418, "tea", "1")
    wait_for(lambda: logged(gateway)[-1] == 418)


def test_whatever_fails_in_the_log_phase_is_logged_and_the_client_has_its_answer(
    gateway: Gateway, protocol: str
) -> None:
    before = len(gateway.log_text())
    gateway.script(log=[["kong.no.such"], *LOG])
    assert get(gateway, "/echo").status_code == 200
    if protocol == MESSAGEPACK:
        wait_for(lambda: "could not find pdk method: kong.no.such" in said(gateway, before))
        return
    wait_for(lambda: "lua entry thread aborted" in said(gateway, before))
    assert 'pb_rpc.lua: pluginserver error: method "kong.no.such" not found' in said(gateway, before)
    assert "runtime error: function cannot be called in log phase" in said(gateway, before)


def test_a_variable_cannot_be_read_in_the_log_phase(gateway: Gateway) -> None:
    before = len(gateway.log_text())
    gateway.script(log=[["kong.nginx.get_var", "kong_request_id"]])
    assert get(gateway, "/echo").status_code == 200
    wait_for(lambda: "lua entry thread aborted: runtime error: API disabled" in said(gateway, before))


@over_messagepack
def test_an_error_is_logged_and_the_request_goes_on(gateway: Gateway) -> None:
    before = len(gateway.log_text())
    gateway.script(fail={"plugin.HandleEvent": "it broke"})
    assert get(gateway, "/echo").status_code == 200
    wait_for(lambda: said(gateway, before).count("mp_rpc.lua: it broke") == 2)


# -- connections


@over_protobuf
def test_a_connection_with_unasked_bytes_on_it_is_not_used_again(gateway: Gateway) -> None:
    closed = gateway.closed()
    gateway.script(log=LOG, **{"break": {"plugin.HandleEvent": ["more", 1]}})
    assert get(gateway, "/echo").status_code == 200
    wait_for(lambda: gateway.closed() > closed)
    assert get(gateway, "/echo").status_code == 200


def test_an_idle_connection_that_the_server_closed_is_not_used_again(gateway: Gateway) -> None:
    starts, before = len(gateway.calls("plugin.StartInstance")), len(gateway.log_text())
    closed, events = gateway.closed(), len(gateway.log_events())
    gateway.script(**{"break": {"plugin.HandleEvent log": ["bye", 1]}})
    assert get(gateway, "/echo").status_code == 200
    wait_for(lambda: gateway.closed() > closed)
    assert get(gateway, "/echo").status_code == 200
    gateway.wait_for_log_events(events + 2)
    assert len(gateway.calls("plugin.StartInstance")) == starts
    assert said(gateway, before) == ""


@both_protocols
def test_a_worker_keeps_so_many_connections_as_its_pool_holds(tmp_path: Path, protocol: str) -> None:
    settings = {"nginx_worker_processes": "1", "lua_socket_pool_size": "2"}
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, **settings) as gateway:
        get(gateway, "/echo")
        gateway.wait_for_log_events()
        gateway.script(hold=["plugin.HandleEvent access"])
        with requests_under_way(gateway, 4):
            wait_for(lambda: len(accesses(gateway)) == 5)
            assert gateway.connections() == 4
            gateway.script()
        gateway.wait_for_log_events(5)
        wait_for(lambda: gateway.connections() == 2)


def accesses(gateway: Gateway) -> list[dict[bytes, Any]]:
    events = [message[3][0] for message in gateway.calls("plugin.HandleEvent")]
    return [event for event in events if event[b"EventName"] == b"access"]


@contextmanager
def requests_under_way(gateway: Gateway, count: int) -> Iterator[list[int]]:
    """Send requests beside what the body does, and wait for their statuses at its end."""
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(get(gateway, "/echo").status_code)) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    yield statuses
    for thread in threads:
        thread.join()


# -- instances


@both_protocols
def test_an_instance_that_cannot_be_started_makes_a_500_and_the_next_request_tries_again(
    tmp_path: Path, protocol: str
) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, nginx_worker_processes="1") as gateway:
        gateway.script(**{"break": {"plugin.StartInstance": ["close", 2]}})
        check_unexpected_error(get(gateway, "/echo"))
        reason = "no data" if protocol == MESSAGEPACK else "closed"
        assert f"plugin.lua: starting instance: {reason}" in gateway.log_text()
        wait_for(lambda: f"lua entry thread aborted: runtime error: {reason}" in gateway.log_text())
        assert get(gateway, "/echo").status_code == 200


def test_a_plugin_server_refuses_a_configuration(tmp_path: Path) -> None:
    with running_gateway(tmp_path, METERED_ECHO) as gateway:
        gateway.script(fail={"plugin.StartInstance": "bad configuration"})
        check_unexpected_error(get(gateway, "/echo"))
        assert "plugin.lua: starting instance: bad configuration" in gateway.log_text()


@pytest.mark.parametrize(
    ("protocol", "how", "words"),
    [
        (MESSAGEPACK, "half", "missing bytes"),
        (PROTOBUF, "nothing", "attempt to index field 'instance_status' (a nil value)"),
    ],
)
def test_a_start_that_raises_keeps_its_claim_for_ten_seconds(
    tmp_path: Path, protocol: str, how: str, words: str
) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, nginx_worker_processes="1") as gateway:
        gateway.script(**{"break": {"plugin.StartInstance": [how, 1]}})
        check_unexpected_error(get(gateway, "/echo"))
        assert f"init.lua: {words}" in gateway.log_text()
        # Its log phase waits in vain and gives the claim up; whoever comes after that starts the instance.
        complaint = f"{source(protocol)}Could not claim instance_id for metering-and-billing (key: "
        wait_for(lambda: complaint in gateway.log_text())
        assert get(gateway, "/echo").status_code == 200
        assert len(gateway.calls("plugin.StartInstance")) == 2


@both_protocols
@pytest.mark.parametrize(("left", "logged"), [("", 1), ("plugins: [{name: key-auth}]", 2)], ids=["none", "another"])
def test_once_the_last_plugin_is_gone_what_is_under_way_has_no_log_phase(
    tmp_path: Path, protocol: str, left: str, logged: int
) -> None:
    """Kong 3.9.3 runs none of any plugin then (tests/e2e/test_lifecycle.py has it on the real one)."""
    without = METERED_ECHO.partition("plugins:")[0] + left
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, nginx_worker_processes="1") as gateway:
        gateway.script(hold=["plugin.HandleEvent access"])
        with requests_under_way(gateway, 1) as statuses:
            wait_for(lambda: len(accesses(gateway)) == 1)
            answer = requests.post(f"{gateway.admin}/config", json={"config": without}, timeout=DEADLINE)
            assert answer.status_code == 201
            gateway.script()
        assert statuses == [200]
        configure(gateway, "other")
        assert get(gateway, "/echo").status_code == 200
        gateway.wait_for_log_events(logged)
        assert len(gateway.log_events()) == logged


def source(protocol: str) -> str:
    return "mp_rpc.lua: " if protocol == MESSAGEPACK else "pb_rpc.lua: pluginserver error: "


def configure(gateway: Gateway, token: str) -> None:
    config = METERED_ECHO.replace("api_token: t,", f"api_token: {token},")
    answer = requests.post(f"{gateway.admin}/config", json={"config": config}, timeout=DEADLINE)
    assert answer.status_code == 201


@contextmanager
def event_without_instance(gateway: Gateway) -> Iterator[list[int]]:
    """Let two configurations meet, so that an event goes out without an instance; then do what the body does.

    The statuses of both requests are there at the end.
    """
    gateway.script(hold=["plugin.HandleEvent access"])
    get_old = requests_under_way(gateway, 1)
    old = get_old.__enter__()
    wait_for(lambda: len(accesses(gateway)) == 1)
    configure(gateway, "other")
    # The new configuration's first request has its instance, and closes the old one.
    gateway.script(hold=["plugin.HandleEvent access", "plugin.CloseInstance"])
    with requests_under_way(gateway, 1) as new:
        wait_for(lambda: gateway.calls("plugin.CloseInstance"))
        # The log phase of the request that began before wants its own configuration, and starts that again.
        gateway.script(hold=["plugin.StartInstance", "plugin.CloseInstance"])
        get_old.__exit__(None, None, None)
        wait_for(lambda: len(gateway.calls("plugin.StartInstance")) == 3)
        gateway.script(hold=["plugin.StartInstance", "plugin.HandleEvent access"])
        wait_for(lambda: any(b"InstanceId" not in event for event in accesses(gateway)))
        yield old
    old.extend(new)


@both_protocols
def test_an_event_goes_out_without_an_instance_where_two_configurations_meet(tmp_path: Path, protocol: str) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, nginx_worker_processes="1") as gateway:
        with event_without_instance(gateway) as statuses:
            gateway.script()
        assert statuses == [200, 200]
        gateway.wait_for_log_events(2)
        # It was sent again, with the instance that is started for it.
        sent = [event.get(b"InstanceId") for event in accesses(gateway)]
        assert sent[1] is None
        assert None not in (sent[0], sent[2])
        assert "No plugin instance None" in gateway.log_text() or protocol == PROTOBUF


def test_an_event_without_an_instance_is_lost_if_the_plugin_server_says_anything_else(tmp_path: Path) -> None:
    with running_gateway(tmp_path, METERED_ECHO, nginx_worker_processes="1") as gateway:
        with event_without_instance(gateway) as statuses:
            gateway.script(fail={"plugin.HandleEvent": "InstanceId missing"})
        assert statuses == [200, 200]
        assert len(accesses(gateway)) == 2
        assert "mp_rpc.lua: InstanceId missing" in gateway.log_text()


# -- log timers


@both_protocols
def test_a_worker_runs_so_many_log_phases_at_once_and_drops_the_others(tmp_path: Path, protocol: str) -> None:
    settings = {"nginx_worker_processes": "1", "standin_max_running_timers": "2"}
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, **settings) as gateway:
        gateway.script(hold=["plugin.HandleEvent log"], log=LOG)
        for count in (1, 2):
            assert get(gateway, "/echo").status_code == 200
            gateway.wait_for_log_events(count)
        assert get(gateway, "/echo").status_code == 200
        wait_for(lambda: "2 lua_max_running_timers are not enough" in gateway.log_text())
        assert f"[alert] {gateway.process.pid}#0: 2 lua_max_running_timers are not enough" in gateway.log_text()
        gateway.script(log=LOG)
        wait_for(lambda: len(logged(gateway)) == 2)
        assert get(gateway, "/echo").status_code == 200
        wait_for(lambda: len(logged(gateway)) == 3)
        assert len(gateway.log_events()) == 3


@both_protocols
def test_the_notes_of_log_phases_name_the_process_of_the_instance(tmp_path: Path, protocol: str) -> None:
    notes = tmp_path / "log-phases"
    with running_gateway(
        tmp_path / "gateway", METERED_ECHO, protocol=protocol, standin_log_phases=str(notes)
    ) as gateway:
        get(gateway, "/echo")
        wait_for(lambda: list(read_log_phases(notes)))
        (phase,) = read_log_phases(notes)
        pid = gateway.starts()[0]["pid"]
        assert (phase.server_pid, phase.access_pid) == (pid, pid)
        assert phase.answered_at is not None
