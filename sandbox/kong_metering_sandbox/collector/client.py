"""Python's side of the collector's query and control paths."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import requests

from kong_metering_sandbox.collector.faults import FaultRule
from kong_metering_sandbox.collector.records import IngestRequest, Stats, StoredEvent, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

_TIMEOUT_SECONDS: Final = 10
_POLL_SECONDS: Final = 0.02
_PAGE: Final = 1_000


class CollectorClient:
    """Asks a running collector, and tells it how to behave.

    Every method raises ``requests.RequestException`` when the collector cannot be reached or refuses.
    Not for use from several threads at once: give each a client of its own.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy from the environment does not lead to this machine's loopback

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept open between calls."""
        self._session.close()

    def usage(self, event_type: str | None = None) -> list[Usage]:
        """Return what each subject used, for one type of event or for each, ordered by subject and type."""
        rows = self._get("/usage", type=event_type)["usage"]
        return [Usage(**row) for row in rows]

    def events(
        self,
        *,
        subject: str | None = None,
        event_type: str | None = None,
        source: str | None = None,
    ) -> list[StoredEvent]:
        """Return all stored events that fit, in order of arrival."""
        found: list[StoredEvent] = []
        while True:
            after = found[-1].seq if found else 0
            rows = self._get("/events", subject=subject, type=event_type, source=source, after=after, limit=_PAGE)[
                "events"
            ]
            found.extend(StoredEvent(**row) for row in rows)
            if len(rows) < _PAGE:
                return found

    def stats(self) -> Stats:
        """Return the totals."""
        return Stats(**self._get("/stats"))

    def requests(self, limit: int = 1_000) -> list[IngestRequest]:
        """Return the newest ingest requests, in order of arrival."""
        return [IngestRequest(**row) for row in self._get("/requests", limit=limit)["requests"]]

    def wait_for_events(self, number: int, timeout: float = 30.0) -> Stats:
        """Wait until at least so many unique events are stored, at most ``timeout`` seconds.

        Raises ``TimeoutError`` with the totals at that time when they do not come.
        """
        deadline = time.monotonic() + timeout
        while (stats := self.stats()).unique < number:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{stats.unique} of {number} events after {timeout} s: {stats}")
            time.sleep(_POLL_SECONDS)
        return stats

    def faults(self, *rules: FaultRule) -> None:
        """Put these rules in force, in place of all others."""
        self._send("POST", "/faults", [rule.model_dump(exclude_unset=True) for rule in rules])

    def faults_left(self) -> list[FaultRule]:
        """Return the rules in force; one whose ``times`` are used up is no longer among them."""
        return [FaultRule(**row) for row in self._get("/faults")["faults"]]

    def clear_faults(self) -> None:
        """Remove all rules."""
        self._send("DELETE", "/faults")

    def set_reading(self, **settings: object) -> None:
        """Change how reading back behaves: the members of ``listing.Reading``; what is left out is as by default."""
        self._send("PUT", "/reading", settings)

    def add_customer(self, key: str, *subjects: str) -> None:
        """Make a customer with this key and these subjects, as OpenMeter's API makes one."""
        document = {"key": key, "name": key, "usage_attribution": {"subject_keys": list(subjects)}}
        self._send("POST", "/api/v3/openmeter/customers", document)

    def set_tokens(self, tokens: Iterable[str]) -> None:
        """Accept these bearer tokens and no others; with none, accept every request."""
        self._send("PUT", "/tokens", list(tokens))

    def reset(self) -> None:
        """Forget events, requests and totals. Faults and tokens stay."""
        self._send("DELETE", "/events")

    def _get(self, path: str, **query: str | int | None) -> dict[str, Any]:
        response = self._session.get(self._url + path, params=query, timeout=_TIMEOUT_SECONDS)
        document: dict[str, Any] = _checked(response).json()
        return document

    def _send(self, method: str, path: str, document: object = None) -> None:
        response = self._session.request(method, self._url + path, json=document, timeout=_TIMEOUT_SECONDS)
        _checked(response)


def _checked(response: requests.Response) -> requests.Response:
    if not response.ok:
        raise requests.HTTPError(f"{response.status_code} from {response.url}: {response.text}", response=response)
    return response
