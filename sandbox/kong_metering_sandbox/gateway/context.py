"""One request on its way through the gateway: what has been learned about it so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

from .headers import Headers
from .values import encode_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from .headers import HeaderTable
    from .router import Match
    from .values import Table, Value
    from .wire import RequestHead

JSON_TYPE = b"application/json; charset=utf-8"


def wall_ms() -> int:
    """Return the wall clock in whole milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Reply:
    """A response that the gateway itself gives."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @classmethod
    def json(cls, status: int, body: Value, headers: Mapping[str, str] | None = None) -> Reply:
        """Return a reply with a JSON body."""
        extra = tuple((name.encode(), value.encode()) for name, value in (headers or {}).items())
        return cls(status, encode_json(body), ((b"Content-Type", JSON_TYPE), *extra))


class PluginExit(Exception):  # noqa: N818 - it ends a phase, it is no error
    """A plugin has answered the request: later plugins do not run their access phase."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"answered {reply.status}")
        self.reply = reply


class LuaError(Exception):
    """Something that raises in Kong: the phase ends there, in the access phase with a 500."""


@dataclass(frozen=True)
class Answer:
    """A plugin server's last answer in a phase: when it had been read (monotonic clock), and which process gave it."""

    at: float
    server_pid: int


@dataclass
class Target:
    """Where the request goes, and how; ai-proxy changes it."""

    scheme: str
    host: str
    port: int
    path: bytes
    host_header: bytes
    retries: int
    connect_timeout: float
    read_timeout: float


@dataclass
class Latencies:
    """Milliseconds that the record shows: Kong's own, the wait for the upstream, the receiving of the response."""

    kong: int = 0
    proxy: int = -1
    receive: int = 0


@dataclass(frozen=True)
class LocalResponse:
    """A response that a plugin makes in the service's place, piece by piece."""

    headers: tuple[tuple[bytes, bytes], ...]
    pieces: AsyncIterator[bytes]


class ResponseObserver(Protocol):
    """A plugin that takes part in the response of the service, or makes it itself."""

    def respond(self) -> LocalResponse | None:
        """Return a response (a 200) that needs no service; None when there is a service to ask."""

    def see_head(self, exchange: Exchange) -> None:
        """Look at the response's head, before it goes to the client."""

    def see_piece(self, data: bytes) -> None:
        """Look at a piece of the body that goes to the client."""

    def finish(self, exchange: Exchange) -> None:
        """Note what was learned, when the response is complete."""


@dataclass
class Exchange:
    """A request and its response; the phases fill it in one after the other."""

    head: RequestHead
    client_ip: str
    client_port: int
    server_port: int
    request_id: str
    """The gateway's own id of the request, whether or not anybody hears of it."""
    kong_request_id: str | None
    """What Kong tells of it: in `$kong_request_id`, the record and X-Kong-Request-Id; Kongs before 3.5 told nothing."""
    nginx_request_id: str
    """nginx's own `$request_id`, which is another one."""
    workspace: str
    started_at: int = field(default_factory=wall_ms)
    started: float = field(default_factory=time.monotonic)
    headers: Headers = field(init=False)
    """The request's headers as the plugins leave them for the service."""
    args: bytes = field(init=False)
    body: bytes = b""
    request_size: int = 0
    method: bytes = field(init=False)
    match: Match | None = None
    consumer: Table | None = None
    credential: Table | None = None
    target: Target | None = None
    upstream_uri: bytes = b""
    shared: dict[Value, Value] = field(default_factory=dict)
    nginx_ctx: dict[Value, Value] = field(default_factory=dict)
    serialize_values: list[tuple[str, Value]] = field(default_factory=list)
    extra_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Headers that plugins add to whatever response there will be."""
    observer: ResponseObserver | None = None
    """The plugin that wants to see the service's response, if there is one."""
    receive_body: Callable[[], Awaitable[None]] | None = None
    """Reads the request's body from the client; None once that has been done."""
    tries: list[Table] | None = None
    upstream_statuses: list[str] = field(default_factory=list)
    buffered_status: int | None = None
    latencies: Latencies = field(default_factory=Latencies)
    proxied: bool = False
    exited: bool = False
    unexpected: bool = False
    status: int = HTTPStatus.OK
    response_headers: Headers = field(default_factory=Headers)
    bytes_sent: int = 0
    access_answers: dict[str, Answer] = field(default_factory=dict)
    """Of the external plugins, those whose access phase was answered to its end."""
    ran: list[tuple[str, Table]] = field(default_factory=list)
    """The plugins that apply, with their configurations: their log phases run at the end."""

    def __post_init__(self) -> None:
        self.headers = self.head.headers
        self.args = self.head.query
        self.method = self.head.method
        self.request_size = self.head.size

    async def ensure_body(self) -> None:
        """Read the request's body, if that has not been done.

        Raises:
            BodyError: it is malformed, or the client went away in the middle of it.

        """
        receive, self.receive_body = self.receive_body, None
        if receive is not None:
            await receive()

    def elapsed_ms(self) -> int:
        """Return how long ago the request came."""
        return int((time.monotonic() - self.started) * 1000)

    @property
    def source(self) -> str:
        """Who gave the response, as `kong.response.get_source` has it: service, exit or error."""
        if self.unexpected:
            return "error"
        if self.exited:
            return "exit"
        return "service" if self.proxied else "error"

    @property
    def route_id(self) -> str | None:
        """The route's id, if there is a route."""
        return self.match.route["id"] if self.match else None

    @property
    def service_id(self) -> str | None:
        """The service's id, if there is a service."""
        return self.match.service["id"] if self.match and self.match.service else None

    @property
    def consumer_id(self) -> str | None:
        """The authenticated consumer's id."""
        return self.consumer["id"] if self.consumer else None


@dataclass(frozen=True)
class Saved:
    """What is kept of a request for the log phase, which runs when the request itself is gone."""

    exchange: Exchange
    record: Table
    request_headers: HeaderTable
    response_headers: HeaderTable
    status: int
