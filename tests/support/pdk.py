"""Kong's side of the PDK, with one request under way, for the PDK objects of kong-pdk itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kong_pdk.pdk import Kong

from tests.support.records import REQUEST_ID

_LUA_DEFAULT_HEADERS = 100


class FakeKong:
    """Answers PDK calls as Kong 3.9.1 does, and keeps what was called.

    `headers` are the client's, in order. `record` is what `kong.log.serialize` gives, as data or as text. `failing`
    names the functions that Kong answers with an error. `lua_style` is that of kong-pdk's server: pairs of a value
    and an error instead of exceptions. `request_id` may be set to None, for Kongs before 3.5.
    """

    def __init__(
        self,
        headers: Iterable[tuple[str, str]] = (),
        record: object = None,
        *,
        failing: Mapping[str, str] | None = None,
        answers: Mapping[str, object] | None = None,
        lua_style: bool = False,
    ) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.said: list[tuple[str, str]] = []
        self.shared: dict[str, Any] = {}
        self.failing = dict(failing or {})
        self.answers = dict(answers or {})
        self._headers = [(name.lower(), value) for name, value in headers]
        self._record = record
        self.request_id: str | None = REQUEST_ID
        self.request_uri: str | None = None
        self._answer: tuple[object, str | None] = (None, None)
        self.kong: Any = Kong(self, lua_style).kong

    def answer(self, method: str, arguments: tuple[object, ...]) -> tuple[object, str | None]:
        """Take a call and answer it: its value, or the error that Kong gives."""
        self.put({"Method": method, "Args": arguments})
        return self.get()

    def put(self, request: Mapping[str, Any]) -> None:
        """Take a call, as the channel of kong-pdk's PDK objects."""
        method, arguments = request["Method"], request["Args"]
        self.calls.append((method, *arguments))
        if method in self.failing:
            self._answer = (None, self.failing[method])
        elif method in self.answers:
            self._answer = (self.answers[method], None)
        else:
            self._answer = (self._call(method, *arguments), None)

    def get(self) -> tuple[object, str | None]:
        """Answer it."""
        return self._answer

    def methods(self) -> list[object]:
        return [call[0] for call in self.calls]

    def _call(self, method: str, *arguments: Any) -> object:
        functions: dict[str, Callable[..., object]] = {
            "kong.request.get_header": self._get_header,
            "kong.request.get_headers": self._get_headers,
            "kong.nginx.get_var": self._get_var,
            "kong.nginx.get_ctx": self._get_ctx,
            "kong.ctx.shared.set": self.shared.__setitem__,
            "kong.ctx.shared.get": self.shared.get,
            "kong.log.serialize": self._serialize,
            "kong.log.err": lambda message: self.said.append(("err", message)),
            "kong.log.warn": lambda message: self.said.append(("warn", message)),
        }
        return functions[method](*arguments)

    def _serialize(self) -> str:
        return self._record if isinstance(self._record, str) else json.dumps(self._record)

    def _get_header(self, name: str) -> str | None:
        """Look a header up as `kong/tools/http.lua` does: by nginx's variable, or in the table if it has several."""
        value = self._nginx_header(name)
        if value is None or ", " not in value:
            return value
        found = self._get_headers().get(name.lower().replace("_", "-"))
        return found[0] if found else None

    def _get_ctx(self, name: str) -> object:
        """Give what Kong notes of a request when it begins; its record's `request.uri` is made of it."""
        return self.request_uri if name == "request_uri" else None

    def _get_var(self, name: str) -> str | None:
        return self.request_id if name == "kong_request_id" else self._nginx_header(name.removeprefix("http_"))

    def _get_headers(self, limit: int = _LUA_DEFAULT_HEADERS) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for name, value in self._headers[:limit]:
            table.setdefault(name, []).append(value)
        return table

    def _nginx_header(self, name: str) -> str | None:
        wanted = name.lower().replace("-", "_")
        values = [value for key, value in self._headers if key.replace("-", "_") == wanted]
        return ", ".join(values) if values else None
