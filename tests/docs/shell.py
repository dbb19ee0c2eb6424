"""What the documentation tells to type, and what it shows that comes of it: blocks and lines, taken apart.

Pure but for `bash -n`, which tells where a command that goes over several lines ends.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from markdown_it.token import Token

_LANGUAGES = frozenset({"console", "bash", "sh", "shell"})
_PROMPTS = ("$ ", "# ")
_MARK = re.compile(r"<!-- (not run|run by)(?: \(([^()]+)\))?: (.+) -->")
_PUNCTUATION = "();<>|&\n"
_KEYWORDS = frozenset({"do", "done", "then", "else", "fi", "if", "while", "{", "}", "!"})
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Mark:
    """What the comment before a block says: of all its commands, or of those that begin with one of `beginnings`."""

    kind: str  # `not run`, or `run by`
    beginnings: tuple[str, ...]
    word: str  # why, or the test

    def is_of(self, command: Command) -> bool:
        """Tell whether this is a mark of a command."""
        calls = [" ".join(words) for words in simple_commands(command.text)]
        return not self.beginnings or any(call.startswith(self.beginnings) for call in calls)


@dataclass(frozen=True)
class Command:
    """A command, over as many lines as it has, and what the page shows below it; "" if it shows nothing."""

    text: str
    shown: str = ""


@dataclass(frozen=True)
class Block:
    """A fenced block of commands, and the heading that it stands under."""

    page: str
    line: int
    heading: str
    commands: tuple[Command, ...]
    mark: Mark | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def marked(self) -> list[Command]:
        """Its commands that the mark is one of."""
        return [command for command in self.commands if self.mark is not None and self.mark.is_of(command)]

    @property
    def run(self) -> list[Command]:
        """Its other commands, which a test runs as they stand there."""
        return [command for command in self.commands if self.mark is None or not self.mark.is_of(command)]


def blocks(page: Path, root: Path) -> list[Block]:
    """Return the blocks of a page that have commands in them."""
    found = []
    heading = ""
    before: Token | None = None
    for token in _parse(page):
        if before is not None and before.type == "heading_open":
            heading = token.content
        if token.type == "fence" and token.info in _LANGUAGES and token.map:
            name = str(page.relative_to(root))
            found.append(Block(name, token.map[0] + 1, heading, tuple(_commands(token)), _mark(before)))
        before = token
    return found


def code_in_lines(page: Path) -> list[str]:
    """Return the texts of a page that stand in a line as code."""
    return [child.content for token in _parse(page) for child in token.children or () if child.type == "code_inline"]


def simple_commands(command: str) -> list[list[str]]:
    """Return the words of each program's call in a shell command, without assignments, redirections and keywords."""
    text = command.partition("<<")[0].replace("\\\n", " ")
    words = shlex.shlex(text, posix=True, punctuation_chars=_PUNCTUATION)
    words.whitespace_split = True
    words.whitespace = " \t"
    found: list[list[str]] = [[]]
    is_file = False
    for word in words:
        if set(word) <= set(_PUNCTUATION):
            is_file = "<" in word or ">" in word
            if not is_file:
                found.append([])
        elif is_file:
            is_file = False
        else:
            found[-1].append(word)
    return [call for call in map(_without_shell, found) if call]


def _without_shell(words: Sequence[str]) -> list[str]:
    while words and (words[0] in _KEYWORDS or _ASSIGNMENT.match(words[0])):
        words = words[1:]
    return [] if words[:1] == ["for"] else [word for word in words if word != "}"]


def _parse(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))


def _mark(token: Token | None) -> Mark | None:
    found = _MARK.fullmatch(token.content.strip()) if token and token.type == "html_block" else None
    return Mark(found[1], tuple(found[2].split(", ")) if found[2] else (), found[3]) if found else None


def _commands(token: Token) -> Iterator[Command]:
    lines = token.content.splitlines()
    if token.info != "console":
        yield from map(Command, _complete(lines))
        return
    while lines:
        first = lines.pop(0)
        if first.startswith(_PROMPTS):
            typed = next(_complete([first[2:], *lines]))
            lines = lines[typed.count("\n") :]
            shown = list(takewhile(lambda line: not line.startswith(_PROMPTS), lines))
            lines = lines[len(shown) :]
            yield Command(typed, "".join(f"{line}\n" for line in shown))


def _complete(lines: Sequence[str]) -> Iterator[str]:
    """Yield commands, each with as many lines as the shell wants for it."""
    begun: list[str] = []
    for line in lines:
        begun.append(line)
        if _is_complete("\n".join(begun)):
            yield "\n".join(begun)
            begun = []
    if begun:
        raise ValueError(f"a command without an end: {begun[0]}")


def _is_complete(command: str) -> bool:
    if command.endswith("\\"):
        return False
    looked = subprocess.run(["bash", "-n"], input=command + "\n", capture_output=True, text=True, check=False)  # noqa: S607
    return looked.returncode == 0 and not looked.stderr
