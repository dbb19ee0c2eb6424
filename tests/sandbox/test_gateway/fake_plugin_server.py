"""A fake plugin server, a program: `fake_plugin_server.py --dump [PROTOCOL [PRIORITY]]`, or SOCKET SCRIPT JOURNAL.

It runs the PDK calls that the script file lists for each phase, and writes every message that it gets, and what it
knows about itself, to the journal: one `repr` per line. It imports little, so that it starts quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgpack

from kong_metering_sandbox.gateway.pluginsocket import SIGNATURES, decode, message

NAME = "metering-and-billing"

SCHEMA: dict[str, Any] = {
    "name": NAME,
    "fields": [
        {
            "protocols": {
                "type": "set",
                "elements": {"type": "string", "one_of": ["http", "https", "grpc", "grpcs"]},
            }
        },
        {
            "config": {
                "type": "record",
                "fields": [
                    {"ingest_endpoint": {"type": "string", "required": True, "match": "^https?://[^%s]+$"}},
                    {
                        "api_token": {
                            "type": "string",
                            "required": True,
                            "referenceable": True,
                            "encrypted": True,
                        }
                    },
                    {"meter_api_requests": {"type": "boolean", "required": True, "default": True}},
                    {"meter_ai_token_usage": {"type": "boolean", "required": True, "default": True}},
                    {"timeout": {"type": "number", "default": 10000, "between": [1, 1000000]}},
                    {"max_bytes": {"type": "integer"}},
                    {
                        "subject": {
                            "type": "record",
                            "required": True,
                            "fields": [
                                {
                                    "look_up_value_in": {
                                        "type": "string",
                                        "default": "consumer",
                                        "one_of": ["header", "query", "consumer"],
                                    }
                                },
                                {"field": {"type": "string"}},
                            ],
                            "entity_checks": [
                                {
                                    "conditional": {
                                        "if_field": "look_up_value_in",
                                        "if_match": {"one_of": ["header", "query"]},
                                        "then_field": "field",
                                        "then_match": {"required": True},
                                    }
                                }
                            ],
                        }
                    },
                    {
                        "attributes": {
                            "type": "array",
                            "elements": {
                                "type": "record",
                                "fields": [
                                    {
                                        "source": {
                                            "type": "string",
                                            "required": True,
                                            "one_of": ["header", "query"],
                                        }
                                    },
                                    {"look_up_value_in": {"type": "string", "required": True}},
                                    {
                                        "event_property_name": {
                                            "type": "string",
                                            "required": True,
                                            "len_min": 1,
                                        }
                                    },
                                ],
                            },
                        }
                    },
                ],
            }
        },
    ],
}
PRIORITY = 850
DUMP = {"Name": NAME, "Phases": ["access", "log"], "Version": "0.1.0", "Schema": SCHEMA}


class Connection:
    """One of Kong's connections: of what it sends, no byte is read before it is wanted."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.received = bytearray()

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, 65536)

    async def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await asyncio.get_running_loop().sock_recv(self._socket, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        self.received += data
        return data

    async def peek(self, size: int) -> bytes:
        """Wait until so many bytes are there, and leave them there."""
        while True:
            await asyncio.sleep(0)
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = self._socket.recv(size, socket.MSG_PEEK)
                if not data:
                    raise EOFError
            if len(data) == size:
                return data
            await asyncio.sleep(0.001)

    async def frame(self) -> bytes:
        return await self.exactly(int.from_bytes(await self.exactly(4), "little"))

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)


class BreakError(Exception):
    """The script says that this connection ends here."""


