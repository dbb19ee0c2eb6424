"""Checks one event against the event schema of an OpenAPI description, fast enough for load tests.

The schema decides. Before it, a hand-written check lets through the events that need no second look, which
are all events of a well-behaved sender: it is far faster than JSON Schema, and may say no to
a valid event but never yes to an invalid one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING, Final

from kong_metering_sandbox.collector.formats import format_checker, is_date_time, is_uri_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonschema import ValidationError
    from openapi_schema_validator import OAS30Validator

SPEC_VERSION: Final = "1.0"
_SPEC_VERSIONS: Final = ("0.3", SPEC_VERSION)
_PLAIN_ATTRIBUTES: Final = frozenset(
    {"id", "source", "specversion", "type", "subject", "time", "datacontenttype", "data"}
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a request's body.

    ``path`` leads to it inside the event; ``index`` is the event's place in its batch, None for a single event.
    ``rule`` is a name from v3's ``InvalidRules``; v3 wants ``minimum`` or ``choices`` with some of them.
    """

    path: tuple[str, ...]
    rule: str
    reason: str
    index: int | None = None
    minimum: int | None = None
    choices: tuple[object, ...] = ()

    def location(self) -> tuple[str, ...]:
        """Return the steps from the body's root to what is wrong."""
        return self.path if self.index is None else (str(self.index), *self.path)


class EventValidator:
    """Checks events against one schema of one of the package's OpenAPI descriptions, compiled once."""

    def __init__(self, description: str, schema: str) -> None:
        self._description = description
        self._schema = schema

    @cached_property
    def _validator(self) -> OAS30Validator:
        """Make it for the first event that needs it: it takes as long as all else of the collector's start."""
        import yaml  # noqa: PLC0415
        from openapi_schema_validator import OAS30Validator  # noqa: PLC0415

        text = resources.files(__package__).joinpath("openapi", self._description).read_text("utf-8")
        components = yaml.safe_load(text)["components"]
        return OAS30Validator(
            {"$ref": f"#/components/schemas/{self._schema}", "components": components},
            format_checker=format_checker(),
        )

    def body_problems(self, body: object) -> tuple[Problem, ...]:
        """Return what is wrong with a body: one event, or a list of events. Empty when it is valid."""
        if not isinstance(body, list):
            return self.problems(body)
        return tuple(
            replace(problem, index=index) for index, event in enumerate(body) for problem in self.problems(event)
        )

    def problems(self, event: object) -> tuple[Problem, ...]:
        """Return what is wrong with one event, in the order of its attributes' names."""
        if is_plainly_valid(event):
            return ()
        found = {problem for error in self._validator.iter_errors(event) for problem in _translate(error)}
        if not found:
            found.update(_version_problems(event))
        return tuple(sorted(found, key=lambda problem: (problem.path, problem.rule)))


def is_plainly_valid(event: object) -> bool:
    """Whether an event is surely valid for both API versions. False says nothing: ask the schema."""
    return (
        isinstance(event, dict)
        and event.keys() <= _PLAIN_ATTRIBUTES
        and event.get("specversion") == SPEC_VERSION
        and all(_is_text(event.get(name)) for name in ("id", "source", "type", "subject"))
        and is_uri_reference(event["source"])
        and event.get("datacontenttype", "application/json") == "application/json"
        and isinstance(event.get("data", {}), dict)
        and ("time" not in event or (_is_text(event["time"]) and is_date_time(event["time"])))
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _version_problems(event: object) -> Iterator[Problem]:
    # The schema takes any text; it is the CloudEvents library that decodes the event afterwards which refuses.
    if isinstance(event, dict) and event["specversion"] not in _SPEC_VERSIONS:
        yield Problem(("specversion",), "enum", 'value is not "0.3" or "1.0"', choices=_SPEC_VERSIONS)


def _translate(error: ValidationError) -> Iterator[Problem]:
    """Put jsonschema's error into the words of OpenMeter's validator and the rules of v3's answers."""
    path = tuple(str(step) for step in error.absolute_path)
    value = error.validator_value
    if error.validator == "required":
        for name in sorted(set(value) - set(error.instance)):
            yield Problem((*path, name), "required", f'property "{name}" is missing')
    elif error.validator == "additionalProperties":
        for name in sorted(set(error.instance) - set(error.schema["properties"])):
            yield Problem((*path, name), "unknown_property", f'property "{name}" is unsupported')
    elif error.validator == "minLength":
        yield Problem(path, "min_length", f"minimum string length is {value}", minimum=value)
    elif error.validator == "enum":
        yield Problem(path, "enum", f"value is not one of the allowed values {value}", choices=tuple(value))
    elif error.validator == "format":
        rule = "is_date_time" if value == "date-time" else "invalid"
        yield Problem(path, rule, f'string doesn\'t match the format "{value}"')
    elif error.instance is None:
        yield Problem(path, f"is_{value}", "Value is not nullable")
    else:
        yield Problem(path, f"is_{value}", f"value must be {'an' if value == 'object' else 'a'} {value}")
