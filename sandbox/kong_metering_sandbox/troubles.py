"""What can go wrong, as README's failure table has it, and the one curl each that brings it about in the sandbox.

Pure: addresses in, commands and words out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

INSTANCE = "metering"
SUBJECT_HEADER = "x-tenant-id"
REFUSED = "initech"
LOST = "umbrella"
SECRET = "om-token"  # noqa: S105 - its name
REFERENCE = f"{{vault://file/{SECRET}}}"
ROTATED = "om_rotated"

# The words of README's table.
_DOWN = "The endpoint is down, slow, or answers 408, 425, 429, 5xx"
_WRONG = "The token is wrong, the URL is wrong (401, 403, 404, 3xx, or 400 to everything)"
_ONE_EVENT = (
    "The endpoint fails because of one event, in whatever way (400, 413, 403 of a firewall, 500, a reset, a hang)"
)
_LOST = "OpenMeter answers 2xx and loses the events (its Kafka was down)"
_NO_ANSWER = "An answer does not come"
_KILLED = "The plugin server is killed, or runs out of memory"
_KONG = "Kong stops, reloads or crashes"
_DISK = "The disk is full, broken, or hangs"
_BYTES = "A client sends bytes that are not UTF-8, hundreds of headers, a blank or doubled header"
_ROTATED = "A token is rotated in a vault"
_BUG = "The plugin has a bug"
_UNUSABLE = "A configuration cannot be used"
_ROWS = (_DOWN, _WRONG, _ONE_EVENT, _LOST, _NO_ANSWER, _KILLED, _KONG, _DISK, _BYTES, _ROTATED, _BUG, _UNUSABLE)


@dataclass(frozen=True)
class Addresses:
    """Where everything is; URLs without a slash at the end. `control` is the sandbox's own.

    `verifying`: the command that reads back what was delivered.
    """

    proxy: str
    admin: str
    collector: str
    control: str
    verifying: str

    @property
    def ingest(self) -> str:
        """Where the events are to go."""
        return f"{self.collector}/api/v3/openmeter/events"


@dataclass(frozen=True)
class Trouble:
    """A row of README's table, by the words of its first column, and a way to see it.

    `curl` brings it about, and then one sees what `sees` says; `ending` ends it, `then` says what one sees after it.
    """

    row: str
    curl: str
    sees: str
    ending: str = ""
    then: str = ""


def enabling(at: Addresses) -> str:
    """Give the command that enables the plugin, with a token that is in a vault."""
    config = {
        "ingest_endpoint": at.ingest,
        "api_token": REFERENCE,
        "subject": {"look_up_value_in": "header", "field": SUBJECT_HEADER},
    }
    body = json.dumps({"name": "metering-and-billing", "instance_name": INSTANCE, "config": config})
    return f"curl -X POST {at.admin}/plugins/ -H 'Content-Type: application/json' -d '{body}'"


def asking(at: Addresses, subject: str = "acme") -> str:
    """Give the command that sends a request of a subject."""
    return f"curl -H '{SUBJECT_HEADER}: {subject}' {at.proxy}/orders/42"


def troubles(at: Addresses, *, writable: bool) -> list[Trouble]:
    """Tell all rows, those of README's order first; where the Admin API is not `writable`, without what needs it."""
    found = [*_of_the_endpoint(at), *_of_the_gateway(at)]
    if writable:
        found += _of_the_configuration(at)
    return sorted(found, key=lambda one: _ROWS.index(one.row))