class FakeServer:
    """Plays a plugin server on a Unix socket, in the protocol in which it is spoken to.

    The script says which PDK calls are made in `access` and `log`, what has to `fail` with which error (MessagePack),
    what to `break`, how and how many times (`{method: [how, times]}`), and what to `hold` until it is no longer said:
    a method, or one event's (`plugin.HandleEvent log`).
    """

    def __init__(self, script: Path, journal: Path) -> None:
        self._script = script
        self._journal = journal
        self._next_instance = os.getpid() * 1000
        self._instances: set[int] = set()
        self._next_event = 0
        self._events: dict[int, list[Any]] = {}
        self._broken: dict[str, int] = {}

    def note(self, what: object) -> None:
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(repr(what) + "\n")

    async def serve(self, sock: socket.socket) -> None:
        self.note(("opened", None))
        with sock:
            connection = Connection(sock)
            with contextlib.suppress(BreakError, EOFError, ConnectionError):
                begin = await connection.peek(4)
                is_messagepack = begin[0] == 0x94 and begin[2:] != b"\0\0"
                await (self.messagepack(connection) if is_messagepack else self.protobuf(connection))
        self.note(("closed", None))

    def script(self) -> dict[str, Any]:
        script: dict[str, Any] = json.loads(self._script.read_text())
        return script

    async def breaks(self, method: str, event: str) -> str | None:
        """Tell how a call is to be answered wrongly; some ways are the same for both protocols."""
        await asyncio.sleep(self.script().get("slow", 0))
        while {method, f"{method} {event}"} & set(self.script().get("hold", [])):  # noqa: ASYNC110 - a file says so
            await asyncio.sleep(0.005)
        breaks = self.script().get("break", {})
        entry = breaks.get(method) or breaks.get(f"{method} {event}")
        if entry is None:
            return None
        key = f"{method} {entry}"
        count = self._broken[key] = self._broken.get(key, 0) + 1
        how, times = entry[:2]
        if count > times:
            return None
        if how == "close":
            raise BreakError
        if how == "silence":
            await asyncio.Event().wait()
        return str(how)

    # -- MessagePack

    async def messagepack(self, connection: Connection) -> None:
        unpacker = msgpack.Unpacker(raw=True, strict_map_key=False)
        while data := await connection.read():
            unpacker.feed(data)
            for request in unpacker:
                self.note(("rpc", request))
                how = await self.breaks(request[2].decode(), _event(request[3][0]))
                answer = self.answer(request)
                if how == "sequence":
                    answer[1] += 1
                answered = msgpack.packb(answer, use_bin_type=False)
                await connection.send(answered[:-1] if how == "half" else answered)
                if how in ("half", "bye"):
                    raise BreakError

    def answer(self, request: list[Any]) -> list[Any]:
        _, message_id, method, (argument,) = request
        error, result = self.dispatch(method.decode(), argument)
        return [1, message_id, error, result]

    def dispatch(self, method: str, argument: Any) -> tuple[Any, Any]:
        script = self.script()
        failure = script.get("fail", {}).get(method)
        if failure:
            return failure, None
        if method == "plugin.StartInstance":
            return None, {"Name": NAME, "Id": self.start_instance(), "Config": {}, "StartTime": 0}
        if method == "plugin.CloseInstance":
            return None, {"Id": argument}
        if method == "plugin.GetStatus":
            instances = [{"Id": number} for number in sorted(self._instances)]
            return None, {"Pid": os.getpid(), "Plugins": {NAME: {"Instances": instances}}}
        if method == "plugin.HandleEvent":
            return self.begin(script, argument)
        return None, self.step(argument[b"EventId"])

    def start_instance(self) -> int:
        self._next_instance += 1
        self._instances.add(self._next_instance)
        return self._next_instance

    def begin(self, script: dict[str, Any], argument: dict[bytes, Any]) -> tuple[Any, Any]:
        if argument.get(b"InstanceId") not in self._instances:
            return "No plugin instance {}".format(argument.get(b"InstanceId")), None
        self._next_event += 1
        self._events[self._next_event] = list(script.get(argument[b"EventName"].decode(), []))
        return None, self.step(self._next_event)

    def step(self, event: int) -> dict[str, Any]:
        if not self._events[event]:
            return {"Data": "ret", "EventId": event}
        method, *arguments = self._events[event].pop(0)
        return {"Data": {"Method": method, "Args": arguments}, "EventId": event}

    # -- ProtoBuf

    async def protobuf(self, connection: Connection) -> None:
        while True:
            connection.received.clear()
            size = int.from_bytes(await connection.exactly(4), "little")
            if self.script().get("break", {}).get("frame") == "reset":
                await connection.peek(1)
                raise BreakError  # with unread bytes
            call = decode("RpcCall", await connection.exactly(size))
            method, argument = _call(call)
            self.note(("rpc", [0, call.sequence, method.encode(), [argument]]))
            self.note(("call", bytes(connection.received)))
            how = await self.breaks(method, _event(argument))
            fields: dict[str, Any] = {}
            if method == "plugin.StartInstance" and how != "nothing":
                fields["instance_status"] = message(
                    "InstanceStatus", name=NAME.encode(), instance_id=self.start_instance()
                )
            if method == "plugin.HandleEvent":
                await self.event(connection, argument, how)
            answer = message("RpcReturn", sequence=call.sequence + (how == "sequence"), **fields).SerializeToString()
            if how == "garbage":
                answer = b"\xff" * 5
            data = len(answer).to_bytes(4, "little") + answer
            await connection.send(data[:-1] if how == "half" else data + b"more" * (how == "more"))
            if how in ("half", "bye"):
                raise BreakError

    async def event(self, connection: Connection, argument: dict[bytes, Any], how: str | None) -> None:
        if argument.get(b"InstanceId") not in self._instances:
            raise BreakError
        self._next_event += 1
        script = self.script()
        calls = [["kong.no.such.method"]] if how == "unknown" else script.get(argument[b"EventName"].decode(), [])
        frames = [_frame(method.encode()) + _frame(encode_argument(method, args)) for method, *args in calls]
        if script.get("pipelined"):
            await connection.send(b"".join(frames))
        if how == "leave":
            raise BreakError
        for (method, *_), frame in zip(calls, frames, strict=True):
            if not script.get("pipelined"):
                await connection.send(frame)
            connection.received.clear()
            result = decode_result(method, await connection.frame())
            data = {} if result is None else {b"Data": result}
            self.note(("frame", bytes(connection.received)))
            self.note(("rpc", [0, self._next_event, b"plugin.Step", [{b"EventId": self._next_event, **data}]]))
        await connection.send(_frame(b""))


