"""How pages are taken apart, and commands typed: what `test_run` and `test_commands` are built on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.shell import Block, Command, Mark, blocks, simple_commands
from tests.docs.terminal import Terminal

PAGE = """
# First

```console
$ one \\
    --more
shown
and more
# two     # a remark
$ three <<'E'
$ four
E
```

## Second

<!-- not run (five, six -x): they take long -->
```sh
A=1 five
six -y | six -x
seven
```

```yaml
$ no: command
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_commands_are_found_with_what_is_shown_below_them(page: Path) -> None:
    first, second = blocks(page, page.parent)
    assert first == Block(
        "page.md",
        4,
        "First",
        (
            Command("one \\\n    --more", "shown\nand more\n"),
            Command("two     # a remark"),
            Command("three <<'E'\n$ four\nE"),
        ),
    )
    assert (second.heading, [command.text for command in second.commands]) == (
        "Second",
        ["A=1 five", "six -y | six -x", "seven"],
    )


def test_a_mark_is_of_all_commands_or_of_those_that_begin_as_it_says(page: Path) -> None:
    first, second = blocks(page, page.parent)
    assert (first.marked, len(first.run)) == ([], 3)
    assert second.mark == Mark("not run", ("five", "six -x"), "they take long")
    assert [command.text for command in second.run] == ["seven"]
    page.write_text(PAGE.replace(" (five, six -x)", ""), encoding="utf-8")
    assert blocks(page, page.parent)[1].run == []


def test_the_words_of_a_command_are_taken_out_of_the_shell() -> None:
    command = 'A=1 cat < f | make x > y && for part in a-*; do\n  echo "$part;" || ls\ndone  # the end'
    assert simple_commands(command) == [["cat"], ["make", "x"], ["echo", "$part;"], ["ls"]]


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal({"PATH": os.environ["PATH"]}, tmp_path)


def test_a_command_has_a_terminal_and_the_status_of_the_one_before(terminal: Terminal) -> None:
    with terminal:
        assert terminal.type("test -t 0 -a -t 1 -a -t 2 && stty size; (exit 3)").output == "24 80\n"
        assert terminal.type("echo $?").output == "3\n"
        assert terminal.type("cat <<'E'\né\nE").output == "é\n"


def test_questions_are_answered(terminal: Terminal) -> None:
    with terminal:
        ended = terminal.type("read -p 'Sure? [y/N]: ' a; read -p 'Quite? [y/N]: ' b; echo $b$a", ["y", "n"])
        assert ended.output == "Sure? [y/N]: y\nQuite? [y/N]: n\nny\n"
        with pytest.raises(AssertionError, match="a question that the page does not show"):
            terminal.type("read -p 'Sure? [y/N]: ' a")


def test_what_does_not_end_by_itself_gets_ctrl_c(terminal: Terminal) -> None:
    with terminal:
        ended = terminal.type("sh -c 'echo begun; exec sleep 600'", until=lambda said: "begun" in said)
        assert (ended.status, ended.output) == (130, "begun\n^C")


def test_a_shell_that_ends_is_not_waited_for(terminal: Terminal) -> None:
    with terminal, pytest.raises(AssertionError, match="did not end"):
        terminal.type("exit 1")
