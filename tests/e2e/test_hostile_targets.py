"""Odd targets, hosts, methods, bodies and connections: each request is metered once, as what Kong took it for."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering_sandbox.ports import port_of, reserve_port
from tests.e2e.declarative import document, metering_at_once, service
from tests.e2e.hostile import ACME, CHUNKED, TENANT, Till, open_till
from tests.e2e.traffic import request
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess
    from tests.e2e.conftest import OpenEchoTill
    from tests.e2e.traffic import Header

pytestmark = pytest.mark.e2e

API = "api.example"
TIMEOUT = 15


@dataclass(frozen=True)
class Odd:
    """A request, the status that it is answered with (0: no status line), and host, path and method of its event.

    Without a host it has no event: nginx refused it before it read the subject.
    """

    data: bytes
    status: int
    host: str | None = None
    uri: str | None = "/echo"
    method: str = "GET"


def target(text: str | bytes, status: int, host: str | None = None, uri: str | None = None) -> Odd:
    return Odd(request(text, ACME), status, host, uri)


def hosted(host: str | bytes, status: int, expected: str | None = None) -> Odd:
    return Odd(request("/echo", ACME, host=host), status, expected)


def version(text: str, status: int, host: str | None = API) -> Odd:
    return Odd(request("/echo", ACME, version=text), status, host)


def method(name: str, status: int, path: str = "/echo") -> Odd:
    return Odd(request(path, ACME, method=name), status, API, path, name)


def body(status: int, *headers: Header, content: bytes = b"") -> Odd:
    return Odd(request("/echo", ACME, *headers, method="POST", body=content), status, API, method="POST")


ODD = {
    # -- targets in absolute form
    "absolute": target("http://Shop.example:99/echo/x?y=1", 200, "shop.example", "/echo/x"),
    "absolute, of another scheme": target("ftp://shop.example/echo", 200, "shop.example", "/echo"),
    "absolute, with a dot at the end": target("http://shop.example./echo", 200, "shop.example", "/echo"),
    "absolute, IPv6": target("http://[2001:db8::7]:99/echo", 200, "[2001:db8::7]", "/echo"),
    "absolute, without a path": target("http://shop.example", 404, "shop.example", "/"),
    "absolute, with a query only": target("http://shop.example?y=1", 404, "shop.example", None),
    "absolute, without Host": Odd(request("http://shop.example/echo", ACME, host=None), 400, "shop.example"),
    "absolute, with a password": target("http://user:password@shop.example/echo", 400),
    "absolute, without a host": target("http:///echo", 400),
    "absolute, not UTF-8": target(b"http://caf\xe9/echo", 400),
    # -- paths
    "double slashes": target("//echo//x", 200, API, "//echo//x"),
    "a path like a host": target("//evil.example/echo", 404, API, "//evil.example/echo"),
    "dot segments": target("/echo/../echo/./x", 200, API, "/echo/../echo/./x"),
    "escaped dot segments": target("/echo/%2e%2e/x", 404, API, "/echo/%2e%2e/x"),
    "dot segments that leave": target("/echo/../../echo", 400),
    "escaped ones that leave": target("/echo%2f..%2f..%2fecho", 400),
    "an escaped slash": target("/echo%2fx", 200, API, "/echo%2fx"),
    "an escaped zero": target("/echo/%00", 400),
    "a broken escape": target("/echo/%zz", 400),
    "a semicolon": target("/echo;jsessionid=1/x", 200, API, "/echo;jsessionid=1/x"),
    "a fragment": target("/echo#/x?y", 200, API, "/echo"),
    "UTF-8": target("/echo/café", 200, API, "/echo/café"),
    "not UTF-8": target(b"/echo/caf\xe9", 404, API, "/echo/caf\ufffd"),
    "not UTF-8, escaped": target("/echo/%E9", 404, API, "/echo/%E9"),
    "no path": target("*", 400),
    "relative": target("echo", 400),
    "long": target("/echo/" + "a" * 8000, 200, API, "/echo/" + "a" * 8000),
    "too long": target("/echo/" + "a" * 9000, 414),
    # -- hosts
    "a port": hosted("api.example:8443", 200, API),
    "a port that is none": hosted("api.example:https", 200, API),
    "IPv6 with a port": hosted("[2001:db8::7]:8443", 200, "[2001:db8::7]"),
    "IPv6": hosted("[::1]", 200, "[::1]"),
    "IPv6 that is not closed": hosted("[::1", 200, "[::1"),
    "IPv6 without brackets": hosted("::1", 400),
    "capitals": hosted("API.Example", 200, API),
    "a dot at the end": hosted("api.example.", 200, API),
    "a password": hosted("user:password@api.example", 200, "user"),
    "a host in UTF-8": hosted("café.example", 200, "café.example"),
    "a host that is not UTF-8": hosted(b"caf\xe9.example", 200, "caf\ufffd.example"),
    "an empty host": hosted("", 400),
    "a host with a slash": hosted("api.example/x", 400),
    "a host with control bytes": hosted(b"a\x01b", 400),
    "two hosts": Odd(request("/echo", ACME, ("Host", "b.example")), 400, API),
    "no host": Odd(request("/echo", ACME, host=None), 400, "kong"),
    "no host in HTTP/1.0": Odd(request("/echo", ACME, host=None, version="HTTP/1.0"), 200, "kong"),
    # -- versions
    "HTTP/1.0": version("HTTP/1.0", 200),
    "HTTP/1.2": version("HTTP/1.2", 200),
    "HTTP/2.0": version("HTTP/2.0", 505, None),
    "HTTP/0.9": Odd(b"GET /echo\r\n", 0),
    "HTTP/2 that was not agreed": Odd(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "lines that end with a line feed only": Odd(request("/echo", ACME).replace(b"\r\n", b"\n"), 200, API),
    # -- methods
    "CONNECT": Odd(request("api.example:443", ACME, method="CONNECT"), 400),
    "CONNECT with a path": method("CONNECT", 405),
    "TRACE": method("TRACE", 405),
    "OPTIONS": method("OPTIONS", 200),
    "a method that nobody knows": method("BREW", 400),
    "a method in small letters": Odd(request("/echo", ACME, method="get"), 400),
    # -- bodies
    "a body of a GET": Odd(request("/echo", ACME, ("Content-Length", "3"), body=b"abc"), 200, API),
    "a chunked body": body(200, CHUNKED, content=b"3;x=y\r\nabc\r\n0\r\nX-Tenant-Id: globex\r\n\r\n"),
    "a length twice": body(400, ("Content-Length", "0"), ("Content-Length", "0")),
    "a negative length": body(400, ("Content-Length", "-1")),
    "a signed length": body(400, ("Content-Length", "+3"), content=b"abc"),
    "a hexadecimal length": body(400, ("Content-Length", "0x3"), content=b"abc"),
    "a list of lengths": body(400, ("Content-Length", "3, 3"), content=b"abc"),
    "a length beyond 64 bits": body(400, ("Content-Length", "9" * 20)),
    "a length and chunks": body(400, ("Content-Length", "3"), CHUNKED, content=b"0\r\n\r\n"),
    "chunks twice": body(400, CHUNKED, CHUNKED, content=b"0\r\n\r\n"),
    "another coding": body(501, ("Transfer-Encoding", "gzip, chunked"), content=b"0\r\n\r\n"),
    "a chunk without a size": body(400, CHUNKED, content=b"zz\r\nabc\r\n"),
    "a negative chunk": body(400, CHUNKED, content=b"-3\r\nabc\r\n0\r\n\r\n"),
    "a chunk that is too large": body(400, CHUNKED, content=b"f" * 16 + b"\r\nabc"),
    "an expectation that nobody knows": body(200, ("Expect", "nonsense")),
    # -- heads
    "a head that is too large": Odd(request("/echo", ACME, *[(f"x-{n}", "y" * 1000) for n in range(60)]), 400, API),
    "a header without a colon": Odd(request("/echo", ACME).replace(b"on: close", b"on close"), 400),
    "a header without a name": Odd(request("/echo", ACME, ("", "x")), 400, API),
    "nonsense": Odd(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
}


@pytest.fixture(scope="module")
def till(open_echo_till: OpenEchoTill, shared_collector: CollectorProcess) -> Iterator[Till]:
    """Meter by header, but on `/query` by an argument."""
    settings: dict[str, dict[str, object]] = {
        "query": {"subject": {"look_up_value_in": "query", "field": "tenant"}},
        "answered": {"allow_status_codes": ["200-299"]},
        "worked-on": {"allow_status_codes": ["200-299", "499-499"]},
    }
    url = shared_collector.ingest_v1
    with open_echo_till({name: [metering_at_once(url, **config)] for name, config in settings.items()}) as till:
        yield till


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_an_odd_request_is_metered_as_what_kong_took_it_for(odd: Odd, till: Till) -> None:
    bill = till.bill(odd.data)
    assert bill.status == odd.status
    if odd.host is None:
        assert (bill.events, bill.skipped) == ([], {"no_subject": 1})
    else:
        assert (bill.subjects, bill.skipped) == (["acme"], {})
        found = [bill.data.get(f"request_{name}") for name in ("host", "uri", "method")]
        assert found == [odd.host, odd.uri, odd.method]
        assert bill.data["response_http_status"] == odd.status


def test_an_argument_is_found_in_an_absolute_target_and_without_any_header(till: Till) -> None:
    assert till.bill(request("http://other.example/query?tenant=acme")).subjects == ["acme"]
    old = till.bill(b"GET /query?tenant=acme\r\n")
    assert old.answer.startswith(b'{"method": "GET"'), "HTTP/0.9 has no head"
    assert old.subjects == ["acme"]


@pytest.mark.parametrize(("name", "path", "status"), [("HEAD", "bytes/9", 200), ("GET", "status/204", 204)])
def test_an_answer_without_a_body_is_metered(name: str, path: str, status: int, till: Till) -> None:
    bill = till.bill(request(f"/echo/{path}", ACME, method=name))
    assert (bill.status, bill.subjects) == (status, ["acme"])
    assert bill.data["response_http_status"] == status


# -- several requests on one connection --------------------------------------------------------------------------------


def test_pipelined_requests_are_metered_each(till: Till) -> None:
    requests = [request(f"/echo/{n}", (TENANT, f"tenant-{n}"), keep_alive=n < 9) for n in range(10)]
    bill = till.bill(b"".join(requests), requests=10)
    assert bill.answer.count(b"HTTP/1.1 200") == 10
    found = sorted((event.subject, (event.data or {})["request_uri"]) for event in bill.events)
    assert found == [(f"tenant-{n}", f"/echo/{n}") for n in range(10)]
    assert len({event.id for event in bill.events}) == 10


def test_what_is_behind_nonsense_is_no_request(till: Till) -> None:
    good = request("/echo", ACME, keep_alive=True)
    bill = till.bill(good + b"nonsense\r\n\r\n" + request("/echo", (TENANT, "never")), requests=2)
    assert re.findall(rb"HTTP/1\.1 (\d+)", bill.answer) == [b"200", b"400"]
    assert (bill.subjects, bill.skipped) == (["acme"], {"no_subject": 1})


def test_a_body_that_is_longer_than_it_says_is_the_next_request(till: Till) -> None:
    lying = request("/echo", ACME, ("Content-Length", "3"), method="POST", body=b"abc", keep_alive=True)
    bill = till.bill(lying + request("/echo/smuggled", (TENANT, "globex")), requests=2)
    assert bill.answer.count(b"HTTP/1.1 200") == 2
    assert sorted(bill.subjects) == ["acme", "globex"]


def test_pipelined_requests_whose_client_leaves_are_metered_as_far_as_they_came(till: Till) -> None:
    requests = [request("/echo/slow/1", ACME, keep_alive=True)] + [request("/echo", (TENANT, "never"))] * 5
    bill = till.bill(lambda port: leave(port, b"".join(requests), after=0.2))
    assert bill.subjects == ["acme"]
    assert bill.data["response_http_status"] == 499


# -- clients that leave ------------------------------------------------------------------------------------------------


def leave(port: int, data: bytes, *, after: float = 0.2, reset: bool = False, read: int = 0) -> bytes:
    """Send bytes, read some of the answer, and close the connection, in the usual way or with a reset."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        connection.sendall(data)
        received = connection.recv(read) if read else b""
        time.sleep(after)  # so that what is asked for is under way
        if reset:
            # A reset takes with it what was not read.
            wait_until(lambda: unread_behind(connection) == 0, "the gateway reads")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return received


