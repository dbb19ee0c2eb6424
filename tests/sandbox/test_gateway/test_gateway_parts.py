from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering_sandbox.gateway.headers import Headers, look_up, multi_map, pdk_get_header
from kong_metering_sandbox.gateway.iterator import PluginsIterator
from kong_metering_sandbox.gateway.luapattern import PatternError, lua_match
from kong_metering_sandbox.gateway.query import (
    decode_args,
    encode_args,
    escape_path,
    normalize_path,
    without_arg,
)
from kong_metering_sandbox.gateway.router import Router
from kong_metering_sandbox.gateway.server import Lane, ProxyServer
from kong_metering_sandbox.gateway.values import encode_json, from_wire, to_wire
from kong_metering_sandbox.gateway.wire import HeaderLimits, RequestHead, read_chunked, read_head


def test_json_leaves_bytes_that_are_not_utf8_as_they_are() -> None:
    assert encode_json({"x": b"caf\xe9\xff"}) == b'{"x":"caf\xe9\xff"}'


def test_json_escapes_what_cjson_escapes() -> None:
    assert encode_json(b'a"\\/\x00\x1f\n\x7f') == b'"a\\"\\\\/\\u0000\\u001f\\n\\u007f"'


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (200, b"200"),
        (1795359983515, b"1795359983515"),
        (1.6e-05, b"1.6e-05"),
        (1.795359983515981e18, b"1.795359983515981e+18"),
    ],
)
def test_json_shows_numbers_as_kong_does(number: float, text: bytes) -> None:
    assert encode_json(number) == text


def test_an_empty_list_and_an_empty_table_differ_in_json() -> None:
    assert encode_json([[], {}]) == b"[[],{}]"


def test_nil_members_vanish_on_the_way_into_lua() -> None:
    assert from_wire({b"a": None, b"b": [1, None], b"c": [None, 2]}) == {b"b": [1], b"c": {2: 2}}


def test_an_empty_table_goes_over_the_wire_as_an_empty_array_but_an_empty_multi_map_as_a_map() -> None:
    assert to_wire({}) == []
    assert to_wire(multi_map({})) == {}


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("https://x/y", "^https?://[^%s]+$", "https://x/y"),
        ("ftp://x", "^https?://", None),
        ("200-299", "^%d+%-?%d*$", "200-299"),
        ("a]b", "[]]", "]"),
        ("a-b", "[%w-]+", "a-b"),
        ("abc", "^[^a]", None),
        ("f(a(b)c)d", "%b()", "(a(b)c)"),
        ("THE (quick) fox", "%f[%a]%a+%f[%A]", "THE"),
        ("abab", "^(ab)%1$", "abab"),
        ("<<a>>", "<(.-)>", "<<a>"),
        ("x", "^$", None),
        ("", "^$", ""),
        ("a.b", "^a%.b$", "a.b"),
        ("Zoë", "^%a+", "Zo"),
        ("0x1F", "%x+", "0"),
        ("a\tb", "%s", "\t"),
        ("a1", "%D%d", "a1"),
        ("a1", "()%d()", "1"),
    ],
)
def test_lua_patterns(text: str, pattern: str, found: str | None) -> None:
    assert lua_match(text, pattern) == found


@pytest.mark.parametrize("pattern", ["[a", "%", "a)", "%b", "%f", "%1", "(" * 33, "a-" * 300])
def test_a_malformed_lua_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        lua_match("aaa", pattern)


@given(st.text(alphabet="abc.%-+*?[]^$()", max_size=8), st.text(alphabet="abc", max_size=8))
def test_a_lua_pattern_never_fails_in_another_way(pattern: str, text: str) -> None:
    with contextlib.suppress(PatternError):
        lua_match(text, pattern)


def test_query_arguments_are_decoded_as_openresty_does() -> None:
    raw = b"tenant=acme&tenant=globex&flag&empty=&a[]=1&a[]=2&=skipped&b%20c=d+e%zz&%ff=%C3%A9"
    assert decode_args(raw) == {
        b"tenant": [b"acme", b"globex"],
        b"flag": True,
        b"empty": b"",
        b"a[]": [b"1", b"2"],
        b"b c": b"d e%zz",
        b"\xff": b"\xc3\xa9",
    }


def test_only_the_first_hundred_arguments_count() -> None:
    assert len(decode_args(b"&".join(b"a%d=1" % i for i in range(150)))) == 100
    assert len(decode_args(b"&".join(b"a%d=1" % i for i in range(150)), 150)) == 150


def test_arguments_are_written_in_order_of_their_names() -> None:
    assert encode_args({b"b": True, b"a": [b"1 2", b"&"]}) == b"a=1%202&a=%26&b"


