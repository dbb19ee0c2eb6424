"""What has to be so before the commands under a heading of a page are typed, and how each of them ends.

A scene is a generator: it prepares, yields before each command how that will end, and looks at what came of them when
it is resumed after the last. Most headings need none: their commands end well.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import requests

from kong_metering.eventlog.log import DAMAGED
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from kong_metering_sandbox.collector.faults import FaultMatch, FaultRule
from tests.docs.world import DELETED, KONNECT, RUNNING, World
from tests.support.plugin_server import ROOT
from tests.support.rpc import KongClient, KongRequest
from tests.support.waiting import wait_until
from tests.unit.commands.helpers import run, run_json
from tests.unit.commands.test_restore import set_aside
from tests.unit.commands.test_verify import TOKEN, event, keep, post
from tests.unit.host.conftest import answers, header_config


@dataclass(frozen=True)
class Ending:
    """How a command ends: with a status; by Ctrl-C, once `until` is true, if it does not end by itself."""

    status: int = 0
    until: Callable[[str], bool] | None = None


WELL = Ending()
Scene = Callable[[World], Iterator[Ending]]

_PATIENCE = 90.0
_HOUR_MS = 3_600_000
_BATCH = 20
_CONFIG = f"""
_format_version: "3.0"
plugins:
- name: metering-and-billing
  config:
    ingest_endpoint: {KONNECT}
    api_token: {TOKEN}
    subject: {{look_up_value_in: header, field: x-tenant-id}}
"""
_WITHOUT_SUBJECT = {
    "specversion": "1.0",
    "id": "63674e3d052b42049663f991b8393388:api_request",
    "source": "kong-gateway",
    "type": "kong.api_request",
    "subject": "",
    "time": "2026-11-22T15:05:59.335Z",
    "data": {"request_method": "GET", "request_uri": "/anything/orders", "response_http_status": 200},
}
# No event twice, whatever the scene.
_numbers = itertools.count(1)


def as_it_is(_: World) -> Iterator[Ending]:
    """Have the commands typed with the world as it is; they end well."""
    return itertools.repeat(WELL)


# README


def see_it_run(_: World) -> Iterator[Ending]:
    """End the second command, which says how."""
    yield WELL
    yield Ending(130, lambda said: "Ctrl-C ends it." in said)


def enable(world: World) -> Iterator[Ending]:
    """Do step 5 after the last command: a request with the header gives an event."""
    yield WELL  # install
    yield WELL  # curl
    world.request("acme")
    world.endpoint.client.wait_for_events(1)
    assert {usage.subject for usage in world.endpoint.client.usage()} == {"acme"}


# docs/commands.md


def check(world: World) -> Iterator[Ending]:
    """Let the file of the page be there, whose faults are counted as errors."""
    (file,) = re.findall(
        r"^```yaml\n(.*?)^```$", (ROOT / "docs/commands.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (world.checkout / "kong.yaml").write_text(file, encoding="utf-8")
    yield Ending(1)


def test_event(world: World) -> Iterator[Ending]:
    """Let kong.yaml be right."""
    world.write("kong.yaml", _CONFIG)
    yield WELL
    yield WELL


def verify(world: World) -> Iterator[Ending]:
    """Have events that are stored, each a customer's."""
    metered(world, "acme", "acme")
    yield WELL
    yield WELL


def customers(world: World) -> Iterator[Ending]:
    """Have events of two subjects that are nobody's."""
    metered(world, "acme", *["stranger"] * 4, "Acme", "Acme")
    yield Ending(1)
    yield WELL


def metered(world: World, *subjects: str, is_lost: bool = False) -> None:
    """Have events of these subjects that were delivered and are kept; stored too, if they are not lost."""
    events = [event(next(_numbers), subject=subject) for subject in subjects]
    keep(world.spool, world.endpoint.ingest_v3, *events)
    if not is_lost:
        post(world.endpoint.ingest_v3, *events)


