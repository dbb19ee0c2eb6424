"""Which endpoint, and with which token: from the options, a configuration, the environment or the terminal.

Contract: a token comes from a file, stdin, a configuration, a variable or a prompt; it is in no argument and no error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kong_metering.commands.check.checking import plugins_in
from kong_metering.commands.check.files import read_file
from kong_metering.commands.check.findings import told
from kong_metering.commands.check.violations import is_reference
from kong_metering.commands.testevent.post import Target
from kong_metering.commands.tokens import chosen_token, read_token
from kong_metering.commands.words import shown

if TYPE_CHECKING:
    from kong_metering.commands.check.entities import Plugin

_ENV_VAULT = re.compile(r"\{vault://env/([^/{}?]+)\}")
_TIMEOUT_MS = 10_000


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What the command line says of the endpoint and the token; `timeout` in seconds."""

    file: str | None
    plugin: str | None
    plugin_name: str
    ingest_endpoint: str | None
    token_file: Path | None
    ca_bundle: Path | None
    insecure: bool
    timeout: float | None


def target_of(options: TargetOptions, environment: Mapping[str, str]) -> Target:
    """Put together where the event goes. Raises `click.UsageError` if that is not clear."""
    config = _config(options, environment)
    url = options.ingest_endpoint or _known(config.get("ingest_endpoint"), environment)
    if url is None:
        where = "the configuration does not say it, or not here" if options.file else "no FILE was given"
        raise click.UsageError(f"name the endpoint with --ingest-endpoint URL: {where}")
    timeout = config.get("timeout")
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    return Target(
        url,
        _token(options, config, environment),
        options.timeout * 1000 if options.timeout else timeout if is_number and timeout else _TIMEOUT_MS,
        not options.insecure and config.get("ssl_verify") is not False,
        str(options.ca_bundle) if options.ca_bundle else None,
    )


def _config(options: TargetOptions, environment: Mapping[str, str]) -> Mapping[str, Any]:
    if options.file is None:
        return {}
    plugin = _chosen(plugins_in(read_file(options.file), environment, options.plugin_name), options)
    return plugin.config if isinstance(plugin.config, Mapping) else {}


def _chosen(plugins: Sequence[Plugin], options: TargetOptions) -> Plugin:
    """Choose the plugin that is meant."""
    ours = [plugin for plugin in plugins if plugin.is_ours]
    names = {_place(plugin): plugin for plugin in ours}
    if not names:
        raise click.UsageError(_none(plugins, options))
    if options.plugin is not None:
        if options.plugin not in names:
            raise click.UsageError(f"--plugin can be: {', '.join(names)}")
        return names[options.plugin]
    if len({_settings_of(plugin) for plugin in ours}) > 1:
        raise click.UsageError(f"there are several metering plugins; choose one with --plugin: {', '.join(names)}")
    return ours[0]


def _none(alike: Sequence[Plugin], options: TargetOptions) -> str:
    """Tell that there is no metering plugin, and which plugins look like one."""
    problem = f"no plugin {options.plugin_name} is in {shown(options.file or '')}"
    if not alike:
        return f"{problem}; `kong-metering check` says more"
    names = dict.fromkeys(f"--plugin-name {shown(plugin.name)}" for plugin in alike)
    return f"{problem}; is it {' or '.join(names)}?"


def _place(plugin: Plugin) -> str:
    return plugin.label or told(plugin.path) or "config"


def _settings_of(plugin: Plugin) -> str:
    """Tell one endpoint with its token from another."""
    config = plugin.config if isinstance(plugin.config, Mapping) else {}
    return repr([config.get(name) for name in ("ingest_endpoint", "api_token", "ssl_verify", "timeout")])


def _token(options: TargetOptions, config: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    if options.token_file is not None:
        return read_token(options.token_file)
    return _known(config.get("api_token"), environment) or chosen_token(None, environment)


def _known(value: Any, environment: Mapping[str, str]) -> str | None:
    """Return a setting that is a text; of vaults, only the environment can be looked into, as Kong does."""
    if not isinstance(value, str) or not value:
        return None
    if not is_reference(value):
        return value
    match = _ENV_VAULT.fullmatch(value)
    return environment.get(match[1].upper().replace("-", "_")) if match else None