def test_one_argument_can_be_taken_out_without_touching_the_others() -> None:
    assert without_arg(b"a=%31&key=s3cret&b&k%65y=2", b"key") == b"a=%31&b"


@pytest.mark.parametrize(
    ("path", "normalized"),
    [
        (b"/", b"/"),
        (b"/a//b/./c/../d/", b"/a/b/d/"),
        (b"/a/..", b"/"),
        (b"/../../x", b"/x"),
        (b"/%61%2f%2F%ff", b"/a%2F%2F\xff"),
    ],
)
def test_paths_are_normalised_for_routing(path: bytes, normalized: bytes) -> None:
    assert normalize_path(path) == normalized


def test_odd_bytes_in_a_path_are_escaped_for_the_service() -> None:
    assert escape_path(b"/caf\xe9 x/%41") == b"/caf%E9%20x/%41"


HEADERS = Headers(
    [
        (b"Host", b"x"),
        (b"X-Tenant-Id", b"acme"),
        (b"x_tenant_id", b"globex"),
        (b"X-Comma", b"one, two"),
        (b"X-Plain", b"one,two"),
        (b"Cookie", b"a=1"),
        (b"cookie", b"b=2"),
    ]
)


def test_a_header_variable_joins_repeated_fields_and_takes_dashes_for_underscores() -> None:
    assert HEADERS.variable(b"X_TENANT-ID") == b"acme, globex"
    assert HEADERS.variable(b"cookie") == b"a=1; b=2"
    assert HEADERS.variable(b"x-none") is None


def test_get_header_gives_the_first_of_several() -> None:
    assert pdk_get_header(HEADERS, b"x-tenant-id") == b"acme"
    assert pdk_get_header(HEADERS, b"x-plain") == b"one,two"
    assert pdk_get_header(HEADERS, b"x-comma") == b"one, two"


def test_get_header_sees_one_value_behind_a_hundred_fields_but_not_one_of_several() -> None:
    filler = [(b"X-%d" % i, b"") for i in range(120)]
    assert pdk_get_header(Headers([*filler, (b"X-T", b"acme")]), b"x-t") == b"acme"
    assert pdk_get_header(Headers([*filler, (b"X-T", b"a"), (b"X-T", b"b")]), b"x-t") is None
    assert pdk_get_header(Headers([*filler, (b"X-T", b"a, b")]), b"x-t") is None


def test_a_saved_header_is_found_under_underscores_too() -> None:
    assert look_up({b"x-tenant-id": [b"a", b"b"]}, b"X_Tenant_Id") == b"a"


def test_a_multi_map_holds_lists_only() -> None:
    assert multi_map({b"a": b"1", b"b": True, b"c": [b"1", b"2"]}) == {
        b"a": [b"1"],
        b"b": [],
        b"c": [b"1", b"2"],
    }


def read(data: bytes, limits: HeaderLimits | None = None) -> RequestHead | None:
    async def run() -> RequestHead | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_head(reader, limits or HeaderLimits())

    return asyncio.run(run())


def parsed(data: bytes, limits: HeaderLimits | None = None) -> RequestHead:
    head = read(data, limits)
    assert head is not None
    return head


def test_a_request_is_read_with_its_bytes_unchanged() -> None:
    head = parsed(b"GET /a%20b?q=\xff%zz HTTP/1.1\r\nHost: X:80\r\nX_Odd-Name:  caf\xe9 \r\nX-Empty:\r\n\r\n")
    assert head.error == 0
    assert (head.method, head.target, head.path, head.query) == (
        b"GET",
        b"/a%20b?q=\xff%zz",
        b"/a%20b",
        b"q=\xff%zz",
    )
    assert list(head.headers) == [(b"Host", b"X:80"), (b"X_Odd-Name", b"caf\xe9"), (b"X-Empty", b"")]
    assert head.host == b"x"