def unread_behind(connection: socket.socket) -> int:
    """Tell how many bytes wait in the socket at the other end, which is one of this machine."""
    ends = connection.getpeername()[1], connection.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if (int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)) == ends:
            return int(queues.rpartition(":")[2], 16)
    return 0


def half_close(port: int, data: bytes) -> bytes:
    """Send bytes, close only that side of the connection, and read the answer."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(65536):
            answer += received
    return answer


UPLOAD = request("/echo", ACME, ("Content-Length", "100000"), method="POST", body=b"x" * 500)
CUT_CHUNK = request("/echo", ACME, CHUNKED, method="POST", body=b"5\r\nabc")
WAITING = request("/echo", ACME, ("Expect", "100-continue"), ("Content-Length", "5"), method="POST")


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("data", [UPLOAD, CUT_CHUNK, WAITING], ids=["plain", "chunked", "not begun"])
def test_an_aborted_upload_is_metered_once(data: bytes, reset: bool, till: Till) -> None:  # noqa: FBT001
    bill = till.bill(lambda port: leave(port, data, reset=reset))
    assert bill.subjects == ["acme"]
    assert bill.data["response_http_status"] == 400
    assert "upstream_status" not in bill.data


def test_an_upload_that_is_shorter_than_it_says_is_metered_once(till: Till) -> None:
    bill = till.bill(lambda port: half_close(port, UPLOAD))
    assert (bill.subjects, bill.data["response_http_status"]) == (["acme"], 400)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_an_aborted_download_is_metered_once_with_what_was_sent(reset: bool, till: Till) -> None:  # noqa: FBT001
    size = 30_000_000
    bill = till.bill(lambda port: leave(port, request(f"/echo/bytes/{size}", ACME), reset=reset, read=1000))
    assert bill.answer.startswith(b"HTTP/1.1 200 OK")
    assert bill.subjects == ["acme"]
    assert bill.data["response_http_status"] == 200
    assert 1000 < bill.data["response_size_bytes"] < size


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_does_not_wait_for_the_answer_is_billed_once(reset: bool, till: Till) -> None:  # noqa: FBT001
    bill = till.bill(lambda port: leave(port, request("/echo/slow/2", ACME), reset=reset))
    assert (bill.subjects, bill.data["response_http_status"]) == (["acme"], 499)


def test_a_client_that_leaves_pays_if_its_status_is_allowed(till: Till) -> None:
    """With successes only, it can have the upstream work for nothing."""
    unpaid = till.bill(lambda port: leave(port, request("/answered/slow/2", ACME)))
    assert (unpaid.events, unpaid.skipped) == ([], {"status_not_allowed": 1})
    paid = till.bill(lambda port: leave(port, request("/worked-on/slow/2", ACME)))
    assert (paid.subjects, paid.data["response_http_status"]) == (["acme"], 499)


def test_a_client_that_closes_its_side_is_one_that_left(till: Till) -> None:
    bill = till.bill(lambda port: half_close(port, request("/echo/slow/1", ACME)))
    assert (bill.answer, bill.subjects, bill.data["response_http_status"]) == (b"", ["acme"], 499)


def test_a_refused_upload_that_nobody_reads_is_metered_once(till: Till) -> None:
    data = request("/nowhere", ACME, ("Content-Length", "100000"), method="POST", body=b"x")
    bill = till.bill(lambda port: leave(port, data, read=1000))
    assert (bill.status, bill.subjects, bill.data["response_http_status"]) == (404, ["acme"], 404)


def test_a_head_that_is_cut_off_is_counted(till: Till) -> None:
    cut = till.bill(lambda port: leave(port, request("/echo", ACME)[:-2]))
    assert (cut.subjects, cut.data["response_http_status"]) == (["acme"], 400)
    assert till.bill(lambda port: leave(port, b"GET /ec")).skipped == {"no_subject": 1}


def test_a_connection_without_a_request_is_nothing(till: Till) -> None:
    assert till.bill(lambda port: leave(port, b""), requests=0).events == []
    till.check()
    assert till.bill(lambda port: leave(port, b"\r\n")).skipped == {"no_subject": 1}


def test_nothing_of_all_this_is_in_the_log(till: Till) -> None:
    """All tests before this one have sent what they send; only the start of instances is told."""
    lines = till.log_lines()
    assert [line for line in lines if "instance" not in line] == []
    assert len(lines) <= 8


# -- what the stand-in does not speak ----------------------------------------------------------------------------------


class Echo(threading.Thread):
    """An upstream that agrees to any websocket, and sends back what it gets."""

    def __init__(self) -> None:
        super().__init__(name="websocket upstream", daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    self._serve(connection)
        except OSError:
            return  # closed

    def _serve(self, connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(65536)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while data := connection.recv(65536):
            connection.sendall(data)

    @contextmanager
    def running(self) -> Iterator[Echo]:
        self.start()
        yield self
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join(TIMEOUT)


@pytest.fixture(scope="module")
def modern_till(
    gateway_class: type[Gateway],
    tmp_path_factory: pytest.TempPathFactory,
    upstream: UpstreamProcess,
    shared_collector: CollectorProcess,
) -> Iterator[Till]:
    """Speak HTTP/2 as well, on the same port; and be the gRPC upstream oneself, under another host name."""
    answer = {"status_code": 200, "content_type": "application/grpc", "body": "x"}
    with reserve_port() as reserved, Echo().running() as echo:
        port = port_of(reserved)
        plugin = metering_at_once(shared_collector.ingest_v1)
        called = service(
            f"grpc://127.0.0.1:{port}",
            "called",
            {"name": "called", "protocols": ["grpc"], "paths": ["/shop.Orders"], "hosts": [API]},
            plugins=[plugin],
        )
        answering = service(
            "http://127.0.0.1:1",
            "answering",
            {"name": "answering", "paths": ["/shop.Orders"], "hosts": ["127.0.0.1"]},
            plugins=[{"name": "request-termination", "config": answer}],
        )
        declarative = document(
            service(upstream.url, "echo", plugins=[plugin]),
            service(echo.url, "socket", plugins=[plugin]),
            called,
            answering,
        )
        gateway = gateway_class(
            tmp_path_factory.mktemp("modern") / "gateway",
            declarative,
            settings={"proxy_listen": f"127.0.0.1:{port}", "nginx_proxy_http2": "on"},
        )
        with open_till(gateway, shared_collector, "/echo") as till:
            yield till


_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_REFUSALS = (3, 7)  # RST_STREAM, GOAWAY


def http2(*requests: list[tuple[bytes, bytes]]) -> Callable[[int], bytes]:
    """Make what asks over one HTTP/2 connection, all requests at once, and gives the content of the answers."""
    blocks = [b"".join(_field(name, value) for name, value in request) for request in requests]
    # Each HEADERS frame ends its headers and its stream.
    frames = [_frame(_HEADERS, 0x05, 2 * number + 1, block) for number, block in enumerate(blocks)]
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b"") + b"".join(frames)

    def ask(port: int) -> bytes:
        content, ended = b"", 0
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
            connection.sendall(sent)
            reader = connection.makefile("rb")
            while ended < len(requests):
                length, kind, flags, _ = struct.unpack(">3sBBI", reader.read(9))
                payload = reader.read(int.from_bytes(length, "big"))
                assert kind not in _REFUSALS, payload
                content += payload if kind == _DATA else b""
                ended += kind in (_DATA, _HEADERS) and flags & 1
        return content

    return ask


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">3sBBI", len(payload).to_bytes(3, "big"), kind, flags, stream) + payload


def _field(name: bytes, value: bytes) -> bytes:
    """Encode a header as a name and a value of its own, that nobody need remember (RFC 7541, 6.2.2)."""
    assert max(len(name), len(value)) < 127
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def fields(path: str, *headers: tuple[bytes, bytes], method: bytes = b"GET") -> list[tuple[bytes, bytes]]:
    pseudo = [(b":method", method), (b":scheme", b"http"), (b":authority", API.encode()), (b":path", path.encode())]
    return [*pseudo, *headers]


@pytest.mark.real_kong
def test_requests_on_one_http2_connection_are_metered_each(modern_till: Till) -> None:
    asked = [fields(f"/echo/{n}?y=1", (b"x-tenant-id", b"tenant-%d" % n)) for n in range(5)]
    bill = modern_till.bill(http2(*asked), requests=5)
    assert bill.answer.count(b'"method": "GET"') == 5
    found = sorted((event.subject, (event.data or {})["request_uri"]) for event in bill.events)
    assert found == [(f"tenant-{n}", f"/echo/{n}") for n in range(5)]
    assert {(event.data or {})["request_host"] for event in bill.events} == {API}


@pytest.mark.real_kong
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"x-tenant-id", b"caf\xe9")], "café"),
        ([(b"x-tenant-id", b"acme"), (b"x-tenant-id", b"globex")], "acme"),
        ([(b"x-tenant-id", b""), (b"x-tenant-id", b"acme")], "acme"),
        ([(b"x_tenant_id", b"acme")], "acme"),
        ([(b"x-tenant-id", b""), (b"x_tenant_id", b"acme")], "acme"),
        ([*((b"x-%d" % n, b"") for n in range(150)), (b"x-tenant-id", b"acme"), (b"x-tenant-id", b"globex")], "acme"),
        ([(b"x-tenant-id", b"")], None),
    ],
    ids=[
        "latin-1",
        "twice",
        "blank, then not",
        "underscores",
        "blank, then underscores",
        "twice, after 150 others",
        "empty",
    ],
)
def test_an_http2_header_is_the_subject_as_any_other(
    headers: list[tuple[bytes, bytes]], expected: str | None, modern_till: Till
) -> None:
    bill = modern_till.bill(http2(fields("/echo", *headers)))
    assert bill.subjects == ([] if expected is None else [expected])


@pytest.mark.real_kong
def test_a_grpc_call_is_metered_once(modern_till: Till) -> None:
    headers = [(b"x-tenant-id", b"acme"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
    bill = modern_till.bill(http2(fields("/shop.Orders/List", *headers, method=b"POST")))
    assert (bill.answer, bill.subjects) == (b"x", ["acme"])
    found = {name: bill.data[name] for name in ("request_host", "request_uri", "request_method", "service_protocol")}
    assert found == {
        "request_host": API,
        "request_uri": "/shop.Orders/List",
        "request_method": "POST",
        "service_protocol": "grpc",
    }


@pytest.mark.real_kong
def test_a_websocket_is_metered_once_when_it_ends(modern_till: Till) -> None:
    upgrade: list[Header] = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
    frame = b"\x81\x85\0\0\0\0hello"

    def talk(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
            connection.sendall(request("/socket", ACME, *upgrade, keep_alive=True))
            answer = connection.recv(65536)
            for _ in range(3):
                connection.sendall(frame)
                assert connection.recv(65536) == frame
            assert modern_till.collector.client.events() == [], "it is not metered before its end"
            return answer

    bill = modern_till.bill(talk)
    assert bill.answer.startswith(b"HTTP/1.1 101 ")
    assert (bill.subjects, bill.data["response_http_status"], bill.data["upstream_status"]) == (["acme"], 101, 101)
    assert bill.data["response_size_bytes"] > 3 * len(frame)
