"""The messages of `ProtoBuf:1` and the PDK methods that can be called over it, as Kong's pluginsocket.proto names them.

Strings are declared as bytes, which is the same on the wire: Kong's library does not look whether they are UTF-8. A map
is a list of entries, and a member of a `oneof` is an optional field: the same on the wire, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# `name=number:type`, with `*` for a repeated field, and `?` for one that is sent also when it is empty or zero.
_TABLE = {
    "Empty": "",
    "Value": "null_value=1:int32? number_value=2:double? string_value=3:string? bool_value=4:bool"
    " struct_value=5:Struct list_value=6:ListValue",
    "Struct": "fields=1:StructEntry*",
    "StructEntry": "key=1:string value=2:Value",
    "ListValue": "values=1:Value*",
    "CmdGetPluginNames": "",
    "CmdGetPluginInfo": "name=1:string",
    "CmdStartInstance": "name=1:string config=2:bytes",
    "CmdGetInstanceStatus": "instance_id=1:int32",
    "CmdCloseInstance": "instance_id=1:int32",
    "CmdHandleEvent": "instance_id=1:int32 event_name=2:string",
    "RpcCall": "sequence=1:int64 cmd_get_plugin_names=31:CmdGetPluginNames cmd_get_plugin_info=32:CmdGetPluginInfo"
    " cmd_start_instance=33:CmdStartInstance cmd_get_instance_status=34:CmdGetInstanceStatus"
    " cmd_close_instance=35:CmdCloseInstance cmd_handle_event=36:CmdHandleEvent",
    "PluginNames": "names=1:string*",
    "PluginInfo": "name=1:string updated_at=2:int64 loaded_at=3:int64 phases=4:string* version=5:string"
    " priority=6:int32 schema=7:string",
    "InstanceStatus": "name=1:string instance_id=2:int32 config=3:Value started_at=4:int64",
    "RpcReturn": "sequence=1:int64 plugin_names=31:PluginNames plugin_info=32:PluginInfo"
    " instance_status=33:InstanceStatus",
    "KV": "k=1:string v=2:Value",
    "Bool": "v=1:bool",
    "Int": "v=1:int32",
    "Number": "v=1:double",
    "String": "v=1:string",
    "ByteString": "v=1:bytes",
    "ExitArgs": "status=1:int32 body=2:bytes headers=3:Struct",
    "RawBodyResult": "content=1:bytes? body_filepath=2:string? error=3:string?",
    "UriCapturesResult": "unnamed=1:bytes* named=2:NamedEntry*",
    "NamedEntry": "key=1:string value=2:bytes",
    "ServiceKey": "id=1:string",
    "CertificateKey": "id=1:string",
    "Route": "id=1:string created_at=2:int64 updated_at=3:int64 name=4:string protocols=5:string* methods=6:string*"
    " hosts=7:string* paths=8:string* headers=9:string* https_redirect_status_code=10:int32 regex_priority=11:int32"
    " strip_path=12:bool preserve_host=13:bool snis=14:string* sources=15:string* destinations=16:string*"
    " tags=17:string* service=18:ServiceKey",
    "Service": "id=1:string created_at=2:int64 updated_at=3:int64 name=4:string retries=5:int32 protocol=6:string"
    " host=7:string port=8:int32 path=9:string connect_timeout=10:int32 write_timeout=11:int32 read_timeout=12:int32"
    " tags=13:string* client_certificate=14:CertificateKey",
    "Target": "host=1:string port=2:int32",
    "ConsumerSpec": "id=1:string by_username=2:bool",
    "Consumer": "id=1:string created_at=2:int64 username=3:string custom_id=4:string tags=5:string*",
    "AuthenticatedCredential": "id=1:string consumer_id=2:string",
    "AuthenticateArgs": "consumer=1:Consumer credential=2:AuthenticatedCredential",
    "MemoryStats": "lua_shared_dicts=1:LuaSharedDicts workers_lua_vms=2:WorkerLuaVm*",
    "LuaSharedDicts": "kong=1:DictStats kong_db_cache=2:DictStats",
    "DictStats": "allocated_slabs=1:int64 capacity=2:int64",
    "WorkerLuaVm": "http_allocated_gc=1:int64 pid=2:int64",
}

# What a method takes and gives, and the methods that do: `kong.` and the names, those of one module together.
_METHODS = """
Empty String: client.get_ip,get_forwarded_ip log.serialize nginx.get_tls1_version_str,get_subsystem node.get_id
Empty String: request.get_scheme,get_host,get_forwarded_scheme,get_forwarded_host,get_method,get_path
Empty String: request.get_path_with_query,get_raw_query response.get_source
Empty Int: client.get_port,get_forwarded_port request.get_port,get_forwarded_port response.get_status
Empty Int: service.response.get_status
Empty Number: nginx.req_start_time request.get_http_version
Empty AuthenticatedCredential: client.get_credential
Empty Consumer: client.get_consumer
Empty MemoryStats: node.get_memory_stats
Empty RawBodyResult: request.get_raw_body
Empty UriCapturesResult: request.get_uri_captures
Empty Route: router.get_route
Empty Service: router.get_service
Empty ByteString: service.response.get_raw_body
ConsumerSpec Consumer: client.load_consumer
AuthenticateArgs Empty: client.authenticate
Bool String: client.get_protocol
KV Empty: ctx.shared.set log.set_serialize_value response.set_header,add_header service.request.set_header,add_header
KV String: nginx.set_ctx
String Value: ctx.shared.get nginx.get_ctx
String Bool: ip.is_trusted service.set_upstream
String String: nginx.get_var request.get_query_arg,get_header response.get_header service.response.get_header
String Empty: response.clear_header service.request.set_scheme,set_path,set_raw_query,set_method,clear_header
ListValue Empty: log.alert,crit,err,warn,notice,info,debug
Int Struct: request.get_query,get_headers response.get_headers service.response.get_headers
Int Empty: response.set_status
Struct Empty: response.set_headers service.request.set_query,set_headers
ExitArgs Empty: response.exit
Target Empty: service.set_target
ByteString Empty: service.request.set_raw_body
"""

_FIELD = re.compile(r"(\w+)=(\d+):(\w+)([*?]?)")
_PACKAGE = "plugin_socket"
_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _Field.TYPE_BYTES,
    "bytes": _Field.TYPE_BYTES,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "double": _Field.TYPE_DOUBLE,
}


@dataclass(frozen=True)
class Signature:
    """The types of a PDK method's argument and of its result."""

    takes: str
    gives: str


