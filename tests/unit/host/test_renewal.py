"""Kong is made to start instances anew when the plugin says that they are outdated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from kong_metering.host.errors import ConnectionEnd
from kong_metering.host.mp_rpc import Answers, MPConversation
from tests.unit.host.hosting import NAME, Host
from tests.unit.host.talking import Talk, call

if TYPE_CHECKING:
    from tests.support.clock import FakeClock


class Plugin:
    """Says that it is outdated as long as the test wants."""

    outdated: str | None = None

    def access(self, kong: Any) -> None:
        """Do nothing."""

    log = access


@pytest.fixture
def plugins() -> list[Plugin]:
    return []


@pytest.fixture
def host(plugins: list[Plugin], clock: FakeClock) -> Host:
    def create(_: object) -> Plugin:
        plugins.append(Plugin())
        return plugins[-1]

    return Host(create, clock)


class Worker:
    """A connection of one of Kong's workers that speaks MessagePack."""

    def __init__(self, host: Host) -> None:
        self._conversation = MPConversation(Answers(host.dispatcher), {})

    def call(self, method: str, argument: object) -> tuple[list[Any], Any]:
        """Give the numbers that it is told, and the answer."""
        unpacker = msgpack.Unpacker()
        unpacker.feed(self._conversation.receive(msgpack.packb([0, 1, f"plugin.{method}", [argument]])))
        *told, answer = unpacker
        assert all(message[:2] == [2, "serverPid"] for message in told)
        return [message[2] for message in told], answer[3]

    def start(self) -> tuple[list[Any], int]:
        told, result = self.call("StartInstance", {"Name": NAME, "Config": "{}"})
        return told, int(result["Id"])

    def event(self, instance: int) -> list[Any]:
        told, result = self.call("HandleEvent", {"InstanceId": instance, "EventName": "log"})
        assert result == {"Data": "ret"} | ({"EventId": result["EventId"]} if "EventId" in result else {})
        return told


def event(talk: Talk, instance: int) -> list[bytes]:
    return talk.send(call(3, handle_event={"instance_id": instance, "event_name": b"log"}))


def test_over_protobuf_an_event_ends_its_connection_once(host: Host, plugins: list[Plugin], clock: FakeClock) -> None:
    talk = Talk(host)
    instance = talk.start()
    event(talk, instance)
    clock.advance(10)
    plugins[0].outdated = "the token is refused"
    event(talk, instance)
    host.dispatcher.sweep()
    with pytest.raises(ConnectionEnd):
        event(talk.beside(host), instance)
    again = talk.beside(host).start()
    assert event(talk.beside(host), again) != []
    assert host.troubles == ["the token is refused"]


def test_over_messagepack_each_connection_tells_another_number_before_an_answer(
    host: Host, plugins: list[Plugin], clock: FakeClock
) -> None:
    one, other = Worker(host), Worker(host)
    (first,), instance = one.start()
    assert one.event(instance) == []
    clock.advance(10)
    plugins[0].outdated = "the token is refused"
    assert one.event(instance) == []
    host.dispatcher.sweep()
    (second,) = one.event(instance)
    assert second != first
    assert one.event(instance) == []
    assert other.event(instance) == [second]
    assert Worker(host).event(instance) == [second]
    assert other.start()[0] == [second]


def test_a_status_is_told_nothing(host: Host) -> None:
    assert Worker(host).call("GetStatus", None)[0] == []


def test_an_instance_that_is_seconds_old_is_left(host: Host, plugins: list[Plugin], clock: FakeClock) -> None:
    worker = Worker(host)
    _, instance = worker.start()
    plugins[0].outdated = "the token is refused"
    clock.advance(9.9)
    worker.event(instance)
    host.dispatcher.sweep()
    assert worker.event(instance) == []


def test_it_happens_once_a_minute_and_only_to_instances_in_use(
    host: Host, plugins: list[Plugin], clock: FakeClock
) -> None:
    worker = Worker(host)
    _, instance = worker.start()
    plugins[0].outdated = "the token is refused"
    seen = []
    for _ in range(125):
        clock.advance(1)
        seen += worker.event(instance)
        host.dispatcher.sweep()
    assert len(seen) == 2
    number = host.dispatcher.renewal.number
    clock.advance(60)
    host.dispatcher.sweep()
    assert host.dispatcher.renewal.number == number