# docs/enabling.md


def meters(world: World) -> Iterator[Ending]:
    """Look at what the command has posted: each meter, alone."""
    yield WELL
    sent = [json.loads(post.body) for post in world.openmeter.requests() if post.path.endswith("/meters")]
    assert sent == json.loads((ROOT / "examples/openmeter/meters.json").read_text("utf-8"))


# docs/guarantees.md


def missing(world: World) -> Iterator[Ending]:
    """Have events that got a 2xx and were lost; they are there when they were sent again."""
    world.write("token", TOKEN)
    metered(world, *["acme"] * 3)
    metered(world, *["acme"] * 12, is_lost=True)
    yield Ending(1)
    yield WELL


# docs/monitoring.md


def watched(world: World) -> Iterator[Ending]:
    """Let the server serve until all paths of the page were asked for."""

    def is_watched(_: str) -> bool:
        try:
            found = [
                requests.get(f"http://{world.metrics}{path}", timeout=60) for path in ("/metrics", "/", "/healthz")
            ]
        except requests.ConnectionError:
            return False
        return all(answer.ok for answer in found)

    yield Ending(0, is_watched)


# docs/troubleshooting.md


def refused(world: World) -> Iterator[Ending]:
    """Have a dead letter: the endpoint refuses one event, and takes others."""
    world.endpoint.client.faults(FaultRule(match=FaultMatch(subject="initech"), status=400))
    world.add_customer("initech")
    world.request("initech")

    def is_given_up() -> bool:
        # What others send shows that the endpoint takes others.
        world.request("acme")
        return bool(run_json(world.spool, "status")["dead_letters"]["count"])

    wait_until(is_given_up, "a dead letter", _PATIENCE, pause=0.1)
    world.endpoint.client.clear_faults()
    yield WELL
    yield WELL


# docs/spool-command.md


def spool_of_two(world: World) -> Iterator[Ending]:
    """Have a queue that nobody holds, and one of a running server whose endpoint has no room."""
    leave(world, 40, sent=20)
    bad = json.dumps(_WITHOUT_SUBJECT).encode()
    answer = requests.post(
        url := world.endpoint.ingest_v3,
        json=[json.loads(bad)],
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=60,
    )
    letters(world, "rejected", bad, answer=f"{url} answered {answer.status_code}: {answer.text}")
    meter(world, 37)
    yield WELL


def letters_listed(world: World) -> Iterator[Ending]:
    letters(world, "ambiguous", *[event(next(_numbers)) for _ in range(6)])
    yield WELL
    yield WELL


def exported(world: World) -> Iterator[Ending]:
    """Have the token where curl looks for it; what was exported is at the endpoint then."""
    world.write("token-header", f"Authorization: Bearer {TOKEN}\n")
    before = world.endpoint.client.stats().unique
    yield WELL
    yield WELL
    yield WELL
    assert world.endpoint.client.stats().unique == before + 6


def taken_back(world: World) -> Iterator[Ending]:
    """Have a segment that the disk did not give for a while, of a log that a process has done with since."""
    with TemporaryDirectory() as other:
        set_aside(Path(other), delivered=4)
        spool = SpoolDirectory(Path(other))
        spool.adopt()
        spool.close()
        shutil.copytree(Path(other) / DAMAGED, world.spool / DAMAGED, dirs_exist_ok=True)
    yield WELL


def delivered(world: World) -> Iterator[Ending]:
    """Have what waits without a server, and let the other endpoint take what is held, and then no more."""
    purge(world)
    leave(world, 40, sent=20)
    leave(world, 10)
    world.write("token", TOKEN)
    yield WELL
    world.another.client.clear_faults()
    yield WELL
    meter(world, 12)
    yield Ending(3)
    yield WELL


def purged(world: World) -> Iterator[Ending]:
    purge(world)
    leave(world, 1)
    yield WELL
    yield WELL
    yield WELL
    yield WELL