def _signatures() -> dict[str, Signature]:
    signatures = {}
    for line in _METHODS.strip().splitlines():
        types, _, modules = line.partition(":")
        for module in modules.split():
            path, _, names = module.rpartition(".")
            for name in names.split(","):
                signatures[f"kong.{path}.{name}"] = Signature(*types.split())
    return signatures


def _message_types() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="plugin_socket.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _TABLE.items():
        message = file.message_type.add(name=name)
        for found in _FIELD.finditer(fields):
            _add_field(message, *found.groups())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _TABLE}


def _add_field(message: descriptor_pb2.DescriptorProto, name: str, number: str, kind: str, mark: str) -> None:
    field = message.field.add(name=name, number=int(number), type=_TYPES.get(kind, _Field.TYPE_MESSAGE))
    field.label = _Field.LABEL_REPEATED if mark == "*" else _Field.LABEL_OPTIONAL
    if kind not in _TYPES:
        field.type_name = f".{_PACKAGE}.{kind}"
    if mark == "?" or kind == "bool":  # Kong's library sends false wherever it is said
        field.proto3_optional = True
        field.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")


SIGNATURES = _signatures()
_MESSAGES = _message_types()


def message(kind: str, /, **fields: Any) -> Any:
    """Return a new message of a kind, with its fields."""
    return _MESSAGES[kind](**fields)


def decode(kind: str, data: bytes) -> Any:
    """Return the message that the bytes hold.

    Raises:
        google.protobuf.message.DecodeError: they hold none.

    """
    return _MESSAGES[kind].FromString(data)
