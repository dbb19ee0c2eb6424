"""`python -m kong_metering.reference > docs/configuration.md`: the settings' documentation, from their declaration."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from kong_metering.schema import config_fields

_HEAD = """\
# Configuration

The `config` of a `metering-and-billing` plugin entity. Names, defaults and ranges are those of the vendor's plugin of
that name (schema of 3.16). This page is made from `kong_metering/config.py` by
`python -m kong_metering.reference > docs/configuration.md`; a test fails when the two differ.

*vault*: a vault reference such as `{vault://env/om-token}` may stand in its place.
*encrypted*: Kong stores it encrypted where a keyring is configured.

| setting | type | default | allowed | |
| --- | --- | --- | --- | --- |
"""


def configuration_page() -> str:
    """Give the page as Markdown."""
    return _HEAD + "".join(_row(path, field) for path, field in _settings(config_fields()))


def _settings(fields: list[dict[str, Any]], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in fields:
        for name, field in entry.items():
            yield prefix + name, field
            inner = field.get("elements", field)
            many = "[]" if "elements" in field else ""
            yield from _settings(inner.get("fields", []), f"{prefix}{name}{many}.")


def _row(path: str, field: Mapping[str, Any]) -> str:
    default = "**required**" if _is_asked_for(field) else _code(field["default"]) if "default" in field else ""
    marks = [mark for mark, key in (("*vault*", "referenceable"), ("*encrypted*", "encrypted")) if field.get(key)]
    text = " ".join([field["description"], *marks])
    return f"| `{path}` | {_type(field)} | {default} | {_allowed(field)} | {text} |\n"


def _is_asked_for(field: Mapping[str, Any]) -> bool:
    return bool(field.get("required")) and field["type"] != "record"


def _type(field: Mapping[str, Any]) -> str:
    if field["type"] == "array":
        return f"array of {field['elements']['type']}s"
    return str(field["type"])


def _allowed(field: Mapping[str, Any]) -> str:
    if "one_of" in field:
        return ", ".join(_code(value) for value in field["one_of"])
    if "between" in field:
        first, last = field["between"]
        return f"{first:,} to {last:,}"
    return ""


def _code(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
