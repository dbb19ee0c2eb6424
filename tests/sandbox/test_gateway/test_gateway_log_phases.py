"""What the gateway notes of log phases names the process that answered, whoever had the connection before."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from kong_metering_sandbox.gateway.logphases import (
    UNKNOWN_PROCESS,
    LogPhase,
    LogPhaseFile,
    NoLogPhases,
    read_log_phases,
)
from kong_metering_sandbox.gateway.rpc import RpcError
from kong_metering_sandbox.gateways import StandIn
from tests.support.plugin_server import PluginServerProcess
from tests.support.waiting import wait_until

from .fakes import METERED_ECHO, get, running_gateway


class SpeakingMessagePack(StandIn):
    """Answers requests also where there is no plugin server: over ProtoBuf they get a 500."""

    protocol = "msgpack"


class Noting:
    """A gateway with one worker that notes log phases, beside plugin servers that are started by hand."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "log-phases"
        settings = {
            "pluginserver_metering_start_cmd": "",
            "nginx_worker_processes": "1",
            "standin_log_phases": str(self._file),
        }
        self.gateway = SpeakingMessagePack(directory / "gateway", METERED_ECHO, settings=settings)
        self._numbers = itertools.count()

    def plugin_server(self) -> PluginServerProcess:
        return PluginServerProcess(prefix=self.gateway.prefix)

    def request(self) -> LogPhase:
        """Send a request, and give what is noted of its log phase."""
        target = f"/echo/{next(self._numbers)}"
        assert requests.get(self.gateway.proxy_url + target, timeout=10).status_code == 200
        return wait_until(lambda: self._noted().get(target), "the log phase is noted")

    def _noted(self) -> dict[str, LogPhase]:
        return {phase.target: phase for phase in read_log_phases(self._file)}


@pytest.fixture
def noting(tmp_path: Path) -> Iterator[Noting]:
    noting = Noting(tmp_path)
    yield noting
    noting.gateway.stop()


def pids_of(phase: LogPhase) -> tuple[int | None, int | None]:
    return phase.access_pid, phase.server_pid


def test_a_process_that_took_over_the_connections_is_named_for_what_it_answers(noting: Noting) -> None:
    with noting.plugin_server() as old:
        noting.gateway.start()
        assert pids_of(noting.request()) == (old.server_pid,) * 2
        with noting.plugin_server() as new:
            # The connection lies in the gateway's pool since the first request.
            assert pids_of(noting.request()) == (new.server_pid,) * 2
            assert old.stop() == 0
            assert pids_of(noting.request()) == (new.server_pid,) * 2
    assert "taken over from the previous process" in "".join(new.log)


def test_the_next_process_is_named_after_one_was_killed(noting: Noting) -> None:
    with noting.plugin_server() as killed:
        noting.gateway.start()
        assert noting.request().server_pid == killed.server_pid
        killed.kill()
        unanswered = noting.request()
        assert (unanswered.answered_at, unanswered.server_pid, unanswered.access_pid) == (None, None, None)
        with noting.plugin_server() as new:
            assert noting.request().server_pid == new.server_pid


def test_without_notes_the_plugin_server_is_asked_nothing_that_kong_does_not_ask(tmp_path: Path) -> None:
    with running_gateway(tmp_path, METERED_ECHO) as gateway:
        get(gateway, "/echo")
        gateway.wait_for_log_events()
        methods = {call[2].decode() for call in gateway.calls()}
    assert methods <= {"plugin.StartInstance", "plugin.HandleEvent", "plugin.Step"}


STATUS = {b"Pid": 42, b"Plugins": {b"metering-and-billing": {b"Instances": [{b"Id": 7}, {b"Id": 8}]}}}


@pytest.mark.parametrize(
    ("instance", "answer", "pid"),
    [(8, STATUS, 42), (9, STATUS, UNKNOWN_PROCESS), (8, RpcError("no data"), UNKNOWN_PROCESS)],
    ids=["its process", "the one that took over meanwhile", "one that was killed meanwhile"],
)
def test_only_a_process_that_has_the_instance_is_taken_for_its_process(
    instance: int, answer: Any, pid: int, tmp_path: Path
) -> None:
    asked = []

    async def call(method: str, _argument: Any) -> Any:
        asked.append(method)
        if isinstance(answer, RpcError):
            raise answer
        return answer

    assert asyncio.run(LogPhaseFile(tmp_path / "log-phases").process_of(instance, call)) == pid
    assert asyncio.run(NoLogPhases().process_of(instance, call)) == UNKNOWN_PROCESS
    assert asked == ["plugin.GetStatus"]
