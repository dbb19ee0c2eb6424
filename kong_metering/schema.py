"""Kong's view of the plugin, derived from `config.py`: the schema and the information that Kong's query command wants.

Field attributes are those that Kong's schema library knows (`kong/db/schema/metaschema.lua`); which of them a real Kong
3.9.1 accepts in an external plugin's JSON schema was measured.
"""

from __future__ import annotations

from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kong_metering import PLUGIN_NAME, __version__
from kong_metering.config import Attribute, Mark, PluginConfig, Subject
from kong_metering.plugin_identity import PluginIdentity

if TYPE_CHECKING:
    from collections.abc import Iterable

PROTOCOLS = ("grpc", "grpcs", "http", "https")

_TYPES: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_A_HEADERS_NAME = {
    "match_none": [{"pattern": "[%s%c:]", "err": "a header's name has no blanks, colons or control characters"}]
}
_CHECKS: dict[type[BaseModel], list[dict[str, Any]]] = {
    Subject: [
        {
            "conditional": {
                "if_field": "look_up_value_in",
                "if_match": {"one_of": ["header", "query"]},
                "then_field": "field",
                "then_match": {"required": True},
            }
        },
        {
            "conditional": {
                "if_field": "look_up_value_in",
                "if_match": {"eq": "header"},
                "then_field": "field",
                "then_match": _A_HEADERS_NAME,
            }
        },
    ],
    Attribute: [
        {
            "conditional": {
                "if_field": "source",
                "if_match": {"eq": "header"},
                "then_field": "look_up_value_in",
                "then_match": _A_HEADERS_NAME,
            }
        }
    ],
}


_OURS = PluginIdentity()


def config_fields() -> list[dict[str, Any]]:
    """Describe the fields of `config`, in Kong's schema language."""
    return _fields(PluginConfig)


def plugin_schema(name: str = PLUGIN_NAME) -> dict[str, Any]:
    """Describe the whole plugin entity, in Kong's schema language."""
    protocols = {
        "type": "set",
        "required": True,
        "default": list(PROTOCOLS),
        "elements": {"type": "string", "one_of": list(PROTOCOLS)},
    }
    config = {"type": "record", "required": True, "fields": config_fields()}
    return {"name": name, "fields": [{"protocols": protocols}, {"config": config}]}


def plugin_info(phases: Iterable[str], identity: PluginIdentity = _OURS) -> dict[str, Any]:
    """Give the entry of this plugin in the answer to Kong's query command and to `plugin.GetPluginInfo`."""
    return {
        "Name": identity.name,
        "Phases": list(phases),
        "Priority": identity.priority,
        "Version": __version__,
        "Schema": plugin_schema(identity.name),
    }


def _fields(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [{name: _field(field)} for name, field in model.model_fields.items()]


def _field(field: FieldInfo) -> dict[str, Any]:
    schema = _typed(field.annotation, field.metadata)
    if field.is_required():
        schema["required"] = True
    elif schema["type"] != "record" and field.default is not None:
        schema["default"] = field.default
    if field.description:
        schema["description"] = _with_unit(field.description, field.metadata)
    return schema


def _with_unit(description: str, metadata: Iterable[object]) -> str:
    units = [mark.unit for mark in metadata if isinstance(mark, Mark) and mark.unit]
    return f"{description} Unit: {units[0]}." if units else description


def _typed(annotation: object, metadata: Iterable[object]) -> dict[str, Any]:
    annotation, metadata = _unwrapped(annotation, list(metadata))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        schema: dict[str, Any] = {"type": "record", "required": True, "fields": _fields(annotation)}
        if annotation in _CHECKS:
            schema["entity_checks"] = _CHECKS[annotation]
        return schema
    if get_origin(annotation) is list:
        return {"type": "array", "elements": _element(get_args(annotation)[0])}
    if get_origin(annotation) is Literal:
        values = list(get_args(annotation))
        return {"type": _TYPES[type(values[0])], "one_of": values}
    return {"type": _TYPES[annotation], **_constraints(metadata)}


def _element(annotation: object) -> dict[str, Any]:
    schema = _typed(annotation, [])
    schema.pop("required", None)
    return schema


def _unwrapped(annotation: object, metadata: list[object]) -> tuple[object, list[object]]:
    """Strip `Annotated` and `| None`, collecting the metadata on the way."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            for item in more:
                metadata.extend(item.metadata if isinstance(item, FieldInfo) else [item])
        elif get_origin(annotation) in (Union, UnionType):
            (annotation,) = (argument for argument in get_args(annotation) if argument is not type(None))
        else:
            return annotation, metadata


def _constraints(metadata: Iterable[object]) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    between: list[object] = []
    for item in metadata:
        if isinstance(item, annotated_types.Ge):
            between.insert(0, item.ge)
        elif isinstance(item, annotated_types.Le):
            between.append(item.le)
        elif isinstance(item, annotated_types.MinLen):
            schema["len_min"] = item.min_length
        elif isinstance(item, Mark):
            schema.update(_marks(item))
    if between:
        schema["between"] = between
    return schema


def _marks(mark: Mark) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    if mark.referenceable:
        marks["referenceable"] = True
    if mark.encrypted:
        marks["encrypted"] = True
    if mark.pattern:
        marks["match"] = mark.pattern
    if mark.expected:
        marks["err"] = mark.expected
    if mark.refused:
        marks["match_none"] = [{"pattern": pattern, "err": error} for pattern, error in mark.refused]
    return marks
