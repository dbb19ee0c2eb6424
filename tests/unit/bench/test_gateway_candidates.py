"""Which Kongs are compared, and what is said of them, without any of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from gateway_candidates import FLOOR, Candidate, floor, go_plugin, http_log, judged, nothing, ours
from gateway_comparison import verdicts
from gateway_samples import TARGETS, Sample
from processes import BENCH

from kong_metering_sandbox.gateways import GatewayError

GO_PROGRAM = shutil.which("go")
GO = Sample(per_second=1_000, kong_us=200, plugin_us=200, p50_us=4000, p99_us=9000, p50_alone_us=300, p99_alone_us=1000)
FAST = Sample(per_second=1_700, kong_us=140, plugin_us=60, p50_us=2000, p99_us=8000, p50_alone_us=200, p99_alone_us=900)


def stub_go(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    go = directory / "go"
    go.write_text(f"#!/bin/sh\n{script}\n")
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize("make", [go_plugin, floor])
def test_what_is_built_with_go_needs_it(
    make: Callable[[Path], Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GatewayError, match="no `go` on the PATH"):
        make(tmp_path)


@pytest.mark.parametrize(("make", "plugin"), [(go_plugin, "bench-go"), (floor, "bench-floor")])
def test_says_what_cannot_be_built_and_why(
    make: Callable[[Path], Candidate], plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_go(tmp_path, monkeypatch, "echo undefined: x >&2; exit 1")
    with pytest.raises(GatewayError, match=f"{plugin} cannot be built: undefined: x"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("make", "plugin", "source"), [(go_plugin, "bench-go", "goplugin"), (floor, "bench-floor", "floor")]
)
def test_what_is_built_is_started_by_kong_on_its_own_socket(
    make: Callable[[Path], Candidate], plugin: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_go(tmp_path, monkeypatch, f'pwd > "{tmp_path}/where"; echo "$@" > "{tmp_path}/how"')
    candidate = make(tmp_path)
    assert (tmp_path / "where").read_text().strip().endswith(f"bench/{source}")
    assert (tmp_path / "how").read_text() == f"build -o {tmp_path}/{plugin} .\n"
    assert candidate.server is not None
    prefix = tmp_path / candidate.name
    server = candidate.server(prefix)
    assert server.plugin == plugin
    assert server.settings["pluginserver_bench_start_cmd"] == f"{tmp_path}/{plugin} -kong-prefix {prefix}"
    assert server.settings["pluginserver_bench_query_cmd"] == f"{tmp_path}/{plugin} -dump"
    assert server.settings["pluginserver_bench_socket"] == str(server.socket) == f"{prefix}/{plugin}.socket"
    assert candidate.plugins("http://collector") == [{"name": plugin, "config": {"header": "x-tenant-id"}}]
    # Nothing comes of it, so nothing is waited for.
    assert not candidate.delivers


def test_targets_are_held_against_ours_and_the_floor() -> None:
    others = [nothing(), http_log(), Candidate("go", "Go"), ours("protobuf", 1), ours("protobuf", by_consumer=True)]
    wanted = [Candidate(FLOOR, "the floor"), ours("protobuf"), ours("msgpack")]
    assert judged([*others, *wanted]) == wanted


def test_the_floor_has_verdicts_of_its_own() -> None:
    held = [Candidate(FLOOR, "the floor"), ours("protobuf")]
    table = verdicts(held, {FLOOR: [FAST], "ours-protobuf-100": [GO], "go": [GO]})
    assert table.columns == ["", "wanted", "the floor", "kong-metering, ProtoBuf, batches of 100"]
    assert table.rows[0] == [TARGETS[0].what, "at least 1.7", "1.70 met", "1.00 MISSED"]
    assert table.rows[1][2:] == ["not measured", "not measured"]


@pytest.mark.skipif(GO_PROGRAM is None, reason="needs go, with which the floor is built")
def test_the_floor_speaks_the_protocol(tmp_path: Path) -> None:
    """Its own tests are in Go, beside it; it needs no module from anywhere."""
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GOPROXY": "off"}
    for what in (["vet"], ["test", "-count=1"]):
        done = subprocess.run(
            [str(GO_PROGRAM), *what, "."],
            cwd=BENCH / "floor",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
