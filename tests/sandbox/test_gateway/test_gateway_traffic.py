"""Requests through the proxy: raw bytes, sizes, failures of the service, who logs what."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import requests

from .fakes import DEADLINE, Gateway, check_unexpected_error, get, raw_exchange, running_gateway, wait_for, write_script

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = """
_format_version: "3.0"
services:
- name: echo
  url: @UPSTREAM@
  routes:
  - {name: echo, paths: [/echo], strip_path: false}
  - {name: stripped, paths: [/stripped]}
  - {name: secure-only, paths: [/secure-only], protocols: [https]}
  - {name: secured, paths: [/secured], plugins: [{name: key-auth}, {name: request-termination, consumer: bob}]}
  - {name: open, paths: [/open], plugins: [{name: key-auth, config: {anonymous: guest, key_names: [apikey, k]}}]}
  - name: limited
    paths: [/limited]
    plugins: [{name: rate-limiting, config: {hour: 2, limit_by: header, header_name: x-user}}]
  - name: transformed
    paths: [/transformed]
    plugins:
    - name: request-transformer
      config:
        add: {headers: ["x-new:1", "x-tenant-id:other"], querystring: ["n:1"]}
        replace: {headers: ["x-old:2"], querystring: ["q:2"]}
        append: {headers: ["x-many:3"]}
- {name: raw, url: "http://127.0.0.1:@RAW@", routes: [{name: raw, paths: [/raw], strip_path: false}]}
- {name: dead, url: "http://127.0.0.1:1/base", retries: 2, routes: [{name: dead, paths: [/dead]}]}
- name: slow
  url: @UPSTREAM@
  read_timeout: 100
  retries: 1
  routes: [{name: slow, paths: [/slow], strip_path: false}]
