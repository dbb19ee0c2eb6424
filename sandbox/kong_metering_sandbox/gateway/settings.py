"""kong.conf: which of its keys the stand-in understands, and what they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .wire import HeaderLimits

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENVIRONMENT_PREFIX = "KONG_"
_COMMENT = re.compile(r"(?<!\\)#.*")
_SIZES = {"": 1, "k": 1024, "m": 1024 * 1024}
_BUNDLED = ("key-auth", "rate-limiting", "ai-proxy", "request-transformer", "request-termination")


class SettingsError(Exception):
    """The configuration cannot be used; the text names the key and what is wrong with it."""


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 lets the system choose."""

    host: str
    port: int


@dataclass(frozen=True)
class PluginServerSettings:
    """One of `pluginserver_names`: its socket and its two commands; no `start_cmd` means that others run it."""

    name: str
    socket: Path
    start_cmd: str | None
    query_cmd: str


@dataclass(frozen=True)
class Settings:
    """Everything that kong.conf and the `KONG_*` environment variables say."""

    prefix: Path
    proxy_listen: Address | None
    admin_listen: Address | None
    workers: int
    database: str
    declarative_config: Path | None
    plugins: tuple[str, ...]
    pluginservers: tuple[PluginServerSettings, ...]
    header_limits: HeaderLimits = field(default_factory=HeaderLimits)
    reload_linger: float = 9.5
    """Seconds that the old plugin server lives on after a reload (`standin_reload_linger`)."""
    socket_pool_size: int = 256
    """How many idle connections to a plugin server each worker keeps (`lua_socket_pool_size`)."""
    max_running_timers: int = 4096
    """How many log phases run at once in a worker; Kong's template fixes it (`standin_max_running_timers`)."""
    tells_request_id: bool = True
    """Whether there is `$kong_request_id`, which Kongs before 3.5 do not have (`standin_kong_request_id`)."""
    log_phases: Path | None = None
    """Where to note what became of each log phase (`standin_log_phases`)."""

    @property
    def db_less(self) -> bool:
        """Whether the Admin API is read-only."""
        return self.database == "off"


def load_settings(conf: Path | None, environment: Mapping[str, str], prefix: Path | None = None) -> Settings:
    """Read kong.conf; environment variables override it, and `prefix` (the command line) overrides both.

    Raises:
        SettingsError: the file cannot be read, or a value makes no sense.

    """
    values = {} if conf is None else _read(conf)
    for name, value in environment.items():
        if name.startswith(_ENVIRONMENT_PREFIX):
            values[name.removeprefix(_ENVIRONMENT_PREFIX).lower()] = value
    return _settings(values, prefix or Path(values.get("prefix", "/usr/local/kong")))


def _read(conf: Path) -> dict[str, str]:
    try:
        lines = conf.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"could not open config file at: {conf} ({error.strerror})") from error
    values = {}
    for line in lines:
        key, equals, value = _COMMENT.sub("", line).partition("=")
        if equals:
            values[key.strip().lower()] = value.strip().replace("\\#", "#").strip("'\"")
    return {key: value for key, value in values.items() if value}


def _settings(values: Mapping[str, str], prefix: Path) -> Settings:
    database = values.get("database", "off")
    if database not in ("off", "memory"):
        raise SettingsError(f"database has an invalid value: '{database}' (off, memory)")
    config = values.get("declarative_config")
    return Settings(
        prefix=prefix.absolute(),
        proxy_listen=_address(values, "proxy_listen", "0.0.0.0:8000"),
        admin_listen=_address(values, "admin_listen", "127.0.0.1:8001"),
        workers=_workers(values.get("nginx_worker_processes", "2")),
        database=database,
        declarative_config=Path(config).absolute() if config else None,
        plugins=_plugins(values.get("plugins", "bundled")),
        pluginservers=tuple(
            _pluginserver(values, name, prefix.absolute()) for name in _names(values.get("pluginserver_names", ""))
        ),
        header_limits=_header_limits(values),
        reload_linger=float(values.get("standin_reload_linger", "9.5")),
        socket_pool_size=_number(values, "lua_socket_pool_size", "256"),
        max_running_timers=_number(values, "standin_max_running_timers", "4096"),
        tells_request_id=values.get("standin_kong_request_id", "on") != "off",
        log_phases=Path(values["standin_log_phases"]) if "standin_log_phases" in values else None,
    )


def _number(values: Mapping[str, str], key: str, default: str) -> int:
    text = values.get(key, default)
    if not text.isdigit() or not int(text):
        raise SettingsError(f"{key} must be a positive number, not '{text}'")
    return int(text)


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"[,\s]+", text) if name and name != "off"]


def _plugins(text: str) -> tuple[str, ...]:
    names: list[str] = []
    for name in _names(text):
        names.extend(_BUNDLED if name == "bundled" else [name])
    return tuple(dict.fromkeys(names))


def _workers(text: str) -> int:
    if text == "auto":
        return 2
    if not text.isdigit() or not int(text):
        raise SettingsError(f"nginx_worker_processes must be a positive number or 'auto', not '{text}'")
    return int(text)


def _address(values: Mapping[str, str], key: str, default: str) -> Address | None:
    """Return the first listener without TLS; what else there is is left out."""
    text = values.get(key, default)
    for entry in text.split(","):
        words = entry.split()
        if not words or words[0] == "off":
            return None
        host, colon, port = words[0].rpartition(":")
        if not colon or not port.isdigit():
            raise SettingsError(f"{key} must be of form: [off] | <ip>:<port> [...], not '{text}'")
        if "ssl" not in words[1:]:
            return Address(host.strip("[]"), int(port))
    return None


def _pluginserver(values: Mapping[str, str], name: str, prefix: Path) -> PluginServerSettings:
    key = f"pluginserver_{name.replace('-', '_')}"
    program = f"/usr/local/bin/{name}"
    return PluginServerSettings(
        name=name,
        socket=Path(values.get(f"{key}_socket", str(prefix / f"{name}.socket"))),
        start_cmd=values.get(f"{key}_start_cmd", program if Path(program).exists() else None),
        query_cmd=values.get(f"{key}_query_cmd", f"{program} -dump"),
    )


def _header_limits(values: Mapping[str, str]) -> HeaderLimits:
    for key in ("nginx_proxy_large_client_header_buffers", "nginx_http_large_client_header_buffers"):
        found = re.fullmatch(r"(\d+)\s+(\d+)([km]?)", values.get(key, "").lower())
        if found:
            return HeaderLimits(int(found[1]), int(found[2]) * _SIZES[found[3]])
        if key in values:
            raise SettingsError(f"{key} must be a number and a size, not '{values[key]}'")
    return HeaderLimits()
