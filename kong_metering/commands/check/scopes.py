"""What only shows beside other plugin entities: doubled ones, and who authenticates the subject. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kong_metering.commands.check.entities import Origin
from kong_metering.commands.check.findings import Level, told

if TYPE_CHECKING:
    from kong_metering.commands.check.entities import Declared, Plugin, Scope
    from kong_metering.commands.check.findings import Finding

_AUTHENTICATION = frozenset(
    {
        "application-registration",
        "basic-auth",
        "header-cert-auth",
        "hmac-auth",
        "jwt",
        "jwt-signer",
        "key-auth",
        "key-auth-enc",
        "konnect-application-auth",
        "ldap-auth",
        "ldap-auth-advanced",
        "mtls-auth",
        "oauth2",
        "oauth2-introspection",
        "openid-connect",
        "saml",
        "session",
        "vault-auth",
    }
)
_CLAIMED = ("header", "query")


def scope_findings(declared: Declared) -> Iterator[Finding]:
    """Find what is wrong between the plugins of a document, or of a file of manifests."""
    ours = [plugin for plugin in declared.plugins if plugin.is_ours]
    yield from _doubled(ours)
    others = [plugin for plugin in declared.plugins if plugin.name in _AUTHENTICATION and plugin.is_enabled]
    for plugin in ours:
        yield from _unauthenticated(plugin, others, declared)


def _doubled(ours: Sequence[Plugin]) -> Iterator[Finding]:
    seen: dict[tuple[tuple[str, str], ...], Plugin] = {}
    for plugin in ours:
        if plugin.origin is Origin.ADMIN_API or plugin.scope.kinds == ("object",):
            continue
        first = seen.setdefault(plugin.scope.names, plugin)
        if first is not plugin:
            where = told(first.path) or first.label
            yield plugin.find(
                Level.ERROR,
                "doubled-plugin",
                plugin.path,
                f"{where} is the same plugin for the same scope ({plugin.scope.told}): Kong takes one for each scope",
                "remove one, or give it a scope of its own",
            )


def _unauthenticated(plugin: Plugin, others: Sequence[Plugin], declared: Declared) -> Iterator[Finding]:
    place = _looked_up(plugin)
    if place is None or "consumer" in plugin.scope.kinds or _is_authenticated(plugin.scope, others, declared):
        return
    path = plugin.path_of(("subject", "look_up_value_in"))
    is_whole = plugin.origin is Origin.DECLARATIVE
    if place in _CLAIMED:
        what = "header" if place == "header" else "query argument"
        yield plugin.find(
            Level.WARNING if is_whole else Level.NOTE,
            "claimed-subject",
            path,
            f"clients choose this {what} themselves, and no authentication plugin "
            + ("runs on the same requests" if is_whole else "is seen here")
            + ": anybody can have somebody else billed",
            "add one such as key-auth and bill by consumer, or let only a proxy of yours, which sets the "
            f"{what}, reach Kong (docs/security.md)",
        )
    elif place == "consumer" and is_whole:
        yield plugin.find(
            Level.WARNING,
            "no-consumer",
            path,
            "without an authentication plugin on the same requests no request has a consumer, and nothing is billed",
            "add one such as key-auth, or set look_up_value_in and field to what your requests have",
        )


def _looked_up(plugin: Plugin) -> str | None:
    if not isinstance(plugin.config, Mapping):
        return None
    subject = plugin.config.get("subject", {})
    if not isinstance(subject, Mapping):
        return None
    place = subject.get("look_up_value_in")
    return place if isinstance(place, str) else "consumer" if place is None else None


def _is_authenticated(scope: Scope, others: Sequence[Plugin], declared: Declared) -> bool:
    """Return whether all requests of a scope meet an authentication plugin, as far as the document tells."""
    if any(set(other.scope.names) <= set(scope.names) for other in others):
        return True
    if scope.service is not None and any(other.scope.names == (("service", scope.service),) for other in others):
        return True
    services, routes = set(dict(scope.names).values()), declared.routes
    inside = [(name, service) for name, service in routes if not scope.names or service in services]
    if "route" in scope.kinds or not inside:
        return False
    scopes = {other.scope.names for other in others}
    return all((("route", name),) in scopes or (("service", service),) in scopes for name, service in inside)
