"""A Kubernetes of the tests' own, as far as an ingress controller sees one: etcd, an API server, no nodes.

Contract: both processes listen on loopback ports until the context ends, and keep what they have in one temporary
directory. Nothing that needs a node or a controller of Kubernetes' happens: no pod runs, no Service has endpoints.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kong_metering_sandbox.gateways import free_port, wait_for

_TOKEN = "t" * 32
_COMMAND_SECONDS = 120
_STOP_SECONDS = 20
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Tools:
    """The programs that it takes."""

    etcd: str
    kube_apiserver: str
    kubectl: str
    openssl: str


@dataclass(frozen=True)
class Cluster:
    """What runs: `kubeconfig` leads to it."""

    kubeconfig: Path
    _kubectl: str

    def kubectl(self, *arguments: str | Path, given: str = "") -> str:
        """Run kubectl, look at its exit status, and give what it printed."""
        done = self._run(*arguments, given=given)
        assert done.returncode == 0, f"kubectl {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def answers(self) -> bool:
        """Tell whether the API server is ready."""
        return self._run("get", "--raw", "/readyz").returncode == 0

    def _run(self, *arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [self._kubectl, "--kubeconfig", self.kubeconfig, *arguments]
        return subprocess.run(
            command, check=False, input=given, capture_output=True, text=True, timeout=_COMMAND_SECONDS
        )


@contextmanager
def running_kubernetes(tools: Tools) -> Iterator[Cluster]:
    """Run one that is empty."""
    with tempfile.TemporaryDirectory(prefix="km-k8s-") as name, ExitStack() as running:
        directory = Path(name)
        client, peer, port = free_port(), free_port(), free_port()
        running.enter_context(running_process(_etcd(tools.etcd, directory, client, peer), directory / "etcd.log"))
        command = _api_server(tools, directory, client, port)
        log = directory / "kube-apiserver.log"
        running.enter_context(running_process(command, log))
        cluster = Cluster(_kubeconfig(directory, port), tools.kubectl)
        wait_for(cluster.answers, "the API server is ready", lambda: log.read_text("utf-8")[-3000:], _START_SECONDS)
        yield cluster


@contextmanager
def running_process(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the context ends, with what it says in a file."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _etcd(program: str, directory: Path, client: int, peer: int) -> list[str]:
    clients, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    return [
        program,
        f"--data-dir={directory}/etcd",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
    ]


def _api_server(tools: Tools, directory: Path, etcd: int, port: int) -> list[str]:
    key, tokens = directory / "service-account.key", directory / "tokens.csv"
    generated = [tools.openssl, "genrsa", "-out", str(key), "2048"]
    subprocess.run(generated, check=True, capture_output=True, timeout=_COMMAND_SECONDS)
    tokens.write_text(f"{_TOKEN},admin,admin,system:masters\n", encoding="utf-8")
    return [
        tools.kube_apiserver,
        f"--etcd-servers=http://127.0.0.1:{etcd}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={directory}/certificates",
        f"--token-auth-file={tokens}",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-cluster-ip-range=10.0.0.0/24",
        # No controller makes the accounts that it would look for.
        "--disable-admission-plugins=ServiceAccount",
    ]


def _kubeconfig(directory: Path, port: int) -> Path:
    path = directory / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "tests",
        "clusters": [
            {
                "name": "tests",
                "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True},
            }
        ],
        "users": [{"name": "admin", "user": {"token": _TOKEN}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "admin"}}],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
