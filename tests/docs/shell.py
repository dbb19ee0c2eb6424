"""What the documentation tells to type: the commands in its blocks and in its lines, taken apart.

Pure but for `bash -n`, which tells where a command that goes over several lines ends.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from markdown_it.token import Token

_LANGUAGES = frozenset({"console", "bash", "sh", "shell"})
_PROMPTS = ("$ ", "# ")
_MARK = re.compile(r"<!-- (not run|run by): (.+) -->")
_PUNCTUATION = "();<>|&\n"
_KEYWORDS = frozenset({"do", "done", "then", "else", "fi", "if", "while", "{", "}", "!"})
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced block of commands; `mark` is what the comment before it says, `kind` is `not run` or `run by`."""

    page: str
    line: int
    commands: tuple[str, ...]
    kind: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, root: Path) -> list[Block]:
    """Return the blocks of a page that have commands in them."""
    tokens = _parse(page)
    return [
        Block(str(page.relative_to(root)), token.map[0] + 1, tuple(_commands(token)), *_mark(before))
        for before, token in zip([None, *tokens], tokens, strict=False)
        if token.type == "fence" and token.info in _LANGUAGES and token.map
    ]


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


def _mark(token: Token | None) -> tuple[str, ...]:
    found = _MARK.fullmatch(token.content.strip()) if token and token.type == "html_block" else None
    return found.groups() if found else ()


def _commands(token: Token) -> Iterator[str]:
    lines = token.content.splitlines()
    if token.info != "console":
        yield from _complete(lines)
        return
    for number, line in enumerate(lines):
        if line.startswith(_PROMPTS):
            yield next(_complete([line[2:], *lines[number + 1 :]]))


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
