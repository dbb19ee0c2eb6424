"""Lengths of time, sizes, names and places on the command line, the same for both programs. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import click

_SIZES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_LARGEST_PORT = 65_535
# More than anybody means, and less than threads can wait for (292 years).
_MOST_DAYS = 36_500
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True)
class Listen:
    """Where to listen: `host` and `port`, or the `path` of a Unix socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Duration(click.ParamType):  # type: ignore[type-arg] # generic for the type checker only
    """A length of time, into seconds: a number of seconds, or a number with s, m, h, d or w behind it."""

    name = "duration"

    def __init__(self, *, may_be_zero: bool = False) -> None:
        self._may_be_zero = may_be_zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it; fails as click's own types do."""
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([smhdw]?)", str(value).strip().lower(), re.ASCII)
        try:
            seconds = float(match[1]) * _SECONDS[match[2]] if match else math.nan
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds) or (seconds == 0 and not self._may_be_zero):
            above = "" if self._may_be_zero else " above 0"
            self.fail(f"{value} is not a length of time{above}, such as 90s, 15m, 24h or 30d", param, ctx)
        if seconds > _MOST_DAYS * _SECONDS["d"]:
            self.fail(f"{value} is too long: {_MOST_DAYS}d, a hundred years, is the most", param, ctx)
        return seconds


class Size(click.ParamType):  # type: ignore[type-arg] # the same
    """A size above 0, into bytes: a number of bytes, or of KiB, MiB or GiB with K, M or G behind it."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it; fails as click's own types do."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15})([kmg]?)(?:i?b)?", str(value).strip().lower(), re.ASCII)
        size = int(match[1]) * _SIZES[match[2]] if match else 0
        if size == 0:
            self.fail(f"{value} is not a size above 0, such as 500M or 1G", param, ctx)
        return size


class WholeNumber(click.IntRange):
    """A whole number within bounds, which a complaint calls so."""

    name = "whole number"


class PluginName(click.ParamType):  # type: ignore[type-arg] # the same
    """What a plugin can be called: part of a list with commas, of a file's name and of a setting's."""

    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read it; fails as click's own types do."""
        name = str(value)
        if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name, re.ASCII) is None:
            self.fail(f"{name} is no name for a plugin: small letters, digits, '-' and '_', 64 at most", param, ctx)
        return name


class ListenAddress(click.ParamType):  # type: ignore[type-arg] # the same
    """An address to listen at, `HOST:PORT`, `[IPv6]:PORT` or `unix:PATH`."""

    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Listen:
        """Read it; fails as click's own types do."""
        if isinstance(value, Listen):
            return value
        text = str(value).strip()
        if text.startswith("unix:") and len(text) > len("unix:"):
            return Listen(path=Path(text.removeprefix("unix:")))
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]/\s]+)):(\d{1,5})", text, re.ASCII)
        if match is None or int(match[3]) > _LARGEST_PORT:
            self.fail(
                f"{value} is no address, such as 127.0.0.1:9542, [::1]:9542 or unix:/run/metrics.sock", param, ctx
            )
        return Listen(match[1] or match[2], int(match[3]))


class DirectoryOrNone(click.ParamType):  # type: ignore[type-arg] # the same
    """A directory; `none`, in any case, for none."""

    name = "directory"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path | None:  # noqa: ARG002
        """Read it."""
        return None if str(value).lower() == "none" else Path(str(value))
