"""The program: its groups of commands, and what becomes of an error.

Contract: exit status 0 when all that was asked for is done, 1 when it is not, 2 for a wrong call, 128 and the signal's
number when it was interrupted. Errors go to stderr in one line: what was wrong, where, and what to do. No traceback for
anything that the disk, the network or the user does.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import click

from kong_metering import __version__
from kong_metering.commands.check.command import check
from kong_metering.commands.customers import customers
from kong_metering.commands.output import Failure
from kong_metering.commands.schema import schema
from kong_metering.commands.serverstatus import status
from kong_metering.commands.spool import spool
from kong_metering.commands.testevent.command import send_test_event
from kong_metering.commands.verify import verify
from kong_metering.errors import KongMeteringError
from kong_metering.log import printable

_LONGEST_MESSAGE = 4000


class Program(click.Group):
    """A group that tells the errors of its commands as click tells its own."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Whoever read our output has had enough; click ends quietly.
            raise
        except KongMeteringError as error:
            raise Failure(printable(str(error), _LONGEST_MESSAGE)) from error
        except OSError as error:
            raise Failure(_told(error)) from error


def _told(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return printable(f"{where}{error.strerror or error}", _LONGEST_MESSAGE)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kong-metering")
def program() -> None:
    """Look after the metering plugin of a Kong Gateway."""


program.add_command(check)
program.add_command(send_test_event)
program.add_command(status)
program.add_command(verify)
program.add_command(customers)
program.add_command(spool)
program.add_command(schema)


def main() -> None:
    """Run the program."""
    for stream in (sys.stdout, sys.stderr):
        # Whatever the locale: what it cannot show is escaped, and no error.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    program(prog_name="kong-metering")
