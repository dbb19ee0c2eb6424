"""`kong-metering spool status`: what is in the spool, per queue, and who looks after it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kong_metering.commands import words
from kong_metering.commands.access import check_readable, check_writable
from kong_metering.commands.asking import ask_about
from kong_metering.commands.filters import UNKNOWN, Filters, reasons_told
from kong_metering.commands.interruption import Interrupted, Interruption
from kong_metering.commands.logs import SeenLog, damaged_files, marks_of, seen_logs, unanswered_in
from kong_metering.commands.options import Place, json_option, place_options, taking
from kong_metering.commands.output import cell, console, say, tell_facts, tell_folded
from kong_metering.commands.sharedmemory import strays, unwritten
from kong_metering.errors import SpoolFormatError
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import Found
from kong_metering.urls import without_credentials

if TYPE_CHECKING:
    from kong_metering.commands.asking import Asked
    from kong_metering.eventlog.format import Mark
    from kong_metering.inbox.strays import Stray
    from kong_metering.spool.delivered import KeptSegment
    from kong_metering.spool.identity import QueueIdentity
    from kong_metering.spool.requests import Answer


@dataclass(frozen=True)
class LogStatus:
    """One log of a queue."""

    directory: str
    waiting: int
    bytes: int
    may_have_arrived: int
    oldest_ms: int | None
    held_by: int | None
    problem: str | None
    unanswered: tuple[Mark, ...] = ()


@dataclass
class QueueStatus:
    """One queue: all of its logs, and its dead letters by reason. `identity` is None when nobody knows whose it is."""

    identity: QueueIdentity | None
    logs: list[LogStatus] = field(default_factory=list)
    dead_letters: Counter[str] = field(default_factory=Counter)
    # How many events killed processes left in shared memory.
    unwritten: int = 0
    # What the servers say that hold it, if they were asked.
    told: Asked | None = None

    @property
    def waiting(self) -> int:
        """How many events wait."""
        return sum(log.waiting for log in self.logs)

    @property
    def unheld(self) -> int:
        """How many events wait in logs that no process holds."""
        return sum(log.waiting for log in self.logs if log.held_by is None)

    @property
    def may_have_arrived(self) -> int:
        """How many waiting events were sent, without an answer so far."""
        return sum(log.may_have_arrived for log in self.logs)

    @property
    def first_sent_ms(self) -> int | None:
        """When the first of them was sent."""
        return min((mark.time_ms for log in self.logs for mark in log.unanswered), default=None)

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return sum(log.bytes for log in self.logs)

    @property
    def oldest_ms(self) -> int | None:
        """When the oldest waiting event was accepted."""
        return min((log.oldest_ms for log in self.logs if log.oldest_ms is not None), default=None)

    @property
    def asked_about(self) -> list[LogStatus]:
        """The logs by which a server can say more of the queue: of one that is done with, it may know nothing more."""
        held = [log for log in self.logs if log.held_by is not None]
        return [log for log in held if log.waiting] or held

    @property
    def holders(self) -> list[int]:
        """The processes that hold logs of it."""
        return sorted(self.held)

    @property
    def held(self) -> Counter[int]:
        """How many events each of them holds."""
        held: Counter[int] = Counter()
        for log in self.logs:
            if log.held_by is not None:
                held[log.held_by] += log.waiting
        return held


@dataclass(frozen=True)
class SpoolStatus:
    """The whole spool at one moment."""

    root: Path
    now_ms: int
    queues: tuple[QueueStatus, ...]
    dead_letter_bytes: int
    dead_letter_problem: str | None
    dead_letters_dropped: int
    damaged_files: int
    damaged_bytes: int
    strays: tuple[Stray, ...]
    delivered: tuple[KeptSegment, ...]


@dataclass(frozen=True, kw_only=True)
class StatusOptions(Place):
    """What `status` takes."""

    ask: bool
    as_json: bool


@click.command()
@place_options
@click.option(
    "--ask",
    is_flag=True,
    help="Ask the running servers what they know besides: what waits in memory too, and what the endpoint said last.",
)
@json_option("one JSON document")
@taking(StatusOptions)
def status(options: StatusOptions) -> None:
    """Show what waits, what was given up, and who holds it.

    Looks at the spool beside running servers and changes nothing. The times are those of acceptance.
    """
    if options.ask:
        check_writable(options.root)
    else:
        check_readable(options.root)
    found = spool_status(options, time.time_ns() // 1_000_000)
    if options.ask:
        _ask(options.root, found)
    if options.as_json:
        say(words.json_document(_as_json(found)))
    else:
        _print(found)


def _ask(root: Path, found: SpoolStatus) -> None:
    """Have the servers tell what they know of the queues."""
    held = {
        queue.identity: [Found(root / log.directory, queue.identity, log.held_by) for log in held_logs]
        for queue in found.queues
        if queue.identity and (held_logs := queue.asked_about)
    }
    with Interruption() as interruption:
        try:
            asked = ask_about(root, held, interruption)
        except Interrupted:
            raise interruption.exit() from None
    for queue in found.queues:
        if queue.identity in asked:
            queue.told = asked[queue.identity]


def spool_status(place: Place, now_ms: int) -> SpoolStatus:
    """Look at everything in a spool."""
    root = place.root
    queues: dict[object, QueueStatus] = {}
    with seen_logs(root, Filters()) as logs:
        for log in logs:
            key = _key(log.identity) if log.identity else log.directory
            queues.setdefault(key, QueueStatus(log.identity)).logs.append(_log_status(root, log))
    for owner, count in unwritten(place, Filters()).items():
        queues.setdefault(_key(owner) if owner else None, QueueStatus(owner)).unwritten += count
    dead_letters, problem = DeadLetters(root / DEAD_LETTERS), None
    try:
        for (identity, reason), count in dead_letters.counts().items():
            queues.setdefault(_key(identity), QueueStatus(identity)).dead_letters[reason] += count
    except SpoolFormatError as error:
        problem = str(error)
    damaged = _sizes(damaged_files(root))
    shown = tuple(queue for queue in queues.values() if queue.unwritten or queue.dead_letters or queue.logs)
    return SpoolStatus(
        root=root,
        now_ms=now_ms,
        queues=shown,
        dead_letter_bytes=dead_letters.bytes_on_disk,
        dead_letter_problem=problem,
        dead_letters_dropped=dead_letters.dropped_ever,
        damaged_files=len(damaged),
        damaged_bytes=sum(damaged),
        strays=tuple(strays(place)),
        delivered=tuple(Delivered(root, lambda: now_ms).segments()),
    )


def _key(identity: QueueIdentity) -> tuple[str, str]:
    """Tell one queue from another; its name may have changed meanwhile."""
    return identity.entity_id, identity.endpoint


def _log_status(root: Path, log: SeenLog) -> LogStatus:
    view, oldest, problem = log.view, None, log.problem
    try:
        oldest = view.oldest() if view else None
    except (SpoolFormatError, OSError) as error:
        problem = str(error)
    marks = marks_of(view) if view else ()
    return LogStatus(
        directory=str(log.directory.relative_to(root)),
        waiting=log.waiting,
        bytes=view.bytes_on_disk if view else 0,
        may_have_arrived=min(unanswered_in(marks), log.waiting),
        oldest_ms=oldest.time_ms if oldest else None,
        held_by=log.holder,
        problem=problem,
        unanswered=marks,
    )


def _sizes(paths: Iterable[Path]) -> list[int]:
    sizes: list[int] = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sizes


# ---------------------------------------------------------------------------------------------------------- for people


def _print(found: SpoolStatus) -> None:
    out = console()
    tell_folded(Text.assemble("Spool ", (words.shown(str(found.root)), "bold")))
    for queue in found.queues:
        out.print()
        out.print(_title(queue))
        tell_facts(list(_facts(queue, found.now_ms)))
    out.print()
    if found.dead_letter_problem:
        out.print(cell(f"dead letters cannot be read: {found.dead_letter_problem}", "red"))
    if found.dead_letters_dropped:
        told = f"{words.letters(found.dead_letters_dropped)} dropped so far, the oldest, to make room for newer ones"
        out.print(cell(told, "red"))
    if found.damaged_files:
        told = f"{words.files(found.damaged_files)}, {words.size(found.damaged_bytes)}: bytes that nobody could read"
        out.print(cell(told, "yellow"))
    for stray in found.strays:
        told = f"{words.events(stray.events)} of another spool, whose servers do not run, in {stray.directory}"
        out.print(cell(told, "yellow"))
    if found.delivered:
        size = words.size(sum(segment.size for segment in found.delivered))
        since = words.moment(found.delivered[0].kept_ms)
        out.print(cell(f"{size} of delivered events kept since {since}: `kong-metering verify` reads them back"))
    out.print(cell(_totals(found)))


def _title(queue: QueueStatus) -> Text:
    if queue.identity is None:
        return Text("unknown plugin", "bold yellow")
    return cell(words.plugin(queue.identity) or UNKNOWN, "bold")


def _facts(queue: QueueStatus, now_ms: int) -> Iterator[tuple[str, Text]]:
    if queue.identity:
        yield "endpoint", cell(without_credentials(queue.identity.endpoint))
    elif queue.logs:
        yield "log", cell(", ".join(log.directory for log in queue.logs))
    yield "waiting", cell(_waiting(queue))
    if queue.unwritten:
        yield "in memory", cell(_unwritten(queue.unwritten), "yellow")
    if queue.oldest_ms is not None:
        yield "oldest", cell(_moment(queue.oldest_ms, now_ms))
    if queue.may_have_arrived:
        yield "unanswered", cell(_unanswered(queue, now_ms))
    yield from _facts_of_logs(queue)
    if queue.dead_letters:
        yield "dead letters", cell(reasons_told(queue.dead_letters), "yellow")


def _facts_of_logs(queue: QueueStatus) -> Iterator[tuple[str, Text]]:
    """Tell which logs cannot be read, who holds them, and what those say."""
    for log in queue.logs:
        if log.problem:
            yield "unreadable", cell(f"{log.directory}: {log.problem}", "red")
    if queue.logs:
        yield "held by", _held_by(queue)
    for told in _told_by_servers(queue.told):
        yield "told", told


def _waiting(queue: QueueStatus) -> str:
    told = words.events(queue.waiting)
    return f"{told}, {words.size(queue.bytes)}" if queue.waiting else told


def _unanswered(queue: QueueStatus, now_ms: int) -> str:
    told = f"{words.of_them_were(queue.may_have_arrived)} sent, and may have arrived"
    return told if queue.first_sent_ms is None else f"{told}: the first at {_moment(queue.first_sent_ms, now_ms)}"


def _unwritten(count: int) -> str:
    return f"{words.events(count)} that a killed process had not written to disk: the next server does"


def _moment(time_ms: int, now_ms: int) -> str:
    return f"{words.moment(time_ms)} ({words.age((now_ms - time_ms) / 1000)})"


def _held_by(queue: QueueStatus) -> Text:
    is_shared = len({log.held_by for log in queue.logs}) > 1
    processes = ", ".join(_holder(queue, pid, is_shared=is_shared) for pid in queue.holders)
    if all(log.held_by is not None for log in queue.logs):
        return Text(processes)
    told = f"{processes}; {queue.unheld:,} by nobody" if processes else "nobody"
    return Text(f"{told}: {_what_it_waits_for(queue)}", "yellow")


def _holder(queue: QueueStatus, pid: int, *, is_shared: bool) -> str:
    told = words.process(pid)
    return f"{told} ({words.events(queue.held[pid])})" if is_shared else told


def _told_by_servers(asked: Asked | None) -> list[Text]:
    if asked is None:
        return []
    told = [cell(_told(answer)) for answer in asked.answers]
    if silent := {log.holder for log in asked.unheard if log.holder is not None}:
        told.append(cell(f"no answer from {', '.join(map(words.process, sorted(silent)))}", "yellow"))
    return told


def _told(answer: Answer) -> str:
    told = f"{words.process(answer.process)} has {words.events(answer.left)}, and has delivered {answer.events:,}"
    return f"{told}; the endpoint takes none: {answer.problem}" if answer.problem else told


def _what_it_waits_for(queue: QueueStatus) -> str:
    if queue.identity is None:
        return f"look at it with `kong-metering spool export --plugin-id {UNKNOWN}`"
    return "waits until an instance of the plugin starts, or for `kong-metering spool deliver`"


def _totals(found: SpoolStatus) -> str:
    dead = sum(queue.dead_letters.total() for queue in found.queues)
    waiting = sum(queue.waiting for queue in found.queues)
    if not (found.queues or found.damaged_files or found.dead_letter_problem):
        return "Nothing waits, and there are no dead letters."
    left = sum(queue.unwritten for queue in found.queues)
    in_memory = f", {words.events(left)} in memory" if left else ""
    return f"In all: {words.events(waiting)} waiting{in_memory}, {words.letters(dead)}."


# --------------------------------------------------------------------------------------------------------- for programs


def _as_json(found: SpoolStatus) -> dict[str, Any]:
    return {
        "spool": str(found.root),
        "time": words.timestamp(found.now_ms),
        "waiting": sum(queue.waiting for queue in found.queues),
        "unwritten": sum(queue.unwritten for queue in found.queues),
        "queues": [_queue_json(queue, found.now_ms) for queue in found.queues],
        "dead_letters": {
            "count": sum(queue.dead_letters.total() for queue in found.queues),
            "bytes": found.dead_letter_bytes,
            "problem": found.dead_letter_problem,
            "dropped": found.dead_letters_dropped,
        },
        "damaged": {"files": found.damaged_files, "bytes": found.damaged_bytes},
        "delivered": {
            "segments": len(found.delivered),
            "bytes": sum(segment.size for segment in found.delivered),
            "verified": sum(segment.is_checked for segment in found.delivered),
        },
        "strays": [{"directory": str(stray.directory), "events": stray.events} for stray in found.strays],
    }


def _queue_json(queue: QueueStatus, now_ms: int) -> dict[str, Any]:
    oldest = queue.oldest_ms
    return {
        **words.queue_members(queue.identity),
        "waiting": queue.waiting,
        "waiting_unheld": queue.unheld,
        "unwritten": queue.unwritten,
        "may_have_arrived": queue.may_have_arrived,
        "oldest_accepted": words.timestamp(oldest),
        "oldest_age_seconds": None if oldest is None else max(0, now_ms - oldest) / 1000,
        "bytes": queue.bytes,
        "held_by": queue.holders,
        "holders": [_holder_json(queue, pid) for pid in queue.holders],
        "first_sent": words.timestamp(queue.first_sent_ms),
        "dead_letters": dict(sorted(queue.dead_letters.items())),
        "logs": [_log_json(log) for log in queue.logs],
    }


def _holder_json(queue: QueueStatus, pid: int) -> dict[str, Any]:
    members: dict[str, Any] = {"process": pid, "waiting": queue.held[pid]}
    if queue.told is None:
        return members
    answer = next((each for each in queue.told.answers if each.process == pid), None)
    told = {"waiting": answer.left, "delivered": answer.events, "problem": answer.problem or None} if answer else None
    return members | {"told": told}


def _log_json(log: LogStatus) -> dict[str, Any]:
    return {
        "directory": log.directory,
        "waiting": log.waiting,
        "bytes": log.bytes,
        "may_have_arrived": log.may_have_arrived,
        "oldest_accepted": words.timestamp(log.oldest_ms),
        "held_by": log.held_by,
        "unanswered": [_mark_json(mark) for mark in log.unanswered],
        "problem": log.problem,
    }


def _mark_json(mark: Mark) -> dict[str, Any]:
    return {"events": unanswered_in([mark]), "first": mark.first, "sent": words.timestamp(mark.time_ms)}
