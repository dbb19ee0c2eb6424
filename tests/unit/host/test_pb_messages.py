"""Calls, and what each PDK function takes and gives: the bytes as Google's library has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.host import pb_messages
from kong_metering.host.errors import ProtocolError
from kong_metering.host.pb_messages import arguments_of, knows, result_of
from tests.support import protobuf
from tests.support.protobuf import FUNCTIONS, as_bytes, message, parsed

texts = st.binary(max_size=20).map(protobuf.as_text)
some_text = st.binary(min_size=1, max_size=20).map(protobuf.as_text)
counts = st.integers(-(2**31), 2**31 - 1)
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)
tables = st.dictionaries(texts, values, max_size=4)

CONSUMER = {"id": "c1", "created_at": 1_795_359_970, "username": "alice", "custom_id": "7", "tags": ["a", "b"]}
CREDENTIAL = {"id": "k1", "consumer_id": "c1"}


def taking(kind: str) -> list[str]:
    return [name for name, (takes, _) in FUNCTIONS.items() if takes == kind]


def giving(kind: str) -> list[str]:
    return [name for name, (_, gives) in FUNCTIONS.items() if gives == kind]


def asked(method: str, *arguments: object) -> Any:
    """Give the argument of a PDK call as the library reads it."""
    return parsed(FUNCTIONS[method][0], arguments_of(method, arguments))


def fields_of(made: Any) -> dict[str, Any]:
    """Give the fields of a message that are there, text as surrogate escapes."""
    found: dict[str, Any] = {}
    for descriptor, value in made.ListFields():
        items = list(value) if isinstance(value, list) or hasattr(value, "append") else value
        found[descriptor.name] = (
            protobuf.as_text(items)
            if isinstance(items, bytes)
            else list(map(protobuf.as_text, items))
            if isinstance(items, list)
            else fields_of(items)
            if hasattr(items, "ListFields")
            else items
        )
    return found


# -- what functions there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FUNCTIONS)
def test_every_function_of_the_protocol_is_known(method: str) -> None:
    assert knows(method)


@pytest.mark.parametrize(
    "method",
    ["kong.response.error", "kong.log", "kong.request.get_start_time", "request.get_header", "kong.", "", "kong.log.x"],
)
def test_no_other_is(method: str) -> None:
    assert not knows(method)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", taking("Empty"))
def test_a_function_that_takes_nothing_is_given_nothing(method: str) -> None:
    assert arguments_of(method, ()) == b""


@pytest.mark.parametrize("method", taking("String"))
@given(text=texts)
def test_text_is_given_as_its_bytes(method: str, text: str) -> None:
    assert asked(method, text).v == as_bytes(text)
    assert asked(method, as_bytes(text)).v == as_bytes(text)


def test_the_bytes_of_what_the_plugin_asks() -> None:
    assert arguments_of("kong.request.get_header", ("x-tenant-id",)) == b"\x0a\x0bx-tenant-id"
    assert arguments_of("kong.nginx.get_var", ("kong_request_id",)) == b"\x0a\x0fkong_request_id"
    assert arguments_of("kong.log.serialize", ()) == b""
    assert arguments_of("kong.request.get_headers", (1000,)) == b"\x08\xe8\x07"
    assert arguments_of("kong.log.err", ("a", 1)) == (b"\x0a\x03\x1a\x01a\x0a\x09\x11\x00\x00\x00\x00\x00\x00\xf0\x3f")


@pytest.mark.parametrize("method", ["kong.request.get_headers", "kong.response.get_headers", "kong.request.get_query"])
def test_a_limit_is_kongs_own_where_none_is_given(method: str) -> None:
    """Kong gets 0 where nothing is sent, and refuses it."""
    assert asked(method).v == 100
    assert asked(method, None).v == 100
    assert asked(method, 1000).v == 1000


@given(counts)
def test_a_status_is_given_as_a_number(status: int) -> None:
    assert asked("kong.response.set_status", status).v == status


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_is_given_as_one(flag: bool) -> None:  # noqa: FBT001 - the parameter of the test
    assert asked("kong.client.get_protocol", flag).v is flag
    assert asked("kong.client.get_protocol").v is False


@pytest.mark.parametrize("method", taking("KV"))
@given(key=texts, value=values)
def test_a_key_is_given_with_any_value(method: str, key: str, value: object) -> None:
    pair = asked(method, key, value)
    assert (pair.k, protobuf.value_of(pair.v)) == (as_bytes(key), value)


@pytest.mark.parametrize("method", taking("List"))
@given(items=st.lists(values, max_size=4))
def test_what_is_logged_may_be_anything(method: str, items: list[object]) -> None:
    assert protobuf.list_of(asked(method, *items)) == items


@pytest.mark.parametrize("method", taking("Struct"))
@given(table=tables)
def test_a_table_is_given_whole(method: str, table: Mapping[str, object]) -> None:
    assert protobuf.struct_of(asked(method, table)) == table


@given(counts, texts | st.none(), tables | st.none())
def test_an_exit_has_its_status_body_and_headers(status: int, body: str | None, headers: dict[str, Any] | None) -> None:
    given_exit = asked("kong.response.exit", status, body, headers)
    assert (given_exit.status, given_exit.body) == (status, as_bytes(body or ""))
    assert protobuf.struct_of(given_exit.headers) == (headers or {})
    assert asked("kong.response.exit", status).status == status


def test_the_other_arguments_that_are_messages() -> None:
    assert fields_of(asked("kong.client.load_consumer", "c1", 1)) == {"id": "c1", "by_username": True}
    assert fields_of(asked("kong.client.load_consumer", "c1")) == {"id": "c1"}
    assert fields_of(asked("kong.service.set_target", "echo", 9000)) == {"host": "echo", "port": 9000}
    authenticated = asked("kong.client.authenticate", CONSUMER, CREDENTIAL)
    assert fields_of(authenticated) == {"consumer": CONSUMER, "credential": CREDENTIAL}
    assert fields_of(asked("kong.client.authenticate", CONSUMER | {"unknown": object()}, None)) == {
        "consumer": CONSUMER
    }


def endless_list() -> list[object]:
    endless: list[object] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("kong.ctx.shared.set", ("key", object())),
        ("kong.ctx.shared.set", ("key", {1, 2})),
        ("kong.ctx.shared.set", ("key", [10**400])),
        ("kong.ctx.shared.set", ("key", "\ud800")),
        ("kong.ctx.shared.set", ("\ud800", "value")),
        ("kong.ctx.shared.set", ("key",)),
        ("kong.ctx.shared.set", ()),
        ("kong.log.err", (object(),)),
        ("kong.response.set_status", ("many",)),
        ("kong.response.set_status", (2**70,)),
        ("kong.response.set_status", (math.inf,)),
        ("kong.response.set_headers", ("x-a",)),
        ("kong.response.exit", (200, "", ["x-a"])),
        ("kong.client.authenticate", ("c1", "k1")),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_arguments_that_cannot_be_said_are_refused(method: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, ValueError, IndexError, OverflowError, AttributeError)):
        arguments_of(method, arguments)


def test_a_list_within_itself_is_refused() -> None:
    with pytest.raises(RecursionError):
        arguments_of("kong.ctx.shared.set", ("key", endless_list()))


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FUNCTIONS)
def test_an_empty_answer_is_nothing(method: str) -> None:
    """Kong sends it for nil, and for what is empty, 0 or false."""
    assert result_of(method, b"") is None


@pytest.mark.parametrize("method", giving("String"))
@given(text=some_text)
def test_a_string_is_given_whatever_its_bytes_are(method: str, text: str) -> None:
    assert result_of(method, message("String", v=as_bytes(text)).SerializeToString()) == text


@pytest.mark.parametrize("method", giving("Int"))
@given(number=counts.filter(bool))
def test_an_integer_is_given(method: str, number: int) -> None:
    assert result_of(method, message("Int", v=number).SerializeToString()) == number


@pytest.mark.parametrize("method", giving("Number"))
def test_a_number_is_an_integer_where_it_is_whole(method: str) -> None:
    """As over MsgPack:1, in Lua there is one kind of number only."""
    for number in (1.1, 2, 1_795_359_970.019, -0.5, 1e300):
        found = result_of(method, message("Number", v=number).SerializeToString())
        assert found == number
        assert type(found) is (int if float(number).is_integer() else float)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_given_as_they_are(number: float) -> None:
    found = result_of("kong.nginx.req_start_time", message("Number", v=number).SerializeToString())
    assert repr(found) == repr(number)


@pytest.mark.parametrize("method", giving("Bool"))
def test_a_flag_is_given(method: str) -> None:
    assert result_of(method, message("Bool", v=True).SerializeToString()) is True


@pytest.mark.parametrize("method", giving("Value"))
@given(value=values)
def test_any_value_is_given(method: str, value: object) -> None:
    found = result_of(method, protobuf.value_message(value).SerializeToString())
    assert found == as_lua_has_it(value)


def as_lua_has_it(value: object) -> object:
    """Give a list that has nothing in it as a table."""
    if isinstance(value, list):
        return [as_lua_has_it(item) for item in value] or {}
    if isinstance(value, dict):
        return {key: as_lua_has_it(item) for key, item in value.items()}
    return value


def test_nil_among_values_is_none() -> None:
    assert result_of("kong.ctx.shared.get", b"\x08\x01") is None
    assert result_of("kong.ctx.shared.get", b"\x08\x00") is None
    assert result_of("kong.ctx.shared.get", b"\x20\x00") is False
    assert result_of("kong.ctx.shared.get", b"\x1a\x00") == ""


@pytest.mark.parametrize("method", giving("Struct"))
def test_headers_and_query_arguments_are_lists_of_values(method: str) -> None:
    """As `StepMultiMap` has them: an argument without a value is there, with none."""
    table = {"x-a": "1", "x-b": ["2", "caf\udce9"], "flag": True}
    found = result_of(method, protobuf.struct_message(table).SerializeToString())
    assert found == {"x-a": ["1"], "x-b": ["2", "caf\udce9"], "flag": []}


@given(tables)
def test_a_table_of_anything_is_lists(table: dict[str, Any]) -> None:
    found = result_of("kong.request.get_headers", protobuf.struct_message(table).SerializeToString())
    assert found is None or (found.keys() == table.keys() and all(isinstance(item, list) for item in found.values()))


TABLES: dict[str, dict[str, Any]] = {
    "Consumer": CONSUMER,
    "Credential": CREDENTIAL,
    "Route": {
        "id": "21f7817b-d909-5895-b81b-ac9ed0a6d09d",
        "created_at": 1,
        "updated_at": 2,
        "name": "anything",
        "protocols": ["http", "https"],
        "methods": ["GET"],
        "hosts": ["a", "b"],
        "paths": ["/a", "/caf\udce9"],
        "headers": ["x"],
        "https_redirect_status_code": 426,
        "regex_priority": -1,
        "strip_path": True,
        "preserve_host": True,
        "snis": ["s"],
        "sources": ["x"],
        "destinations": ["y"],
        "tags": ["t"],
        "service": {"id": "adbd70b3"},
    },
    "Service": {
        "id": "adbd70b3",
        "created_at": 1,
        "updated_at": 2,
        "name": "echo",
        "retries": 5,
        "protocol": "http",
        "host": "h",
        "port": 9000,
        "path": "/",
        "connect_timeout": 1,
        "write_timeout": 2,
        "read_timeout": 3,
        "tags": ["t"],
        "client_certificate": {"id": "z"},
    },
    "Memory": {
        "lua_shared_dicts": {"kong": {"allocated_slabs": 1, "capacity": 2}, "kong_db_cache": {"capacity": 3}},
        "workers_lua_vms": [{"http_allocated_gc": 4, "pid": 5}, {"pid": 6}],
    },
}


def from_table(name: str, table: Mapping[str, Any]) -> Any:
    return message(name, **{key: _from_value(value) for key, value in table.items()})


def _from_value(value: Any) -> Any:
    if isinstance(value, str):
        return as_bytes(value)
    if isinstance(value, dict):
        return {key: _from_value(item) for key, item in value.items()}
    return list(map(_from_value, value)) if isinstance(value, list) else value


@pytest.mark.parametrize(("kind", "method"), [(kind, method) for kind in TABLES for method in giving(kind)])
def test_an_entity_is_given_with_the_names_that_kong_has_for_its_fields(kind: str, method: str) -> None:
    encoded = from_table(kind, TABLES[kind]).SerializeToString()
    assert result_of(method, encoded) == TABLES[kind]
    # A newer Kong may tell more.
    assert result_of(method, encoded + b"\xf2\x07\x03new") == TABLES[kind]


def test_a_body_is_its_content_or_nothing() -> None:
    """A large one is in a file that belongs to Kong."""
    method = "kong.request.get_raw_body"
    assert result_of(method, message("Body", content=b"a\xff\x00").SerializeToString()) == "a\udcff\x00"
    assert result_of(method, message("Body", body_filepath=b"/tmp/1").SerializeToString()) is None
    assert result_of(method, message("Body", error=b"no").SerializeToString()) is None


def test_uri_captures_are_those_with_names_and_those_without() -> None:
    captures = message("Captures", unnamed=[b"a", b"\xff"])
    captures.named.add(key=b"user", value=b"b")
    found = result_of("kong.request.get_uri_captures", captures.SerializeToString())
    assert found == {"unnamed": ["a", "\udcff"], "named": {"user": "b"}}


@pytest.mark.parametrize("method", FUNCTIONS)
@given(data=st.binary(max_size=60))
def test_any_answer_gives_a_result_or_a_protocol_error(method: str, data: bytes) -> None:
    try:
        result_of(method, data)
    except ProtocolError:
        return


# -- calls -------------------------------------------------------------------------------------------------------------


def test_kongs_calls_are_read() -> None:
    def read(**fields: Any) -> dict[str, Any]:
        return pb_messages.CALL.decode(message("Call", **fields).SerializeToString())

    assert read(sequence=5, get_plugin_names={}) == {"sequence": 5, "get_plugin_names": {}}
    assert read(sequence=5, get_plugin_info={"name": b"x"}) == {"sequence": 5, "get_plugin_info": {"name": "x"}}
    started = read(sequence=2**62, start_instance={"name": b"x", "config": b'{"a":"\xff"}'})
    assert started == {"sequence": 2**62, "start_instance": {"name": "x", "config": '{"a":"\udcff"}'}}
    assert read(get_instance_status={"instance_id": 7}) == {"get_instance_status": {"instance_id": 7}}
    assert read(close_instance={"instance_id": 7}) == {"close_instance": {"instance_id": 7}}
    event = read(sequence=1, handle_event={"instance_id": 7, "event_name": b"log"})
    assert event == {"sequence": 1, "handle_event": {"instance_id": 7, "event_name": "log"}}
    assert read(handle_event={"event_name": b"log"}) == {"handle_event": {"event_name": "log"}}


def test_what_calls_return_is_written_as_kong_reads_it() -> None:
    def written(**fields: Any) -> dict[str, Any]:
        return fields_of(parsed("Return", pb_messages.RETURN.encode(fields)))

    names = {"sequence": 5, "plugin_names": {"names": ["a"]}}
    status = {"sequence": 5, "instance_status": {"name": "a", "instance_id": 2**31 - 1, "started_at": 1_795_359_970}}
    info = {
        "name": "a",
        "updated_at": 1,
        "loaded_at": 2,
        "phases": ["access", "log"],
        "version": "1.0",
        "priority": 850,
        "schema": "{}",
    }
    assert written(**names) == names
    assert written(**status) == status
    assert written(plugin_info=info) == {"plugin_info": info}
