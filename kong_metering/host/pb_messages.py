"""The messages of `ProtoBuf:1`, and which of them each PDK function takes and gives (`kong/pluginsocket.proto`).

A plugin passes and gets the same values as over `MsgPack:1`: `arguments_of` and `result_of` translate. Kong sends an
empty message both for nil and for a value that is empty, 0 or false; either is None here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kong_metering.host.pb_codec import BOOLEAN, DOUBLE, INTEGER, TEXT, Field, Message

# -- calls of Kong's, and what they return ----------------------------------------------------------------------------

CALL: Message = Message(
    {
        "sequence": Field(1, INTEGER),
        "get_plugin_names": Field(31, lambda: EMPTY),
        "get_plugin_info": Field(32, lambda: PLUGIN),
        "start_instance": Field(33, lambda: START_INSTANCE),
        "get_instance_status": Field(34, lambda: INSTANCE),
        "close_instance": Field(35, lambda: INSTANCE),
        "handle_event": Field(36, lambda: HANDLE_EVENT),
    }
)
RETURN: Message = Message(
    {
        "sequence": Field(1, INTEGER),
        "plugin_names": Field(31, lambda: PLUGIN_NAMES),
        "plugin_info": Field(32, lambda: PLUGIN_INFO),
        "instance_status": Field(33, lambda: INSTANCE_STATUS),
    }
)
EMPTY: Message = Message({})
PLUGIN: Message = Message({"name": Field(1, TEXT)})
START_INSTANCE: Message = Message({"name": Field(1, TEXT), "config": Field(2, TEXT)})
INSTANCE: Message = Message({"instance_id": Field(1, INTEGER)})
HANDLE_EVENT: Message = Message({"instance_id": Field(1, INTEGER), "event_name": Field(2, TEXT)})
PLUGIN_NAMES: Message = Message({"names": Field(1, TEXT, repeated=True)})
PLUGIN_INFO: Message = Message(
    {
        "name": Field(1, TEXT),
        "updated_at": Field(2, INTEGER),
        "loaded_at": Field(3, INTEGER),
        "phases": Field(4, TEXT, repeated=True),
        "version": Field(5, TEXT),
        "priority": Field(6, INTEGER),
        "schema": Field(7, TEXT),
    }
)
INSTANCE_STATUS: Message = Message(
    {"name": Field(1, TEXT), "instance_id": Field(2, INTEGER), "started_at": Field(4, INTEGER)}
)

# -- values of any type -----------------------------------------------------------------------------------------------

_VALUE: Message = Message(
    {
        "null_value": Field(1, INTEGER),
        "number_value": Field(2, DOUBLE),
        "string_value": Field(3, TEXT),
        "bool_value": Field(4, BOOLEAN),
        "struct_value": Field(5, lambda: _STRUCT),
        "list_value": Field(6, lambda: _LIST),
    }
)
_STRUCT: Message = Message({"fields": Field(1, lambda: _VALUE, mapping=True)})
_LIST: Message = Message({"values": Field(1, lambda: _VALUE, repeated=True)})


def _value_in(value: Mapping[str, Any]) -> Any:
    if "struct_value" in value:
        return _struct_in(value["struct_value"])
    if "list_value" in value:
        return _list_in(value["list_value"])
    number = value.get("number_value")
    if number is not None:
        return int(number) if number.is_integer() else number
    return value.get("string_value", value.get("bool_value"))


def _struct_in(struct: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value_in(value) for name, value in struct.get("fields", {}).items()}


def _list_in(values: Mapping[str, Any]) -> list[Any]:
    return [_value_in(value) for value in values.get("values", ())]


def _value_out(value: Any) -> dict[str, Any]:
    if value is None:
        return {"null_value": 0}
    if isinstance(value, bool):
        return {"bool_value": value}
    if isinstance(value, (int, float)):
        return {"number_value": float(value)}
    if isinstance(value, (str, bytes)):
        return {"string_value": value}
    if isinstance(value, Mapping):
        return {"struct_value": _struct_out(value)}
    if isinstance(value, Sequence):
        return {"list_value": _list_out(value)}
    raise TypeError(f"Kong takes no {type(value).__name__}")


def _struct_out(struct: Mapping[Any, Any]) -> dict[str, Any]:
    return {"fields": {name: _value_out(value) for name, value in struct.items()}}


def _list_out(values: Sequence[Any]) -> dict[str, Any]:
    return {"values": [_value_out(value) for value in values]}


# -- what PDK functions give ------------------------------------------------------------------------------------------

_KEY: Message = Message({"id": Field(1, TEXT)})
_ROUTE: Message = Message(
    {
        "id": Field(1, TEXT),
        "created_at": Field(2, INTEGER),
        "updated_at": Field(3, INTEGER),
        "name": Field(4, TEXT),
        **{
            name: Field(number, TEXT, repeated=True)
            for number, name in enumerate(("protocols", "methods", "hosts", "paths", "headers"), 5)
        },
        "https_redirect_status_code": Field(10, INTEGER),
        "regex_priority": Field(11, INTEGER),
        "strip_path": Field(12, BOOLEAN),
        "preserve_host": Field(13, BOOLEAN),
        **{
            name: Field(number, TEXT, repeated=True)
            for number, name in enumerate(("snis", "sources", "destinations", "tags"), 14)
        },
        "service": Field(18, lambda: _KEY),
    }
)
_SERVICE: Message = Message(
    {
        "id": Field(1, TEXT),
        "created_at": Field(2, INTEGER),
        "updated_at": Field(3, INTEGER),
        "name": Field(4, TEXT),
        "retries": Field(5, INTEGER),
        "protocol": Field(6, TEXT),
        "host": Field(7, TEXT),
        "port": Field(8, INTEGER),
        "path": Field(9, TEXT),
        "connect_timeout": Field(10, INTEGER),
        "write_timeout": Field(11, INTEGER),
        "read_timeout": Field(12, INTEGER),
        "tags": Field(13, TEXT, repeated=True),
        "client_certificate": Field(14, lambda: _KEY),
    }
)
_CONSUMER: Message = Message(
    {
        "id": Field(1, TEXT),
        "created_at": Field(2, INTEGER),
        "username": Field(3, TEXT),
        "custom_id": Field(4, TEXT),
        "tags": Field(5, TEXT, repeated=True),
    }
)
_CREDENTIAL: Message = Message({"id": Field(1, TEXT), "consumer_id": Field(2, TEXT)})
_RAW_BODY: Message = Message({"content": Field(1, TEXT), "body_filepath": Field(2, TEXT), "error": Field(3, TEXT)})
_URI_CAPTURES: Message = Message({"unnamed": Field(1, TEXT, repeated=True), "named": Field(2, TEXT, mapping=True)})
_DICT_STATS: Message = Message({"allocated_slabs": Field(1, INTEGER), "capacity": Field(2, INTEGER)})
_MEMORY_STATS: Message = Message(
    {
        "lua_shared_dicts": Field(
            1, lambda: Message({"kong": Field(1, lambda: _DICT_STATS), "kong_db_cache": Field(2, lambda: _DICT_STATS)})
        ),
        "workers_lua_vms": Field(
            2, lambda: Message({"http_allocated_gc": Field(1, INTEGER), "pid": Field(2, INTEGER)}), repeated=True
        ),
    }
)
_NUMBER: Message = Message({"v": Field(1, DOUBLE)})
_COUNT: Message = Message({"v": Field(1, INTEGER)})
_FLAG: Message = Message({"v": Field(1, BOOLEAN)})
_STRING: Message = Message({"v": Field(1, TEXT)})
_PAIR: Message = Message({"k": Field(1, TEXT), "v": Field(2, lambda: _VALUE)})
_CONSUMER_SPEC: Message = Message({"id": Field(1, TEXT), "by_username": Field(2, BOOLEAN)})
_AUTHENTICATE: Message = Message({"consumer": Field(1, lambda: _CONSUMER), "credential": Field(2, lambda: _CREDENTIAL)})
_TARGET: Message = Message({"host": Field(1, TEXT), "port": Field(2, INTEGER)})
_EXIT: Message = Message({"status": Field(1, INTEGER), "body": Field(2, TEXT), "headers": Field(3, lambda: _STRUCT)})


class _Parameters(NamedTuple):
    """What a PDK function takes: a message, and how its members come from the arguments."""

    message: Message
    members: Callable[[Sequence[Any]], Mapping[str, Any]]


class _Result(NamedTuple):
    """What a PDK function gives: a message, and how its members become a value."""

    message: Message
    value: Callable[[Mapping[str, Any]], Any]


def _named(message: Message) -> _Parameters:
    """Take arguments in the order of the message's fields."""
    return _Parameters(message, lambda arguments: dict(zip(message.fields, arguments, strict=False)))


