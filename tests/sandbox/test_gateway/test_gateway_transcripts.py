"""The stand-in says what a real Kong 3.9.1 said: the same requests give the same frames and the same records."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .fake_plugin_server import NAME
from .fakes import DEADLINE, DUMP_COMMAND, Gateway, running_gateway, wait_for, write_script

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSCRIPTS = Path(__file__).parents[4] / "shared" / "kong-3.9.1" / "transcripts"
pytestmark = pytest.mark.skipif(not TRANSCRIPTS.is_dir(), reason="the shared transcripts are not here")

CONFIG = """
_format_version: "3.0"
services:
- name: echo
  url: @UPSTREAM@
  routes:
  - {name: anything, paths: [/anything], strip_path: false}
  - {name: secured, paths: [/secured], strip_path: false, plugins: [{name: key-auth, config: {hide_credentials: true}}]}
  - {name: limited, paths: [/limited], strip_path: false, plugins: [{name: rate-limiting, config: {minute: 1}}]}
  - {name: terminated, paths: [/terminated], plugins: [{name: request-termination, config: {message: maintenance}}]}
  - name: transformed
    paths: [/transformed]
    strip_path: false
    plugins:
    - name: request-transformer
      config:
        remove: {headers: [x-tenant-id], querystring: [tenant]}
        rename: {headers: ["x-department:x-dept"]}
  - name: ai
    paths: [/ai]
    plugins:
    - name: ai-proxy
      config:
        route_type: llm/v1/chat
        auth: {header_name: Authorization, header_value: Bearer x}
        logging: {log_statistics: true}
        model:
          provider: openai
          name: gpt-4o-mini
          options: {upstream_url: "@UPSTREAM@/v1/chat/completions", input_cost: 0.5, output_cost: 1.5}
consumers:
- {username: alice, custom_id: alice-custom, tags: [gold], keyauth_credentials: [{key: alice-key}]}
plugins:
- name: metering-and-billing
  instance_name: global-metering
  config:
    ingest_endpoint: http://127.0.0.1:9100/api/v3/openmeter/events
    api_token: "{vault://env/om-token}"
    subject: {look_up_value_in: header, field: x-tenant-id}
    attributes: [{source: header, look_up_value_in: x-department, event_property_name: department}]
