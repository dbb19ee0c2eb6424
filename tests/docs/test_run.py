"""What README and docs/ tell to type does what they say: each command is typed at a terminal, as it stands there.

The commands of a page are typed from above, on one machine (`world`). Where a heading's commands need something to be
so, or end otherwise than with status 0, a scene says it. What a page shows below a command is what comes of it, but for
numbers, times, ids and blanks.

A block that is not run, or run elsewhere, has a comment in front of it; with beginnings in brackets it is for these
commands alone:

    <!-- not run: needs a cluster -->
    <!-- not run (systemctl, kong): they change the machine -->
    <!-- run by (make sandbox): tests/sandbox/test_troubles.py -->
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import pytest

from tests.docs.pages import BLOCKS
from tests.docs.scenes import SCENES, WELL, as_it_is
from tests.docs.shell import Command, simple_commands
from tests.docs.world import World, running_world, with_server_of_its_own

pytestmark = pytest.mark.timeout(300)

_MAY_BE_MISSING = ("curl", "jq", "make")
_SPOOL = "docs/spool-command.md"
# What differs from one time to the next, and how lines are broken.
_VARIES = (
    (r"\x1b\[[0-9;?]*[A-Za-z]", ""),
    (r"(?m)^\w+ ━+.*$", ""),  # a progress bar, which a better terminal takes away again
    (r"[0-9a-f]{32}:[\w…]+|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?Z", "TIME"),
    (r"\d+(?:[.,]\d+)*", "N"),
    (r"N (?:ms|s|min|h|d)\b", "N s"),
    (r"N (?:B|bytes|KB|MB|GB)\b", "N B"),
    (r"[\s─]+", ""),
    (r"ID(?:,ID)+", "ID"),
    (r"(?<=trace:)N+", ""),
)


@dataclass(frozen=True)
class Section:
    """The commands under a heading that are run."""

    page: str
    heading: str
    commands: tuple[Command, ...]

    def needs(self, program: str) -> bool:
        """Tell whether one of the commands calls a program."""
        return any(words[0] == program for command in self.commands for words in simple_commands(command.text))

    def __str__(self) -> str:
        return f"{self.page}: {self.heading.partition(':')[0]}"


SECTIONS = [
    Section(page, heading, tuple(command for block in blocks for command in block.run))
    for (page, heading), blocks in groupby((block for block in BLOCKS if block.run), lambda b: (b.page, b.heading))
]


def shape(text: str) -> str:
    """Give a text without what may differ from one time to the next."""
    for pattern, stand_in in _VARIES:
        text = re.sub(pattern, stand_in, text)
    return text


def answers(command: Command) -> list[str]:
    """Give the answers to the questions that a page shows; a question without one is answered yes."""
    return [line.strip() or "y" for line in re.findall(r"\[y/N\]:(.*)", command.shown)] or ["y"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running_world() as world:
        yield world


@pytest.fixture(scope="module")
def world_with_a_spool(world: World) -> Iterator[World]:
    with with_server_of_its_own(world) as own:
        yield own


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_what_is_typed_does_what_the_page_says(section: Section, request: pytest.FixtureRequest) -> None:
    """Type the commands of all blocks under a heading, in one terminal."""
    for program in _MAY_BE_MISSING:
        if section.needs(program) and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    world: World = request.getfixturevalue("world_with_a_spool" if section.page == _SPOOL else "world")
    scene = SCENES.get((section.page, section.heading), as_it_is)(world)
    with world.terminal() as terminal:
        for command in section.commands:
            ending = next(scene)
            ended = terminal.type(world.here(command.text), answers(command), ending.until)
            assert ended.status == ending.status, f"{command.text}\n{ended.output}"
            if command.shown:
                assert shape(world.there(ended.output)) == shape(command.shown), f"{command.text}\n{ended.output}"
    assert next(scene, WELL) is WELL, "the scene has endings of more commands"


def test_each_scene_has_its_heading() -> None:
    assert set(SCENES) <= {(section.page, section.heading) for section in SECTIONS}


@pytest.mark.parametrize(
    ("shown", "printed", "is_alike"),
    [
        ("4,820 events, 1.4 MB (26 h)", "40 events,   912 B\n(3 s)", True),
        ("1 event", "2 events", False),
        ("process 31207, which", "process 12, which", True),
        ("2026-11-21 17:52:21Z  b8a1abcd1a6916c74da4f9fc3c6da5d7:api_req…", f"2026-01-01 00:00:00Z {7:032x}:api", True),
        ("4 errors", "4 warnings", False),
        ("done.", "sending ━━━━ 3/3\n\ndone.", True),
        ("config.subject.field", "config.subject.filed", False),
    ],
)
def test_what_is_printed_is_what_is_shown_but_for_what_varies(shown: str, printed: str, *, is_alike: bool) -> None:
    assert (shape(shown) == shape(printed)) is is_alike
