"""Tokens on their way in: from a file, stdin or a prompt, never from an argument.

Contract: no error quotes a token, and none is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click

from kong_metering.errors import KongMeteringError

TOKEN_VARIABLE = "KONG_METERING_API_TOKEN"  # noqa: S105 - the name of a variable
_MAX_BYTES = 64 * 1024


def read_token(path: Path) -> str:
    """Read the token from a file, or with `-` from stdin. Raises `KongMeteringError` if there is none in it."""
    if str(path) == "-":
        text = _from_stdin()
    else:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("latin-1")
    token = text.strip()
    if not token:
        raise KongMeteringError(f"--token-file {path} is empty: it has to hold the endpoint's token")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise KongMeteringError(f"--token-file {path} does not hold a token: it has to be one word in ASCII")
    return token


def chosen_token(path: Path | None, environment: Mapping[str, str]) -> str:
    """Return the token from a file, else from the variable, else from whoever is at the terminal.

    Raises `KongMeteringError`, and `click.UsageError` when there is none.
    """
    if path is not None:
        return read_token(path)
    if token := environment.get(TOKEN_VARIABLE):
        return token
    if sys.stdin.isatty():
        return ask_for_token()
    raise click.UsageError(f"there is no token: set {TOKEN_VARIABLE}, or name a file that holds it with --token-file")


def ask_for_token() -> str:
    """Ask whoever is at the terminal; nothing of it is shown."""
    return str(click.prompt("Token", hide_input=True, err=True))


def _from_stdin() -> str:
    if sys.stdin.isatty():
        return ask_for_token()
    return sys.stdin.buffer.read(_MAX_BYTES).decode("latin-1")
