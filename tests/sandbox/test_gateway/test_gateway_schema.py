from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kong_metering_sandbox.gateway import declarative, typedefs
from kong_metering_sandbox.gateway.declarative import DeclarativeError
from kong_metering_sandbox.gateway.entities import EntityError, Store
from kong_metering_sandbox.gateway.iterator import plugin_config
from kong_metering_sandbox.gateway.settings import Address, SettingsError, load_settings
from kong_metering_sandbox.gateway.vault import resolve

from .fake_plugin_server import NAME, SCHEMA

SCHEMAS = {**typedefs.BUNDLED, NAME: SCHEMA}
EXAMPLES = Path(__file__).parents[4] / "shared" / "mission" / "examples" / "deck"
CONFIG: dict[str, Any] = {
    "ingest_endpoint": "https://us.api.konghq.com/v3/openmeter/events",
    "api_token": "spat_x",
    "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
}


def insert(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return Store(SCHEMAS).insert("plugins", {"name": NAME, "config": config, **fields})


def refused(config: dict[str, Any], **fields: Any) -> EntityError:
    with pytest.raises(EntityError) as caught:
        insert(config, **fields)
    return caught.value


def test_defaults_are_filled_in_and_unset_fields_are_null() -> None:
    entity = insert({**CONFIG, "subject": {"look_up_value_in": "header", "field": "x"}})
    assert entity["config"] == {
        **CONFIG,
        "subject": {"look_up_value_in": "header", "field": "x"},
        "meter_api_requests": True,
        "meter_ai_token_usage": True,
        "timeout": 10000,
        "max_bytes": None,
        "attributes": None,
    }
    assert (entity["enabled"], entity["tags"], entity["route"], entity["instance_name"]) == (
        True,
        None,
        None,
        None,
    )


def test_a_required_record_is_made_from_its_defaults() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "subject"}
    assert insert(config)["config"]["subject"] == {"look_up_value_in": "consumer", "field": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"api_token": None}, "schema violation (config.api_token: required field missing)"),
        ({"api_token": ""}, "schema violation (config.api_token: length must be at least 1)"),
        ({"api_token": 5}, "schema violation (config.api_token: expected a string)"),
        ({"timeout": 0}, "schema violation (config.timeout: value should be between 1 and 1000000)"),
        ({"max_bytes": 1.5}, "schema violation (config.max_bytes: expected an integer)"),
        ({"meter_api_requests": "yes"}, "schema violation (config.meter_api_requests: expected a boolean)"),
        ({"ingest_endpoint": "ftp://x"}, "schema violation (config.ingest_endpoint: invalid value: ftp://x)"),
        ({"nonsense": 1}, "schema violation (config.nonsense: unknown field)"),
        ({"attributes": {"a": 1}}, "schema violation (config.attributes: expected an array)"),
        ({"subject": "x"}, "schema violation (config.subject: expected a record)"),
        (
            {"subject": {"look_up_value_in": "cookie"}},
            'schema violation (config.subject: {\n  look_up_value_in = "expected one of: header, query, consumer"\n})',
        ),
        (
            {"api_token": None, "timeout": 0},
            (
                "2 schema violations (config.api_token: required field missing; "
                "config.timeout: value should be between 1 and 1000000)"
            ),
        ),
    ],
)
def test_bad_values_are_refused_in_kongs_words(change: dict[str, Any], message: str) -> None:
    error = refused({**CONFIG, **change})
    assert error.status == 400
    assert (error.body["code"], error.body["name"], error.body["message"]) == (2, "schema violation", message)


def test_a_missing_field_is_named_in_the_answer() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "api_token"}
    assert refused(config).fields == {"config": {"api_token": "required field missing"}}


def test_a_conditional_rule_demands_a_field() -> None:
    assert refused({**CONFIG, "subject": {"look_up_value_in": "header"}}).fields == {
        "config": {
            "subject": {
                "@entity": ["failed conditional validation given value of field 'look_up_value_in'"],
                "field": "required field missing",
            }
        }
    }


def test_each_element_of_an_array_is_checked() -> None:
    good = {"source": "header", "look_up_value_in": "x", "event_property_name": "y"}
    error = refused({**CONFIG, "attributes": [good, {"source": "cookie"}]})
    assert error.fields["config"]["attributes"] == [
        None,
        {
            "source": "expected one of: header, query",
            "look_up_value_in": "required field missing",
            "event_property_name": "required field missing",
        },
    ]


def test_a_vault_reference_passes_where_it_may_stand() -> None:
    assert insert({**CONFIG, "api_token": "{vault://env/om-token}"})
    assert refused({**CONFIG, "ingest_endpoint": "{vault://env/x}"})


def test_protocols_come_from_the_plugins_own_schema() -> None:
    assert insert(CONFIG)["protocols"] == typedefs.HTTP_PROTOCOLS
    assert refused(CONFIG, protocols=["tcp"]).fields == {"protocols": ["expected one of: http, https, grpc, grpcs"]}