def _event(argument: Any) -> str:
    return str(argument.get(b"EventName", b"").decode()) if isinstance(argument, dict) else ""


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


_COMMANDS = {
    "cmd_start_instance": ("plugin.StartInstance", {"name": b"Name", "config": b"Config"}),
    "cmd_close_instance": ("plugin.CloseInstance", {"instance_id": b"InstanceId"}),
    "cmd_handle_event": ("plugin.HandleEvent", {"instance_id": b"InstanceId", "event_name": b"EventName"}),
}


def _call(call: Any) -> tuple[str, dict[bytes, Any]]:
    """Give a call as MessagePack has it; what is empty or zero is not there."""
    ((command, fields),) = [(field.name, value) for field, value in call.ListFields() if field.name != "sequence"]
    method, names = _COMMANDS[command]
    return method, {names[field.name]: value for field, value in fields.ListFields()}


def encode_argument(method: str, arguments: list[Any]) -> bytes:
    """Give a PDK call's argument; one of `hex:` and an unknown method's is what stands there."""
    if arguments and str(arguments[0]).startswith("hex:"):
        return bytes.fromhex(arguments[0].removeprefix("hex:"))
    if method not in SIGNATURES or not arguments:
        return b""
    kind = SIGNATURES[method].takes
    first, second = _lua(arguments[0]), _lua(arguments[1]) if arguments[1:] else None
    fields: dict[str, Any] = {"v": first}
    if kind == "KV":
        fields = {"k": first, **({"v": value(second)} if arguments[1:] else {})}
    elif kind == "ListValue":
        fields = {"values": [value(_lua(one)) for one in arguments]}
    elif kind == "ExitArgs":
        headers = value(_lua(arguments[2])).struct_value if arguments[2:] else None
        fields = {"status": first, "body": second, "headers": headers}
    data: bytes = message(kind, **fields).SerializeToString()
    return data


