"""`kong-metering spool export`: whole events, byte by byte as they were accepted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from kong_metering.commands import words
from kong_metering.commands.access import check_readable
from kong_metering.commands.letters import matching_letters
from kong_metering.commands.logs import SeenLog, seen_logs
from kong_metering.commands.options import ChosenEvents, filter_options, place_options, taking
from kong_metering.commands.output import Advance, note, private_file, progress
from kong_metering.commands.sharedmemory import tell_unwritten
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters

if TYPE_CHECKING:
    from kong_metering.commands.filters import Filters


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ChosenEvents):
    """What `export` takes."""

    output: Path | None
    force: bool

    @property
    def file(self) -> Path | None:
        """The file to write to, None for stdout."""
        return None if self.output == Path("-") else self.output


@dataclass
class _Account:
    written: int = 0
    left_out: int = 0
    gone: int = 0
    problems: int = 0


@click.command()
@place_options
@filter_options
@click.option("--dead-letters", is_flag=True, help="Export the dead letters, not the events that wait.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write to this file, which only you can read.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@taking(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write events as JSON lines, as they were accepted.

    Each line is one CloudEvent, byte by byte. Nothing is removed: `purge` does that. Events that cannot be read are
    left out, and counted on stderr.
    """
    check_readable(options.root)
    options.check_reason()
    account = _Account()
    with _output(options) as file, contextlib.closing(_events(options, account)) as found:
        for event in found:
            _write(file, event, account)
    _tell(options, account)
    if not options.dead_letters:
        tell_unwritten(options, options.filters, "exported")
    if account.problems:
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def _output(options: ExportOptions) -> Iterator[BinaryIO | None]:
    """Open where to write to; None is a terminal, which does not get bytes from outside."""
    if options.file is not None:
        with private_file(options.file, force=options.force) as file:
            yield file
    elif sys.stdout.isatty():
        yield None
    else:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()


def _write(file: BinaryIO | None, event: bytes, account: _Account) -> None:
    if not event or b"\n" in event:
        account.left_out += 1
        return
    account.written += 1
    if file is None:
        click.echo(words.one_line(event))
    else:
        file.write(event + b"\n")


def _events(options: ExportOptions, account: _Account) -> Generator[bytes, None, None]:
    if options.dead_letters:
        return _letter_events(options)
    return _waiting_events(options, account)


def _letter_events(options: ExportOptions) -> Generator[bytes, None, None]:
    dead_letters = DeadLetters(options.root / DEAD_LETTERS)
    is_shown = options.file is not None
    total = _count(dead_letters, options.filters) if is_shown else 0
    with progress("exporting", total, is_wanted=is_shown) as advance:
        for stored in matching_letters(dead_letters, options.filters):
            yield stored.letter.event
            advance(1)


def _count(dead_letters: DeadLetters, filters: Filters) -> int:
    return sum(count for (queue, reason), count in dead_letters.counts().items() if filters.match_letter(queue, reason))


def _waiting_events(options: ExportOptions, account: _Account) -> Generator[bytes, None, None]:
    with seen_logs(options.root, options.filters) as logs:
        total = sum(log.waiting for log in logs)
        with progress("exporting", total, is_wanted=options.file is not None) as advance:
            for log in logs:
                yield from _log_events(log, account, advance)


def _log_events(log: SeenLog, account: _Account, advance: Advance) -> Iterator[bytes]:
    if log.problem:
        note(f"{log.directory} cannot be read: {words.shown(log.problem)}")
        account.problems += 1
        return
    for stored in log.events():
        yield stored.payload
        advance(1)
    # What vanishes from a log that a server holds was delivered.
    if log.holder is None:
        account.left_out += log.lost()
    else:
        account.gone += log.lost()


def _tell(options: ExportOptions, account: _Account) -> None:
    target = f" to {options.file}" if options.file else ""
    note(f"{words.events(account.written)} exported{target}.")
    if account.left_out:
        note(f"{words.events(account.left_out)} left out: unreadable.")
    if account.gone:
        note(f"{words.events(account.gone)} left out: delivered while this ran, or unreadable.")