def test_an_absolute_target_gives_the_host_and_leaves_the_path() -> None:
    head = parsed(b"GET http://Shop.example:81/x?y=1 HTTP/1.1\r\nHost: other\r\n\r\n")
    assert (head.error, head.host, head.target) == (0, b"shop.example", b"/x?y=1")
    assert parsed(b"GET http://h?y=1 HTTP/1.1\r\nHost: h\r\n\r\n").target == b"?y=1"
    assert parsed(b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n").target == b"/"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (b"Shop.example", b"shop.example"),
        (b"shop.example.", b"shop.example"),
        (b"shop.example:81", b"shop.example"),
        (b"shop.example:x", b"shop.example"),
        (b"user:password@shop.example", b"user"),
        (b"[2001:DB8::7]:81", b"[2001:db8::7]"),
        (b"[::1", b"[::1"),
        (b"caf\xe9", b"caf\xe9"),
    ],
)
def test_the_host_is_what_nginx_takes_for_it(host: bytes, expected: bytes) -> None:
    head = parsed(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert (head.error, head.host) == (0, expected)


@pytest.mark.parametrize("host", [b"", b":80", b"::1", b".", b"a..b", b"a/b", b"a b", b"a\x01b"])
def test_a_host_that_nginx_refuses_is_refused(host: bytes) -> None:
    assert parsed(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").error == 400


def test_http_0_9_is_one_line() -> None:
    head = parsed(b"GET /a?b HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.version == "1.1"
    head = parsed(b"GET /a?b\r\n")
    assert (head.error, head.version, head.target, head.size, head.keep_alive) == (0, "0.9", b"/a?b", 10, False)


@pytest.mark.parametrize(
    ("request_bytes", "error", "size"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nbad header: 1\r\n\r\n", 400, 25),
        (b"GET / HTTP/1.1\r\nHost: x\r\n: 1\r\n\r\n", 400, 25),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400, 25),
        (b"GET / HTTP/1.1\r\n\r\n", 400, 18),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, 34),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n", 400, 65),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, 29),
        (b"CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n", 405, 31),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 0),
        (b"GET /a/../.. HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"GET /%2e%2E/x HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"GET /a%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"GET /a%4 HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"GET http://a_b/ HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"GET / HTTP/0.9\r\nHost: x\r\n\r\n", 400, 0),
        (b"POST /\r\n", 400, 0),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, 47),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501, 52),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505, 0),
        (b"GET x HTTP/1.1\r\nHost: x\r\n\r\n", 400, 0),
        (b"\x16\x03\x01\x02\n", 400, 0),
        (b"GET / HT", 400, 0),
        (b"GET /" + b"p" * 9000 + b" HTTP/1.1\r\n\r\n", 414, 0),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"p" * 9000 + b"\r\n\r\n", 494, 25),
    ],
)
def test_what_nginx_refuses_is_refused(request_bytes: bytes, error: int, size: int) -> None:
    head = parsed(request_bytes)
    assert (head.error, head.size) == (error, size)


def test_a_header_name_with_odd_characters_is_left_out() -> None:
    head = parsed(b"GET / HTTP/1.1\nHost: x\nX.Y: 1\nX(Z: 2\nNoColon\n\n")
    assert head.error == 0
    assert list(head.headers) == [(b"Host", b"x"), (b"NoColon", b"")]


def test_the_header_limits_can_be_raised() -> None:
    head = parsed(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"p" * 9000 + b"\r\n\r\n", HeaderLimits(4, 16384))
    assert head.error == 0


def test_a_connection_that_ends_without_a_request_is_no_request() -> None:
    assert read(b"") is None
    assert parsed(b"\r\n").error == 400


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    head = read(data)
    assert head is None or head.error or head.method


def test_a_chunked_body_is_put_together_and_counted_as_it_came() -> None:
    async def run() -> tuple[bytes, int]:
        reader = asyncio.StreamReader()
        reader.feed_data(b"3;x=y\r\nabc\r\n1\r\nd\r\n0\r\nTrailer: 1\r\n\r\n")
        return await read_chunked(reader)

    assert asyncio.run(run()) == (b"abcd", 35)


@pytest.mark.parametrize("size", [b"", b"-3", b"0x3", b"1_0", b"z", b"f" * 16])
def test_a_chunk_without_a_size_is_refused(size: bytes) -> None:
    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(size + b"\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n")
        await read_chunked(reader)

    with pytest.raises(ValueError, match="size"):
        asyncio.run(run())


def route(name: str, **fields: Any) -> dict[str, Any]:
    defaults = {"protocols": ["http"], "strip_path": True, "regex_priority": 0, "preserve_host": False}
    return {"id": name, "service": {"id": "s"}, **defaults, **fields}


SERVICES = {"s": {"id": "s", "enabled": True}, "p": {"id": "p", "enabled": True, "path": "/base/"}}


