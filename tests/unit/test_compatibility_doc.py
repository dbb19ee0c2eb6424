"""`docs/compatibility.md` has a row for every field of the vendor's, and every row names tests that exist."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.records import DATA

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "compatibility.md").read_text("utf-8")
SCHEMA = json.loads((DATA / "kong-3.16-metering-and-billing.schema.json").read_text("utf-8"))
EVENTS = json.loads((DATA / "event-fields.json").read_text("utf-8"))
REFERENCE = REPOSITORY.parent / "shared" / "reference"


def schema_fields(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the path of every field of a JSON schema, with `[]` where it is one of an array's elements."""
    for name, field in schema.get("properties", {}).items():
        yield prefix + name
        yield from schema_fields(field, f"{prefix}{name}.")
        yield from schema_fields(field.get("items", {}), f"{prefix}{name}[].")


EXPECTED = {
    "Configuration": sorted(schema_fields(SCHEMA)),
    "Envelope": sorted(["specversion", "id", "source", "type", "subject", "time", "data"]),
    **{kind: sorted(field["name"] for field in fields) for kind, fields in EVENTS.items()},
}


def rows(section: str) -> dict[str, list[str]]:
    """Give the cells of each row of a section's table, by the field that it is for."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    fields = [row[0].strip("`") for row in cells]
    assert len(set(fields)) == len(fields), "a field has two rows"
    return dict(zip(fields, cells, strict=True))


@cache
def functions_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def named_tests(text: str) -> list[str]:
    return re.findall(r"`([\w/]+\.py::\w+)`", text)


@pytest.mark.parametrize("section", EXPECTED)
def test_every_field_of_the_vendors_has_a_row(section: str) -> None:
    assert sorted(rows(section)) == EXPECTED[section]


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section, fields in EXPECTED.items() for field in fields]
)
def test_every_row_names_a_test(section: str, field: str) -> None:
    assert named_tests(rows(section)[field][-1])


@pytest.mark.parametrize("name", sorted(set(named_tests(PAGE))))
def test_every_test_that_is_named_exists(name: str) -> None:
    path, _, function = name.partition("::")
    file = REPOSITORY / path
    assert file.is_file()
    assert function.startswith("test_")
    assert function in functions_in(file), f"{file} has no test of this name: was it renamed?"


@pytest.mark.parametrize("name", ["event-fields.json", "kong-3.16-metering-and-billing.schema.json"])
def test_our_copies_of_the_vendors_files_are_unchanged(name: str) -> None:
    if not REFERENCE.is_dir():
        pytest.skip("the shared reference files are not here")
    assert (DATA / name).read_bytes() == (REFERENCE / name).read_bytes()
