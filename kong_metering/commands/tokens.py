"""Tokens on their way in: from a file, stdin or a prompt, never from an argument.

Contract: no error quotes a token, and none is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kong_metering.errors import KongMeteringError

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


def ask_for_token() -> str:
    """Ask whoever is at the terminal; nothing of it is shown."""
    return str(click.prompt("Token", hide_input=True, err=True))


def _from_stdin() -> str:
    if sys.stdin.isatty():
        return ask_for_token()
    return sys.stdin.buffer.read(_MAX_BYTES).decode("latin-1")
