"""What OpenMeter and the vendor's catalogue say of an event."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import yaml
from openapi_schema_validator import OAS30Validator

from kong_metering_sandbox import collector
from kong_metering_sandbox.collector.formats import format_checker
from tests.support.records import DATA

_DESCRIPTIONS = (("openmeter-ingest-v1.openapi.yaml", "Event"), ("openmeter-ingest-v3.openapi.yaml", "MeteringEvent"))
_PYTHON_TYPES: dict[str, type] = {"string": str, "integer": int}


@cache
def _validators() -> list[Any]:
    validators = []
    for description, schema in _DESCRIPTIONS:
        text = resources.files(collector).joinpath("openapi", description).read_text("utf-8")
        components = yaml.safe_load(text)["components"]
        whole = {"$ref": f"#/components/schemas/{schema}", "components": components}
        validators.append(OAS30Validator(whole, format_checker=format_checker()))
    return validators


@cache
def catalogue(event_type: str) -> dict[str, type]:
    """Give the data fields of an event type, with their Python types."""
    fields = json.loads((DATA / "event-fields.json").read_text("utf-8"))[event_type]
    return {field["name"]: _PYTHON_TYPES[field["type"]] for field in fields}


def valid_event(raw: bytes, *, attributes: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Parse an event; fail unless both API descriptions accept it and its data are of the catalogue's types.

    `attributes` are the further names that its data may have, whose values are strings.
    """
    event: dict[str, Any] = json.loads(raw.decode("utf-8"))
    problems = [error.message for validator in _validators() for error in validator.iter_errors(event)]
    assert problems == []
    assert event["specversion"] == "1.0"
    fields = catalogue(event["type"])
    for name, value in event["data"].items():
        assert name in fields or name in attributes, f"{name} is not in the vendor's catalogue"
        assert type(value) is fields.get(name, str), f"{name} is {value!r}"
    return event
