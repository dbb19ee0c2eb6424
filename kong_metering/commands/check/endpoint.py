"""What is valid in the endpoint, the token and the times of a plugin, and surely not meant. Pure.

No text holds a token, or anything of a URL but its host.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from kong_metering.commands.check.entities import Origin
from kong_metering.commands.check.findings import Level
from kong_metering.log import printable
from kong_metering.plurals import form

if TYPE_CHECKING:
    from kong_metering.commands.check.findings import Finding
    from kong_metering.commands.check.view import Settings

KONNECT_PATH = "/v3/openmeter/events"
OWN_PATHS = ("/api/v1/events", "/api/v3/openmeter/events")
_KONNECT = re.compile(r"(?:[a-z0-9-]+\.)*konghq\.(?:com|tech)")
_KONNECT_API = re.compile(r"[a-z]{2}\.api\.konghq\.(?:com|tech)")
_BEARER = re.compile(r"\s*bearer(?:\s|$)", re.IGNORECASE)
_LONGEST_WAIT = 60
_SHORTEST_MS = 500


def token(settings: Settings) -> Iterator[Finding]:
    """Look at the token."""
    text, path = settings.text("api_token"), ("api_token",)
    if text is None or not text.strip():
        return
    word = text.strip()
    if text.strip(" \t") != word:
        yield settings.find(
            Level.WARNING,
            "token-line-break",
            path,
            "there is a line break around the token; the plugin takes it off, other tools do not",
            "in YAML write it in one line, without | and >; make a Secret or file of it with `printf %s`, not echo",
        )
    elif text != word:
        problem = "there are blanks around the token; the plugin takes them off, other tools do not"
        yield settings.find(Level.WARNING, "token-blanks", path, problem, "take them off")
    if _BEARER.match(word):
        problem = "the word Bearer stands before the token; the plugin writes it itself, and takes this one off"
        yield settings.find(Level.WARNING, "token-bearer", path, problem, "write the token alone")
    elif " " in word:
        problem = "there is a blank inside the token, which no token of Konnect or OpenMeter has"
        yield settings.find(Level.WARNING, "token-blanks", path, problem, "is it one token, and all of it?")
    if settings.plugin.origin is Origin.KUBERNETES:
        problem = "the token stands in the manifest, for all who may read it"
        remedy = "put it into a Secret, and use configPatches with `path: /api_token`"
        yield settings.find(Level.NOTE, "token-in-clear", path, problem, remedy)


def address(settings: Settings) -> Iterator[Finding]:
    """Look at the URL."""
    url = _url(settings)
    if url is None:
        return
    path, host = ("ingest_endpoint",), url.hostname or ""
    if url.scheme == "http" and not _is_loopback(host):
        yield settings.find(
            Level.WARNING,
            "http-with-token",
            path,
            "the token and all events go over the network as anybody on the way can read them: it is http",
            "write https, unless nobody else is on the network between Kong and the endpoint",
        )
    if url.username is not None:
        yield settings.find(
            Level.WARNING,
            "url-with-password",
            path,
            "user and password in the URL are not sent: the endpoint gets api_token as Bearer",
            "take them out, and use a token",
        )
    if url.scheme == "https" and settings.value("ssl_verify") is False:
        yield settings.find(
            Level.WARNING,
            "not-verified",
            ("ssl_verify",),
            "nobody verifies who the endpoint is: whoever can redirect the traffic gets the token",
            "leave ssl_verify out, and name your own authority with --ca-bundle in the plugin server's start_cmd",
        )
    yield from _path_findings(settings, url)


def _path_findings(settings: Settings, url: SplitResult) -> Iterator[Finding]:
    path, host = ("ingest_endpoint",), (url.hostname or "").lower()
    if is_konnect(host):
        if not _KONNECT_API.fullmatch(host):
            problem = f"{printable(host, 80)} is not Konnect's API for a region"
            remedy = f"write https://us.api.konghq.com{KONNECT_PATH}, with your region in the place of us"
            yield settings.find(Level.ERROR, "endpoint-host", path, problem, remedy)
        if url.path != KONNECT_PATH:
            problem, remedy = (
                "Konnect takes no events at this path, and answers 404",
                f"write https://{printable(host, 80)}{KONNECT_PATH}",
            )
            yield settings.find(Level.ERROR, "endpoint-path", path, problem, remedy)
    elif url.path.rstrip("/") != url.path or not url.path:
        what = "ends with a slash: OpenMeter answers 404" if url.path.strip("/") else "has no path"
        yield settings.find(Level.ERROR, "endpoint-path", path, f"the URL {what}", own_path_remedy())
    elif not url.path.endswith(OWN_PATHS):
        level = Level.NOTE if url.path.endswith("/events") else Level.WARNING
        yield settings.find(level, "endpoint-path", path, "its path is none that an OpenMeter has", own_path_remedy())


def own_path_remedy() -> str:
    """Tell the paths of the endpoints that there are."""
    first, second = OWN_PATHS
    return f"an OpenMeter of yours takes events at {first} or {second}, Konnect at {KONNECT_PATH}; no slash at the end"


def is_konnect(host: str) -> bool:
    """Return whether a host is one of Konnect's."""
    return _KONNECT.fullmatch(host.lower()) is not None


def _url(settings: Settings) -> SplitResult | None:
    text = settings.text("ingest_endpoint")
    try:
        url = urlsplit(text or "")
        is_usable = url.scheme in ("http", "https") and bool(url.hostname)
    except ValueError:
        return None
    return url if is_usable else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def times(settings: Settings) -> Iterator[Finding]:
    """Find seconds where milliseconds are meant, and the other way round."""
    for name in ("timeout", "keepalive"):
        value = settings.number(name)
        if value is not None and 0 < value < _SHORTEST_MS:
            yield settings.find(
                Level.WARNING,
                "milliseconds",
                (name,),
                f"{value:g} {form(value, 'millisecond')} is next to no time",
                f"it is in milliseconds: {form(value, 'is', 'are')} {value:g} {form(value, 'second')} meant, "
                f"{value * 1000:.0f}?",
            )
        elif value is not None and value < 0:
            problem, remedy = f"{value:g} is no length of time", "leave it out for the default"
            yield settings.find(Level.WARNING, "milliseconds", (name,), problem, remedy)
    value = settings.number("queue", "max_coalescing_delay")
    if value is not None and value > _LONGEST_WAIT:
        problem = f"each event may wait {value:g} seconds for others"
        remedy = f"it is in seconds: are {value:g} milliseconds meant, {value / 1000:g}?"
        yield settings.find(Level.WARNING, "seconds", ("queue", "max_coalescing_delay"), problem, remedy)
