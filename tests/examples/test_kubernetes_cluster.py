"""The Kubernetes examples with the real tools: an API server takes the objects, and Kong's controller translates them.

They need `etcd`, `kube-apiserver`, `kubectl`, `openssl` on the PATH, and the custom resource definitions in the
directories that `KONG_CRDS` names (see `test_kubernetes.py`); the second part the controller, as `kic`, and a real
Kong. There are no nodes, and nothing finds a service's endpoints: the tests say that the one of `orders.yaml` is their
upstream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import yaml

from kong_metering_sandbox.gateways import Gateway, free_port
from tests.e2e.declarative import PLUGIN, document
from tests.e2e.traffic import get
from tests.examples.conftest import TOKEN, needs
from tests.examples.kongs import KongBeside
from tests.support.kubernetes import Cluster, Tools, running_kubernetes, running_process
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.upstream_process import UpstreamProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGINS, MISSION = EXAMPLES / "kubernetes" / "plugins", EXAMPLES / "kic"
KONNECT = "https://us.api.konghq.com/v3/openmeter/events"
KEY = "key-of-alice"
# What a change takes from the API server over the controller to all of Kong's workers.
_PATIENCE = 90.0
_DELIVERY_SECONDS = 10.0
_INGRESS_CLASS = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "IngressClass",
    "metadata": {"name": "kong"},
    "spec": {"controller": "ingress-controllers.konghq.com/kong"},
}


@dataclass(frozen=True)
class Scope:
    """An example: its file, what has to be annotated with which plugins, and what it meters."""

    file: Path
    annotated: tuple[str, str] | None
    path: str = "/orders/1"


_SERVICE, _INGRESS, _CONSUMER = "service/orders", "ingress/orders", "kongconsumer/alice"
SCOPES = {
    "global": Scope(PLUGINS / "global.yaml", None),
    "vault": Scope(PLUGINS / "vault.yaml", None),
    "service": Scope(PLUGINS / "service.yaml", (_SERVICE, "metering-service")),
    "route": Scope(PLUGINS / "route.yaml", (_INGRESS, "key-auth,metering-route")),
    "consumer": Scope(PLUGINS / "consumer.yaml", (_CONSUMER, "metering-consumer")),
    "gateway-api": Scope(PLUGINS / "gateway-api.yaml", None, "/api/orders/1"),
    "mission's global": Scope(MISSION / "global.yaml", None),
    "mission's service": Scope(MISSION / "service.yaml", (_SERVICE, PLUGIN)),
    "mission's route": Scope(MISSION / "route.yaml", (_INGRESS, f"key-auth,{PLUGIN}")),
    "mission's consumer": Scope(MISSION / "consumer.yaml", (_CONSUMER, PLUGIN)),
}
_FILLED_IN = {"$AUTH_TOKEN": TOKEN, "$SUBJECT_HEADER": "x-tenant-id", "namespace: kong": "namespace: orders"}
_UNANNOTATED = {_INGRESS: "konghq.com/plugins=key-auth"}


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[Cluster]:
    """Run a Kubernetes that knows Kong's objects and those of the Gateway API, with the namespaces of the examples."""
    tools = Tools(needs("etcd"), needs("kube-apiserver"), needs("kubectl"), needs("openssl"))
    directories = os.environ.get("KONG_CRDS")
    if not directories:
        pytest.skip("KONG_CRDS names no directories with custom resource definitions")
    definitions = [path for directory in directories.split(":") for path in sorted(Path(directory).glob("*.yaml"))]
    with running_kubernetes(tools) as cluster:
        for path in definitions:
            if "kind: CustomResourceDefinition" in path.read_text(encoding="utf-8"):
                cluster.kubectl("apply", "--server-side", "-f", path)
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        for name in ("kong", "orders"):
            cluster.kubectl("create", "namespace", name)
            secret = ("secret", "generic", "metering-config", f'--from-literal=api_token="{TOKEN}"')
            cluster.kubectl("-n", name, "create", *secret)
        yield cluster


@pytest.mark.parametrize("path", sorted([*PLUGINS.glob("*.yaml"), *MISSION.glob("*.yaml")]), ids=str)
def test_an_api_server_takes_the_objects(kubernetes: Cluster, path: Path) -> None:
    said = kubernetes.kubectl("apply", "--server-side", "--dry-run=server", "-f", path)
    wanted = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]
    assert said.count("serverside-applied (server dry run)") == len(wanted)


