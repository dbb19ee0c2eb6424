"""`kong-metering schema`: three forms of one declaration, read by who they are for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from lupa.luajit21 import LuaRuntime, lua_type

from kong_metering.commands.main import program
from kong_metering.luasource import lua_source
from kong_metering.schema import plugin_schema
from kong_metering_sandbox.gateway import typedefs
from kong_metering_sandbox.gateway.entities import EntityError, Store

CONFIG: dict[str, Any] = {
    "ingest_endpoint": "https://us.api.konghq.com/v3/openmeter/events",
    "api_token": "spat_x",
    "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
}
ATTRIBUTE = {"source": "header", "look_up_value_in": "x-department", "event_property_name": "department"}


def printed(form: str, *more: str) -> str:
    done = CliRunner().invoke(program, ["schema", "--format", form, *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def run_lua(source: str) -> Any:
    """Run Lua source in LuaJIT without any of Lua's libraries, and give what it returns."""
    run = LuaRuntime().eval("function(source) return setfenv(assert(loadstring(source)), {})() end")
    return plain(run(source))


def plain(value: Any) -> Any:
    if lua_type(value) != "table":
        return value
    if len(value):
        return [plain(item) for item in value.values()]
    return {name: plain(item) for name, item in value.items()}


def test_kongs_form_is_what_the_query_command_gives() -> None:
    assert json.loads(printed("kong")) == plugin_schema()


def test_the_lua_form_says_the_same_to_a_real_lua_without_any_library() -> None:
    assert run_lua(printed("lua")) == plugin_schema()


@pytest.mark.parametrize("form", ["kong", "lua", "json"])
def test_the_plugin_may_have_another_name(form: str) -> None:
    assert "metering-and-billing" not in printed(form, "--plugin-name", "our-metering")
    assert printed(form, "--plugin-name", "our-metering").count("our-metering") >= 1


def test_the_lua_form_asks_for_nothing() -> None:
    # Konnect refuses a schema that does.
    for word in ("require", "function", "typedefs"):
        assert word not in printed("lua").replace("required", "")


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b c": True, "end": [1.5, "x"], "nested": {"deep": ["long" * 10] * 5}},
        ['"', "\\", "\n\t\0" + "7", "ä€", "%s%c]]"],
        {"name": "[["},
        "",
    ],
)
def test_lua_reads_plain_data_as_it_was(value: Any) -> None:
    assert run_lua(f"return {lua_source(value)}") == value


def test_what_is_unset_is_left_out_and_what_is_no_data_is_refused() -> None:
    assert run_lua(f"return {lua_source({'a': None, 'b': 1})}") == {"b": 1}
    with pytest.raises(TypeError, match="a set is no plain data"):
        lua_source({"a": {1}})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"api_token": "{vault://env/om-token}", "ingest_endpoint": "{vault://env/om-url}"},
        {"subject": {"look_up_value_in": "consumer"}},
        {"subject": {"field": "custom_id"}},
        {"attributes": [ATTRIBUTE, {**ATTRIBUTE, "source": "query", "look_up_value_in": "a b"}]},
        {"allow_status_codes": ["200-299", "404-404"]},
        {"queue": {"max_batch_size": 1_000_000, "max_retry_delay": 0.001, "concurrency_limit": -1}},
        {"timeout": 2.5, "ssl_verify": False},
        {"api_token": ""},
        {"api_token": 5},
        {"ingest_endpoint": "ftp://x"},
        {"ingest_endpoint": "https://a b/"},
        {"nonsense": 1},
        {"subject": {"look_up_value_in": "header"}},
        {"subject": {"look_up_value_in": "query"}},
        {"subject": {"look_up_value_in": "cookie"}},
        {"subject": {"look_up_value_in": "header", "field": "x tenant"}},
        {"subject": {"look_up_value_in": "header", "field": "x-tenant:"}},
        {"subject": {"look_up_value_in": "query", "field": " tenant"}},
        {"subject": {"look_up_value_in": "query", "field": "ten\x01ant"}},
        {"attributes": {"a": 1}},
        {"attributes": [{"source": "header"}]},
        {"attributes": [{**ATTRIBUTE, "look_up_value_in": "x department"}]},
        {"attributes": [{**ATTRIBUTE, "event_property_name": "department "}]},
        {"allow_status_codes": ["2xx"]},
        {"queue": {"max_batch_size": 0}},
        {"queue": {"max_batch_size": 1.5}},
        {"queue": {"max_retry_delay": 1_000_001}},
        {"queue": {"concurrency_limit": 2}},
        {"queue": {"unknown": 1}},
    ],
    ids=json.dumps,
)
def test_the_json_schema_takes_what_kong_takes_and_refuses_what_kong_refuses(change: dict[str, Any]) -> None:
    plugin = {"name": "metering-and-billing", "config": {**CONFIG, **change}}
    store = Store({**typedefs.BUNDLED, "metering-and-billing": plugin_schema()})
    try:
        store.check("plugins", plugin)
        taken = True
    except EntityError:
        taken = False
    schema = json.loads(printed("json"))
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(plugin) == taken


@pytest.mark.parametrize("missing", ["ingest_endpoint", "api_token"])
def test_the_json_schema_asks_for_what_has_no_default(missing: str) -> None:
    validator = Draft202012Validator(json.loads(printed("json")))
    config = {name: value for name, value in CONFIG.items() if name != missing}
    assert not validator.is_valid({"name": "metering-and-billing", "config": config})
    assert not validator.is_valid({"name": "another", "config": CONFIG})
    assert not validator.is_valid({"name": "metering-and-billing"})
