"""A token that is rotated in a vault: Kong tells no plugin server of it, and what waits arrives all the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kong_metering_sandbox.gateways import wait_for
from tests.e2e.declarative import document, metering, service
from tests.e2e.traffic import get

if TYPE_CHECKING:
    from kong_metering_sandbox.collector.process import CollectorProcess
    from kong_metering_sandbox.gateways import Gateway
    from kong_metering_sandbox.upstream_process import UpstreamProcess

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# A real Kong looks once a minute whether a secret has changed.
_PATIENCE_SECONDS = 200.0
_PAUSE_SECONDS = 0.5
_VAULT = """
return {{
  VERSION = "1.0.0",
  get = function(conf, resource)
    local file = io.open("{directory}/" .. resource)
    if not file then return nil, "no such secret" end
    local secret = file:read("*a")
    file:close()
    return secret
  end,
}}
"""
_VAULT_SCHEMA = """
return { name = "file", fields = { { config = { type = "record", fields = { { ttl = { type = "number" } } } } } } }
"""


class Vault:
    """A vault whose secrets are files, for a real Kong and for the stand-in."""

    def __init__(self, directory: Path) -> None:
        self._secrets = directory / "secrets"
        self._lua = directory / "lua"
        module = self._lua / "kong" / "vaults" / "file"
        module.mkdir(parents=True)
        self._secrets.mkdir()
        (module / "init.lua").write_text(_VAULT.format(directory=self._secrets), encoding="utf-8")
        (module / "schema.lua").write_text(_VAULT_SCHEMA, encoding="utf-8")

    def put(self, secret: str) -> None:
        draft = self._secrets / "draft"
        draft.write_text(secret, encoding="utf-8")
        draft.replace(self._secrets / "om-token")

    @property
    def environment(self) -> tuple[str, str]:
        return "STANDIN_VAULT", str(self._secrets)

    @property
    def settings(self) -> dict[str, str]:
        return {"vaults": "bundled,file", "lua_package_path": f"{self._lua}/?.lua;{self._lua}/?/init.lua;;"}


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vault:
    vault = Vault(tmp_path)
    monkeypatch.setenv(*vault.environment)
    return vault


@pytest.fixture
def gateway(
    vault: Vault,
    gateway_class: type[Gateway],
    tmp_path: Path,
    upstream: UpstreamProcess,
    collector: CollectorProcess,
) -> Iterator[Gateway]:
    vault.put("om_token")
    plugin = metering(collector.ingest_v1, api_token="{vault://file/om-token?ttl=1}")
    declarative = document(service(upstream.url), plugins=[plugin])
    with gateway_class(tmp_path / "gateway", declarative, settings=vault.settings) as gateway:
        yield gateway


def test_events_that_wait_on_401_arrive_once_the_vault_has_another_token(
    gateway: Gateway, vault: Vault, collector: CollectorProcess
) -> None:
    sent = 0

    def ask() -> None:
        nonlocal sent
        sent += get(gateway.proxy_port, "/echo", ("X-Tenant-Id", "acme")) == 200

    for _ in range(10):
        ask()
    collector.client.wait_for_events(10)
    collector.client.set_tokens(["om_token_2"])
    vault.put("om_token_2")

    def has_arrived() -> bool:
        ask()
        time.sleep(_PAUSE_SECONDS)
        return collector.client.stats().unique > 10

    wait_for(has_arrived, "the new token is used", lambda: gateway.error_log[-3000:], _PATIENCE_SECONDS)
    collector.client.wait_for_events(sent)
    assert collector.client.stats().unique == sent
    assert "api_token comes from a vault" in gateway.error_log
    assert "of the env vault it reads a new one only when it is restarted" in gateway.error_log
    assert "om_token_2" not in gateway.error_log