- {name: nameless, url: "http://no-such-host.invalid", routes: [{name: nameless, paths: [/nameless]}]}
routes:
- {name: serviceless, paths: [/serviceless]}
consumers:
- {username: alice, keyauth_credentials: [{key: alice-key}]}
- {username: bob, keyauth_credentials: [{key: bob-key}]}
- {username: guest}
plugins:
- name: metering-and-billing
  config: {ingest_endpoint: http://x, api_token: t}
"""


class RawService:
    """A service that keeps the bytes of the last request that it got."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.request = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += client.recv(65536)
                self.request = request
                client.sendall(b"HTTP/1.1 200 OK\r\nX-Raw: caf\xe9\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture(scope="module")
def raw_service() -> RawService:
    return RawService()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, raw_service: RawService) -> Iterator[Gateway]:
    config = CONFIG.replace("@RAW@", str(raw_service.port))
    with running_gateway(tmp_path_factory.mktemp("gateway"), config) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    """Give the running gateway, with its usual script."""
    write_script(shared.prefix, log=[["kong.log.serialize"]])
    return shared


def answers(gateway: Gateway, *calls: list[Any], path: str = "/echo/x%20y?a=1&b&a=2", **headers: str) -> list[Any]:
    """Make the plugin do these PDK calls in the access phase; return what a request got it."""
    gateway.script(access=list(calls), log=[["kong.log.serialize"]])
    before = len(gateway.calls())
    get(gateway, path, headers=headers or {"X-Tenant": "acme"})
    calls_made = gateway.calls()[before:]
    first = next(message for message in calls_made if message[3][0].get(b"EventName") == b"access")
    steps = [message for message in calls_made[calls_made.index(first) + 1 :] if message[2].startswith(b"plugin.Step")]
    return [message[3][0].get(b"Data") for message in steps[: len(calls)]]


def test_raw_targets_and_headers_reach_service_and_record_unchanged(gateway: Gateway, raw_service: RawService) -> None:
    target = b"/raw//%7Euser/./\xc3\xbf?q=%zz&\xe9=1"
    fields = b"x_Under: caf\xe9\r\nX-A: 1\r\nX-A: 2\r\nX-Empty: \r\n"
    received = raw_exchange(
        gateway, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + fields + b"\r\n"
    )
    assert b"X-Raw: caf\xe9\r\n" in received
    assert raw_service.request.startswith(b"GET /raw/~user/%C3%BF?q=%zz&\xe9=1 HTTP/1.1\r\n")
    assert raw_service.request.endswith(fields + b"\r\n")
    record = gateway.record(received)
    assert record["request"]["uri"].encode("utf-8", "surrogateescape") == target
    assert record["request"]["headers"]["x_under"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert record["request"]["headers"]["x-a"] == ["1", "2"]
    assert record["response"]["headers"]["x-raw"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert record["request"]["querystring"] == {"q": "%zz", "\udce9": "1"}


def test_an_absolute_target_is_logged_as_its_path(gateway: Gateway) -> None:
    line = b"GET http://Shop.Example/echo?x=1 HTTP/1.1"
    received = raw_exchange(gateway, line + b"\r\nHost: other\r\nConnection: close\r\n\r\n")
    request = gateway.record(received)["request"]
    assert request["uri"] == "/echo?x=1"
    assert request["url"].startswith("http://shop.example:")
    assert request["headers"]["host"] == "other"


def test_two_hundred_headers_pass_but_the_record_has_a_hundred(gateway: Gateway, raw_service: RawService) -> None:
    many = {f"X-{i}": str(i) for i in range(200)}
    calls: list[list[Any]] = [
        ["kong.request.get_headers", 1000],
        ["kong.request.get_headers"],
        ["kong.request.get_header", "x-150"],
    ]
    all_of_them, some, one = answers(gateway, *calls, path="/raw/many", **many)
    assert (len(all_of_them) >= 200, len(some), one) == (True, 100, b"150")
    assert b"X-199: 199\r\n" in raw_service.request
    assert len(gateway.record("/raw/many")["request"]["headers"]) == 100


def test_a_long_header_passes_and_a_too_long_one_is_refused(gateway: Gateway) -> None:
    assert get(gateway, "/echo", headers={"X-Long": "x" * 8000}).status_code == 200
    response = get(gateway, "/echo", headers={"X-Long": "x" * 8300})
    assert response.status_code == 400
    assert response.json()["message"] == "Request header or cookie too large"
    assert gateway.record(response)["response"]["status"] == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_pass_both_ways_and_are_counted(gateway: Gateway, chunked: bool) -> None:  # noqa: FBT001
    size = 10_000_000
    body = b"x" * size
    data: Any = iter([body[: size // 2], body[size // 2 :]]) if chunked else body
    response = requests.post(gateway.proxy + f"/echo/bytes/{size}", data=data, timeout=DEADLINE)
    assert len(response.content) == size
    record = gateway.record(response)
    assert size < record["request"]["size"] < size + 1000
    assert size < record["response"]["size"] < size + 1000


def test_a_body_is_asked_for_when_the_client_waits_for_that(gateway: Gateway) -> None:
    with socket.create_connection(gateway.address(), timeout=DEADLINE) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        received = b""
        while b'"body_bytes": 3' not in received:
            received += client.recv(10000)


def test_one_connection_carries_many_requests_also_after_refused_bodies(gateway: Gateway) -> None:
    refused = b"POST /secured HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    last = b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received = raw_exchange(gateway, refused + refused + last)
    assert [received.count(b"HTTP/1.1 401 Unauthorized"), received.count(b"HTTP/1.1 200 OK")] == [2, 1]


def test_http_1_0_gets_its_answer_and_the_end_of_the_connection(gateway: Gateway) -> None:
    received = raw_exchange(gateway, b"GET /echo HTTP/1.0\r\nHost: x\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Connection: close\r\n" in received


def test_the_service_gets_kongs_headers(gateway: Gateway) -> None:
    response = get(
        gateway,
        "/stripped/x?y=1",
        headers={"X-Forwarded-For": "203.0.113.9", "Via": "1.1 other", "Connection": "close, X-Drop", "X-Drop": "1"},
    )
    headers = {name.lower(): value for name, value in response.json()["headers"]}
    assert headers["x-forwarded-for"] == "203.0.113.9, 127.0.0.1"
    assert headers["via"] == "1.1 other, 1.1 kong/3.9.1"
    assert (headers["x-forwarded-prefix"], headers["x-forwarded-path"]) == ("/stripped", "/stripped/x")
    assert (
        headers["x-kong-request-id"]
        == response.headers["X-Kong-Request-Id"]
        == gateway.record(response)["request"]["id"]
    )
    assert "x-drop" not in headers
    assert (response.json()["path"], response.json()["query"]) == ("/x", "y=1")


def test_a_service_that_cannot_be_reached_is_tried_again_and_then_502(gateway: Gateway) -> None:
    response = get(gateway, "/dead/x")
    assert (response.status_code, response.json()["message"]) == (
        502,
        "An invalid response was received from the upstream server",
    )
    assert {"X-Kong-Upstream-Latency", "X-Kong-Proxy-Latency", "Via"} <= set(response.headers)
    record = gateway.record(response)
    assert (record["upstream_status"], record["source"], record["upstream_uri"]) == ("502, 502, 502", "kong", "/base/x")
    assert [(one["state"], one["code"]) for one in record["tries"]] == [("failed", 502)] * 3


def test_a_service_that_takes_too_long_is_504(gateway: Gateway) -> None:
    response = requests.get(gateway.proxy + "/slow/slow/5", timeout=DEADLINE, headers={"Accept": "text/plain"})
    assert (response.status_code, response.text.partition("\n")[0]) == (504, "The upstream server is timing out")
    assert gateway.record(response)["upstream_status"] == "504, 504"


def test_a_service_without_an_address_is_503(gateway: Gateway) -> None:
    response = get(gateway, "/nameless")
    assert (response.status_code, response.json()["message"]) == (503, "name resolution failed")


def test_a_route_without_a_service_is_503(gateway: Gateway) -> None:
    response = get(gateway, "/serviceless")
    assert response.json()["message"] == "no Service found with those values"
    record = gateway.record(response)
    assert ("service" in record, record["route"]["name"], record["tries"]) == (False, "serviceless", [])


def test_a_route_for_https_only_asks_for_https(gateway: Gateway) -> None:
    response = get(gateway, "/secure-only")
    assert (response.status_code, response.json()["message"]) == (426, "Please use HTTPS protocol")


def test_a_client_that_goes_away_is_logged_as_499(gateway: Gateway) -> None:
    gateway.script(access=[["kong.request.get_path"]], log=[["kong.log.serialize"]])
    with socket.create_connection(gateway.address(), timeout=DEADLINE) as client:
        client.sendall(b"GET /echo/slow/5 HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: any(call[3][0].get(b"Data") == b"/echo/slow/5" for call in gateway.calls("plugin.Step")))
    record = gateway.record("/echo/slow/5")
    assert (record["response"]["status"], record["response"]["size"]) == (499, 0)


def test_an_unreadable_body_is_400(gateway: Gateway) -> None:
    received = raw_exchange(
        gateway, b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"
    )
    assert received.startswith(b"HTTP/1.1 400 Bad Request")
    assert gateway.record(received)["response"]["status"] == 400


@pytest.mark.parametrize("line", [b"get / HTTP/1.1", b"\x16\x03\x01", b"GET /?x=1 HTTP/9"])
def test_a_malformed_request_line_reaches_the_log_phase_of_global_plugins(gateway: Gateway, line: bytes) -> None:
    record = gateway.record(raw_exchange(gateway, line + b"\r\n\r\n"))
    assert (record["request"]["uri"], record["request"]["size"], record["upstream_uri"]) == ("", 0, "")
    assert record["response"]["status"] >= 400


def test_an_unknown_key_and_a_known_one(gateway: Gateway) -> None:
    response = get(gateway, "/secured", headers={"apikey": "wrong"})
    assert (response.status_code, response.json()["message"]) == (401, "Unauthorized")
    assert response.headers["WWW-Authenticate"] == "Key"
    response = get(gateway, "/secured?apikey=alice-key")
    assert response.status_code == 200
    record = gateway.record(response)
    assert record["consumer"]["username"] == "alice"
    assert set(record["authenticated_entity"]) == {"id"}


def test_a_plugin_for_a_consumer_applies_after_authentication(gateway: Gateway) -> None:
    response = get(gateway, "/secured", headers={"apikey": "bob-key"})
    assert (response.status_code, response.json()) == (503, {"message": "Service unavailable"})


def test_an_anonymous_consumer_may_pass(gateway: Gateway) -> None:
    response = get(gateway, "/open")
    headers = {name.lower(): value for name, value in response.json()["headers"]}
    assert (headers["x-consumer-username"], headers["x-anonymous-consumer"]) == ("guest", "true")
    record = gateway.record(response)
    assert (record["consumer"]["username"], "authenticated_entity" in record) == ("guest", False)


def test_requests_are_limited_per_header_value(gateway: Gateway) -> None:
    statuses = [get(gateway, "/limited", headers={"X-User": "a"}).status_code for _ in range(3)]
    other = get(gateway, "/limited", headers={"X-User": "b"})
    assert (statuses, other.status_code) == ([200, 200, 429], 200)
    assert other.headers["X-RateLimit-Remaining-Hour"] == "1"
    assert other.headers["RateLimit-Limit"] == "2"


def test_headers_and_query_are_transformed(gateway: Gateway) -> None:
    response = get(gateway, "/transformed?q=1&k=v", headers={"X-Old": "1", "X-Many": "1", "X-Tenant-Id": "acme"})
    headers = [(name.lower(), value) for name, value in response.json()["headers"]]
    assert {("x-new", "1"), ("x-old", "2"), ("x-many", "1"), ("x-many", "3"), ("x-tenant-id", "acme")} <= set(headers)
    assert response.json()["query"] == "k=v&n=1&q=2"
    record = gateway.record(response)
    assert record["upstream_uri"] == "/?k=v&n=1&q=2"
    assert record["request"]["uri"] == "/transformed?q=1&k=v"


def test_the_pdk_answers_about_the_request(gateway: Gateway) -> None:
    port = gateway.address()[1]
    found = answers(
        gateway,
        ["kong.request.get_method"],
        ["kong.request.get_path"],
        ["kong.request.get_raw_path"],
        ["kong.request.get_raw_query"],
        ["kong.request.get_query"],
        ["kong.request.get_query_arg", "b"],
        ["kong.request.get_host"],
        ["kong.request.get_port"],
        ["kong.request.get_scheme"],
        ["kong.request.get_http_version"],
        ["kong.client.get_ip"],
        ["kong.nginx.get_var", "http_x_tenant"],
        ["kong.nginx.get_var", "REQUEST_URI"],
        ["kong.nginx.get_var", "no_such"],
        ["kong.no.such"],
    )
    assert found == [
        b"GET",
        b"/echo/x y",
        b"/echo/x%20y",
        b"a=1&b&a=2",
        {b"a": [b"1", b"2"], b"b": []},
        True,
        b"127.0.0.1",
        port,
        b"http",
        1.1,
        b"127.0.0.1",
        b"acme",
        b"/echo/x%20y?a=1&b&a=2",
        None,
        None,
    ]
    assert "could not find pdk method: kong.no.such" in gateway.log_text()


def test_a_plugin_changes_the_request_for_the_service(gateway: Gateway) -> None:
    gateway.script(
        access=[["kong.service.request.set_header", "X-Set", "1"], ["kong.service.request.clear_header", "x-gone"]]
    )
    response = get(gateway, "/echo", headers={"X-Gone": "1"})
    headers = {name.lower() for name, _ in response.json()["headers"]}
    assert ("x-set" in headers, "x-gone" in headers) == (True, False)


def test_a_plugin_can_answer_the_request(gateway: Gateway) -> None:
    gateway.script(
        access=[["kong.response.exit", 402, {"message": "pay"}, {"X-Why": "money"}], ["kong.client.get_ip"]],
        log=[["kong.log.serialize"]],
    )
    before = len(gateway.calls())
    response = get(gateway, "/echo")
    assert (response.status_code, response.json(), response.headers["X-Why"]) == (402, {"message": "pay"}, "money")
    assert gateway.record(response)["source"] == "kong"
    # The event ends there: the plugin server never hears of the call's result.
    assert b"127.0.0.1" not in [message[3][0].get(b"Data") for message in gateway.calls()[before:]]


@pytest.mark.parametrize(
    "call",
    [
        ["kong.response.get_status"],
        ["kong.log.serialize"],
        ["kong.request.get_headers", 1001],
        ["kong.request.get_header", 1],
    ],
)
def test_a_call_that_raises_in_the_access_phase_makes_a_500(gateway: Gateway, call: list[Any]) -> None:
    gateway.script(access=[call], log=[["kong.log.serialize"]])
    response = get(gateway, "/echo")
    check_unexpected_error(response)
    assert gateway.record(response)["source"] == "kong"


@pytest.mark.parametrize(
    "call", [["kong.nginx.get_var", "request_id"], ["kong.request.get_method"], ["kong.response.exit", 200]]
)
def test_a_call_that_raises_in_the_log_phase_ends_the_event(gateway: Gateway, call: list[Any]) -> None:
    gateway.script(log=[["kong.log.serialize"], call, ["kong.response.get_status"]])
    before, complaints = len(gateway.calls()), gateway.log_text().count("API disabled in the")
    response = get(gateway, "/echo")
    assert response.status_code == 200
    gateway.record(response)
    wait_for(lambda: gateway.log_text().count("API disabled in the") > complaints)
    assert 200 not in [message[3][0].get(b"Data") for message in gateway.calls()[before:]]


def test_shared_context_goes_from_access_to_log_with_its_bytes(gateway: Gateway) -> None:
    table = {"a": [1, {"b": "x"}], "none": None, "list": ["y", None]}
    gateway.script(
        access=[
            ["kong.ctx.shared.set", "k", table],
            ["kong.ctx.shared.set", "gone", 1],
            ["kong.ctx.shared.set", "gone", None],
        ],
        log=[["kong.ctx.shared.get", "k"], ["kong.ctx.shared.get", "gone"], ["kong.log.serialize"]],
    )
    gateway.record(get(gateway, "/echo"))
    found = [message[3][0] for message in gateway.calls("plugin.Step")]
    assert {b"a": [1, {b"b": b"x"}], b"list": [b"y"]} in [one.get(b"Data") for one in found]


def test_a_plugin_adds_to_the_record_and_to_the_error_log(gateway: Gateway) -> None:
    gateway.script(
        access=[["kong.log.set_serialize_value", "my.own", {"x": 1}], ["kong.log.warn", "watch ", "out: ", 5]],
        log=[["kong.log.serialize"]],
    )
    assert gateway.record(get(gateway, "/echo"))["my"] == {"own": {"x": 1}}
    assert "[warn]" in gateway.log_text()
    assert "[metering-and-billing] watch out: 5" in gateway.log_text()
