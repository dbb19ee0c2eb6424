"""The Kubernetes examples: what they say holds together, and real tools take them.

Helm is tried with Kong's chart in the directory that `KONG_CHART` names (its folder `charts/kong` of Kong/charts);
kubeconform with the custom resource definitions in the directories that `KONG_CRDS` names, with colons between them
(`config/crd/ingress-controller` of Kong/kubernetes-configuration, `config/crd/standard` of the Gateway API).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kong_metering.quantities import Duration, Size
from kong_metering.schema import plugin_schema
from kong_metering_sandbox.gateway import typedefs
from kong_metering_sandbox.gateway.entities import Store
from tests.examples.conftest import needs
from tests.support.image import command_of_the_image, make_directories, variables_of_the_image
from tests.support.plugin_server import BIN, ServerProcess, remove_directory, short_directory

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
DEPLOYMENTS = ["values.yaml", "values-daemonset.yaml"]
ALL_VALUES = [["values.yaml"], ["values.yaml", "values-autoscaling.yaml"], ["values.yaml", "values-daemonset.yaml"]]
PLUGINS = ["consumer", "gateway-api", "global", "route", "service", "vault"]
_GIBIBYTE = 1024**3
# What `kong quit --wait=15` of the chart takes at most, and what a supervisor takes beyond --stop-timeout.
_QUIT_SECONDS, _END_SECONDS = 15 + 10, 3


def objects(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def values(name: str) -> dict[str, Any]:
    (content,) = objects(FOLDER / "helm" / name)
    return content


def sidecar(name: str) -> dict[str, Any]:
    (found,) = (one for one in values(name)["deployment"]["initContainers"] if one["name"] == "kong-metering")
    return dict(found)


def flag(name: str, flag: str) -> str:
    (value,) = (argument.partition("=")[2] for argument in sidecar(name)["args"] if argument.startswith(flag + "="))
    return str(value)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_server_starts_before_kong_and_ends_after_it(name: str) -> None:
    container = sidecar(name)
    assert container["restartPolicy"] == "Always"
    assert container["startupProbe"]["exec"]["command"] == ["kong-metering", "health"]
    grace = values("values.yaml")["terminationGracePeriodSeconds"]
    assert grace > _QUIT_SECONDS + Duration().convert(flag(name, "--stop-timeout"), None, None) + _END_SECONDS


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_server_may_write_to_its_volumes_only(name: str) -> None:
    container = sidecar(name)
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert (security["runAsUser"], security["runAsNonRoot"]) == (1000, True)
    assert values("values.yaml")["securityContext"]["fsGroup"] == security["runAsGroup"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/run/kong-metering", "/var/lib/kong-metering"}
    deployment = values(name)["deployment"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in deployment["userDefinedVolumes"]
    }
    (shared,) = deployment["userDefinedVolumeMounts"]
    assert shared in container["volumeMounts"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_images_entry_point_takes_the_servers_arguments_and_is_well(name: str) -> None:
    container = sidecar(name)
    directory = short_directory()
    try:
        make_directories(directory)
        environment = variables_of_the_image(directory)
        entry_point = shlex.join([*command_of_the_image("ENTRYPOINT"), *container["args"]])
        with ServerProcess(entry_point, Path(environment["KONG_METERING_SOCKET"]), environment=environment) as server:
            assert server.complaints() == []
            program, *arguments = container["startupProbe"]["exec"]["command"]
            command = [str(BIN / program), *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        remove_directory(directory)


def test_the_spool_stays_below_what_the_volume_may_hold() -> None:
    volumes = {one["name"]: one for one in values("values.yaml")["deployment"]["userDefinedVolumes"]}
    limit = volumes["kong-metering-spool"]["emptyDir"]["sizeLimit"]
    assert limit.endswith("Gi")
    largest = Size().convert(flag("values.yaml", "--spool-max-bytes"), None, None)
    assert largest < 0.8 * int(limit.removesuffix("Gi")) * _GIBIBYTE


@pytest.mark.parametrize("name", PLUGINS)
def test_the_plugins_are_such_that_kong_takes(name: str) -> None:
    store = Store({**typedefs.BUNDLED, "metering-and-billing": plugin_schema()})
    metering = [one for one in objects(FOLDER / "plugins" / f"{name}.yaml") if one["kind"].endswith("Plugin")]
    assert metering
    for plugin in metering:
        config = dict(plugin["config"])
        for patch in plugin.get("configPatches", ()):
            config[patch["path"].removeprefix("/")] = "what the Secret holds"
        store.check("plugins", {"name": plugin["plugin"], "config": config})


@pytest.mark.parametrize("names", ALL_VALUES, ids=lambda names: names[-1])
def test_kongs_chart_makes_a_pod_of_them(names: list[str]) -> None:
    helm = needs("helm")
    chart = os.environ.get("KONG_CHART")
    if not chart:
        pytest.skip("KONG_CHART does not name the directory of Kong's chart")
    flags = [part for name in names for part in ("--values", str(FOLDER / "helm" / name))]
    command = [helm, "template", "kong", chart, "--namespace", "kong", "--kube-version", "1.33.0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    kind = "DaemonSet" if "values-daemonset.yaml" in names else "Deployment"
    (workload,) = (one for one in yaml.safe_load_all(done.stdout) if one and one["kind"] == kind)
    pod = workload["spec"]["template"]["spec"]
    (server,) = (one for one in pod["initContainers"] if one["name"] == "kong-metering")
    assert server["restartPolicy"] == "Always"
    (kong,) = (one for one in pod["containers"] if one["name"] == "proxy")
    environment = {one["name"]: one.get("value") for one in kong["env"]}
    assert environment["KONG_PLUGINSERVER_METERING_QUERY_CMD"] == "cat /run/kong-metering/dump.json"
    assert "OM_TOKEN" in environment
    assert {"name": "kong-metering-run", "mountPath": "/run/kong-metering"} in kong["volumeMounts"]


@pytest.mark.parametrize("folder", ["kubernetes/plugins", "kic"])
def test_the_controllers_definitions_take_the_objects(folder: str, tmp_path: Path) -> None:
    kubeconform = needs("kubeconform")
    directories = os.environ.get("KONG_CRDS")
    if not directories:
        pytest.skip("KONG_CRDS names no directories with custom resource definitions")
    for directory in directories.split(":"):
        for path in Path(directory).glob("*.yaml"):
            for kind, version, schema in defined(path):
                (tmp_path / f"{kind.lower()}-{version}.json").write_text(json.dumps(schema), encoding="utf-8")
    location = f"{tmp_path}/{{{{ .ResourceKind }}}}-{{{{ .ResourceAPIVersion }}}}.json"
    files = sorted((FOLDER.parent / folder).glob("*.yaml"))
    # Of Kubernetes itself, and not among the definitions.
    flags = ["-strict", "-summary", "-output", "json", "-skip", "Namespace,Service,Deployment,Ingress"]
    command = [kubeconform, *flags, "-schema-location", location, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["summary"]["valid"] >= len(files)


def defined(path: Path) -> list[tuple[str, str, Any]]:
    """List kind, version and schema of what a file defines."""
    definitions = [one["spec"] for one in objects(path) if one["kind"] == "CustomResourceDefinition"]
    return [
        (spec["names"]["kind"], version["name"], version["schema"]["openAPIV3Schema"])
        for spec in definitions
        for version in spec["versions"]
    ]
