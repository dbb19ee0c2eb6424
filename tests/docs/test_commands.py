"""What README and docs/ name exists: commands in a line, commands of blocks that are not run here, options, files.

What stands in blocks is run, by `test_run`, unless a mark in front of the block says what else runs it, or why nothing
does. Of these, and of commands in a line, this looks whether they can be typed: programs, options, values, targets.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import click
import pytest

from kong_metering.cli import program as plugin_server
from kong_metering.commands.main import program as kong_metering
from tests.docs.pages import BLOCKS, PAGES
from tests.docs.shell import Block, code_in_lines, simple_commands
from tests.support.plugin_server import ROOT

MARKED = [block for block in BLOCKS if block.mark]

_PROGRAMS: dict[str, click.Command] = {"kong-metering": kong_metering, "kong-metering-plugin-server": plugin_server}
# What their options do is no matter of ours.
_FOREIGN = frozenset({"base64", "cat", "deck", "docker", "eval", "kong", "kubectl", "pip", "source", "systemctl"})
# Options of other programs that are named in passing.
_FOREIGN_OPTIONS = frozenset({"--rm", "--entrypoint", "--from-literal", "--populate-env-vars", "--shm-size"})
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|.*\.\.\..*|.*\$.*")
_OURS_BEGIN = ("bench/", "docker/", "docs/", "examples/", "monitoring/", "sandbox/", "tests/")
_OWN = re.compile(r"(?:^|\| |&& )(?:\w+=\S* )*(?:kong-metering|kong-metering-plugin-server|make|python3?) ")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text("utf-8")


@cache
def sources() -> str:
    """Give all that may declare an option of a program of ours that is no click command."""
    files = [*ROOT.glob("bench/*.py"), *ROOT.glob("sandbox/*/*.py"), *ROOT.glob("tests/fuzz/*.py")]
    return "\n".join(path.read_text("utf-8") for path in [*files, ROOT / "tests" / "conftest.py"])


def misuse(command: click.Command, words: list[str]) -> str:
    """Say what is wrong in a call, without making it; nothing is "".

    Files need not be there, and a value in capitals stands for another one.
    """
    context = click.Context(command, ignore_unknown_options=False, allow_extra_args=False)
    try:
        values, rest, used = command.make_parser(context).parse_args(list(words))
        for parameter in used:
            check_value(parameter, values.get(parameter.name or ""), context)
    except click.UsageError as error:
        return error.format_message()
    if not isinstance(command, click.Group):
        return f"too many arguments: {rest}" if rest else ""
    if not rest:
        return ""
    chosen = command.get_command(context, rest[0])
    return misuse(chosen, rest[1:]) if chosen else f"no such command: {rest[0]}"


def check_value(parameter: click.Parameter, value: object, context: click.Context) -> None:
    is_file = isinstance(parameter.type, click.Path | click.File)
    if isinstance(value, str) and not is_file and not _PLACEHOLDER.fullmatch(value):
        parameter.type.convert(value, parameter, context)


def misuse_of_make(words: list[str]) -> str:
    for word in words:
        name, assigns, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if assigns else rf"^{re.escape(name)}:"
        if not re.search(pattern, makefile(), re.MULTILINE):
            return f"the Makefile has no {name}"
    return ""


def misuse_of_python(words: list[str]) -> str:
    if words[0] == "-":
        return ""
    if words[0] == "-m":
        if words[1] == "venv":
            return ""
        name = words[1].replace(".", "/")
        found = [path for top in (ROOT, ROOT / "sandbox") for path in (top / name / "__main__.py", top / f"{name}.py")]
        script = next((path for path in found if path.is_file()), None)
        words = words[1:]
    else:
        script = ROOT / words[0]
    if script is None or not script.is_file():
        return f"there is no {words[0]}"
    declared = script.read_text("utf-8")
    missing = [option for option in _OPTION.findall(" ".join(words[1:])) if f'"{option}"' not in declared]
    return f"{script.name} has no {missing}" if missing else ""


def misuse_of(words: list[str]) -> str:
    """Say what is wrong in a call of a program of ours; nothing is ""."""
    name, arguments = Path(words[0]).name, [word.strip("[]") for word in words[1:] if word != "..."]
    if name in _PROGRAMS:
        return misuse(_PROGRAMS[name], arguments)
    if name == "make":
        return misuse_of_make(arguments)
    if re.fullmatch(r"python3?", name):
        return misuse_of_python(arguments)
    if name in _FOREIGN:
        return ""
    return f"what is {name}?"


def missing_files(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(_OURS_BEGIN) and not (ROOT / word).exists()]


def test_a_page_with_commands_shows_each_with_its_prompt() -> None:
    assert [str(block) for block in BLOCKS if not block.commands] == []


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_what_is_run_elsewhere_or_not_can_be_typed(block: Block) -> None:
    for command in block.marked:
        for words in simple_commands(command.text):
            assert misuse_of(words) == "", words
            assert missing_files(words) == []


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_mark_tells_of_commands_that_are_there_and_of_a_test_that_is(block: Block) -> None:
    assert block.mark
    begun = [" ".join(words) for command in block.marked for words in simple_commands(command.text)]
    assert [one for one in block.mark.beginnings if not any(call.startswith(one) for call in begun)] == []
    assert block.marked
    assert block.mark.kind == "not run" or (ROOT / block.mark.word).is_file()


def test_a_mark_stands_before_a_block() -> None:
    for page in PAGES:
        marks = re.findall(r"<!-- (?:not run|run by)", page.read_text("utf-8"))
        assert len(marks) == sum(block.page == str(page.relative_to(ROOT)) for block in MARKED), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_line_can_be_typed(page: Path) -> None:
    for text in code_in_lines(page):
        for words in simple_commands(text) if _OWN.search(text) else ():
            assert misuse_of(words) == "", text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "kong.conf.example"], ids=lambda page: page.name)
def test_an_option_that_is_named_exists(page: Path) -> None:
    named = {
        option
        for text in (code_in_lines(page) if page.suffix == ".md" else [page.read_text("utf-8")])
        for option in _OPTION.findall(text)
    }
    unknown = {option for option in named - options() - _FOREIGN_OPTIONS if f'"{option}"' not in sources()}
    assert unknown == set()


@cache
def options() -> frozenset[str]:
    """Name the options of all our commands."""
    return frozenset(option for command in _PROGRAMS.values() for option in options_of(command))


def options_of(command: click.Command) -> set[str]:
    context = click.Context(command)
    found = {name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        commands = [command.get_command(context, name) for name in command.list_commands(context)]
        found |= {name for one in commands if one for name in options_of(one)}
    return found


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("kong-metering verify --since 1h --resend", ""),
        ("kong-metering verify --sinze 1h", "No such option"),
        ("kong-metering verify --since soon", "soon"),
        ("kong-metering verity", "no such command"),
        ("kong-metering spool purge --wating", "No such option"),
        ("kong-metering health now", "too many arguments"),
        ("kong-metering-plugin-server --spool-sync TIME", ""),
        ("kong-metering-plugin-server --spool-sync always", "always"),
        ("kong-metering-plugin-server --spool", "No such option"),
        ("make demo GATEWAY=kong", ""),
        ("make demonstration", "no demonstration"),
        ("make demo GATEWEY=kong", "no GATEWEY"),
        ("python bench/host.py [--rounds R]", ""),
        ("python bench/host.py [--round R]", "no ['--round']"),
        ("python bench/hosts.py", "there is no"),
        ("python -m kong_metering_soak --seconds S", ""),
        ("konk reload", "what is konk"),
    ],
)
def test_what_cannot_be_typed_is_found(command: str, complaint: str) -> None:
    (words,) = simple_commands(command)
    found = misuse_of(words)
    assert complaint in found
    assert bool(complaint) == bool(found)