@pytest.fixture(scope="module")
def controlled(
    kubernetes: Cluster,
    vault: None,  # noqa: ARG001 - its variables are for Kong
    upstream: UpstreamProcess,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    """Run a gateway without a database that the controller configures, with all that the plugins are for."""
    program = needs("kic")
    if request.config.getoption("--gateway") != "kong":
        pytest.skip("the stand-in has no upstreams, as which the controller gives Kong its services: --gateway=kong")
    directory = tmp_path_factory.mktemp("k") / "g"
    command: list[str | Path] = [
        program,
        "--kubeconfig",
        kubernetes.kubeconfig,
        "--anonymous-reports=false",
        "--election-namespace=kong",
        # Its part for the Gateway API demands one, and finds out by it which of Kong's ports serves a Gateway's.
        "--publish-service=kong/proxy",
        "--health-probe-bind-address=127.0.0.1:0",
        "--metrics-bind-address=127.0.0.1:0",
        f"--diagnostic-server-port={free_port()}",
        "--proxy-sync-seconds=0.5",
    ]
    with KongBeside(directory, document()) as gateway:
        environment = {**os.environ, "POD_NAME": "kong", "POD_NAMESPACE": "kong"}
        log = directory / "controller.log"
        kubernetes.kubectl("-n", "kong", "create", "service", "clusterip", "proxy", f"--tcp=80:{gateway.proxy_port}")
        with running_process([*command, f"--kong-admin-url={gateway.admin_url}"], log, environment):
            kubernetes.kubectl("apply", "-f", "-", given=json.dumps(_INGRESS_CLASS))
            kubernetes.kubectl("apply", "-f", PLUGINS / "orders.yaml")
            kubernetes.kubectl("apply", "-f", "-", given=json.dumps(_endpoints(upstream.port)))
            kubernetes.kubectl("-n", "orders", "create", "secret", "generic", "alice-key", f"--from-literal=key={KEY}")
            kubernetes.kubectl("-n", "orders", "label", "secret", "alice-key", "konghq.com/credential=key-auth")
            kubernetes.kubectl("-n", "orders", "annotate", _INGRESS, _UNANNOTATED[_INGRESS])
            try:
                wait_until(lambda: _asked(gateway, "/orders/1") == 200, "the Ingress is served", _PATIENCE, pause=0.2)
            except AssertionError as error:
                raise AssertionError(f"{error}: {log.read_text('utf-8')[-5000:]}") from None
            yield gateway


@pytest.mark.parametrize("name", SCOPES)
def test_the_controller_brings_the_plugin_to_a_gateway_that_meters_then(
    name: str, kubernetes: Cluster, controlled: Gateway, collector: CollectorProcess
) -> None:
    scope = SCOPES[name]
    objects = _objects(scope.file).replace(KONNECT, collector.ingest_v3)
    kubernetes.kubectl("apply", "-f", "-", given=objects)
    if scope.annotated is not None:
        annotated, plugins = scope.annotated
        annotate = ("-n", "orders", "annotate", "--overwrite", annotated)
        kubernetes.kubectl(*annotate, f"konghq.com/plugins={plugins}")
    try:
        wait_until(lambda: _metering(controlled), "the plugin is there", _PATIENCE, pause=0.2)
        assert _metering(controlled) == [scope_of(name)]
        wait_until(lambda: _asked(controlled, scope.path) == 200, "the route is there", _PATIENCE, pause=0.2)
        wait_until(lambda: _each_is_metered(controlled, scope, collector), "all workers have the plugin", _PATIENCE)
        assert _each_is_metered(controlled, scope, collector)
        assert {event.subject for event in collector.client.events()} == {"acme"}
        assert not any(one.status == 401 for one in collector.client.requests())
    finally:
        if scope.annotated is not None:
            kubernetes.kubectl(*annotate, _UNANNOTATED.get(annotated, "konghq.com/plugins-"))
        kubernetes.kubectl("delete", "-f", "-", given=objects)
    wait_until(lambda: not _metering(controlled), "the plugin is gone", _PATIENCE, pause=0.2)


def _each_is_metered(gateway: Gateway, scope: Scope, collector: CollectorProcess) -> bool:
    """Tell whether 20 requests give 20 events.

    The Admin API has a plugin before each worker has (tests/e2e/test_lifecycle.py counts what is asked meanwhile).
    """
    wanted = collector.client.stats().unique + 20
    assert {_asked(gateway, scope.path) for _ in range(20)} == {200}
    try:
        collector.client.wait_for_events(wanted, _DELIVERY_SECONDS)
    except TimeoutError:
        return False
    return True


def scope_of(name: str) -> list[str]:
    """List what a plugin entity of Kong's refers to."""
    scope = name.removeprefix("mission's ")
    return {"global": [], "vault": [], "gateway-api": ["route"]}.get(scope, [scope])


def _objects(path: Path) -> str:
    """Give the objects of a file; the mission's with what it leaves to the shell, and beside what they are for."""
    text = path.read_text(encoding="utf-8")
    if path.parent == MISSION:
        for place, value in _FILLED_IN.items():
            text = text.replace(place, value)
    return text


def _metering(gateway: Gateway) -> list[list[str]]:
    """List what each of our plugins in a gateway refers to."""
    plugins = requests.get(f"{gateway.admin_url}/plugins", timeout=20).json()["data"]
    ours = [plugin for plugin in plugins if plugin["name"] == PLUGIN]
    return [[name for name in ("service", "route", "consumer") if plugin.get(name)] for plugin in ours]


def _asked(gateway: Gateway, path: str) -> int:
    return get(gateway.proxy_port, path, ("X-Tenant-Id", "acme"), ("apikey", KEY))


def _endpoints(port: int) -> dict[str, Any]:
    """Give what says where the service of `orders.yaml` answers: on a port of this machine's.

    It is of the type FQDN, as the API server takes no loopback address of the type IPv4.
    """
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "orders-tests",
            "namespace": "orders",
            "labels": {"kubernetes.io/service-name": "orders"},
        },
        "addressType": "FQDN",
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    }
