"""What goes to the terminal, to a pipe, or to a file.

Contract: no markup in anything that is printed, so that text from outside is never taken for it. A pipe gets neither
colours nor lines cut to a terminal's width. What is going on is shown on stderr, and only where somebody looks on.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kong_metering.commands.words import shown
from kong_metering.errors import KongMeteringError

# Wide enough that no line of a table is folded, for whoever greps in it.
_PIPE_WIDTH = 240
_NUMBER_AND_MORE = re.compile(r"(?<!\S)(\(?[\d.,:-]+) (?=\w)")
# Stands for a blank at which no line may be folded: no text to be shown has it, for it is not printable.
_JOINT = "\ue000"

Advance = Callable[[int], None]


def console(*, stderr: bool = False) -> Console:
    """Make the way to stdout, or to stderr."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


class Failure(click.ClickException):
    """The end of a command that could not do what was asked for; tells what was wrong, where, and what to do."""

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002 - as in click
        """Print it."""
        note(f"Error: {self.format_message()}")


def say(line: str) -> None:
    """Print a line for programs, exactly as it is."""
    click.echo(line)


def tell(text: str) -> None:
    """Tell people something, folded between words on a terminal."""
    console().print(Text(text), soft_wrap=not sys.stdout.isatty())


def tell_facts(facts: Sequence[tuple[str, Text]]) -> None:
    """Tell people what there is to know of something: each fact behind its name, and folded there.

    A number stays with what it counts, and a date with its time.
    """
    out, indent = console(), max(len(name) for name, _ in facts) + 4
    for name, told in facts:
        head = f"  {name}"
        for line in _folded(told, out, max(1, out.width - indent)):
            out.print(Text.assemble((head.ljust(indent), "dim"), line), soft_wrap=True)
            head = ""


def tell_folded(text: Text) -> None:
    """Tell people something that may be longer than a line."""
    out = console()
    for line in _folded(text, out, out.width):
        out.print(line, soft_wrap=True)


def _folded(text: Text, out: Console, width: int) -> Iterator[Text]:
    joined = text.copy()
    joined.plain = _NUMBER_AND_MORE.sub(rf"\1{_JOINT}", text.plain)
    for line in joined.wrap(out, width, overflow="fold"):
        line.rstrip()
        line.plain = line.plain.replace(_JOINT, " ")
        yield line


def note(text: str) -> None:
    """Tell people something beside the output proper."""
    console(stderr=True).print(Text(text), soft_wrap=not sys.stderr.isatty())


def confirmed(question: str, *, yes: bool) -> None:
    """Ask, unless the answer was given with the command; go on only with a yes."""
    if yes:
        return
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        raise Failure("nobody answered, so nothing was changed; add --yes to skip the question") from None
    if not agreed:
        note("Nothing was changed.")
        raise click.exceptions.Exit(1)


def table(*columns: str, whole: Collection[str]) -> Table:
    """Make a table with these columns; where the terminal is too narrow, those that are not `whole` are cut."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=column in whole)
    return made


def cut(text: str) -> Text:
    """Make a table's cell of foreign text that is cut where it does not fit."""
    return Text(shown(text), no_wrap=True, overflow="ellipsis")


def cell(text: str, style: str = "") -> Text:
    """Make a cell of foreign text."""
    return Text(shown(text), style=style)


class _Rate(ProgressColumn):
    """How many events a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="cyan")


@contextlib.contextmanager
def progress(what: str, total: int, *, is_wanted: bool = True) -> Iterator[Advance]:
    """Show how far something is, on a terminal; gives the function that is told of each step."""
    if not (is_wanted and sys.stderr.isatty()):
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


@contextlib.contextmanager
def private_file(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Make a file that only its owner can read; it is there when all is written, and not before.

    Raises `KongMeteringError` when there is one already that was not to be replaced.
    """
    _check_free(path, force=force)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Of the file that was asked for; nobody knows of the draft.
        error.filename = str(path)
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_free(path, force=force)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _check_free(path: Path, *, force: bool) -> None:
    if not path.exists():
        return
    if not path.is_file():
        raise KongMeteringError(f"{path} is not a file: name a file to write to, or leave --output out for stdout")
    if not force:
        raise KongMeteringError(f"{path} exists already: name another file, or replace it with --force")
