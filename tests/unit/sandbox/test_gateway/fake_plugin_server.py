"""A fake plugin server, run as a program: `fake_plugin_server.py --dump [PRIORITY]`, or with SOCKET SCRIPT JOURNAL.

It runs the PDK calls that the script file lists for each phase, and writes every message that it gets, and what it
knows about itself, to the journal: one `repr` per line. It imports little, so that it starts quickly.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgpack

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


class FakeServer:
    """Plays a plugin server on a Unix socket."""

    def __init__(self, script: Path, journal: Path) -> None:
        self._script = script
        self._journal = journal
        self._next_instance = os.getpid() * 1000
        self._instances: set[int] = set()
        self._next_event = 0
        self._events: dict[int, list[Any]] = {}

    def note(self, what: object) -> None:
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(repr(what) + "\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unpacker = msgpack.Unpacker(raw=True, strict_map_key=False)
        while data := await reader.read(65536):
            unpacker.feed(data)
            for message in unpacker:
                self.note(("rpc", message))
                await asyncio.sleep(self.script().get("slow", 0))
                writer.write(msgpack.packb(self.answer(message), use_bin_type=False))
                await writer.drain()
        writer.close()

    def script(self) -> dict[str, Any]:
        script: dict[str, Any] = json.loads(self._script.read_text())
        return script

    def answer(self, message: list[Any]) -> list[Any]:
        _, message_id, method, (argument,) = message
        error, result = self.dispatch(method.decode(), argument)
        return [1, message_id, error, result]

    def dispatch(self, method: str, argument: Any) -> tuple[Any, Any]:
        script = self.script()
        failure = script.get("fail", {}).get(method)
        if failure:
            return failure, None
        if method == "plugin.StartInstance":
            self._next_instance += 1
            self._instances.add(self._next_instance)
            return None, {"Name": NAME, "Id": self._next_instance, "Config": {}, "StartTime": 0}
        if method == "plugin.CloseInstance":
            return None, {"Id": argument}
        if method == "plugin.HandleEvent":
            return self.begin(script, argument)
        return None, self.step(argument[b"EventId"])

    def begin(self, script: dict[str, Any], argument: dict[bytes, Any]) -> tuple[Any, Any]:
        if argument[b"InstanceId"] not in self._instances:
            return "No plugin instance {}".format(argument[b"InstanceId"]), None
        self._next_event += 1
        self._events[self._next_event] = list(script.get(argument[b"EventName"].decode(), []))
        return None, self.step(self._next_event)

    def step(self, event: int) -> dict[str, Any]:
        if not self._events[event]:
            return {"Data": "ret", "EventId": event}
        method, *arguments = self._events[event].pop(0)
        return {"Data": {"Method": method, "Args": arguments}, "EventId": event}


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
        async with await asyncio.start_unix_server(server.serve, path) as listener:
            await listener.serve_forever()

    asyncio.run(serve())


def _is_listener(fd: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            return bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


if __name__ == "__main__":
    if sys.argv[1] == "--dump":
        priority = int(sys.argv[2]) if len(sys.argv) > 2 else PRIORITY
        print(json.dumps([{**DUMP, "Priority": priority}]))  # noqa: T201 - the dump goes to stdout
    else:
        run_server(*map(Path, sys.argv[1:]))
