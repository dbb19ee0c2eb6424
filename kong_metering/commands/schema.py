"""`kong-metering schema`: the plugin's schema for those who have to know it and do not run it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from kong_metering import PLUGIN_NAME, __version__
from kong_metering.jsonschema import json_schema
from kong_metering.luasource import lua_source
from kong_metering.quantities import PluginName
from kong_metering.schema import plugin_schema


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2)


def _as_lua(schema: Mapping[str, Any]) -> str:
    head = f"-- The schema of kong-metering {__version__}, made by `kong-metering schema --format lua`.\n"
    return f"{head}return {lua_source(schema)}"


_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "kong": _as_json,
    "lua": _as_lua,
    "json": lambda schema: _as_json(json_schema(schema)),
}


@click.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(list(_FORMATS)),
    default="kong",
    show_default=True,
    help="'lua': a schema.lua without `require`, for Konnect and for a control plane without kong-metering; 'kong': "
    "the same in JSON, as Kong's query command gives it; 'json': JSON Schema of the plugin entity, for editors.",
)
@click.option(
    "--plugin-name",
    type=PluginName(),
    default=PLUGIN_NAME,
    show_default=True,
    metavar="NAME",
    help="What the plugin is called in Kong; Konnect takes no custom plugin with a name of its own plugins.",
)
def schema(form: str, plugin_name: str) -> None:
    """Print the schema of the plugin's configuration."""
    click.echo(_FORMATS[form](plugin_schema(plugin_name)))