def _first(arguments: Sequence[Any]) -> Any:
    return arguments[0] if arguments else None


_MOST_BY_DEFAULT = 100  # what Kong itself takes when it is not told; in a message 0 would stand for nothing

_NOTHING = _named(EMPTY)
_TEXT = _named(_STRING)
_INTEGER = _named(_COUNT)
_AT_MOST = _Parameters(_COUNT, lambda arguments: {"v": _first(arguments) or _MOST_BY_DEFAULT})
_BOOLEAN = _named(_FLAG)
_KEY_VALUE = _Parameters(_PAIR, lambda arguments: {"k": _first(arguments), "v": _value_out(arguments[1])})
_ANYTHING = _Parameters(_LIST, _list_out)
_TABLE = _Parameters(_STRUCT, lambda arguments: _struct_out(_first(arguments) or {}))
_RESPONSE = _Parameters(
    _EXIT,
    lambda arguments: {
        **dict(zip(("status", "body"), arguments, strict=False)),
        "headers": _struct_out(arguments[2]) if len(arguments) > 2 and arguments[2] else None,  # noqa: PLR2004
    },
)


def _v(members: Mapping[str, Any]) -> Any:
    return members.get("v")


def _multi_map(members: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Give each value as a list, one that is only there an empty one: as `MsgPack:1` has it."""
    return {
        name: value if isinstance(value, list) else [] if value is True else [value]
        for name, value in _struct_in(members).items()
    }


_NO_RESULT = _Result(EMPTY, lambda _: None)
_A_STRING = _Result(_STRING, _v)
_AN_INTEGER = _Result(_COUNT, _v)
_A_NUMBER = _Result(_NUMBER, lambda members: _value_in({"number_value": members["v"]}) if "v" in members else None)
_A_FLAG = _Result(_FLAG, _v)
_A_VALUE = _Result(_VALUE, _value_in)
_A_MULTI_MAP = _Result(_STRUCT, _multi_map)
_A_BODY = _Result(_RAW_BODY, lambda members: members.get("content"))


def _table(message: Message) -> _Result:
    return _Result(message, lambda members: dict(members) or None)


_FUNCTIONS: Mapping[str, tuple[_Parameters, _Result]] = {
    f"kong.{name}": (parameters, result)
    for names, parameters, result in (
        ("client.get_ip client.get_forwarded_ip", _NOTHING, _A_STRING),
        ("client.get_port client.get_forwarded_port", _NOTHING, _AN_INTEGER),
        ("client.get_credential", _NOTHING, _table(_CREDENTIAL)),
        ("client.load_consumer", _named(_CONSUMER_SPEC), _table(_CONSUMER)),
        ("client.get_consumer", _NOTHING, _table(_CONSUMER)),
        ("client.authenticate", _named(_AUTHENTICATE), _NO_RESULT),
        ("client.get_protocol", _BOOLEAN, _A_STRING),
        ("ctx.shared.set", _KEY_VALUE, _NO_RESULT),
        ("ctx.shared.get", _TEXT, _A_VALUE),
        ("ip.is_trusted", _TEXT, _A_FLAG),
        ("log.alert log.crit log.err log.warn log.notice log.info log.debug", _ANYTHING, _NO_RESULT),
        ("log.set_serialize_value", _KEY_VALUE, _NO_RESULT),
        ("log.serialize", _NOTHING, _A_STRING),
        ("nginx.get_var", _TEXT, _A_STRING),
        ("nginx.get_tls1_version_str nginx.get_subsystem node.get_id", _NOTHING, _A_STRING),
        ("nginx.set_ctx", _KEY_VALUE, _A_STRING),
        ("nginx.get_ctx", _TEXT, _A_VALUE),
        ("nginx.req_start_time", _NOTHING, _A_NUMBER),
        ("node.get_memory_stats", _NOTHING, _table(_MEMORY_STATS)),
        ("request.get_scheme request.get_host request.get_forwarded_scheme", _NOTHING, _A_STRING),
        ("request.get_forwarded_host request.get_method request.get_path", _NOTHING, _A_STRING),
        ("request.get_path_with_query request.get_raw_query", _NOTHING, _A_STRING),
        ("request.get_port request.get_forwarded_port", _NOTHING, _AN_INTEGER),
        ("request.get_http_version", _NOTHING, _A_NUMBER),
        ("request.get_query_arg request.get_header", _TEXT, _A_STRING),
        ("request.get_query request.get_headers", _AT_MOST, _A_MULTI_MAP),
        ("request.get_raw_body", _NOTHING, _A_BODY),
        ("request.get_uri_captures", _NOTHING, _table(_URI_CAPTURES)),
        ("response.get_status", _NOTHING, _AN_INTEGER),
        ("response.get_header", _TEXT, _A_STRING),
        ("response.get_headers", _AT_MOST, _A_MULTI_MAP),
        ("response.get_source", _NOTHING, _A_STRING),
        ("response.set_status", _INTEGER, _NO_RESULT),
        ("response.set_header response.add_header", _KEY_VALUE, _NO_RESULT),
        ("response.clear_header", _TEXT, _NO_RESULT),
        ("response.set_headers", _TABLE, _NO_RESULT),
        ("response.exit", _RESPONSE, _NO_RESULT),
        ("router.get_route", _NOTHING, _table(_ROUTE)),
        ("router.get_service", _NOTHING, _table(_SERVICE)),
        ("service.set_upstream", _TEXT, _A_FLAG),
        ("service.set_target", _named(_TARGET), _NO_RESULT),
        ("service.request.set_scheme service.request.set_path", _TEXT, _NO_RESULT),
        ("service.request.set_raw_query service.request.set_method", _TEXT, _NO_RESULT),
        ("service.request.set_query service.request.set_headers", _TABLE, _NO_RESULT),
        ("service.request.set_header service.request.add_header", _KEY_VALUE, _NO_RESULT),
        ("service.request.clear_header service.request.set_raw_body", _TEXT, _NO_RESULT),
        ("service.response.get_status", _NOTHING, _AN_INTEGER),
        ("service.response.get_header", _TEXT, _A_STRING),
        ("service.response.get_headers", _AT_MOST, _A_MULTI_MAP),
        ("service.response.get_raw_body", _NOTHING, _A_STRING),
    )
    for name in names.split()
}


def knows(method: str) -> bool:
    """Tell whether the protocol has this PDK function; Kong ends the event at any other."""
    return method in _FUNCTIONS


def arguments_of(method: str, arguments: Sequence[Any]) -> bytes:
    """Return the message with the arguments of a PDK function that the protocol has.

    Raises TypeError, ValueError, IndexError, OverflowError, AttributeError or RecursionError for arguments that the
    function's message cannot hold.
    """
    message, members = _FUNCTIONS[method][0]
    return message.encode(members(arguments))


def result_of(method: str, answer: bytes) -> Any:
    """Return what a PDK function gave, as a plugin gets it; None for an empty answer. Raises `ProtocolError`."""
    if not answer:
        return None
    message, value = _FUNCTIONS[method][1]
    return value(message.decode(answer))