def _lua(argument: Any) -> Any:
    """Give strings as bytes; a lone surrogate is a byte that is not UTF-8."""
    if isinstance(argument, str):
        return argument.encode("utf-8", "surrogateescape")
    if isinstance(argument, list):
        return [_lua(one) for one in argument]
    if isinstance(argument, dict):
        return {_lua(key): _lua(one) for key, one in argument.items()}
    return argument


def value(one: Any) -> Any:
    if one is None:
        return message("Value", null_value=0)
    if isinstance(one, bool):
        return message("Value", bool_value=one)
    if isinstance(one, (int, float)):
        return message("Value", number_value=one)
    if isinstance(one, bytes):
        return message("Value", string_value=one)
    if isinstance(one, list):
        return message("Value", list_value=message("ListValue", values=map(value, one)))
    entries = [message("StructEntry", key=key, value=value(member)) for key, member in one.items()]
    return message("Value", struct_value=message("Struct", fields=entries))


def decode_result(method: str, data: bytes) -> Any:
    """Give a PDK call's result as Python has it: None for an empty frame, but for a string."""
    kind = SIGNATURES[method].gives if method in SIGNATURES else "Empty"
    result = decode(kind, data)
    if kind in ("String", "Int", "Number", "Bool", "ByteString"):
        return result.v if data or kind != "String" else None
    if kind == "Value":
        return plain(result)
    if kind == "Struct":
        return {entry.key: plain(entry.value) for entry in result.fields}
    return {field.name.encode(): _field(one) for field, one in result.ListFields()} if data else None


def _field(one: Any) -> Any:
    if hasattr(one, "ListFields"):
        return {field.name.encode(): _field(member) for field, member in one.ListFields()}
    return one if isinstance(one, (bytes, int, float)) else list(one)


def plain(one: Any) -> Any:
    (found,) = one.ListFields() or [(None, None)]
    field, member = found
    if field is None or field.name == "null_value":
        return None
    if field.name == "list_value":
        return [plain(each) for each in member.values]
    if field.name == "struct_value":
        return {entry.key: plain(entry.value) for entry in member.fields}
    return member


def run_server(path: Path, script: Path, journal: Path) -> None:
    server = FakeServer(script, journal)
    umask = os.umask(0)
    os.umask(umask)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    server.note(
        (
            "start",
            {
                "pid": os.getpid(),
                "environment": {k: v for k, v in os.environ.items() if k not in ("PWD", "LC_CTYPE")},
                "umask": umask,
                "stdin": Path("/proc/self/fd/0").readlink().as_posix(),
                "sockets": [fd for fd in range(3, min(limit, 64)) if _is_listener(fd)],
            },
        )
    )
    print("the fake plugin server starts", flush=True)  # noqa: T201 - its output is what the test reads

    def terminated(*_: object) -> None:
        server.note(("signal", "SIGTERM"))
        if not json.loads(script.read_text()).get("ignore_sigterm"):
            os._exit(0)

    signal.signal(signal.SIGTERM, terminated)
    path.unlink(missing_ok=True)

    async def serve() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(128)
            listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
            tasks = set()
            while True:
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
                task = asyncio.create_task(server.serve(accepted))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    asyncio.run(serve())


def _is_listener(fd: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            return bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


if __name__ == "__main__":
    if sys.argv[1] == "--dump":
        protocol = sys.argv[2] if len(sys.argv) > 2 else "MsgPack:1"
        priority = int(sys.argv[3]) if len(sys.argv) > 3 else PRIORITY
        dump: Any = [{**DUMP, "Priority": priority}]
        if protocol != "MsgPack:1":
            dump = {"Protocol": protocol, "SocketPath": "/unused", "Plugins": dump}
        print(json.dumps(dump))  # noqa: T201 - the dump goes to stdout
    else:
        run_server(*map(Path, sys.argv[1:]))
