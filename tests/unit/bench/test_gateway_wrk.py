"""What wrk prints, as it was printed by wrk 4.1.0."""

from __future__ import annotations

import pytest
from gateway_wrk import Load, find_wrk, parse_wrk

from kong_metering_sandbox.gateways import GatewayError

BLANK = " "  # wrk pads units of one letter

CLEAN = f"""Running 4s test @ http://127.0.0.1:41533/orders
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.99ms    2.68ms  38.07ms   85.15%
    Req/Sec     5.97k   650.18     7.34k    70.00%
  Latency Distribution
     50%    2.17ms
     75%    3.95ms
     90%  900.00us
     99%    1.04s{BLANK}
  23769 requests in 4.00s, 7.93MB read
Requests/sec:   5939.53
Transfer/sec:      1.98MB
"""
TROUBLED = CLEAN.replace(
    "Requests/sec",
    "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 42\nRequests/sec",
)


def test_reads_requests_and_latencies() -> None:
    assert parse_wrk(CLEAN) == Load(23769, 5939.53, p50_us=2170.0, p99_us=1_040_000.0, refused=0, socket_errors=0)


def test_reads_what_went_wrong() -> None:
    load = parse_wrk(TROUBLED)
    assert (load.requests, load.refused, load.socket_errors) == (23769, 42, 4321)


@pytest.mark.parametrize(
    "text",
    ["", "unable to connect to 127.0.0.1:1 Connection refused\n", CLEAN.replace("99%", "98%")],
    ids=["nothing", "an error", "no percentile"],
)
def test_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(GatewayError, match="wrk printed what is not known"):
        parse_wrk(text)


def test_says_where_wrk_comes_from_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GatewayError, match="apt-get install wrk"):
        find_wrk()
