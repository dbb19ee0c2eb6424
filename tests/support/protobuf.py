"""The messages of `ProtoBuf:1` as Google's library reads and writes them: what the host's own codec is measured by.

The tables are our own words for `kong/pluginsocket.proto` of Kong 3.9. All text is bytes here, as it is to Kong: the
library would refuse strings that are not UTF-8. All integers have 64 bits, and a map is a list of its entries; on the
wire that is the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

_PACKAGE = "tests"

# A message, and its fields: name=number:type. [type] is repeated, {type} a map from text; | is before one of several.
_MESSAGES = """
Call sequence=1:int |get_plugin_names=31:Empty |get_plugin_info=32:Name |start_instance=33:Start
     |get_instance_status=34:Instance |close_instance=35:Instance |handle_event=36:Event
Return sequence=1:int |plugin_names=31:Names |plugin_info=32:Info |instance_status=33:Status
Empty
Name name=1:text
Start name=1:text config=2:text
Instance instance_id=1:int
Event instance_id=1:int event_name=2:text
Names names=1:[text]
Info name=1:text updated_at=2:int loaded_at=3:int phases=4:[text] version=5:text priority=6:int schema=7:text
Status name=1:text instance_id=2:int config=3:Value started_at=4:int

Value |null_value=1:int |number_value=2:double |string_value=3:text |bool_value=4:bool |struct_value=5:Struct
      |list_value=6:List
Struct fields=1:{Value}
List values=1:[Value]

KV k=1:text v=2:Value
Bool v=1:bool
Int v=1:int
Number v=1:double
String v=1:text
Exit status=1:int body=2:text headers=3:Struct
Key id=1:text
Body |content=1:text |body_filepath=2:text |error=3:text
Captures unnamed=1:[text] named=2:{text}
Route id=1:text created_at=2:int updated_at=3:int name=4:text protocols=5:[text] methods=6:[text] hosts=7:[text]
      paths=8:[text] headers=9:[text] https_redirect_status_code=10:int regex_priority=11:int strip_path=12:bool
      preserve_host=13:bool snis=14:[text] sources=15:[text] destinations=16:[text] tags=17:[text] service=18:Key
Service id=1:text created_at=2:int updated_at=3:int name=4:text retries=5:int protocol=6:text host=7:text port=8:int
        path=9:text connect_timeout=10:int write_timeout=11:int read_timeout=12:int tags=13:[text]
        client_certificate=14:Key
Target host=1:text port=2:int
ConsumerSpec id=1:text by_username=2:bool
Consumer id=1:text created_at=2:int username=3:text custom_id=4:text tags=5:[text]
Credential id=1:text consumer_id=2:text
Authenticate consumer=1:Consumer credential=2:Credential
Memory lua_shared_dicts=1:Dicts workers_lua_vms=2:[Worker]
Dicts kong=1:Dict kong_db_cache=2:Dict
Dict allocated_slabs=1:int capacity=2:int
Worker http_allocated_gc=1:int pid=2:int

EntryOfText key=1:text value=2:text
EntryOfValue key=1:text value=2:Value
EntryOfEverything key=1:text value=2:Everything

Everything i=1:int b=2:bool d=3:double t=4:text ts=5:[text] map=6:{text} m=7:Everything ms=8:[Everything]
           mm=9:{Everything} far=536870911:text
