"""The arguments and results of PDK calls over `ProtoBuf:1`: what Kong makes of the one, and how it sends the other.

What a message says is a Lua value afterwards, so what Lua has not is lost on the way: false and an empty place are nil,
an empty list is an empty table, a list ends at its first nil.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from .context import LuaError
from .pluginsocket import decode, message
from .values import Value, as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SCALARS = ("Bool", "Int", "Number", "String", "ByteString")
_NULL = b"NULL_VALUE"
_LUA_TYPES = {bytes: "string", str: "string", bool: "boolean", int: "number", float: "number"}
_INTEGERS = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)


def arguments(kind: str, data: bytes) -> list[Value]:
    """Return the arguments that a PDK function gets from an encoded message.

    Raises:
        LuaError: it is no such message.

    """
    try:
        given = decode(kind, data)
    except DecodeError as error:
        raise LuaError("assertion failed!") from error
    if kind in _SCALARS:
        return [given.v]
    if kind == "ListValue":
        return _until_nil([_lua_value(member) for member in given.values])
    return _ARGUMENTS[kind](given)


def encode_result(kind: str, result: Value) -> bytes:
    """Return the encoded result of a PDK function; nothing for nil, but a value that says so where any is possible.

    Raises:
        LuaError: the function gave something that cannot be sent so.

    """
    if kind == "Value":
        return _encode(_value(result))
    if kind == "Struct":
        return _encode(message(kind, fields=_entries(result)))
    if kind in _SCALARS:
        return _encode(_message(kind, {"v": result}))
    return b"" if result is None else _encode(_message(kind, result))


def _encode(made: Any) -> bytes:
    data: bytes = made.SerializeToString()
    return data


# -- what comes from the plugin


def _lua_value(value: Any) -> Value:
    if value.HasField("list_value"):
        return _table({i: _lua_value(member) for i, member in enumerate(value.list_value.values, 1)})
    if value.HasField("struct_value"):
        return _struct(value.struct_value)
    if value.bool_value:
        return True
    for name in ("string_value", "number_value"):
        if value.HasField(name):
            return getattr(value, name)
    if value.HasField("null_value"):
        return _NULL if value.null_value == 0 else value.null_value
    return None


def _struct(struct: Any) -> Value:
    return _table({entry.key: _lua_value(entry.value) for entry in struct.fields})


def _table(members: dict[Value, Value]) -> Value:
    """Return a table without the members that are nil: a list if it has no holes."""
    table = {key: member for key, member in members.items() if member is not None}
    if table and list(table) == list(range(1, len(table) + 1)):
        return list(table.values())
    return table


def _until_nil(values: list[Value]) -> list[Value]:
    return values[: values.index(None)] if None in values else values


def _fields(given: Any) -> Value:
    """Return a message as a table."""
    return {field.name.encode(): getattr(given, field.name) for field, _ in given.ListFields()}


_ARGUMENTS: dict[str, Callable[[Any], list[Value]]] = {
    "Empty": lambda _: [],
    "Struct": lambda given: [_struct(given)],
    "KV": lambda given: [given.k, _lua_value(given.v)],
    "Target": lambda given: [given.host, given.port],
    "ExitArgs": lambda given: [
        given.status,
        given.body,
        _struct(given.headers) if given.HasField("headers") else None,
    ],
    "ConsumerSpec": lambda given: [given.id, given.by_username],
    "AuthenticateArgs": lambda given: [_fields(given.consumer), _fields(given.credential)],
}


# -- what goes to the plugin


def _value(value: Value) -> Any:
    if value is None:
        return message("Value", null_value=1)
    if isinstance(value, bool):
        return message("Value", bool_value=value)
    if isinstance(value, (int, float)):
        return message("Value", number_value=value)
    if isinstance(value, (bytes, str)):
        return message("Value", string_value=as_bytes(value))
    members = _array(value)
    if members:
        return message("Value", list_value=message("ListValue", values=map(_value, members)))
    return message("Value", struct_value=message("Struct", fields=_entries(value)))


def _array(value: Value) -> list[Value]:
    """Return a table's array: what is under 1, 2 and so on, until there is nothing."""
    if not isinstance(value, dict):
        return _until_nil(list(value))
    return _until_nil([value.get(i) for i in range(1, len(value) + 1)])


def _entries(table: Value) -> list[Any]:
    if isinstance(table, list):
        table = dict(enumerate(table, 1))
    if not isinstance(table, dict):
        raise LuaError(f"bad argument #1 to 'for iterator' (table expected, got {_lua_type(table)})")
    for key in table:
        if not isinstance(key, (bytes, str)):
            raise _expected("string", "key", key)
    return [
        message("StructEntry", key=as_bytes(key), value=_value(member))
        for key, member in table.items()
        if member is not None
    ]


def _message(kind: str, table: Value) -> Any:
    """Return a message with those members of a table that it has fields for."""
    if not isinstance(table, dict):
        raise LuaError(f"bad argument #2 to 'encode' (table expected, got {_lua_type(table)})")
    made = message(kind)
    for name, field in made.DESCRIPTOR.fields_by_name.items():
        member = _get(table, name)
        if member is not None:
            _set(made, field, member)
    return made


def _get(table: Mapping[Value, Value], name: str) -> Value:
    return table.get(name, table.get(name.encode()))


def _set(made: Any, field: FieldDescriptor, member: Value) -> None:
    if field.is_repeated:
        if not isinstance(member, (dict, list)):
            raise LuaError(
                f"bad argument #2 to 'encode' (table expected at field '{field.name}', got {_lua_type(member)})"
            )
        getattr(made, field.name).extend(_single(field, one) for one in _array(member))
    elif field.message_type is not None:
        getattr(made, field.name).CopyFrom(_single(field, member))
    else:
        setattr(made, field.name, _single(field, member))


def _single(field: FieldDescriptor, member: Value) -> Any:
    if field.message_type is not None:
        return _message(field.message_type.name, member)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return member is not False
    if field.type == FieldDescriptor.TYPE_BYTES:
        if not isinstance(member, (bytes, str)):
            raise _expected("string", field.name, member)
        return as_bytes(member)
    if isinstance(member, bool) or not isinstance(member, (int, float)):
        raise _expected("number", field.name, member)
    return int(member) if field.type in _INTEGERS else float(member)


def _expected(what: str, name: str, member: Value) -> LuaError:
    return LuaError(f"bad argument #2 to 'encode' ({what} expected for field '{name}', got {_lua_type(member)})")


def _lua_type(value: Value) -> str:
    return "nil" if value is None else _LUA_TYPES.get(type(value), "table")
