"""What the tests of `kong-metering check` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from kong_metering.commands.main import program

CASES = Path(__file__).parents[3] / "data" / "check"


def run(*arguments: object, stdin: str | None = None, **environment: str) -> Result:
    result = CliRunner(env=environment).invoke(program, ["check", *map(str, arguments)], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def findings(*arguments: object, stdin: str | None = None, **environment: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(*arguments, "--json", stdin=stdin, **environment).stdout)["findings"]
    return found


def above_notes(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in found if one["level"] != "note"]
