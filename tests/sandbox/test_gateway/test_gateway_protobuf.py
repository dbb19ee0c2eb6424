"""What Kong says in `ProtoBuf:1`, byte for byte: frames that a real Kong 3.9.3 sent, and the stand-in's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kong_metering_sandbox.gateway.pluginsocket import decode

from .fakes import (
    METERED_ECHO,
    PROTOBUF,
    Gateway,
    both_protocols,
    get,
    raw_exchange,
    running_gateway,
    wait_for,
    write_script,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SET, GET = "kong.ctx.shared.set", "kong.ctx.shared.get"
NOTHING = "00000000"

# PDK calls of the access phase, and Kong's frames for the request that `answers` sends.
ACCESS: list[tuple[list[Any], str]] = [
    (["kong.request.get_header", "x-tenant-id"], "060000000a0461636d65"),
    (["kong.request.get_header", "x-none"], NOTHING),
    (["kong.nginx.get_var", "undefined_thing"], NOTHING),
    (["kong.nginx.get_var", "http_x_tenant_id"], "110000000a0f61636d652c20676c6f6265782c2075"),
    (["kong.nginx.get_var", "HTTP_X_Tenant_ID"], "110000000a0f61636d652c20676c6f6265782c2075"),
    (["kong.nginx.get_var", "http_x-tenant-id"], NOTHING),
    (["kong.nginx.get_var", "http_cookie"], "0a0000000a08613d313b20623d32"),
    (["kong.nginx.get_var", ""], NOTHING),
    (["kong.request.get_query_arg", "a"], "030000000a0131"),
    (["kong.request.get_query_arg", "e"], NOTHING),
    (["kong.request.get_http_version"], "09000000099a9999999999f13f"),
    (["kong.client.get_consumer"], NOTHING),
    (["kong.client.get_credential"], NOTHING),
    (["kong.router.get_service"], NOTHING),
    (["kong.client.get_protocol", False], "060000000a0468747470"),
    (["kong.log.notice", "a", 1, 2.5, True], NOTHING),
    ([SET, "k", True], NOTHING),
    ([GET, "k"], "020000002001"),
    ([SET, "k", False], NOTHING),  # false is nil afterwards
    ([GET, "k"], "020000000801"),
    ([SET, "k", None], NOTHING),  # but null is a string
    ([GET, "k"], "0c0000001a0a4e554c4c5f56414c5545"),
    ([SET, "k", [1, "x", {"k": ["\udcff"]}, [], {}]], NOTHING),
    (
        [GET, "k"],
        "2c000000322a0a0911000000000000f03f0a031a01780a102a0e0a0c0a016b120732050a031a01ff0a022a000a022a00",
    ),
    ([SET, "k", [True, False, 3]], NOTHING),  # a list ends at its first nil
    ([GET, "k"], "0600000032040a022001"),
    ([SET, "k", ""], NOTHING),
    ([GET, "k"], "020000001a00"),
    ([SET, "k", 0], NOTHING),
    ([GET, "k"], "09000000110000000000000000"),
    ([SET, "k"], NOTHING),
    ([GET, "k"], "020000000801"),
    ([SET, "hex:0a016b12020801"], NOTHING),  # an enumeration's value without a name is a number
    ([GET, "k"], "0900000011000000000000f03f"),
]
LOG: list[tuple[list[Any], str]] = [
    (["kong.request.get_header", "x-tenant-id"], "060000000a0461636d65"),
    (["kong.request.get_header", "X_Tenant_Id"], "030000000a0175"),
    (["kong.response.get_source"], "060000000a0465786974"),
    (["kong.response.get_status"], "0300000008c801"),
]
FIELDS = (
    b"x-tenant-id: acme\r\nX-Tenant-Id: globex\r\nx_tenant_id: u\r\ncookie: a=1\r\ncookie: b=2\r\n"
    b"X-Kong-Request-Id: mine\r\nx-bin: \xff\xfe\r\nx-empty:\r\n"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    prefix = tmp_path_factory.mktemp("gateway")
    with running_gateway(prefix, METERED_ECHO, protocol=PROTOBUF, nginx_worker_processes="1") as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    """Give the running gateway, with its usual script."""
    write_script(shared.prefix, log=[["kong.log.serialize"]])
    return shared


def answers(gateway: Gateway, access: list[list[Any]], log: list[list[Any]], **script: Any) -> list[bytes]:
    """Let the plugin make calls for one request; give the frames that it gets for them."""
    before = len(gateway.frames())
    gateway.script(access=access, log=log, **script)
    request = b"GET /echo?a=1&a=2&f&e= HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + FIELDS + b"\r\n"
    assert raw_exchange(gateway, request).startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: len(gateway.frames()) - before >= len(access) + len(log))
    return gateway.frames()[before:]


def results(gateway: Gateway, access: list[list[Any]], log: list[list[Any]]) -> list[Any]:
    """Do what `answers` does, and give the results as values."""
    count = len(answers(gateway, access, log))
    return [message[3][0].get(b"Data") for message in gateway.calls("plugin.Step")[-count:]]


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "all calls and the return in one write"])
def test_results_of_pdk_calls_are_sent_as_kong_sends_them(gateway: Gateway, *, pipelined: bool) -> None:
    calls = [*ACCESS, *LOG]
    found = answers(gateway, [call for call, _ in ACCESS], [call for call, _ in LOG], pipelined=pipelined)
    assert [(call, frame.hex()) for (call, _), frame in zip(calls, found, strict=True)] == calls


def test_headers_and_query_are_tables_of_strings_and_lists(gateway: Gateway) -> None:
    query, headers = results(gateway, [["kong.request.get_query", 100]], [["kong.request.get_headers", 3]])
    assert query == {b"a": [b"1", b"2"], b"f": True, b"e": b""}
    expected: dict[bytes, Any] = {b"x-tenant-id": [b"acme", b"globex"], b"x_tenant_id": b"u", b"x-empty": b""}
    assert {name: headers.get(name) for name in expected} == expected
    assert headers[b"x-bin"] == b"\xff\xfe"


def test_entities_have_the_fields_that_the_protocol_knows(gateway: Gateway) -> None:
    (route,) = results(gateway, [["kong.router.get_route"]], [])
    kongs = bytes.fromhex(
        "50aa0310caef9ed8062a04687474702a05687474707322046563686f42052f6563686f680018caef9ed80660010a246266336331386664"
        "2d333437642d353439372d383233302d303434316632616437613635"
    )
    expected = decode("Route", kongs)
    assert set(route) == {field.name.encode() for field, _ in expected.ListFields()}
    same = ("name", "protocols", "paths", "strip_path", "preserve_host", "https_redirect_status_code")
    assert [route[name.encode()] for name in same] == [getattr(expected, name) for name in same]


def test_calls_are_numbered_from_two_and_say_what_kong_says(tmp_path: Path) -> None:
    kongs = ["120000000803a2020d120661636365737308b19c8f04", "0f0000000804a2020a12036c6f6708b19c8f04"]
    with running_gateway(tmp_path, METERED_ECHO, protocol=PROTOBUF, nginx_worker_processes="1") as gateway:
        get(gateway, "/echo")
        gateway.wait_for_log_events()
        start, *events = [frame for kind, frame in gateway.journal() if kind == "call"]
    assert [int.from_bytes(frame[:4], "little") + 4 for frame in (start, *events)] == list(map(len, (start, *events)))
    assert decode("RpcCall", start[4:]).sequence == 2
    for event, recorded in zip(events, kongs, strict=True):
        found, expected = decode("RpcCall", event[4:]), decode("RpcCall", bytes.fromhex(recorded)[4:])
        expected.cmd_handle_event.instance_id = found.cmd_handle_event.instance_id
        assert found == expected


# -- the request's id and nginx's variables, in both protocols


VARIABLES = [["kong.nginx.get_var", name] for name in ("kong_request_id", "no_such_thing", "http_x_tenant_id")]


@both_protocols
def test_a_client_has_no_influence_on_the_request_id(tmp_path: Path, protocol: str) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol) as gateway:
        gateway.script(access=VARIABLES, log=[["kong.log.serialize"]])
        response = get(gateway, "/echo", headers={"X-Kong-Request-Id": "mine", "kong_request_id": "mine"})
        request_id = response.headers["X-Kong-Request-Id"]
        assert gateway.record(response)["request"]["id"] == request_id != "mine"
        steps = [message[3][0] for message in gateway.calls("plugin.Step")]
        assert [step.get(b"Data") for step in steps[:3]] == [request_id.encode(), None, None]


@both_protocols
def test_an_older_kong_tells_no_request_id(tmp_path: Path, protocol: str) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol, standin_kong_request_id="off") as gateway:
        gateway.script(access=VARIABLES, log=[["kong.log.serialize"]])
        response = get(gateway, "/echo", headers={"X-Tenant-Id": "acme"})
        assert "X-Kong-Request-Id" not in response.headers
        wait_for(gateway.records)
        assert "id" not in gateway.records()[0]["request"]
        steps = [message[3][0] for message in gateway.calls("plugin.Step")]
        assert [step.get(b"Data") for step in steps[:3]] == [None, None, b"acme"]


@both_protocols
def test_a_header_variable_joins_all_lines_of_that_name(tmp_path: Path, protocol: str) -> None:
    with running_gateway(tmp_path, METERED_ECHO, protocol=protocol) as gateway:
        gateway.script(access=[["kong.nginx.get_var", "http_x_tenant_id"]], log=[["kong.log.serialize"]])
        many = b"".join(b"x-%d: 1\r\n" % i for i in range(150))
        request = b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + many + FIELDS + b"\r\n"
        gateway.record(raw_exchange(gateway, request))
        steps = [message[3][0] for message in gateway.calls("plugin.Step")]
        assert steps[0][b"Data"] == b"acme, globex, u"
