"""The Terraform examples, by Terraform or OpenTofu.

Plans need the providers: `KONG_TF_PLUGINS` names a directory that has them in the layout of a file system mirror
(registry.terraform.io/kevholditch/kong/..., registry.terraform.io/kong/konnect/...).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from kong_metering.commands.main import program
from tests.e2e.traffic import get
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = ["terraform-on-prem", "terraform-konnect"]
PROVIDERS = {"terraform-on-prem": "kevholditch/kong", "terraform-konnect": "kong/konnect"}
_NO_CHANGES, _CHANGES = 0, 2
_PATIENCE = 90.0


class Terraform:
    """The program in a copy of one example."""

    def __init__(self, folder: str, directory: Path) -> None:
        self._program = terraform()
        self._directory = directory / folder
        shutil.copytree(EXAMPLES / folder, self._directory)

    def __call__(self, *arguments: str, status: int = 0, **variables: object) -> str:
        """Run it, look at its exit status, and give what it printed."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._directory),
            "CHECKPOINT_DISABLE": "1",
            **{f"TF_VAR_{name}": _text(value) for name, value in variables.items()},
        }
        done = subprocess.run(  # noqa: PLW1510 - the status is looked at below
            [self._program, *arguments],
            cwd=self._directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout


def terraform() -> str:
    found = shutil.which("terraform") or shutil.which("tofu")
    if found is None:
        pytest.skip("there is neither `terraform` nor `tofu` on the PATH")
    return found


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def initialised(folder: str, directory: Path) -> Terraform:
    """Give the program with the example's provider, or skip with a word why."""
    run = Terraform(folder, directory)
    plugins = os.environ.get("KONG_TF_PLUGINS", "")
    if not plugins or not (Path(plugins) / "registry.terraform.io" / PROVIDERS[folder]).is_dir():
        pytest.skip(f"KONG_TF_PLUGINS names no directory with the provider {PROVIDERS[folder]}")
    run("init", "-input=false", f"-plugin-dir={plugins}")
    return run


@pytest.mark.parametrize("folder", FOLDERS)
def test_examples_are_formatted(folder: str, tmp_path: Path) -> None:
    assert Terraform(folder, tmp_path)("fmt", "-check", "-diff") == ""


def test_the_schema_for_konnect_is_that_of_the_plugin() -> None:
    command = ["schema", "--format", "lua", "--plugin-name", "kong-metering"]
    schema = (EXAMPLES / "terraform-konnect" / "schema.lua").read_text(encoding="utf-8")
    assert schema == CliRunner().invoke(program, command).stdout


def test_the_example_for_konnect_plans(tmp_path: Path) -> None:
    run = initialised("terraform-konnect", tmp_path)
    run("validate")
    planned = run("plan", "-input=false", "-no-color", konnect_token="kpat_made_up")
    assert "5 to add, 0 to change, 0 to destroy" in planned


def test_the_example_for_an_admin_api_applies_and_meters(
    writable: Gateway, upstream: UpstreamProcess, collector: CollectorProcess, tmp_path: Path
) -> None:
    run = initialised("terraform-on-prem", tmp_path)
    address = urlsplit(upstream.url)
    variables: dict[str, Any] = {
        "admin_uri": writable.admin_url,
        "ingest_endpoint": collector.ingest_v3,
        "upstream": {"host": address.hostname, "port": address.port},
    }
    run("validate")
    run("plan", "-input=false", "-detailed-exitcode", status=_CHANGES, **variables)
    run("apply", "-input=false", "-auto-approve", **variables)
    try:
        run("plan", "-input=false", "-detailed-exitcode", status=_NO_CHANGES, **variables)
        billed = ("X-Tenant-Id", "acme")
        wait_until(lambda: get(writable.proxy_port, "/orders/1", billed) == 200, "it is applied", _PATIENCE)
        collector.client.wait_for_events(1)
        assert {event.subject for event in collector.client.events()} == {"acme"}
        state = (tmp_path / "terraform-on-prem" / "terraform.tfstate").read_text(encoding="utf-8")
        assert "{vault://env/om-token}" in state
    finally:
        run("destroy", "-input=false", "-auto-approve", **variables)
