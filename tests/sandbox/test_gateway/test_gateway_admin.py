"""The Admin API, with and without a database, and what its changes do to the workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import requests

from .fake_plugin_server import NAME
from .fakes import DEADLINE, Gateway, get, running_gateway, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = '_format_version: "3.0"\nservices: [{name: echo, url: "@UPSTREAM@", routes: [{name: r, paths: [/echo]}]}]\n'
METERING = {
    "name": NAME,
    "config": {
        "ingest_endpoint": "https://us.api.konghq.com/v3/openmeter/events",
        "api_token": "spat_x",
        "meter_api_requests": True,
        "meter_ai_token_usage": False,
        "subject": {"look_up_value_in": "header", "field": "x-tenant-id"},
    },
    "tags": [],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    prefix = tmp_path_factory.mktemp("gateway")
    with running_gateway(prefix, CONFIG, database="memory", nginx_worker_processes="1") as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Iterator[Gateway]:
    """Give a gateway with a database that has one service and one route, and nothing else afterwards."""
    (shared.prefix / "journal").unlink(missing_ok=True)
    yield shared
    for kind in ("plugins", "consumers"):
        for entity in call(shared, "GET", f"/{kind}").json()["data"]:
            call(shared, "DELETE", f"/{kind}/{entity['id']}")


@pytest.fixture(scope="module")
def db_less(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("db-less"), CONFIG, nginx_worker_processes="1") as gateway:
        yield gateway


def call(gateway: Gateway, method: str, path: str, body: Any = None, **arguments: Any) -> requests.Response:
    return requests.request(method, gateway.admin + path, json=body, timeout=DEADLINE, **arguments)


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/plugins/", None),
        ("/services/echo/plugins/", "service"),
        ("/routes/r/plugins/", "route"),
        ("/consumers/alice/plugins/", "consumer"),
    ],
)
def test_the_missions_requests_create_a_plugin_at_every_scope(gateway: Gateway, path: str, scope: str | None) -> None:
    call(gateway, "POST", "/consumers", {"username": "alice"})
    response = call(gateway, "POST", path, METERING)
    assert response.status_code == 201
    entity = response.json()
    assert entity["config"]["timeout"] == 10000
    assert entity["config"]["max_bytes"] is None
    assert entity["protocols"] == ["grpc", "grpcs", "http", "https"]
    assert {name: entity[name] is not None for name in ("service", "route", "consumer")} == {
        name: name == scope for name in ("service", "route", "consumer")
    }
    assert call(gateway, "GET", path).json() == {"data": [entity], "next": None}
    assert call(gateway, "GET", f"{path}{entity['id']}").json() == entity


def test_a_second_plugin_at_the_same_scope_is_a_conflict(gateway: Gateway) -> None:
    call(gateway, "POST", "/plugins", METERING)
    response = call(gateway, "POST", "/plugins", METERING)
    assert response.status_code == 409
    key = {"name": NAME, "route": None, "service": None, "consumer": None}
    assert response.json() == {
        "code": 5,
        "name": "unique constraint violation",
        "message": f"UNIQUE violation detected on '{{consumer=null,name=\"{NAME}\",route=null,service=null}}'",
        "fields": key,
    }


def test_a_bad_plugin_is_refused_with_kongs_answer(gateway: Gateway) -> None:
    response = call(gateway, "POST", "/plugins", {"name": NAME, "config": {"ingest_endpoint": "http://x"}})
    assert response.status_code == 400
    assert response.json() == {
        "code": 2,
        "name": "schema violation",
        "message": "schema violation (config.api_token: required field missing)",
        "fields": {"config": {"api_token": "required field missing"}},
    }


def test_changes_reach_the_plugin_server_as_kong_sends_them(gateway: Gateway) -> None:
    plugin = call(gateway, "POST", "/plugins", METERING).json()
    get(gateway, "/echo")
    gateway.wait_for_log_events()
    changed = call(gateway, "PATCH", f"/plugins/{plugin['id']}", {"config": {"timeout": 5000}}).json()
    assert changed["config"] == {**plugin["config"], "timeout": 5000}
    get(gateway, "/echo")
    gateway.wait_for_log_events(2)
    methods = [message[2] for message in gateway.calls()]
    first = methods.index(b"plugin.StartInstance")
    second = methods.index(b"plugin.StartInstance", first + 1)
    assert methods[second + 1] == b"plugin.CloseInstance"
    old, new = (json.loads(message[3][0][b"Config"]) for message in gateway.calls("plugin.StartInstance"))
    assert (old["timeout"], new["timeout"], old["__plugin_id"]) == (10000, 5000, new["__plugin_id"])
    assert new["__seq__"] > old["__seq__"]
    assert gateway.calls("plugin.CloseInstance")[0][3] == [gateway.calls("plugin.HandleEvent")[0][3][0][b"InstanceId"]]


def test_after_a_deletion_nothing_more_is_sent(gateway: Gateway) -> None:
    plugin = call(gateway, "POST", "/plugins", METERING).json()
    get(gateway, "/echo")
    gateway.wait_for_log_events()
    wait_for(gateway.records)
    assert call(gateway, "DELETE", f"/plugins/{plugin['id']}").status_code == 204
    before = len(gateway.calls())
    assert get(gateway, "/echo").status_code == 200
    assert len(gateway.calls()) == before


def test_a_plugin_that_is_switched_off_does_not_run(gateway: Gateway) -> None:
    call(gateway, "POST", "/plugins", {**METERING, "enabled": False})
    assert get(gateway, "/echo").status_code == 200
    assert gateway.calls() == []


def test_services_routes_consumers_and_keys_can_be_managed(gateway: Gateway) -> None:
    service = call(gateway, "POST", "/services", {"name": "s2", "url": "http://127.0.0.1:9"}).json()
    assert call(gateway, "PATCH", "/services/s2", {"retries": 1}).json()["retries"] == 1
    route = call(gateway, "POST", "/services/s2/routes", {"name": "r2", "paths": ["/two"]}).json()
    assert route["service"] == {"id": service["id"]}
    assert call(gateway, "DELETE", "/services/s2").status_code == 400
    consumer = call(gateway, "PUT", "/consumers/alice", {"custom_id": "c"}).json()
    assert (consumer["username"], consumer["custom_id"]) == ("alice", "c")
    replaced = call(gateway, "PUT", "/consumers/alice", {"username": "alice"}).json()
    assert (replaced["id"], replaced["custom_id"]) == (consumer["id"], None)
    key = call(gateway, "POST", "/consumers/alice/key-auth", {"key": "secret"}).json()
    assert key["consumer"] == {"id": consumer["id"]}
    call(gateway, "POST", "/routes/r/plugins", {"name": "key-auth"})
    assert [get(gateway, "/echo", headers=h).status_code for h in ({}, {"apikey": "secret"})] == [401, 200]
    assert [
        call(gateway, "DELETE", path).status_code for path in ("/routes/r2", "/services/s2", "/consumers/alice")
    ] == [204] * 3
    assert call(gateway, "GET", "/key-auths").json()["data"] == []


def test_forms_are_understood(gateway: Gateway) -> None:
    form = {"name": "rate-limiting", "config.minute": "5", "config.hide_client_headers": "true", "tags[]": ["a", "b"]}
    response = requests.post(gateway.admin + "/plugins", data=form, timeout=DEADLINE)
    assert response.status_code == 201
    entity = response.json()
    assert (entity["config"]["minute"], entity["config"]["hide_client_headers"], entity["tags"]) == (
        5,
        True,
        ["a", "b"],
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/plugins/none", None, 404),
        ("GET", "/nothing", None, 404),
        ("GET", "/services/none/plugins", None, 404),
        ("POST", "/consumers/none/plugins", METERING, 404),
        ("PATCH", "/services/none", {}, 404),
        ("DELETE", "/services/none", None, 404),
        ("DELETE", "/plugins/00000000-0000-4000-8000-000000000000", None, 204),
        ("PATCH", "/plugins", {}, 405),
        ("POST", "/plugins", ["x"], 400),
        ("POST", "/plugins", {"name": NAME, "service": {"name": "none"}, "config": METERING["config"]}, 400),
        ("POST", "/consumers", {}, 400),
    ],
)
def test_what_cannot_be_done_is_answered_as_kong_does(
    gateway: Gateway, method: str, path: str, body: Any, status: int
) -> None:
    response = call(gateway, method, path, body)
    assert response.status_code == status
    if status == 404:
        assert response.json() == {"message": "Not found"}


def test_information_about_the_gateway(gateway: Gateway) -> None:
    root = call(gateway, "GET", "/").json()
    assert root["version"] == "3.9.1"
    assert root["plugins"]["available_on_server"][NAME] == {"version": "0.1.0", "priority": 850}
    assert call(gateway, "GET", "/status").json()["database"] == {"reachable": True}
    assert NAME in call(gateway, "GET", "/plugins/enabled").json()["enabled_plugins"]
    assert [name for field in call(gateway, "GET", f"/schemas/plugins/{NAME}").json()["fields"] for name in field] == [
        "protocols",
        "config",
    ]
    assert call(gateway, "POST", "/schemas/plugins/validate", METERING).status_code == 200
    assert call(gateway, "POST", "/config", {"config": ""}).status_code == 400


def test_lists_come_in_pages(gateway: Gateway) -> None:
    for name in "abc":
        call(gateway, "POST", "/consumers", {"username": name, "tags": ["metered", name]})
    first = call(gateway, "GET", "/consumers?size=2&tags=metered").json()
    assert [one["username"] for one in first["data"]] == ["a", "b"]
    assert first["next"] == f"/consumers?offset={quote(first['offset'], safe='')}&tags=metered&size=2"
    last = call(gateway, "GET", first["next"]).json()
    assert [one["username"] for one in last["data"]] == ["c"]
    assert (last["next"], "offset" in last) == (None, False)


@pytest.mark.parametrize(
    ("tags", "found"), [("metered", "ab"), ("metered,a", "a"), ("a/b", "ab"), ("b/c", "bc"), ("none", ""), ("a,b", "")]
)
def test_tags_choose_from_a_list(gateway: Gateway, tags: str, found: str) -> None:
    for name in "abc":
        call(gateway, "POST", "/consumers", {"username": name, "tags": [name, *(["metered"] if name != "c" else [])]})
    assert "".join(one["username"] for one in call(gateway, "GET", f"/consumers?tags={tags}").json()["data"]) == found


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("size=0", 9, "size must be an integer between 1 and 1000"),
        ("size=1001", 9, "size must be an integer between 1 and 1000"),
        ("size=x", 9, "size must be a number"),
        ("offset=zzz", 7, "'zzz' is not a valid offset: bad json encoding"),
        ("tags=", 11, "invalid option (tags: cannot be null)"),
    ],
)
def test_a_page_that_there_cannot_be_is_refused_in_kongs_words(
    gateway: Gateway, query: str, code: int, message: str
) -> None:
    answer = call(gateway, "GET", f"/services?{query}")
    assert (answer.status_code, answer.json()["code"], answer.json()["message"]) == (400, code, message)


@pytest.mark.parametrize("kind", ["upstreams", "certificates", "vaults", "key-sets", "acls", "hmac-auths"])
def test_what_the_stand_in_has_none_of_is_an_empty_list(gateway: Gateway, kind: str) -> None:
    assert call(gateway, "GET", f"/{kind}?size=1000").json() == {"data": [], "next": None}


@pytest.mark.parametrize("kind", ["consumer_groups", "rbac/roles", "licenses", "workspaces", "partials"])
def test_what_only_the_enterprise_edition_has_is_not_found(gateway: Gateway, kind: str) -> None:
    assert call(gateway, "GET", f"/{kind}").status_code == 404


@pytest.mark.parametrize("kind", ["services", "routes", "consumers", "plugins", "keyauth_credentials"])
def test_schemas_of_entities_are_told(gateway: Gateway, kind: str) -> None:
    schema = call(gateway, "GET", f"/schemas/{kind}").json()
    assert set(schema) == {"fields", "entity_checks"}
    assert {"id", "tags"} <= {name for field in schema["fields"] for name in field}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/schemas/nonsense", "No entity named 'nonsense'"),
        ("/schemas/plugins/nope", "No plugin named 'nope'"),
        ("/plugins/schema/nope", "No plugin named 'nope'"),
    ],
)
def test_a_schema_that_there_is_none_of_is_said_to_be_none(gateway: Gateway, path: str, message: str) -> None:
    answer = call(gateway, "GET", path)
    assert (answer.status_code, answer.json()["message"]) == (404, message)


def test_a_plugins_configuration_has_a_schema_of_its_own(gateway: Gateway) -> None:
    schema = call(gateway, "GET", "/plugins/schema/rate-limiting").json()
    assert {"minute", "limit_by"} <= {name for field in schema["fields"] for name in field}


ABSENT = {"id": "00000000-0000-4000-8000-000000000000"}


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("services", {"name": "x", "url": "http://a"}, None),
        ("services", {"name": "x"}, "schema violation (host: required field missing)"),
        ("services", {"url": "http://a", "nonsense": 1}, "schema violation (nonsense: unknown field)"),
        ("routes", {"name": "r", "paths": ["/x"], "service": ABSENT}, None),
        ("consumers", {"username": "u"}, None),
        (
            "consumers",
            {},
            "schema violation (at least one of these fields must be non-empty: 'custom_id', 'username')",
        ),
        ("plugins", {"name": "rate-limiting", "config": {"minute": 5}, "service": ABSENT}, None),
        (
            "plugins",
            {"name": "rate-limiting", "config": {"minute": 5}, "service": {"name": "nope"}},
            "schema violation (service.id: missing primary key)",
        ),
        (
            "plugins",
            {"name": "nope"},
            "schema violation (name: plugin 'nope' not enabled; add it to the 'plugins' configuration property)",
        ),
        ("keyauth_credentials", {"key": "k", "consumer": ABSENT}, None),
    ],
)
def test_entities_are_checked_without_being_kept(
    gateway: Gateway, kind: str, body: dict[str, Any], message: str | None
) -> None:
    answer = call(gateway, "POST", f"/schemas/{kind}/validate", body)
    assert answer.status_code == (200 if message is None else 400)
    assert answer.json()["message"] == (message or "schema validation successful")
    assert call(gateway, "POST", "/schemas/nonsense/validate", body).json()["message"] == "No entity named 'nonsense'"


@pytest.mark.parametrize(
    ("method", "path", "body", "operation"),
    [
        ("POST", "/plugins", METERING, "create"),
        ("PATCH", "/services/echo", {"retries": 1}, "update"),
        ("PUT", "/services/x", {"url": "http://x"}, "create or update"),
        ("DELETE", "/services/echo", None, "remove"),
    ],
)
def test_without_a_database_nothing_can_be_written(
    db_less: Gateway, method: str, path: str, body: Any, operation: str
) -> None:
    response = call(db_less, method, path, body)
    kind = path.split("/")[1]
    assert response.status_code == 405
    assert response.json() == {
        "code": 12,
        "name": "operation unsupported",
        "message": f"cannot {operation} '{kind}' entities when not using a database",
    }


def test_without_a_database_a_bad_plugin_is_still_named(db_less: Gateway) -> None:
    assert call(db_less, "POST", "/plugins", {"name": NAME, "config": {}}).status_code == 400


def test_a_whole_configuration_replaces_the_old_one(db_less: Gateway) -> None:
    plugin = f'{{name: {NAME}, config: {{ingest_endpoint: http://x, api_token: ${{{{ env "DECK_AUTH_TOKEN" }}}}}}}}'
    text = (db_less.prefix / "kong.yaml").read_text().replace("/echo", "/other") + f"plugins:\n- {plugin}\n"
    assert call(db_less, "POST", "/config", {"config": text}).status_code == 201
    assert [get(db_less, path).status_code for path in ("/echo", "/other")] == [404, 200]
    wait_for(lambda: db_less.calls("plugin.StartInstance"))
    assert json.loads(db_less.calls("plugin.StartInstance")[0][3][0][b"Config"])["api_token"] == "spat_x"
    bad = call(db_less, "POST", "/config", {"_format_version": "3.0", "plugins": [{"name": NAME, "config": {}}]})
    assert bad.status_code == 400
    assert bad.json()["name"] == "invalid declarative configuration"
    assert get(db_less, "/other").status_code == 200