"""

ACCESS: list[list[Any]] = [
    ["kong.request.get_header", "x-tenant-id"],
    ["kong.request.get_headers", 1000],
    ["kong.request.get_query_arg", "tenant"],
    ["kong.ctx.shared.set", "metering", "v"],
    ["kong.client.get_consumer"],
    ["kong.nginx.get_var", "request_id"],
]
LOG: list[list[Any]] = [
    ["kong.ctx.shared.get", "metering"],
    ["kong.request.get_header", "x-tenant-id"],
    ["kong.log.serialize"],
    ["kong.client.get_consumer"],
    ["kong.router.get_route"],
    ["kong.router.get_service"],
    ["kong.response.get_status"],
]

CURL = "Host: 127.0.0.1:8000|User-Agent: curl/7.88.1|Accept: */*"
TENANT = CURL + "|x-tenant-id: acme"


def curl(line: str, fields: str = TENANT, body: str = "") -> bytes:
    return (line + "\r\n" + "".join(f"{field}\r\n" for field in fields.split("|")) + "\r\n" + body).encode("latin-1")


REQUESTS = {
    "get_header_subject": [
        curl("GET /anything/orders?tenant=acme&page=2 HTTP/1.1", TENANT + "|x-department: engineering")
    ],
    "get_no_subject": [curl("GET /anything HTTP/1.1", CURL)],
    "post_json_body": [
        curl("POST /anything HTTP/1.1", TENANT + "|content-type: application/json|Content-Length: 7", '{"a":1}')
    ],
    "head_request": [curl("HEAD /anything HTTP/1.1")],
    "no_route_404": [curl("GET /nowhere HTTP/1.1")],
    "consumer_key_auth_hidden_credentials": [curl("GET /secured HTTP/1.1", TENANT + "|apikey: alice-key")],
    "key_auth_rejected_401": [curl("GET /secured HTTP/1.1")],
    "upstream_500": [curl("GET /anything/status/500 HTTP/1.1")],
    "upstream_204": [curl("GET /anything/status/204 HTTP/1.1")],
    "rate_limited_429": [curl("GET /limited HTTP/1.1"), curl("GET /limited HTTP/1.1")],
    "request_termination_503": [curl("GET /terminated HTTP/1.1")],
    "request_transformer_removes_subject": [
        curl("GET /transformed?tenant=acme HTTP/1.1", TENANT + "|x-department: engineering")
    ],
    "authorization_header": [curl("GET /anything HTTP/1.1", TENANT + "|authorization: Bearer s3cret")],
    "duplicate_subject_headers": [curl("GET /anything HTTP/1.1", TENANT + "|x-tenant-id: globex")],
    "empty_subject_header": [curl("GET /anything HTTP/1.1", CURL + "|x-tenant-id:")],
    "utf8_subject_header": [
        curl("GET /anything HTTP/1.1", "Host: x|Connection: close|X-Tenant-Id: ").replace(
            b"Id: ", b"Id: " + "Zoë-株式会社".encode()
        )
    ],
    "latin1_subject_header_invalid_utf8": [
        curl("GET /anything HTTP/1.1", "Host: x|Connection: close|X-Tenant-Id: caf\xe9")
    ],
    "invalid_utf8_in_other_header": [
        curl("GET /anything HTTP/1.1", "Host: x|Connection: close|X-Tenant-Id: acme|X-Junk: \xff\xfe")
    ],
    "query_repeated_flag_and_array_args": [
        curl("GET /anything?tenant=acme&tenant=globex&flag&empty=&a[]=1&a[]=2 HTTP/1.1")
    ],
    "underscore_and_case_header_names": [
        curl("GET /anything HTTP/1.1", "Host: x|Connection: close|X-TENANT-ID: acme|X-DEPARTMENT: eng")
    ],
    "no_user_agent_http_1_0": [curl("GET /anything HTTP/1.0", "Host: x|X-Tenant-Id: acme")],
    "x_forwarded_for_client_ip": [curl("GET /anything HTTP/1.1", TENANT + "|X-Forwarded-For: 203.0.113.9")],
    "long_subject_header_7000_bytes": [curl("GET /anything HTTP/1.1", f"{CURL}|x-tenant-id: {'a' * 7000}")],
    "large_response_and_gzip": [
        curl(f"GET /anything/{'p' * 2000} HTTP/1.1", TENANT + "|accept-encoding: gzip"),
    ],
    "bad_request_400_malformed": [b"GET / HTTP/1.1\r\nHost: x\r\nbad header: 1\r\n\r\n"],
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    prefix = tmp_path_factory.mktemp("gateway")
    write_script(prefix, access=ACCESS, log=LOG)
    # The recorder ran before rate-limiting (910) and after key-auth (1250).
    keys = {"nginx_worker_processes": "1", "pluginserver_metering_query_cmd": f"{DUMP_COMMAND} MsgPack:1 1000"}
    with running_gateway(prefix, CONFIG, **keys) as gateway:
        yield gateway


def kong_messages(scenario: str) -> list[list[Any]]:
    frames = json.loads((TRANSCRIPTS / f"{scenario}.json").read_text(encoding="utf-8"))["frames"]
    return [_bytes(frame["message"]) for frame in frames if frame["from"] == "kong"]


def _bytes(value: Any) -> Any:
    """Give a transcript's value as MessagePack has it: strings are bytes."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [_bytes(member) for member in value]
    if isinstance(value, dict):
        if "__bytes_hex__" in value:
            return bytes.fromhex(value["__bytes_hex__"])
        return {key.encode(): _bytes(member) for key, member in value.items()}
    return value


def own_messages(gateway: Gateway, requests: list[bytes]) -> list[list[Any]]:
    """Send the requests, and return what the plugin server got because of them."""
    before = len(gateway.calls())
    for request in requests:
        send_and_wait_for_log(gateway, request)
    return [message for message in gateway.calls()[before:] if message[2] != b"plugin.StartInstance"]


def send_and_wait_for_log(gateway: Gateway, request: bytes) -> None:
    before = logged(gateway)
    with socket.create_connection(gateway.address(), timeout=DEADLINE) as client:
        client.sendall(request)
        wait_for(lambda: logged(gateway) > before)


def logged(gateway: Gateway) -> int:
    return sum(map(_is_status, gateway.calls("plugin.Step")))


def _is_status(message: list[Any]) -> bool:
    """Tell the last message of a log phase: the status, the only number that is ever asked for."""
    return isinstance(message[3][0].get(b"Data"), int)


def _data(message: list[Any]) -> Any:
    argument = message[3][0]
    return argument.get(b"Data", b"(absent)") if isinstance(argument, dict) else argument


def _record(message: list[Any]) -> dict[str, Any] | None:
    data = _data(message)
    if message[2] != b"plugin.Step" or not isinstance(data, bytes) or not data.startswith(b'{"request":'):
        return None
    record: dict[str, Any] = json.loads(data.decode("utf-8", "surrogateescape"))
    return record


def _stable(value: Any) -> Any:
    """Give a PDK result without what differs from run to run."""
    if isinstance(value, bytes) and len(value) == 32:
        return b"(an id)"
    if isinstance(value, dict):
        changing = (b"created_at", b"updated_at", b"port", b"x-credential-identifier")
        return {key: _stable(member) for key, member in value.items() if key not in changing}
    return value


