"""What the tests of the commands share: spools with something in them, and the program in this process or its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
from click.testing import CliRunner, Result

from kong_metering.commands.main import program
from kong_metering.eventlog.log import EventLog
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetter, DeadLetters
from kong_metering.spool.directory import SpoolDirectory, survey
from kong_metering.spool.identity import QueueIdentity
from tests.unit.eventlog.helpers import segments

if TYPE_CHECKING:
    from kong_metering.commands.handdelivery import Timing

REPOSITORY = Path(__file__).parents[3]
PROGRAM = (sys.executable, "-c", "from kong_metering.commands.main import main; main()")
NOW = time.time_ns() // 1_000_000
HOUR = 3_600_000
PLUGIN = "0d9a4f0e-6a37-4a6e-9d3f-52f3b4ad0001"
QUEUE = QueueIdentity(PLUGIN, "metering-and-billing", "https://ingest.example/events")
OTHER = QueueIdentity("7c1be0aa", "metering-and-billing", "https://ingest.example/events")

HOLDER = """
import sys, time
from pathlib import Path
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from tests.unit.commands.helpers import event
log = SpoolDirectory(Path(sys.argv[1])).log_for(QueueIdentity(*sys.argv[2:5])).log
number = 0
while True:
    log.append([event(number + n) for n in range(20)], time.time_ns() // 1_000_000)
    number += 20
    if number > 100:
        log.done(number - 100)
        log.save_position()
    if number == 200:
        print("ready", flush=True)
    time.sleep(0.0005)
"""


KILLED = """
import os, signal, sys, time
from pathlib import Path
from kong_metering.inbox.inbox import Inbox
from kong_metering.inbox.place import Place
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import QueueIdentity
from tests.unit.commands.helpers import event
root, count, written, done = Path(sys.argv[1]), *map(int, sys.argv[3:6])
queue, spool = QueueIdentity(*sys.argv[6:9]), SpoolDirectory(root)
inbox = Inbox.open(Place(Path(sys.argv[2]), root), lambda: None, ring_bytes=256 * 1024)
inbox.open_queue(1, queue)
for number in range(count):
    assert inbox.append(1, event(number))
if written:
    held = spool.log_for(queue)
    inbox.log_opened(1, held.directory)
    held.log.append([event(number) for number in range(written)], time.time_ns() // 1_000_000)
    held.log.done(done)
    held.log.save_position()
os.kill(os.getpid(), signal.SIGKILL)
"""


def event(number: int, **members: Any) -> bytes:
    made = {
        "specversion": "1.0",
        "id": f"{number:08d}:api_request",
        "source": "kong",
        "type": "kong.api_request",
        "subject": "acme",
        "data": {"request_uri": "/orders", "filler": "x" * (number % 50)},
    }
    return json.dumps(made | members, ensure_ascii=False).encode("utf-8", "surrogatepass")


def event_ids(lines: bytes) -> list[int]:
    return [int(json.loads(line)["id"][:8]) for line in lines.splitlines()]


def waiting(root: Path, events: Sequence[bytes], queue: QueueIdentity = QUEUE, *, accepted: int = NOW) -> EventLog:
    """Leave events as a process does that is dead; give the log, closed, for its path."""
    spool = SpoolDirectory(root)
    held = spool.log_for(queue)
    held.log.append(events, accepted)
    spool.close()
    return held.log


def damage(log: EventLog, *numbers: int) -> None:
    """Make events that wait in a log unreadable."""
    (segment,) = segments(log.directory)
    data = segment.read_bytes()
    for number in numbers:
        data = data.replace(b"%08d:api" % number, b"%08d:apx" % number)
    segment.write_bytes(data)


def leave_damaged_file(root: Path) -> None:
    """Leave a log that is done but for a damaged event."""
    damage(waiting(root, [event(n) for n in range(3)]), 1)
    spool = SpoolDirectory(root)
    (held,) = spool.adopt(lambda _: True).logs
    assert len(held.log.read(0, 10, 1 << 20)) == 2
    held.log.done(3)
    spool.close()


def sent_at(root: Path, last: int, time_ms: int) -> None:
    """Mark the first events of the only log as sent without an answer."""
    log = EventLog.open(survey(root)[0].directory)
    log.mark_ambiguous(1, last, time_ms)
    log.close()


def letter(reason: str, body: bytes, queue: QueueIdentity = QUEUE, answer: str = "the endpoint said no") -> DeadLetter:
    return DeadLetter(reason, answer, queue, NOW - HOUR if body else 0, body)


def dead_letters(root: Path, *letters: DeadLetter, now: int = NOW) -> DeadLetters:
    SpoolDirectory(root)
    kept = DeadLetters(root / DEAD_LETTERS)
    kept.add(letters, now)
    return kept


def events_of(root: Path, queue: QueueIdentity = QUEUE) -> list[bytes]:
    """Give all events that wait in logs of a queue."""
    found = []
    for log in survey(root):
        if log.identity == queue:
            view = EventLog.view(log.directory)
            found += [stored.payload for stored in view.read(0, 1_000_000, 1 << 40)]
            view.close()
    return found


def run(
    root: Path, *arguments: object, stdin: str | None = None, width: int = 80, timing: Timing | None = None
) -> Result:
    """Run a command of the group in this process; the servers' shared memory is beside the spool."""
    command, *rest = map(str, arguments)
    environment = {
        "KONG_METERING_SPOOL_DIR": str(root),
        "KONG_METERING_INBOX_DIR": str(shared_memory(root)),
        "COLUMNS": str(width),
    }
    result = CliRunner(env=environment).invoke(program, ["spool", command, *rest], input=stdin, obj=timing)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(root: Path, *arguments: object) -> Any:
    result = run(root, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def start(root: Path, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command as a process of its own."""
    command, *rest = map(str, arguments)
    return subprocess.Popen(
        [*PROGRAM, "spool", command, "--spool-dir", str(root), "--inbox-dir", str(shared_memory(root)), *rest],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def shared_memory(root: Path) -> Path:
    """Give the directory that has the rings of a spool's servers."""
    return root.parent / "shm"


def killed_before_it_wrote(
    root: Path, count: int, *, written: int = 0, done: int = 0, queue: QueueIdentity = QUEUE
) -> None:
    """Have a server killed that had taken `count` events in, written some to its log, and delivered some of these."""
    shared_memory(root).mkdir(exist_ok=True)
    names = (root, shared_memory(root), count, written, done, queue.entity_id, queue.name, queue.endpoint)
    process = subprocess.run([sys.executable, "-c", KILLED, *map(str, names)], cwd=REPOSITORY, check=False)
    assert process.returncode == -signal.SIGKILL


@contextmanager
def holder(root: Path, queue: QueueIdentity = QUEUE) -> Iterator[int]:
    """Have a living process that holds a log, appends to it and finishes events, all the time; gives its pid."""
    command = [sys.executable, "-c", HOLDER, str(root), queue.entity_id, queue.name, queue.endpoint]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@contextmanager
def answering(path: Path, figures: dict[str, Any]) -> Iterator[None]:
    """Have something at the path that answers every status request with these figures."""
    status = {"Pid": 7, "Plugins": {"metering-and-billing": {"Status": figures}}}

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(msgpack.packb([1, 1, None, status]))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            path.unlink()
