"""`kong-metering spool restore`: segments that the disk did not give, back into the queue once it does.

Contract: events are in a log, on the disk itself, before their file is removed; killed in between, they are in both
places, with the same ids. A file is locked meanwhile, and read once more: one that somebody else has taken back in, or
removed, since the question was asked, is left out. What was settled before the segment was set aside is left out, too,
and what was sent without an answer is known as such in the new log. The log is this process's own, free to be adopted
once this ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kong_metering.commands import words
from kong_metering.commands.access import check_writable
from kong_metering.commands.filters import Filters
from kong_metering.commands.logs import damaged_files, remove_remains
from kong_metering.commands.options import Place, json_option, place_options, taking, yes_option
from kong_metering.commands.output import confirmed, note, say, tell
from kong_metering.errors import SpoolFormatError
from kong_metering.eventlog import files
from kong_metering.eventlog.damage import ABOUT
from kong_metering.eventlog.format import (
    EVENT,
    SEGMENT_HEADER_BYTES,
    Mark,
    StoredEvent,
    is_segment_header,
    next_record,
    segment_first,
)
from kong_metering.plurals import form
from kong_metering.spool.deadletters import DEAD_LETTERS
from kong_metering.spool.directory import SpoolDirectory
from kong_metering.spool.identity import load_identity

if TYPE_CHECKING:
    from kong_metering.spool.identity import QueueIdentity

_NO_END = 1 << 63


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(Place):
    """What `restore` takes."""

    plugin_id: str | None
    endpoint: str | None
    everything: bool
    yes: bool
    as_json: bool


@dataclass(frozen=True)
class Restorable:
    """A file whose events can be read now: those that were lost with it, and the marks that they had."""

    path: Path
    identity: QueueIdentity
    events: tuple[StoredEvent, ...]
    marks: tuple[Mark, ...]
    is_whole: bool


@dataclass
class Plan:
    """What can be taken back in, and why the other files cannot be."""

    files: list[Restorable] = field(default_factory=list)
    left: dict[Path, str] = field(default_factory=dict)

    @property
    def events(self) -> int:
        """How many events come back."""
        return sum(len(each.events) for each in self.files)


@click.command()
@place_options
@click.option("--plugin-id", metavar="ID", help="Only those of the plugin entity with this id.")
@click.option("--endpoint", metavar="URL", help="Only what was accepted for this ingest endpoint.")
@click.option("--all", "everything", is_flag=True, help="Also files of which it is not known what was delivered.")
@json_option("one JSON document with the counts")
@yes_option
@taking(RestoreOptions)
def restore(options: RestoreOptions) -> None:
    """Take segments back into the queue that the disk did not give, and gives now.

    For a disk that was repaired, or a file system that was checked. What had been delivered before the trouble is left
    out. Stretches of damaged bytes within a segment hold no event that can be read, and stay.
    """
    check_writable(options.root)
    plan, done = plan_of(options), Plan()
    for path, why in plan.left.items():
        note(f"{path} stays: {words.shown(why)}.")
    if plan.files:
        confirmed(
            f"Put {words.events(plan.events)} of {words.files(len(plan.files))} back into the queue?", yes=options.yes
        )
        done = _restored(options, plan)
    if changed := len(plan.files) - len(done.files):
        their, them = form(changed, "its", "their"), form(changed, "it", "them")
        note(
            f"{words.files(changed)} left out: somebody has taken {their} events back in meanwhile, or removed {them}."
        )
    if options.as_json:
        say(words.json_document({"restored": done.events, "files": len(done.files), "files_left": len(plan.left)}))
    else:
        tell(f"{words.events(done.events)} back in the queue." if plan.files else "There is nothing to take back in.")


def plan_of(options: RestoreOptions) -> Plan:
    """Read what was set aside."""
    plan, filters = Plan(), Filters(plugin_id=options.plugin_id, endpoint=options.endpoint)
    for path in damaged_files(options.root):
        if segment_first(path.name) is None or path.is_relative_to(options.root / DEAD_LETTERS):
            continue
        try:
            identity = load_identity(path.parent.parent)
            if not filters.match_queue(identity):
                continue
            if identity is None:
                plan.left[path] = "nobody knows whose events these are"
                continue
            found = _read(path, identity, everything=options.everything)
        except (OSError, SpoolFormatError) as error:
            plan.left[path] = str(error)
            continue
        if isinstance(found, str):
            plan.left[path] = found
        else:
            plan.files.append(found)
    return plan


def _read(path: Path, identity: QueueIdentity, *, everything: bool) -> Restorable | str:
    """Read a file; tell why not if nothing in it can be taken back."""
    about = _about(path)
    if about is None and not everything:
        return "it is not known what of it was delivered; --all takes it all"
    settled, marks = about or (0, ())
    events, is_whole = _events(path)
    if not events:
        return "it holds no event that can be read"
    lost = tuple(event for event in events if event.sequence > settled)
    if not lost and not is_whole:
        return "what can be read of it was delivered, or taken back in"
    return Restorable(path, identity, lost, marks, is_whole)


def _about(path: Path) -> tuple[int, tuple[Mark, ...]] | None:
    try:
        about = json.loads(path.with_name(path.name + ABOUT).read_bytes())
        return int(about["settled"]), tuple(Mark(*map(int, mark)) for mark in about["marks"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _events(path: Path) -> tuple[list[StoredEvent], bool]:
    """Read the good events of a segment, and whether there is nothing else in it."""
    first, data = segment_first(path.name) or 0, path.read_bytes()
    is_whole = is_segment_header(data, first)
    events: list[StoredEvent] = []
    sequence, offset = first, min(SEGMENT_HEADER_BYTES, len(data))
    while record := next_record(data, offset, sequence, _NO_END):
        is_whole &= record.start == offset
        if record.kind == EVENT:
            events.append(StoredEvent(record.sequence, record.time_ms, record.payload))
        sequence, offset = record.sequence + 1, record.end
    return events, is_whole and offset == len(data)


def _restored(options: RestoreOptions, plan: Plan) -> Plan:
    """Take back in what is as it was when it was planned; tell of which files that was so."""
    spool, done = SpoolDirectory(options.root), Plan()
    try:
        for each in plan.files:
            with _locked(each.path) as is_ours:
                if is_ours and _read(each.path, each.identity, everything=options.everything) == each:
                    if each.events:
                        _put_back(spool, each)
                    _let_go(each)
                    done.files.append(each)
    finally:
        spool.close()
        remove_remains(options.root)
    return done


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Be the only one who takes a file back in meanwhile; gives False if somebody else does, or it is gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists()
    except BlockingIOError:
        is_ours = False
    try:
        yield is_ours
    finally:
        os.close(lock)


def _put_back(spool: SpoolDirectory, restorable: Restorable) -> None:
    """Have the events in a log, on the disk itself."""
    log = spool.log_for(restorable.identity).log
    # The age of what waits counts from now on: else --spool-max-age might drop it at once.
    numbers = log.append([event.payload for event in restorable.events], time.time_ns() // 1_000_000)
    for number, event in zip(numbers, restorable.events, strict=True):
        for time_ms in _times(restorable.marks, event.sequence):
            log.mark_ambiguous(number, number, time_ms)
    log.save_position()
    log.sync()


def _times(marks: Sequence[Mark], sequence: int) -> list[int]:
    return [mark.time_ms for mark in marks if mark.first <= sequence <= mark.last]


def _let_go(restorable: Restorable) -> None:
    """Remove the file; one with bytes that nobody can read stays, and its events are settled."""
    about = restorable.path.with_name(restorable.path.name + ABOUT)
    if restorable.is_whole:
        restorable.path.unlink()
        about.unlink(missing_ok=True)
    else:
        last = max((event.sequence for event in restorable.events), default=0)
        files.write_file(about, json.dumps({"settled": last, "marks": []}).encode("ascii"), is_lasting=True)