@pytest.mark.parametrize("scenario", sorted(REQUESTS))
def test_the_plugin_server_gets_the_frames_that_kong_sent(gateway: Gateway, scenario: str) -> None:
    expected = kong_messages(scenario)
    if scenario == "rate_limited_429":
        wait_for(lambda: time.time() % 60 < 58)  # both requests have to be in one minute
    found = own_messages(gateway, REQUESTS[scenario])
    assert [message[2] for message in found] == [message[2] for message in expected]
    assert [set(message[3][0]) for message in found] == [set(message[3][0]) for message in expected]
    for ours, kongs in zip(found, expected, strict=True):
        record, kongs_record = _record(ours), _record(kongs)
        if record is None or kongs_record is None:
            assert _stable(_data(ours)) == _stable(_data(kongs))
        else:
            check_record(scenario, record, kongs_record)


def check_record(scenario: str, record: dict[str, Any], kongs: dict[str, Any]) -> None:
    assert set(record) == set(kongs)
    for name in ("route", "service", "consumer"):
        assert _entity(record.get(name)) == _entity(kongs.get(name))
    for name in ("upstream_uri", "upstream_status", "source", "client_ip", "workspace", "workspace_name"):
        assert (name, record[name]) == (name, kongs[name])
    for name in ("method", "querystring", "uri", "size"):
        assert (name, record["request"][name]) == (name, kongs["request"][name])
    assert _headers(record["request"]["headers"]) == _headers(kongs["request"]["headers"])
    assert without_port(record["request"]["url"]) == without_port(kongs["request"]["url"])
    assert set(record["latencies"]) == set(kongs["latencies"])
    assert record["response"]["status"] == kongs["response"]["status"]
    assert set(record.get("authenticated_entity", {})) == set(kongs.get("authenticated_entity", {}))
    assert [set(one) for one in record.get("tries", [])] == [set(one) for one in kongs.get("tries", [])]
    check_response(scenario, record["response"], kongs["response"])


def without_port(url: str) -> str:
    return re.sub(r":\d+/", "/", url, count=1)


def check_response(scenario: str, ours: dict[str, Any], kongs: dict[str, Any]) -> None:
    assert set(ours["headers"]) == set(kongs["headers"]), scenario
    if "x-kong-response-latency" in kongs["headers"]:
        # The gateway's own answers are the same to the byte, but for the digits of the times in them.
        assert size_without_times(ours) == size_without_times(kongs)
        assert ours["headers"]["content-type"] == kongs["headers"]["content-type"]
        assert ours["headers"]["content-length"] == kongs["headers"]["content-length"]


def size_without_times(response: dict[str, Any]) -> int:
    times = ("x-kong-response-latency", "ratelimit-reset", "retry-after")
    return int(response["size"]) - sum(len(response["headers"].get(name, "")) for name in times)


def _entity(entity: dict[str, Any] | None) -> dict[str, Any] | None:
    return (
        None if entity is None else {k: v for k, v in entity.items() if k not in ("created_at", "updated_at", "port")}
    )


def _headers(headers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in headers.items() if name != "x-credential-identifier"}


def test_an_instance_starts_with_the_configuration_that_kong_sent(gateway: Gateway) -> None:
    own_messages(gateway, [REQUESTS["get_no_subject"][0]])
    started = gateway.calls("plugin.StartInstance")[0][3][0]
    expected = json.loads(kong_messages("start_instance_dbless_vault_reference")[0][3][0][b"Config"])
    found = json.loads(started[b"Config"])
    assert started[b"Name"] == NAME.encode()
    same = ("__plugin_id", "__key__", "__ws_id", "$refs", "plugin_instance_name", "subject", "attributes", "timeout")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert isinstance(found["__seq__"], int)
    assert found["api_token"] == "om_secret"


def test_a_chat_through_ai_proxy_leaves_the_record_that_kong_left(gateway: Gateway) -> None:
    body = '{"messages": [{"role": "user", "content": "hi"}]}'
    fields = f"{TENANT}|content-type: application/json|Content-Length: {len(body)}"
    records = [_record(m) for m in own_messages(gateway, [curl("POST /ai HTTP/1.1", fields, body)])]
    record = next(one for one in records if one)
    kongs = next(one for one in map(_record, kong_messages("ai_proxy_chat")) if one)
    assert set(record) == set(kongs)
    assert record["ai"]["proxy"]["meta"] == {
        **kongs["ai"]["proxy"]["meta"],
        "llm_latency": record["ai"]["proxy"]["meta"]["llm_latency"],
    }
    usage = {**kongs["ai"]["proxy"]["usage"], "time_per_token": record["ai"]["proxy"]["usage"]["time_per_token"]}
    assert record["ai"]["proxy"]["usage"] == usage
    assert (record["upstream_status"], record["upstream_uri"]) == (200, "/v1/chat/completions")
    assert set(record["request"]["headers"]) == set(kongs["request"]["headers"])
    assert record["response"]["headers"]["x-kong-llm-model"] == "openai/gpt-4o-mini"
    assert set(record["response"]["headers"]) == set(kongs["response"]["headers"])
