"""What the benchmarks read from the command line, and how they show what they found."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

CONSOLE = Console(width=150)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser that shows a script's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def say_progress(text: str) -> None:
    """Show where it is, where somebody looks on; the next line takes its place."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{text}\033[K\r")