def _of_the_endpoint(at: Addresses) -> Iterator[Trouble]:
    well = f"curl -X DELETE {at.collector}/faults"
    yield Trouble(
        _DOWN,
        _fault(at, '{"status": 503}'),
        f"events wait on disk: `waiting` in `curl {at.control}/status`",
        well,
        f"they arrive, in order: `curl {at.collector}/usage`",
    )
    yield Trouble(
        _ONE_EVENT,
        _fault(at, f'{{"match": {{"subject": "{REFUSED}"}}, "status": 400}}'),
        f"requests of {REFUSED} become `dead_letters` in `curl {at.control}/status`, all others arrive",
        well,
    )
    yield Trouble(
        _LOST,
        _fault(at, f'{{"lose": {{"subject": "{LOST}"}}}}'),
        f"requests of {LOST} are `delivered` in `curl {at.control}/status`, and not in `curl {at.collector}/usage`: "
        f"`{at.verifying}` finds them",
        well,
    )
    yield Trouble(
        _NO_ANSWER,
        _fault(at, '{"hang": 1, "store": true, "times": 1}'),
        f"the next event is sent again with its id: `duplicates` in `curl {at.collector}/stats`; /usage counts it once",
    )


def _of_the_configuration(at: Addresses) -> Iterator[Trouble]:
    yield Trouble(
        _WRONG,
        f"curl -X PUT {at.collector}/tokens -d '[\"om_other\"]'",
        f"events wait, and `curl {at.control}/log` says what to look at",
        _setting(at, "api_token", "om_other"),
        "the corrected token takes over at once, with all that waits",
    )
    yield Trouble(
        _WRONG,
        _setting(at, "ingest_endpoint", f"{at.collector}/wrong"),
        f"the same (404); what waits for the right URL is delivered: `curl {at.control}/status`",
        _setting(at, "ingest_endpoint", at.ingest),
        "the corrected URL takes over what waits for the wrong one, which never accepted an event",
    )
    yield Trouble(
        _ROTATED,
        f"curl -X PUT {at.control}/vault -d {ROTATED}",
        "the endpoint answers 401, until Kong is made to start instances with the new token: at the next request, a "
        "minute later at most",
    )
    yield Trouble(
        _UNUSABLE,
        _setting(at, "api_token", "{vault://file/nothing}"),
        f"requests go on; `unusable_configuration` in `curl {at.control}/status`, why in `curl {at.control}/log`",
        _setting(at, "api_token", REFERENCE),
        "requests are billed again",
    )


def _of_the_gateway(at: Addresses) -> Iterator[Trouble]:
    yield Trouble(
        _KILLED,
        f"curl -X POST {at.control}/server -d kill",
        f"the next request is served by the next one, and billed: `curl {at.control}/log` tells of the kill",
    )
    yield Trouble(
        _KONG,
        f"curl -X POST {at.control}/gateway -d restart",
        "it stops and starts (`-d reload`: it reloads); what was not delivered is delivered by the next process, once "
        "there is a request",
    )
    yield Trouble(
        _DISK,
        f"curl -X PUT {at.control}/disk -d broken",
        f"every call is an input/output error: requests go on, and `curl {at.control}/log` says it. The same with "
        "`-d read-only`, with `-d full` (seen when a new file is needed, ten seconds after the last event at the "
        "soonest), and with `-d hangs` (after five seconds)",
        f"curl -X PUT {at.control}/disk -d works",
        "it has recovered by itself: all that was asked for is delivered",
    )
    yield Trouble(
        _BYTES,
        f"printf '{SUBJECT_HEADER}: caf\\351\\n' | curl -H @- {at.proxy}/orders/42",
        f"café is billed, as for the right bytes: `curl {at.collector}/usage`",
    )
    yield Trouble(
        _BUG,
        f"curl -X PUT {at.control}/plugin -d bug",
        f"requests go on, unbilled; `curl {at.control}/log` says it once, `error` in `curl {at.control}/status` counts "
        "them",
        f"curl -X PUT {at.control}/plugin -d works",
        "requests are billed again",
    )


def _setting(at: Addresses, name: str, value: str) -> str:
    return f"curl -X PATCH {at.admin}/plugins/{INSTANCE} -d 'config.{name}={value}'"


def _fault(at: Addresses, rule: str) -> str:
    return f"curl -X POST {at.collector}/faults -d '[{rule}]'"
