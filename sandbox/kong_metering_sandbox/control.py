"""The sandbox's control: faults of the disk, of the processes, of the vault and of the plugin, by one curl each.

Contract: answers HTTP on a loopback port of its own while its context lasts, each request on a thread of its own, one
after the other. What it starts and stops is the gateway that it is given.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from kong_metering_sandbox.faulty_server import DiskFault, Faults
from kong_metering_sandbox.gateways import Gateway, GatewayError
from kong_metering_sandbox.status import plugin_status
from kong_metering_sandbox.troubles import INSTANCE, REFERENCE, SECRET

if TYPE_CHECKING:
    from typing_extensions import Self

    from kong_metering_sandbox.collector.process import CollectorProcess

_WORKS = "works"
_LOG_LINES = 20
_ADMIN_SECONDS = 30
_SEEN_LEVELS = ("[error]", "[warn]")


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """What was asked for is not to be had; the text says what is."""


class Vault:
    """The directory of the stand-in's vault."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory

    def put(self, secret: str) -> None:
        """Keep another secret from now on."""
        draft = self.directory / "draft"
        draft.write_text(secret, encoding="utf-8")
        draft.replace(self.directory / SECRET)


class Troubles:
    """Everything that can be brought about, by method and path; each takes the body's text and gives the answer's."""

    def __init__(self, gateway: Gateway, collector: CollectorProcess, faults: Faults, vault: Vault) -> None:
        self._gateway = gateway
        self._collector = collector
        self._faults = faults
        self._vault = vault
        self.actions: Mapping[tuple[str, str], Callable[[str], str]] = {
            ("GET", "/status"): self._status,
            ("GET", "/log"): self._log,
            ("PUT", "/disk"): self._disk,
            ("PUT", "/plugin"): self._plugin,
            ("PUT", "/vault"): self._rotate,
            ("POST", "/server"): self._kill,
            ("POST", "/gateway"): self._begin_again,
            ("DELETE", "/troubles"): self._end_all,
        }

    def _status(self, _: str) -> str:
        return json.dumps(dict(plugin_status(self._gateway)), indent=1)

    def _log(self, _: str) -> str:
        lines = self._gateway.error_log.splitlines()
        return "\n".join([line for line in lines if any(level in line for level in _SEEN_LEVELS)][-_LOG_LINES:])

    def _disk(self, word: str) -> str:
        words = {fault.value: fault for fault in DiskFault}
        self._faults.set_disk(_chosen(word, {_WORKS: None, **words}))
        return f"the spool's disk: {word}"

    def _plugin(self, word: str) -> str:
        self._faults.set_bug(is_there=_chosen(word, {_WORKS: False, "bug": True}))
        return f"the plugin: {word}"

    def _rotate(self, token: str) -> str:
        self._collector.client.set_tokens([token])
        self._vault.put(token)
        return f"vault and endpoint have the token {token} now; Kong's own copy follows"

    def _kill(self, word: str) -> str:
        _chosen(word, {"kill": None})
        return f"process {self._gateway.kill_plugin_server()} got SIGKILL"

    def _begin_again(self, word: str) -> str:
        _chosen(word, {"reload": self._gateway.reload, "restart": self._restart})()
        return f"the gateway has done its {word}"

    def _restart(self) -> None:
        """Stop and start; what the Admin API made, and a database would have kept, is made again."""
        plugins = self._admin("GET", "/plugins").json()["data"]
        self._gateway.stop()
        self._gateway.start()
        for plugin in plugins:
            self._admin("PUT", f"/plugins/{plugin['id']}", plugin)

    def _end_all(self, _: str) -> str:
        self._faults.set_disk(None)
        self._faults.set_bug(is_there=False)
        self._collector.client.clear_faults()
        self._collector.client.set_tokens([])
        right = {"ingest_endpoint": self._collector.ingest_v3, "api_token": REFERENCE}
        self._admin("PATCH", f"/plugins/{INSTANCE}", {"config": right})
        return "disk, plugin and endpoint work, the endpoint takes any token, and the plugin's URL and token are right"

    def _admin(self, method: str, path: str, document: object = None) -> requests.Response:
        """Ask the Admin API; what it refuses, as one that is read-only does, stays undone."""
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, self._gateway.admin_url + path, json=document, timeout=_ADMIN_SECONDS)


class Control:
    """Serves them; `url` is there once the context is entered."""

    url: str

    def __init__(self, troubles: Troubles) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(troubles))
        self._thread = threading.Thread(target=self._server.serve_forever, name="control")

    def __enter__(self) -> Self:
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(troubles: Troubles) -> type[BaseHTTPRequestHandler]:
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace").strip()
            action = troubles.actions.get((self.command, self.path))
            if action is None:
                known = ", ".join(f"{method} {path}" for method, path in troubles.actions)
                self._send(HTTPStatus.NOT_FOUND, f"there is {known}")
                return
            try:
                with one_at_a_time:
                    said = action(body)
            except Refused as refused:
                self._send(HTTPStatus.BAD_REQUEST, str(refused))
            except (GatewayError, OSError) as error:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            else:
                self._send(HTTPStatus.OK, said)

        def _send(self, status: HTTPStatus, text: str) -> None:
            data = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing: who has sent it sees the answer."""

        do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - the names that the library calls

    return Handler


def _chosen(word: str, choices: Mapping[str, Any]) -> Any:
    if word not in choices:
        raise Refused(f"{word!r} is not known: {', '.join(choices)}")
    return choices[word]
