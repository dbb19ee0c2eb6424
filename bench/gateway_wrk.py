"""Runs `wrk`, and reads what it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kong_metering_sandbox.gateways import GatewayError

_REMEDY = "there is no `wrk` on the PATH; Debian and Ubuntu have it: apt-get install wrk"
_REQUESTS_SENT = Path(__file__).with_name("gateway_requests.lua")
_SPARE_SECONDS = 60
_MICROSECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6}
_DISTRIBUTION = re.compile(r"^\s+(\d+)%\s+([\d.]+)(us|ms|s|m|h)\s*$", re.MULTILINE)
_REQUESTS = re.compile(r"^\s+(\d+) requests in ", re.MULTILINE)
_PER_SECOND = re.compile(r"^Requests/sec:\s+([\d.]+)$", re.MULTILINE)
_REFUSED = re.compile(r"^\s+Non-2xx or 3xx responses: (\d+)$", re.MULTILINE)
_SOCKET_ERRORS = re.compile(r"^\s+Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Load:
    """What wrk saw: responses, latencies in microseconds, responses other than 2xx and 3xx, errors of sockets."""

    requests: int
    per_second: float
    p50_us: float
    p99_us: float
    refused: int
    socket_errors: int


def find_wrk() -> str:
    """Find wrk on the PATH; raises `GatewayError` with the remedy if it is not there."""
    program = shutil.which("wrk")
    if program is None:
        raise GatewayError(_REMEDY)
    return program


def run_wrk(url: str, *, connections: int, seconds: int, headers: Mapping[str, str]) -> Load:
    """Send as many requests as can be, from one thread over some connections: those of gateway_requests.lua."""
    command = [find_wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(_REQUESTS_SENT)]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    done = subprocess.run(
        [*command, url], capture_output=True, text=True, timeout=seconds + _SPARE_SECONDS, check=False
    )
    if done.returncode != 0:
        raise GatewayError(f"wrk ended with {done.returncode}: {done.stdout}{done.stderr}")
    return parse_wrk(done.stdout)


def parse_wrk(text: str) -> Load:
    """Read what `wrk --latency` prints; raises `GatewayError` if it is something else."""
    latencies = {int(share): float(value) * _MICROSECONDS[unit] for share, value, unit in _DISTRIBUTION.findall(text)}
    requests, per_second = _REQUESTS.search(text), _PER_SECOND.search(text)
    if requests is None or per_second is None or not latencies.keys() >= {50, 99}:
        raise GatewayError(f"wrk printed what is not known: {text}")
    refused, errors = _REFUSED.search(text), _SOCKET_ERRORS.search(text)
    return Load(
        requests=int(requests[1]),
        per_second=float(per_second[1]),
        p50_us=latencies[50],
        p99_us=latencies[99],
        refused=int(refused[1]) if refused else 0,
        socket_errors=sum(map(int, errors.groups())) if errors else 0,
    )
