"""The program: its groups of commands, and what becomes of an error.

Contract: exit status 0 when all that was asked for is done, 1 when it is not, 2 for a wrong call, 128 and the signal's
number when it was interrupted. Errors go to stderr in one line: what was wrong, where, and what to do. No traceback for
anything that the disk, the network or the user does.
"""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper
from typing import Any

import click

from kong_metering import __version__
from kong_metering.commands.lazygroup import LazyGroup
from kong_metering.errors import KongMeteringError
from kong_metering.log import printable

_LONGEST_MESSAGE = 4000
_INTERRUPTED = 128 + signal.SIGINT


_PLACES = {
    "check": "check.command:check",
    "customers": "customers:customers",
    "health": "health:health",
    "install": "install:install",
    "schema": "schema:schema",
    "send-test-event": "testevent.command:send_test_event",
    "spool": "spool:spool",
    "status": "status:status",
    "uninstall": "install:uninstall",
    "verify": "verify:verify",
}


class Program(LazyGroup):
    """A group that tells the errors of its commands as click tells its own."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read our output has had enough; click ends quietly.
            raise
        except KeyboardInterrupt:
            raise click.exceptions.Exit(_INTERRUPTED) from None
        except KongMeteringError as error:
            raise _failure(printable(str(error), _LONGEST_MESSAGE)) from error
        except OSError as error:
            raise _failure(_told(error)) from error


def _failure(message: str) -> click.ClickException:
    from kong_metering.commands.output import Failure  # noqa: PLC0415 - takes long

    return Failure(message)


def _told(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return printable(f"{where}{error.strerror or error}", _LONGEST_MESSAGE)


@click.group(
    cls=Program,
    places=_PLACES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 not all of it is, 2 wrong call, 130 interrupted; others are in a command's help.",
)
@click.version_option(__version__, prog_name="kong-metering")
def program() -> None:
    """Look after the metering plugin of a Kong Gateway."""


def main() -> None:
    """Run the program."""
    for stream in (sys.stdout, sys.stderr):
        # Whatever the locale: what it cannot show is escaped, and no error.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    program(prog_name="kong-metering")
