"""What several commands take: where the spool is, which events, how long.

Contract: the options of a command arrive as one frozen record, whose fields are named as click names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from kong_metering import ENVIRONMENT_PREFIX, PLUGIN_NAME, SPOOL_DIRECTORY
from kong_metering.commands.filters import Filters
from kong_metering.quantities import DirectoryOrNone, PluginName
from kong_metering.reasons import Buried
from kong_metering.spool.options import INBOX_DIRECTORY

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the spool is, and where shared memory is for what is not in it yet (None: nowhere)."""

    spool_dir: Path | None
    kong_prefix: Path
    inbox_dir: Path | None

    @property
    def root(self) -> Path:
        """The spool's directory."""
        return self.spool_dir or self.kong_prefix / SPOOL_DIRECTORY


@dataclass(frozen=True, kw_only=True)
class Chosen(Place):
    """Where the spool is, and which queues and dead letters are meant."""

    plugin_id: str | None
    endpoint: str | None
    reason: str | None

    @property
    def filters(self) -> Filters:
        """What they have to be like."""
        return Filters(self.plugin_id, self.endpoint, self.reason)


@dataclass(frozen=True, kw_only=True)
class ChosenEvents(Chosen):
    """The same, where dead letters are meant only if they are asked for."""

    dead_letters: bool

    def check_reason(self) -> None:
        """See that a reason is given for dead letters only. Raises `click.UsageError`."""
        if self.reason is not None and not self.dead_letters:
            raise click.UsageError("--reason is about dead letters: add --dead-letters, or leave --reason out")


def taking(record: type[R]) -> Callable[[Callable[[R], None]], Callable[..., None]]:
    """Hand a command all of its options as one record."""

    def decorated(command: Callable[[R], None]) -> Callable[..., None]:
        def call(**options: Any) -> None:
            if _is_prefix_meant():
                options["spool_dir"] = None
            command(record(**options))

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        # click keeps the options that were declared so far on the function.
        call.__dict__.update(command.__dict__)
        return call

    return decorated


def _is_prefix_meant() -> bool:
    """Whether the prefix was given with the command, and the spool's directory by the environment only."""
    source_of = click.get_current_context().get_parameter_source
    is_given = source_of("kong_prefix") is ParameterSource.COMMANDLINE
    return is_given and source_of("spool_dir") is ParameterSource.ENVIRONMENT


def place_options(command: F) -> F:
    """Let a command take the place of the spool."""
    prefix = click.option(
        "-p",
        "--kong-prefix",
        metavar="DIR",
        default="/usr/local/kong",
        show_default=True,
        envvar=f"{ENVIRONMENT_PREFIX}KONG_PREFIX",
        show_envvar=True,
        type=click.Path(path_type=Path),
        help=f"Kong's prefix; the spool is {SPOOL_DIRECTORY} in it.",
    )
    directory = click.option(
        "--spool-dir",
        metavar="DIR",
        envvar=f"{ENVIRONMENT_PREFIX}SPOOL_DIR",
        show_envvar=True,
        type=click.Path(path_type=Path),
        help="The spool's directory, if it is not in Kong's prefix.",
    )
    inbox = click.option(
        "--inbox-dir",
        metavar="DIR",
        default=str(INBOX_DIRECTORY),
        show_default=True,
        envvar=f"{ENVIRONMENT_PREFIX}INBOX_DIR",
        show_envvar=True,
        type=DirectoryOrNone(),
        help="The servers' --inbox-dir, if it is another one; 'none' for none.",
    )
    return directory(prefix(inbox(command)))


class CaBundle(click.Path):
    """A PEM file with certificate authorities."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, readable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Look into it; fails as click's own types do."""
        from kong_metering.authorities import holds_certificates  # noqa: PLC0415 - takes long

        path: Any = super().convert(value, param, ctx)
        if not holds_certificates(Path(path)):
            self.fail(f"{value} holds no certificate (PEM)", param, ctx)
        return path


def filter_options(command: F) -> F:
    """Let a command take the choice of queues and of dead letters."""
    plugin = click.option(
        "--plugin-id",
        metavar="ID",
        help="Only those of the plugin entity with this id ('unknown': those of no known plugin).",
    )
    endpoint = click.option("--endpoint", metavar="URL", help="Only what was accepted for this ingest endpoint.")
    reasons = ", ".join(reason.value for reason in Buried)
    reason = click.option("--reason", metavar="WORD", help=f"Only dead letters for this reason: {reasons}.")
    return plugin(endpoint(reason(command)))


def json_option(what: str) -> Callable[[F], F]:
    """Let a command print JSON."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what}, for programs.")


def plugin_name_option(help_text: str) -> Callable[[F], F]:
    """Let a command take what the plugin is called in Kong, as the server takes it."""
    return click.option(
        "--plugin-name",
        metavar="NAME",
        type=PluginName(),
        default=PLUGIN_NAME,
        show_default=True,
        envvar=f"{ENVIRONMENT_PREFIX}PLUGIN_NAME",
        show_envvar=True,
        help=help_text,
    )


yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask first.")