def test_a_plugin_that_is_not_enabled_is_refused() -> None:
    with pytest.raises(EntityError) as caught:
        Store({}).insert("plugins", {"name": "x"})
    expected = "schema violation (name: plugin 'x' not enabled; add it to the 'plugins' configuration property)"
    assert caught.value.body["message"] == expected


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("rate-limiting", {}, "at least one of these fields must be non-empty: 'config.second'"),
        (
            "request-termination",
            {"message": "a", "body": "b"},
            "message cannot be used with content_type or body",
        ),
        ("request-transformer", {"rename": {"headers": ["x"]}}, "invalid value: x"),
        ("ai-proxy", {"route_type": "llm/v1/chat"}, "required field missing"),
        ("key-auth", {"key_names": ["a b"]}, "bad header name 'a b'"),
    ],
)
def test_bundled_plugins_have_schemas_too(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(EntityError) as caught:
        Store(SCHEMAS).insert("plugins", {"name": name, "config": config})
    assert message in str(caught.value.body)


def test_key_auth_cannot_be_for_one_consumer() -> None:
    store = Store(SCHEMAS)
    alice = store.insert("consumers", {"username": "alice"})
    with pytest.raises(EntityError, match="consumer: value must be null"):
        store.insert("plugins", {"name": "key-auth", "consumer": {"id": alice["id"]}})


def test_the_plugin_gets_its_configuration_without_nulls_and_with_kongs_keys() -> None:
    store = Store(SCHEMAS)
    service = store.insert("services", {"name": "s", "url": "http://x:9000/base"})
    data = {
        "name": NAME,
        "instance_name": "mine",
        "service": {"name": "s"},
        "config": {**CONFIG, "api_token": "{vault://env/om-token}"},
    }
    entity = store.insert("plugins", data)
    config = plugin_config(entity, SCHEMA, "ws", {"OM_TOKEN": "secret"})
    assert "max_bytes" not in config
    assert config["api_token"] == "secret"
    assert config["$refs"] == {"api_token": "{vault://env/om-token}"}
    assert config["__key__"] == f"plugins:{NAME}::{service['id']}:::ws"
    assert (config["service_id"], config["plugin_instance_name"]) == (service["id"], "mine")
    assert (config["__plugin_id"], config["__ws_id"]) == (entity["id"], "ws")


@pytest.mark.parametrize(
    ("reference", "secret"),
    [
        ("{vault://env/om-token}", "s"),
        ("{vault://env/json/key}", "v"),
        ("{vault://env/json/none}", None),
        ("{vault://env/none}", None),
        ("{vault://aws/om-token}", None),
    ],
)
def test_vault_references_are_read_from_the_environment(reference: str, secret: str | None) -> None:
    assert resolve(reference, {"OM_TOKEN": "s", "JSON": '{"key": "v"}'}) == secret


def test_a_services_url_is_taken_apart() -> None:
    service = Store({}).insert("services", {"url": "https://api.example/base"})
    found = [service[name] for name in ("protocol", "host", "port", "path", "retries", "read_timeout")]
    assert found == ["https", "api.example", 443, "/base", 5, 60000]


def load(text: str, environment: dict[str, str] | None = None) -> Store:
    return declarative.load(declarative.parse(text, environment or {}), SCHEMAS)


def test_a_declarative_file_gets_kongs_own_ids() -> None:
    store = load(
        """
        _format_version: "3.0"
        services:
        - name: echo
          url: http://x
          routes: [{name: ai, paths: [/ai], plugins: [{name: key-auth}]}]
        consumers:
        - {username: alice, keyauth_credentials: [{key: k}], plugins: [{name: request-transformer}]}
        plugins:
        - {name: key-auth}
        """
    )
    assert [one["id"] for one in store.all("services")] == ["adbd70b3-4224-5183-a52a-179d7b34ab5b"]
    assert [one["id"] for one in store.all("routes")] == ["373fdc3d-8999-50d6-91ea-1752227300ff"]
    assert [one["id"] for one in store.all("consumers")] == ["b32379d9-3d28-5683-a79c-72139be6e34f"]
    plugins = {(one["name"], one["route"] is not None, one["consumer"] is not None) for one in store.all("plugins")}
    assert plugins == {
        ("key-auth", True, False),
        ("request-transformer", False, True),
        ("key-auth", False, False),
    }
    assert len({one["id"] for one in store.all("plugins")}) == 3


@pytest.mark.parametrize("scope", ["service", "route", "consumer"])
@pytest.mark.parametrize("reference", ["it", "{name: it}", "{id: @}", "@"])
def test_a_plugin_refers_to_its_scope_by_name_or_id(scope: str, reference: str) -> None:
    base = """
        _format_version: "3.0"
        services: [{name: it, url: "http://x", routes: [{name: it, paths: [/]}]}]
        consumers: [{username: it}]
        """
    owner = next(iter(load(base).all(f"{scope}s")))
    line = f"        plugins: [{{name: request-transformer, {scope}: {reference.replace('@', owner['id'])}}}]\n"
    store = load(base + "\n" + line)
    assert [one[scope] for one in store.all("plugins")] == [{"id": owner["id"]}]


@pytest.mark.parametrize(
    ("text", "explained"),
    [
        ("services: []", "in '_format_version': required field missing"),
        ("_format_version: '9'", "in '_format_version': expected one of: 1.1, 2.1, 3.0"),
        ("_format_version: '3.0'\nx: []", "in 'x': unknown field"),
        ("_format_version: '3.0'\n_info: {select_tags: [a]}", "in '_info': unknown field"),
        (
            "_format_version: '3.0'\nplugins: [{name: rate-limiting, config: {minute: 0}}]",
            "  - in entry 1 of 'plugins':\n    in 'config':\n      in 'minute': value must be greater than 0",
        ),
        (
            "_format_version: '3.0'\nplugins: [{name: key-auth, route: none}]",
            "does not reference an existing 'routes'",
        ),
        ("_format_version: '3.0'\nplugins: [{name: key-auth}, {name: key-auth}]", "in entry 2 of 'plugins'"),
        ("[]", "in 'error': expected an object"),
        ("a: [", "failed parsing declarative configuration"),
    ],
)
def test_a_bad_declarative_file_is_refused_with_its_place(text: str, explained: str) -> None:
    with pytest.raises(DeclarativeError) as caught:
        load(text)
    shown = declarative.explain(caught.value.errors) + str(caught.value.errors)
    assert explained in shown


def test_decks_environment_variables_are_put_in() -> None:
    text = "a: ${{ env \"DECK_X\" }}\nb: ${{env 'DECK_X'}}"
    assert declarative.parse(text, {"DECK_X": "v"}) == {"a": "v", "b": "v"}
    with pytest.raises(DeclarativeError, match="'DECK_X' present in state file but not set"):
        declarative.parse(text, {})
    with pytest.raises(DeclarativeError, match="must be prefixed with 'DECK_'"):
        declarative.parse('a: ${{ env "HOME" }}', {"HOME": "/"})


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the shared material is not here")
@pytest.mark.parametrize("scope", ["global", "service", "route", "consumer"])
def test_the_missions_deck_files_load(scope: str) -> None:
    text = (EXAMPLES / f"{scope}.yaml").read_text(encoding="utf-8").replace(f"{scope}Name|Id", "it")
    text += 'services: [{name: it, url: "http://x", routes: [{name: it, paths: [/]}]}]\nconsumers: [{username: it}]\n'
    store = load(text, {"DECK_AUTH_TOKEN": "spat_x", "DECK_SUBJECT_HEADER": "x-tenant-id"})
    plugin = next(iter(store.all("plugins")))
    assert plugin["config"]["subject"] == {"look_up_value_in": "header", "field": "x-tenant-id"}
    assert (plugin.get(scope) is None) is (scope == "global")


def test_settings_are_read_and_overridden_by_the_environment(tmp_path: Path) -> None:
    conf = tmp_path / "kong.conf"
    conf.write_text(
        "# comment\nprefix = /tmp/k # another\nproxy_listen = 0.0.0.0:8443 ssl, 127.0.0.1:0 reuseport\n"
        "nginx_worker_processes = 3\nplugins = bundled, metering\npluginserver_names = metering\n"
        "pluginserver_metering_start_cmd = run \\# it\nadmin_listen = off\n"
        "nginx_proxy_large_client_header_buffers = 8 16k\nstandin_reload_linger = 0.5\n"
    )
    settings = load_settings(conf, {"KONG_NGINX_WORKER_PROCESSES": "1", "KONG_DATABASE": "memory"})
    assert settings.proxy_listen == Address("127.0.0.1", 0)
    assert settings.admin_listen is None
    assert (settings.workers, settings.db_less, settings.reload_linger) == (1, False, 0.5)
    assert (settings.header_limits.count, settings.header_limits.size) == (8, 16384)
    assert settings.plugins[-1] == "metering"
    assert settings.pluginservers[0].start_cmd == "run # it"
    assert settings.pluginservers[0].socket == Path("/tmp/k/metering.socket")  # noqa: S108 - never opened
    assert load_settings(conf, {}, tmp_path).prefix == tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "database = postgres",
        "nginx_worker_processes = 0",
        "proxy_listen = x",
        "nginx_http_large_client_header_buffers = x",
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, line: str) -> None:
    conf = tmp_path / "kong.conf"
    conf.write_text(line)
    with pytest.raises(SettingsError, match=line.partition(" ")[0]):
        load_settings(conf, {})


def test_a_configuration_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="could not open config file"):
        load_settings(tmp_path / "none", {})