@pytest.mark.parametrize(
    ("path", "name", "upstream"),
    [
        (b"/api", "api", b"/"),
        (b"/api/", "api", b"/"),
        (b"/api/x", "api", b"/x"),
        (b"/api/v2/x", "v2", b"/api/v2/x"),
        (b"/apix", "api", b"/x"),
        (b"/user/12/orders", "regex", b"/orders"),
        (b"/based/x", "based", b"/base/x"),
        (b"/based", "based", b"/base"),
        (b"/%61pi/./y%20z", "api", b"/y%20z"),
        (b"/api/caf%C3%A9", "api", b"/caf%C3%A9"),
    ],
)
def test_the_longest_prefix_wins_and_the_path_is_stripped(path: bytes, name: str, upstream: bytes) -> None:
    routes = [
        route("api", paths=["/api"]),
        route("v2", paths=["/api/v2"], strip_path=False),
        route("regex", paths=["~/user/\\d+"]),
        route("based", paths=["/based"], service={"id": "p"}),
    ]
    match = Router(routes, SERVICES).match(b"GET", b"x", 8000, path)
    assert match is not None
    assert (match.route["id"], match.upstream_path) == (name, upstream)


@pytest.mark.parametrize("path", [b"/api/\xff", b"/api/%FF", b"/api/%ED%A0%80"])
def test_a_path_that_is_not_utf8_has_no_route(path: bytes) -> None:
    assert Router([route("api", paths=["/api"])], SERVICES).match(b"GET", b"x", 8000, path) is None


def test_hosts_and_methods_narrow_a_route() -> None:
    routes = [
        route("any", paths=["/"]),
        route("host", paths=["/"], hosts=["shop.example"]),
        route("wild", paths=["/"], hosts=["*.example"]),
        route("post", paths=["/"], methods=["POST"], hosts=["shop.example"]),
    ]
    router = Router(routes, SERVICES)

    def found(method: bytes, host: bytes) -> str:
        match = router.match(method, host, 8000, b"/x")
        return match.route["id"] if match else ""

    assert [found(b"GET", b"shop.example"), found(b"GET", b"a.example"), found(b"GET", b"other")] == [
        "host",
        "wild",
        "any",
    ]
    assert found(b"POST", b"shop.example") == "post"


def plugin(route: str | None, service: str | None, consumer: str | None, **fields: Any) -> dict[str, Any]:
    references = zip(("route", "service", "consumer"), (route, service, consumer), strict=True)
    scopes = {name: {"id": key} if key else None for name, key in references}
    label = f"{route or '-'}{service or '-'}{consumer or '-'}"
    return {"name": "m", "enabled": True, "protocols": ["http"], "label": label, **scopes, **fields}


def iterator(*entities: dict[str, Any]) -> PluginsIterator:
    return PluginsIterator(entities, lambda one: {"label": one["label"]}, {"m": 850}, iter(range(1, 99)).__next__)


def test_the_most_specific_plugin_entity_applies() -> None:
    order = ["rsc", "r-c", "-sc", "rs-", "--c", "r--", "-s-", "---"]
    entities = [plugin(*(None if letter == "-" else letter for letter in label)) for label in order]
    for i in range(len(order)):
        config = iterator(*entities[i:]).find("m", "r", "s", "c")
        assert config is not None
        assert config["label"] == order[i]


def test_a_plugin_for_a_consumer_does_not_apply_before_authentication() -> None:
    assert iterator(plugin(None, None, "c")).find("m", "r", "s", None) is None


@pytest.mark.parametrize("fields", [{"enabled": False}, {"protocols": ["tcp"]}])
def test_a_plugin_that_is_off_or_for_streams_does_not_apply(fields: dict[str, Any]) -> None:
    assert iterator(plugin(None, None, None, **fields)).names == []


def test_every_configuration_has_its_own_sequence() -> None:
    found = iterator(plugin(None, None, None), plugin("r", None, None))
    configs = [found.find("m", None, None, None), found.find("m", "r", None, None)]
    assert [config and config["__seq__"] for config in configs] == [1, 2]
    assert [config["__seq__"] for _, config in found.global_only()] == [1]


# asyncio forgets to close one that it has accepted, and has no transport for yet, when the server closes.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("turns", range(5))
def test_a_connection_that_was_accepted_a_moment_before_the_stop_is_served_before_it_or_never(turns: int) -> None:
    dealt: list[int] = []

    def next_lane() -> Lane:
        dealt.append(turns)
        return Lane(pytest.fail, lambda: True, "", tells_request_id=False)

    async def stop_then() -> tuple[int, int]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            proxy = ProxyServer(listener, HeaderLimits(), next_lane)
            await proxy.start()
            with socket.create_connection(listener.getsockname()):
                for _ in range(turns):
                    await asyncio.sleep(0)
                await proxy.stop(1)
                before = len(dealt)
                await asyncio.sleep(0.01)
        return before, len(dealt)

    before, after = asyncio.run(stop_then())
    gc.collect()
    assert before == after
