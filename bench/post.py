"""What one POST costs its client: ours next to plain requests, urllib3, http.client and a bare socket, in one run.

    python bench/post.py [--posts N] [--rounds R]

All of them post the same events, with the same headers, over one kept connection each, to a process on loopback that
answers as an ingest endpoint does; they take turns in short rounds, so that whatever else the machine does hits them
alike. Each figure is the median of the rounds: CPU of the client's process, user and system, in µs for each POST.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from statistics import median

import requests
import urllib3
from rich.table import Table
from terminal import CONSOLE, argument_parser, say_progress

from kong_metering import __version__
from kong_metering.clock import SystemClock
from kong_metering.ingest.client import BATCH, SINGLE, Endpoint, IngestClient
from kong_metering.trial.outcome import Delivered

Post = Callable[[], bool]

_PATH = "/api/v3/openmeter/events"
_TOKEN = "kpat_of_the_benchmark"  # noqa: S105 - not a secret
_EVENT_BYTES = 700
_BATCHES = (1, 100)
_ANSWER = (
    b"HTTP/1.1 202 Accepted\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\nConnection: keep-alive\r\nX-Request-Id: 0b3f5a7e2c6d4f10\r\nServer: endpoint\r\n\r\n{}"
)


def main() -> int:
    """Measure, and show the table."""
    options = _options()
    with ExitStack() as stack:
        port = stack.enter_context(_endpoint())
        table = Table(f"CPU µs of the client for each POST ({options.rounds} rounds of {options.posts})")
        found: dict[str, list[float]] = {}
        for events in _BATCHES:
            table.add_column(f"{events} x {_EVENT_BYTES} bytes", justify="right")
            clients = _clients(stack, port, [b"x" * _EVENT_BYTES] * events)
            for name, cost in _measure(clients, options.posts, options.rounds).items():
                found.setdefault(name, []).append(cost)
    for name, costs in found.items():
        table.add_row(name, *(f"{cost:,.0f}" for cost in costs))
    CONSOLE.print(table)
    return 0


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--posts", type=int, default=300, help="POSTs of each client in a round")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def _measure(clients: dict[str, Post], posts: int, rounds: int) -> dict[str, float]:
    costs: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(rounds + 1):
        say_progress(f"round {number} of {rounds}")
        for name, post in clients.items():
            started = time.process_time()
            taken = sum(post() for _ in range(posts))
            used = time.process_time() - started
            if taken != posts:
                raise SystemExit(f"{name}: {posts - taken} of {posts} POSTs were not answered with 202")
            if number:  # the first round is for caches
                costs[name].append(used / posts * 1e6)
    return {name: median(each) for name, each in costs.items()}


def _clients(stack: ExitStack, port: int, events: Sequence[bytes]) -> dict[str, Post]:
    body = events[0] if len(events) == 1 else b"[" + b",".join(events) + b"]"
    headers = {
        "Accept": "application/json, application/problem+json",
        "User-Agent": f"kong-metering/{__version__}",
        "Authorization": f"Bearer {_TOKEN}",
        "Content-Type": SINGLE if len(events) == 1 else BATCH,
    }
    return {
        "kong-metering": _ours(stack, port, events),
        "requests.Session.post": _requests(stack, port, body, headers),
        "urllib3.PoolManager.request": _urllib3(stack, port, body, headers),
        "http.client": _http_client(stack, port, body, headers),
        "a bare socket": _bare(stack, port, body, headers),
    }


def _ours(stack: ExitStack, port: int, events: Sequence[bytes]) -> Post:
    endpoint = Endpoint(f"http://127.0.0.1:{port}{_PATH}", _TOKEN, timeout=10, keepalive=60, verify=True)
    client = stack.enter_context(closing(IngestClient(endpoint, SystemClock())))
    return lambda: client.send(events) == Delivered()


def _requests(stack: ExitStack, port: int, body: bytes, headers: dict[str, str]) -> Post:
    session = stack.enter_context(requests.Session())
    url = f"http://127.0.0.1:{port}{_PATH}"
    return lambda: session.post(url, data=body, headers=headers, timeout=10).status_code == http.client.ACCEPTED


def _urllib3(stack: ExitStack, port: int, body: bytes, headers: dict[str, str]) -> Post:
    pool = stack.enter_context(urllib3.PoolManager(retries=False, timeout=10))
    url = f"http://127.0.0.1:{port}{_PATH}"
    return lambda: pool.request("POST", url, body=body, headers=headers).status == http.client.ACCEPTED


def _http_client(stack: ExitStack, port: int, body: bytes, headers: dict[str, str]) -> Post:
    connection = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)))

    def post() -> bool:
        connection.request("POST", _PATH, body, headers)
        response = connection.getresponse()
        response.read()
        return response.status == http.client.ACCEPTED

    return post


def _bare(stack: ExitStack, port: int, body: bytes, headers: dict[str, str]) -> Post:
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"POST {_PATH} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def post() -> bool:
        connection.sendall(request)
        return connection.recv(4096) == _ANSWER

    return post


@contextmanager
def _endpoint() -> Iterator[int]:
    """Run an endpoint in a process of its own, and give its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # It ends with us, whatever happens here: daemons are ended at exit, and it reads the end of its connections.
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listening,), daemon=True)
        process.start()
        try:
            yield listening.getsockname()[1]
        finally:
            process.terminate()
            process.join()


def _serve(listening: socket.socket) -> None:
    """Answer each connection's requests in a thread of its own."""
    while True:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_answer_all, args=(connection,), daemon=True).start()


def _answer_all(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as requested:
        while requested.readline():
            length = 0
            while line := requested.readline().strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            requested.read(length)
            connection.sendall(_ANSWER)


if __name__ == "__main__":
    sys.exit(main())