"""

# PDK functions: what they take, and what they give.
_FUNCTIONS = """
client.get_ip Empty String
client.get_forwarded_ip Empty String
client.get_port Empty Int
client.get_forwarded_port Empty Int
client.get_credential Empty Credential
client.load_consumer ConsumerSpec Consumer
client.get_consumer Empty Consumer
client.authenticate Authenticate Empty
client.get_protocol Bool String
ctx.shared.set KV Empty
ctx.shared.get String Value
ip.is_trusted String Bool
log.alert List Empty
log.crit List Empty
log.err List Empty
log.warn List Empty
log.notice List Empty
log.info List Empty
log.debug List Empty
log.set_serialize_value KV Empty
log.serialize Empty String
nginx.get_var String String
nginx.get_tls1_version_str Empty String
nginx.set_ctx KV String
nginx.get_ctx String Value
nginx.req_start_time Empty Number
nginx.get_subsystem Empty String
node.get_id Empty String
node.get_memory_stats Empty Memory
request.get_scheme Empty String
request.get_host Empty String
request.get_port Empty Int
request.get_forwarded_scheme Empty String
request.get_forwarded_host Empty String
request.get_forwarded_port Empty Int
request.get_http_version Empty Number
request.get_method Empty String
request.get_path Empty String
request.get_path_with_query Empty String
request.get_raw_query Empty String
request.get_query_arg String String
request.get_query Int Struct
request.get_header String String
request.get_headers Int Struct
request.get_raw_body Empty Body
request.get_uri_captures Empty Captures
response.get_status Empty Int
response.get_header String String
response.get_headers Int Struct
response.get_source Empty String
response.set_status Int Empty
response.set_header KV Empty
response.add_header KV Empty
response.clear_header String Empty
response.set_headers Struct Empty
response.exit Exit Empty
router.get_route Empty Route
router.get_service Empty Service
service.set_upstream String Bool
service.set_target Target Empty
service.request.set_scheme String Empty
service.request.set_path String Empty
service.request.set_raw_query String Empty
service.request.set_method String Empty
service.request.set_query Struct Empty
service.request.set_header KV Empty
service.request.add_header KV Empty
service.request.clear_header String Empty
service.request.set_headers Struct Empty
service.request.set_raw_body String Empty
service.response.get_status Empty Int
service.response.get_header String String
service.response.get_headers Int Struct
service.response.get_raw_body Empty String
"""

FUNCTIONS: Mapping[str, tuple[str, str]] = {
    f"kong.{name}": (takes, gives) for name, takes, gives in map(str.split, _FUNCTIONS.split("\n")[1:-1])
}

_FieldType = descriptor_pb2.FieldDescriptorProto
_SCALARS: Mapping[str, _FieldType.Type.ValueType] = {
    "int": _FieldType.TYPE_INT64,
    "bool": _FieldType.TYPE_BOOL,
    "double": _FieldType.TYPE_DOUBLE,
    "text": _FieldType.TYPE_BYTES,
}
_FIELD = re.compile(r"(\|?)(\w+)=(\d+):([\[{]?)(\w+)")


def _described() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="tests.proto", package=_PACKAGE, syntax="proto3")
    for line in re.sub(r"\n +", " ", _MESSAGES).split("\n"):
        if line:
            name, _, fields = line.partition(" ")
            _describe(file.message_type.add(name=name), fields)
    return file


def _describe(message: descriptor_pb2.DescriptorProto, fields: str) -> None:
    for is_one_of, name, number, many, kind in _FIELD.findall(fields):
        field = message.field.add(name=name, number=int(number), label=_FieldType.LABEL_OPTIONAL)
        if is_one_of:
            if not message.oneof_decl:
                message.oneof_decl.add(name="one")
            field.oneof_index = 0
        if many:
            field.label = _FieldType.LABEL_REPEATED
        _set_type(field, f"EntryOf{kind.capitalize()}" if many == "{" else kind)


def _set_type(field: _FieldType, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _FieldType.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_described())


def message(name: str, /, **fields: Any) -> Any:
    """Make a message; text as bytes."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))(**fields)


def parsed(name: str, data: bytes) -> Any:
    """Read a message; raises `google.protobuf.message.DecodeError`."""
    made = message(name)
    made.ParseFromString(data)
    return made


def as_bytes(text: object) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogateescape")


def as_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


# -- values of any type, as Kong puts them in and takes them out -------------------------------------------------------


def value_message(value: object) -> Message:
    """Wrap a value as Kong does: a table that has nothing in it is a struct; nil is not 0, as elsewhere, but 1."""
    if value is None:
        return _of("Value", null_value=1)
    if isinstance(value, bool):
        return _of("Value", bool_value=value)
    if isinstance(value, (int, float)):
        return _of("Value", number_value=float(value))
    if isinstance(value, (str, bytes)):
        return _of("Value", string_value=as_bytes(value))
    if isinstance(value, Mapping):
        return _of("Value", struct_value=struct_message(value))
    assert isinstance(value, Sequence)
    return _of("Value", list_value=list_message(value)) if value else _of("Value", struct_value=struct_message({}))


def struct_message(table: Mapping[Any, object]) -> Message:
    made = message("Struct")
    for name, value in table.items():
        made.fields.add(key=as_bytes(name), value=value_message(value))
    return _is_message(made)


def list_message(values: Sequence[object]) -> Message:
    return _of("List", values=[value_message(value) for value in values])


def value_of(value: Any) -> Any:
    """Take a value out, text as surrogate escapes."""
    kind = value.WhichOneof("one")
    if kind == "struct_value":
        return struct_of(value.struct_value)
    if kind == "list_value":
        return list_of(value.list_value)
    if kind in (None, "null_value"):
        return None
    content = getattr(value, kind)
    return as_text(content) if isinstance(content, bytes) else content


def struct_of(struct: Any) -> dict[str, Any]:
    return {as_text(entry.key): value_of(entry.value) for entry in struct.fields}


def list_of(values: Any) -> list[Any]:
    return [value_of(value) for value in values.values]


def _of(name: str, /, **fields: Any) -> Message:
    return _is_message(message(name, **fields))


def _is_message(made: object) -> Message:
    assert isinstance(made, Message)
    return made