def purge(world: World) -> None:
    """Remove what waits for the plugin that was deleted."""
    assert run(world.spool, "purge", "--waiting", "--plugin-id", DELETED, "--yes").exit_code == 0


def leave(world: World, count: int, *, sent: int = 0) -> None:
    """Leave events as a process does that is dead; the first ones were sent, longer ago than the window."""
    accepted = _now() - (26 * _HOUR_MS if sent else 0)
    spool = SpoolDirectory(world.spool)
    held = spool.log_for(_queue(world))
    held.log.append([event(next(_numbers)) for _ in range(count)], accepted)
    if sent:
        held.log.mark_ambiguous(1, sent, accepted)
    spool.close()


def letters(world: World, reason: str, *events: bytes, answer: str = "") -> None:
    """Leave dead letters of the plugin that was deleted."""
    kept = DeadLetters(world.spool / DEAD_LETTERS)
    kept.add([DeadLetter(reason, answer, _queue(world), _now() - _HOUR_MS, event) for event in events], _now())


def meter(world: World, count: int) -> None:
    """Have a running server take in events, and keep them: their endpoint had room for one, and has none any more."""
    endpoint, client = world.another.client, KongClient(world.server.path)
    queue = {"max_batch_size": _BATCH, "initial_retry_delay": 3600, "max_retry_delay": 3600}
    config = header_config(
        world.another.ingest_v3, api_token=TOKEN, queue=queue, __plugin_id=RUNNING, plugin_instance_name="payments"
    )
    instance = client.start_instance(config)

    def request(times: int) -> None:
        for _ in range(times):
            client.run_phases(instance, KongRequest(answers("acme", next(_numbers))))

    taken = endpoint.stats().unique
    request(1)
    wait_until(lambda: endpoint.stats().unique > taken, "one event was taken", _PATIENCE)
    endpoint.faults(FaultRule(status=503, body="no room"))
    sent = len(endpoint.requests())
    request(count)
    wait_until(lambda: len(endpoint.requests()) > sent, "the first batch was refused", _PATIENCE)
    wait_until(lambda: _waiting(world) >= count, f"{count} events on disk", _PATIENCE)


def _waiting(world: World) -> int:
    queues = run_json(world.spool, "status")["queues"]
    return sum(queue["waiting"] for queue in queues if queue["plugin_id"] == RUNNING)


def _queue(world: World) -> QueueIdentity:
    return QueueIdentity(DELETED, f"metering ({DELETED})", world.endpoint.ingest_v3)


def _now() -> int:
    return time.time_ns() // 1_000_000


SCENES: dict[tuple[str, str], Scene] = {
    ("README.md", "See it run"): see_it_run,
    ("README.md", "Load it into Kong"): enable,
    ("docs/commands.md", "check: mistakes in a configuration, before Kong has it"): check,
    ("docs/commands.md", "send-test-event: does the endpoint take events?"): test_event,
    ("docs/commands.md", "verify: is what was delivered there?"): verify,
    ("docs/commands.md", "customers: who is metered, and billed to nobody?"): customers,
    ("docs/enabling.md", "An OpenMeter of your own"): meters,
    ("docs/guarantees.md", "Guarantees: what was billed can be proved"): missing,
    ("docs/monitoring.md", "Monitoring"): watched,
    ("docs/spool-command.md", "status: what waits, and who looks after it"): spool_of_two,
    ("docs/spool-command.md", "list: the events"): letters_listed,
    ("docs/spool-command.md", "export: events to take elsewhere"): exported,
    ("docs/spool-command.md", "restore: segments that the disk did not give"): taken_back,
    ("docs/spool-command.md", "deliver: what waits, now"): delivered,
    ("docs/spool-command.md", "purge: remove for good"): purged,
    ("docs/troubleshooting.md", "Dead letters"): refused,
}
