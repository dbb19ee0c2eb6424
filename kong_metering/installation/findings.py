"""What is to be found out of a Kong on this host: its program and version, prefix, kong.conf, and its workers' user.

Contract: runs `kong version`, reads files and `/proc`, and changes nothing.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kong_metering.errors import StartupError
from kong_metering.host.admission import user_name
from kong_metering.host.kongs import Kong, running_kongs
from kong_metering.installation.kongconf import settings_in, starts_ours

_PROGRAMS = ("kong", "/usr/local/bin/kong", "/usr/bin/kong")
# Where Kong looks, in this order.
_CONFS = (Path("/etc/kong/kong.conf"), Path("/etc/kong.conf"))
_USUAL_PREFIX = Path("/usr/local/kong")
_VERSION = re.compile(r"(Kong Enterprise )?(\d+)\.(\d+)[\d.]*")
_USER = re.compile(r"^\s*user\s+([^\s;]+)", re.MULTILINE)
_VERSION_SECONDS = 20.0


@dataclass(frozen=True)
class Version:
    """A version of Kong, as `kong version` tells it."""

    text: str
    number: tuple[int, int]
    is_enterprise: bool


@dataclass(frozen=True)
class Findings:
    """A Kong: its version if its program is here, its prefix, its kong.conf (which need not be there), whose it is.

    `user_source`: where the user of its workers is known from. `is_running`: whether its processes are to be seen.
    `starts_server`: whether it runs, and starts our plugin server itself.
    """

    version: Version | None
    prefix: Path
    conf: Path
    user: pwd.struct_passwd
    user_source: str
    is_running: bool
    starts_server: bool


def find_kong(prefix: Path | None, conf: Path | None, user: str | None) -> Findings:
    """Find out what is not given. Raises `StartupError` when there is no telling, with what to name."""
    kongs = running_kongs()
    conf = kong_conf(conf)
    settings = settings_in(_text_of(conf))
    prefix = (prefix or _prefix_of(kongs, settings.get("prefix"))).absolute()
    running = next((kong for kong in kongs if kong.prefix == prefix), None)
    name, source = (user, "--user") if user is not None else _worker_user(prefix, running, settings)
    entry = user_named(name, source)
    starts_server = running is not None and starts_ours(running.configuration() or "")
    return Findings(_version(), prefix, conf, entry, source, running is not None, starts_server)


def user_named(name: str, source: str) -> pwd.struct_passwd:
    """Return a user. Raises `StartupError` when there is none, with where the name is from."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise StartupError(f"there is no user {name} ({source}); name the user of Kong's workers with --user") from None


def kong_conf(given: Path | None) -> Path:
    """Return the configuration file that is given, or the one that Kong reads; it need not be there."""
    return given.absolute() if given else next((path for path in _CONFS if path.exists()), _CONFS[0])


def _prefix_of(kongs: list[Kong], configured: str | None) -> Path:
    if len(kongs) > 1:
        prefixes = ", ".join(str(kong.prefix) for kong in kongs)
        raise StartupError(f"several Kongs run here: name the prefix of one with --kong-prefix ({prefixes})")
    if kongs:
        return kongs[0].prefix
    return Path(configured) if configured else _USUAL_PREFIX


def _worker_user(prefix: Path, running: Kong | None, settings: dict[str, str]) -> tuple[str, str]:
    """Return the name of the workers' user, and where it is known from."""
    if running is not None and running.workers:
        return running.workers[0].party.name, f"process {running.workers[0].pid}, a worker of Kong's"
    for source in ("nginx_user", "nginx_main_user"):
        if settings.get(source):
            return settings[source].split()[0], f"{source} in kong.conf"
    if (found := _USER.search(_text_of(prefix / "nginx.conf"))) is not None:
        return found[1], f"{prefix / 'nginx.conf'}"
    with suppress(OSError):
        owner = prefix.stat().st_uid
        if owner != 0:
            # Kong that is not root's has workers of its own user.
            return user_name(owner), f"the owner of {prefix}"
    for name in ("kong", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name, "Kong's default"
    raise StartupError("name the user of Kong's workers with --user")


def _version() -> Version | None:
    program = next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - Kong's own program
            [program, "version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(done.stdout)
    return (
        None
        if match is None
        else Version(match[0] if match[1] else f"Kong {match[0]}", (int(match[2]), int(match[3])), match[1] is not None)
    )


def _text_of(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    return ""


def can_become(user: pwd.struct_passwd) -> bool:
    """Return whether files can be made that are this user's."""
    return os.geteuid() in (0, user.pw_uid)
