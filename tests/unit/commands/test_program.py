"""What all commands have in common: completion in a shell, and exit statuses that are documented."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from kong_metering.commands.main import program
from tests.docs.shell import blocks
from tests.support.plugin_server import BIN, ROOT, PluginServerProcess

PROGRAM = str(BIN / "kong-metering")


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """List the words of each command."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield (*above, name)


def completed(*words: str) -> list[str]:
    """Return what can stand for the last word."""
    completion = ShellComplete(program, {}, "kong-metering", "_KONG_METERING_COMPLETE")
    return [item.value for item in completion.get_completions(list(words[:-1]), words[-1])]


def test_commands_and_options_are_completed() -> None:
    assert completed("s") == ["schema", "send-test-event", "spool", "status"]
    assert completed("spool", "re") == ["redirect", "replay", "restore"]
    assert "--spool-dir" in completed("spool", "status", "--")


# What a shell is given behind the documented line, so that it prints what it completes `kong-metering spool sta` to.
SHELLS = {
    "bash": """
        COMP_WORDS=(kong-metering spool sta) COMP_CWORD=2
        _kong_metering_completion kong-metering
        echo "${COMPREPLY[@]}"
    """,
    "zsh": """
        _describe() { print -r -- ${(P)3} }
        words=(kong-metering spool sta) CURRENT=3
        ${_comps[kong-metering]}
    """,
    "fish": "complete -C 'kong-metering spool sta'",
}
BEFORE = {"zsh": "autoload -Uz compinit; compinit -u"}


@pytest.mark.parametrize("name", SHELLS)
def test_the_documented_line_completes(name: str, tmp_path: Path) -> None:
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"{name} is not installed")
    (line,) = [
        command.text
        for block in blocks(ROOT / "docs/commands.md", ROOT)
        for command in block.commands
        if f"={name}_source" in command.text
    ]
    script = f"{BEFORE.get(name, '')}\n{line}\n{SHELLS[name]}"
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    run = subprocess.run(
        [shell, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[0].partition(":")[0] == "status", run.stdout + run.stderr


def test_a_wrong_call_has_the_documented_status() -> None:
    statuses = {words: CliRunner().invoke(program, [*words, "--nonsense"]).exit_code for words in commands(program)}
    assert statuses == dict.fromkeys(commands(program), 2)


def test_each_command_is_in_the_table_of_exit_statuses() -> None:
    table = (ROOT / "docs/commands.md").read_text().partition("# All commands")[2]
    assert [
        words for words in commands(program) if f"`{words[-1]}`" not in table and f"`{' '.join(words)}`" not in table
    ] == []


def test_an_interrupted_command_has_the_documented_status() -> None:
    with PluginServerProcess() as server:
        command = [PROGRAM, "status", "--watch", "1s", "--json", "--socket", str(server.path)]
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        said = watching.communicate()[1]
    assert (watching.returncode, said) == (130, "")
