"""What an endpoint's answer means, and what to do about it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kong_metering.commands.check.endpoint import KONNECT_PATH, is_konnect, own_path_remedy

if TYPE_CHECKING:
    from kong_metering.commands.testevent.post import Answer


@dataclass(frozen=True)
class Advice:
    """`outcome` is one word for programs; `means` and `remedy` are sentences."""

    outcome: str
    means: str
    remedy: str = ""


_UNREACHABLE = "can this machine, and the one that Kong runs on, reach it? Firewall, proxy, network policy, VPN?"
_BY_KIND = {
    "401": Advice(
        "token",
        "The endpoint does not know the token.",
        "is it a system account token of Konnect (spat_...) or the API key of your OpenMeter, whole, not expired, and "
        "of the same region?",
    ),
    "403": Advice(
        "forbidden",
        "The endpoint knows the token, and does not let it send events; or something before the endpoint refuses.",
        "give the account that the token belongs to the right to ingest events; is a firewall before the endpoint?",
    ),
    "407": Advice("proxy", "A proxy on the way wants a password.", "let Kong's machine reach the endpoint directly"),
    "408": Advice("busy", "The endpoint did not wait for the request.", "try again"),
    "429": Advice(
        "busy",
        "The endpoint takes no more for now; the token and the path are right, as far as one can tell.",
        "try again",
    ),
    "refused": Advice(
        "refused",
        "The endpoint was reached, and refused the event itself.",
        "is it the URL for events? " + own_path_remedy(),
    ),
    "gaierror": Advice(
        "name",
        "The name in the URL is not known here.",
        "is it spelt rightly? Does this machine have the name server that Kong's has? In a container, only names of "
        "its own network are known",
    ),
    "ConnectionRefusedError": Advice(
        "connection",
        "Nobody listens there: the connection was refused.",
        "does the endpoint run, and is the port right? In a container, localhost is the container itself",
    ),
    "SSLCertVerificationError": Advice(
        "certificate",
        "The endpoint's certificate is not trusted.",
        "for an authority of your own name its file with --ca-bundle, here and in the plugin server's start_cmd; else "
        "look whether name and date of the certificate are right",
    ),
    "ConnectionResetError": Advice("connection", "The connection was cut.", _UNREACHABLE),
    "BrokenPipeError": Advice("connection", "The connection was cut.", _UNREACHABLE),
    "RemoteDisconnected": Advice(
        "connection",
        "The endpoint ended the connection without an answer.",
        "is it an HTTP server? With TLS, write https",
    ),
    "BadStatusLine": Advice(
        "no-http", "What answers there does not speak HTTP.", "is the port right? With TLS, write https"
    ),
}
_TIMEOUT = Advice("timeout", "Nothing came back in time.", _UNREACHABLE)
_TLS = Advice(
    "tls",
    "TLS could not be agreed upon.",
    "does this port speak TLS? If not, it is an http URL; else look at the versions of TLS on both sides",
)
_NETWORK = Advice("connection", "The endpoint was not reached.", _UNREACHABLE)


def advice_for(answer: Answer, url: str) -> Advice:
    """Tell what an answer means."""
    if answer.is_accepted:
        return Advice("accepted", "Accepted.")
    if not answer.kind:
        return Advice(
            "no-acceptance",
            "The endpoint answered with success, but not as one that takes events does: a page for people, perhaps. "
            "The plugin would take its events for delivered, and they would be lost.",
            _right_path(url),
        )
    if answer.kind in _BY_KIND:
        return _BY_KIND[answer.kind]
    return _of_status(answer.kind, url) if answer.kind.isdigit() else _of_error(answer.kind)


def _of_status(status: str, url: str) -> Advice:
    if status in ("404", "405", "410"):
        return Advice("path", "There is nothing at this path that takes events.", _right_path(url))
    if status.startswith("3"):
        remedy = f"redirects are not followed: write the URL that it points to, if it is for events; {_right_path(url)}"
        return Advice("redirect", "The endpoint sends the plugin to another URL.", remedy)
    if status.startswith("5"):
        remedy = "look at the endpoint's own log; the plugin keeps events and tries again, so nothing would be lost"
        return Advice("endpoint", "The endpoint has trouble of its own.", remedy)
    return Advice("refused", f"The endpoint refuses the request with {status}.", _right_path(url))


def _of_error(kind: str) -> Advice:
    lower = kind.lower()
    return _TIMEOUT if "timeout" in lower else _TLS if "ssl" in lower else _NETWORK


def _right_path(url: str) -> str:
    host = urlsplit(url).hostname or ""
    if is_konnect(host):
        return f"with Konnect the URL is https://us.api.konghq.com{KONNECT_PATH}, with your region in the place of us"
    return own_path_remedy()
