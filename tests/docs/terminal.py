"""A shell at a terminal, for commands that are typed one after the other and questions that are answered.

Contract: the shell is at a terminal of 80 columns, as a person's is: programs draw their tables for it, ask there, and
get Ctrl-C from it. What it has started in the foreground does not outlive the context.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.05
_ENDED = re.compile(r"\x01(\d+)\x01")
_QUESTION = re.compile(r"(\[y/N\]|Token): \Z")
_CTRL_C = b"\x03"
# Reads commands from descriptor 9, and tells of each that it has ended, and how; `$?` is that of the command before.
_LOOP = r"""
exec 0<> "$1" 1>&0 2>&0
trap : INT
status=0
before() { return "$status"; }
while IFS= read -r -d '' -u 9 typed; do
    before
    eval "$typed" 9<&-
    status=$?
    printf '\001%d\001' "$status"
done
"""


@dataclass(frozen=True)
class Ended:
    """The exit status of a command, and what stood on the terminal below it, questions and answers included."""

    status: int
    output: str


class Terminal:
    """A bash in a directory, with nothing in its environment but what is given."""

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._environment = {**environment, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        self._directory = directory

    def __enter__(self) -> Self:
        self._screen, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        commands, self._typed = os.pipe()
        try:
            # The shell opens the terminal itself, as the leader of a session: so it is its own, with Ctrl-C.
            self._shell = subprocess.Popen(
                ["bash", "-c", f"exec 9<&{commands} {commands}<&-\n{_LOOP}", "bash", os.ttyname(slave)],  # noqa: S607
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[commands],
                start_new_session=True,
            )
            self._slave = slave  # kept, so that the terminal is there before the shell has opened it, and after its end
        finally:
            os.close(commands)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._typed)
        with suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        os.close(self._screen)
        os.close(self._slave)

    def type(self, command: str, answers: Sequence[str] = (), until: Callable[[str], bool] | None = None) -> Ended:
        """Type a command, answer what it asks, and give what came of it.

        With `until` it is one that goes on until it is ended: by Ctrl-C, once `until` is true of what it said.
        """
        os.write(self._typed, command.encode() + b"\0")
        left = iter(answers)
        said = ""
        for read in self._reads():
            said += read
            if (ended := _ENDED.search(said)) is not None:
                return Ended(int(ended[1]), said[: ended.start()].replace("\r\n", "\n"))
            if _QUESTION.search(said):
                self._answer(next(left, None), said)
            if until is not None and until(said):
                os.write(self._screen, _CTRL_C)
                until = None
        raise AssertionError(f"{command!r} did not end, and said: {said}")

    def _answer(self, answer: str | None, said: str) -> None:
        assert answer is not None, f"a question that the page does not show: {said}"
        os.write(self._screen, answer.encode() + b"\n")

    def _reads(self) -> Iterator[str]:
        """Give what the terminal shows, as it comes, and "" now and then while nothing does."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        text = codecs.getincrementaldecoder("utf-8")("replace")
        while time.monotonic() < deadline:
            has_ended = self._shell.poll() is not None
            ready, _, _ = select.select([self._screen], [], [], _POLL_SECONDS)
            if has_ended and not ready:
                return
            yield text.decode(os.read(self._screen, 65536)) if ready else ""
