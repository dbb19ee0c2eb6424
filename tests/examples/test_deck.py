"""The examples for decK, applied by decK to the stand-in, or with `--gateway=kong` to a real Kong with a database."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
import yaml

from tests.docs.shell import blocks, simple_commands
from tests.e2e.declarative import consumer, route, service
from tests.e2e.traffic import get
from tests.examples.conftest import TOKEN, needs
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess

KONNECT = "https://us.api.konghq.com/v3/openmeter/events"
KEY = "key-of-alice"
NAMES = {
    "global": ("", ""),
    "service": ("serviceName|Id", "first"),
    "route": ("routeName|Id", "one"),
    "consumer": ("consumerName|Id", "alice"),
}
# What a change takes to reach all of Kong's workers over its database.
_PATIENCE = 90.0


class Deck:
    """decK, as it is called for one gateway."""

    def __init__(self, program: str, gateway: Gateway, environment: Mapping[str, str]) -> None:
        self._program = program
        self._gateway = gateway
        self._environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment}

    def __call__(self, *arguments: str | Path, status: int = 0) -> str:
        """Run it, look at its exit status, and give what it printed."""
        flags = ["--analytics=false", "--kong-addr", self._gateway.admin_url]
        done = subprocess.run(  # noqa: PLW1510 - the status is looked at below
            [self._program, *map(str, arguments), *flags],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def program() -> str:
    return needs("deck")


@pytest.fixture
def deck(program: str, writable: Gateway, upstream: UpstreamProcess, collector: CollectorProcess) -> Iterator[Deck]:
    """Give decK for a gateway that is empty again afterwards."""
    environment = {
        "DECK_UPSTREAM_URL": upstream.url,
        "DECK_MODEL_URL": f"{upstream.url}/v1/chat/completions",
        "DECK_ALICE_KEY": KEY,
        "DECK_INGEST_ENDPOINT": collector.ingest_v3,
        "DECK_OTHER_INGEST_ENDPOINT": collector.ingest_v1,
        "DECK_AUTH_TOKEN": TOKEN,
        "DECK_SUBJECT_HEADER": "x-customer-id",
    }
    deck = Deck(program, writable, environment)
    yield deck
    deck("gateway", "reset", "--force")


def documented(repository: Path) -> list[list[str]]:
    """Give what the page has decK called with, in a checkout."""
    commands = [command for block in blocks(repository / "docs/enabling.md", repository) for command in block.commands]
    calls = [words for command in commands for words in simple_commands(command.text) if words[0] == "deck"]
    return [[str(repository / word) if word.startswith("examples/") else word for word in call[1:]] for call in calls]


def test_the_complete_file_applies_to_an_empty_gateway_and_meters(
    deck: Deck, writable: Gateway, collector: CollectorProcess, repository: Path, tmp_path: Path
) -> None:
    example = repository / "examples" / "deck" / "kong.yaml"
    deck("gateway", "validate", example)
    apply, diff = documented(repository)
    assert "Created: 6" in deck(*apply)
    assert "Created: 0" in deck(*diff)
    assert "Created: 0" in deck("gateway", "apply", example)
    deck("gateway", "diff", "--non-zero-exit-code", example)
    dump = tmp_path / "dump.yaml"
    deck("gateway", "dump", "--output-file", dump, "--select-tag", "metered")
    assert TOKEN not in dump.read_text(encoding="utf-8")
    deck("gateway", "diff", "--non-zero-exit-code", "--select-tag", "metered", dump)
    wait_until(lambda: get(writable.proxy_port, "/orders/1", ("apikey", KEY)) == 200, "it is applied", _PATIENCE)
    collector.client.wait_for_events(1)
    assert {event.subject for event in collector.client.events()} == {"alice"}
    assert not any(one.status == 401 for one in collector.client.requests())


def test_applying_leaves_everything_else_alone(
    deck: Deck, writable: Gateway, upstream: UpstreamProcess, repository: Path
) -> None:
    requests.put(f"{writable.admin_url}/services/others", json={"url": upstream.url}, timeout=20).raise_for_status()
    deck("gateway", "apply", repository / "examples" / "deck" / "kong.yaml")
    assert requests.get(f"{writable.admin_url}/services/others", timeout=20).status_code == 200


@pytest.mark.parametrize("scope", NAMES)
def test_the_missions_examples_apply(  # noqa: PLR0913, PLR0917 - fixtures
    scope: str, deck: Deck, writable: Gateway, upstream: UpstreamProcess, repository: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.yaml"
    first = service(upstream.url, "first", route("one"))
    base.write_text(
        json.dumps({"_format_version": "3.0", "services": [first], "consumers": [consumer("alice")]}), encoding="utf-8"
    )
    deck("gateway", "apply", base)
    text = (repository / "examples" / "deck" / f"{scope}.yaml").read_text(encoding="utf-8")
    example = tmp_path / "example.yaml"
    example.write_text(text.replace(*NAMES[scope]) if NAMES[scope][0] else text, encoding="utf-8")
    assert "Created: 1" in deck("gateway", "apply", example)
    deck("gateway", "dump", "--output-file", tmp_path / "dump.yaml")
    deck("gateway", "diff", "--non-zero-exit-code", tmp_path / "dump.yaml")
    (plugin,) = requests.get(f"{writable.admin_url}/plugins", timeout=20).json()["data"]
    assert plugin["config"]["subject"] == {"look_up_value_in": "header", "field": "x-customer-id"}
    assert [name for name in ("service", "route", "consumer") if plugin[name]] == ([scope] if scope in plugin else [])


def test_a_file_is_rendered_for_a_gateway_without_a_database(deck: Deck, repository: Path) -> None:
    example = repository / "examples" / "deck" / "global.yaml"
    (plugin,) = yaml.safe_load(deck("file", "render", "--populate-env-vars", example))["plugins"]
    assert plugin["config"]["api_token"] == TOKEN


@pytest.mark.parametrize(
    "name",
    [
        "ai-tokens",
        "allowed-status-codes",
        "api-requests-by-consumer",
        "department-attributes",
        "several-endpoints",
        "tenant-header",
    ],
)
def test_the_ready_configurations_apply(name: str, deck: Deck, repository: Path) -> None:
    example = repository / "examples" / "configurations" / f"{name}.yaml"
    deck("gateway", "validate", example)
    deck("gateway", "apply", example)
    deck("gateway", "diff", "--non-zero-exit-code", example)
