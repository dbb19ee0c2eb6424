"""What the collector received, in SQLite: every event once, every request, and totals.

One connection, used from one thread. Each request is one transaction, so that its events, its log entry and the
totals always agree. With a file, committed rows survive the end of the process.
"""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import orjson

from kong_metering_sandbox.collector.records import Customer, IngestRequest, Stats, StoredEvent, Usage
from kong_metering_sandbox.collector.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    source TEXT NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL,
    time TEXT, data TEXT, attributes TEXT NOT NULL,
    received_at REAL NOT NULL, token TEXT, path TEXT NOT NULL,
    UNIQUE (source, id)
);
CREATE INDEX IF NOT EXISTS events_by_id ON events (id);
CREATE TABLE IF NOT EXISTS requests (
    seq INTEGER PRIMARY KEY,
    received_at REAL NOT NULL, path TEXT NOT NULL, content_type TEXT, events INTEGER, status INTEGER, connection TEXT
);
CREATE TABLE IF NOT EXISTS totals (
    kind TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL, PRIMARY KEY (kind, name)
);
CREATE TABLE IF NOT EXISTS customers (id TEXT PRIMARY KEY, key TEXT NOT NULL, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attributions (subject TEXT PRIMARY KEY, customer TEXT NOT NULL, is_key INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (digest TEXT NOT NULL);
"""
_INSERT_EVENT: Final = """
INSERT INTO events (source, id, type, subject, time, data, attributes, received_at, token, path)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
_SAME_EVENT: Final = """
SELECT 1 FROM events
WHERE source = ? AND id = ? AND type = ? AND subject = ? AND time IS ? AND data IS ? AND attributes = ?
"""
_INSERT_REQUEST: Final = """
INSERT INTO requests (received_at, path, content_type, events, status, connection) VALUES (?, ?, ?, ?, ?, ?)
"""
_TRIM_REQUESTS: Final = "DELETE FROM requests WHERE seq <= (SELECT MAX(seq) FROM requests) - ?"
_ADD: Final = """
INSERT INTO totals (kind, name, value) VALUES (?, ?, ?)
ON CONFLICT (kind, name) DO UPDATE SET value = value + excluded.value
"""
_SELECT_EVENTS: Final = """
SELECT seq, id, source, type, subject, time, data, attributes, received_at, token, path FROM events
WHERE seq > :after AND (:subject IS NULL OR subject = :subject) AND (:type IS NULL OR type = :type)
  AND (:source IS NULL OR source = :source)
ORDER BY seq LIMIT :limit
"""
_SELECT_NEWEST: Final = """
SELECT seq, id, source, type, subject, time, data, attributes, received_at, token, path FROM events
WHERE seq < :below AND received_at <= :until {} ORDER BY seq DESC LIMIT :limit
"""
_SECONDS: Final = "coalesce(CAST(strftime('%s', time) AS INTEGER), CAST(received_at AS INTEGER))"
# What narrows the list down, each only if it is asked for, so that an index serves it.
_NARROWED: Final = {
    "ids": "id IN (SELECT value FROM json_each(:ids))",
    "id_pattern": "id LIKE :id_pattern",
    "subjects": "subject IN (SELECT value FROM json_each(:subjects))",
    "types": "type IN (SELECT value FROM json_each(:types))",
    "sources": "source IN (SELECT value FROM json_each(:sources))",
    "since": f"{_SECONDS} >= :since",
    "before": f"{_SECONDS} < :before",
}
_SELECT_CUSTOMERS: Final = """
SELECT customers.id, key, name, (SELECT json_group_array(subject) FROM attributions WHERE customer = customers.id
    AND NOT is_key) FROM customers ORDER BY name, customers.id
"""
_SELECT_REQUESTS: Final = """
SELECT received_at, path, content_type, events, status, connection FROM
    (SELECT * FROM requests ORDER BY seq DESC LIMIT ?) ORDER BY seq
"""
_SELECT_USAGE: Final = """
SELECT subject, type, COUNT(*), CAST(TOTAL(
    CASE json_type(data, '$.tokens') WHEN 'integer' THEN json_extract(data, '$.tokens') END
) AS INTEGER)
FROM events WHERE :type IS NULL OR type = :type GROUP BY subject, type ORDER BY subject, type
"""
_COLUMNS: Final = frozenset({"id", "source", "type", "subject", "time", "data"})


@dataclass(frozen=True)
class Narrowed:
    """Which events are listed; None: whichever. Of times the seconds since 1970: `since`, and below `before`.

    `id_pattern` is one of SQL's LIKE.
    """

    ids: list[str] | None = None
    id_pattern: str | None = None
    subjects: list[str] | None = None
    types: list[str] | None = None
    sources: list[str] | None = None
    since: int | None = None
    before: int | None = None


class EventStore:
    """The database behind one collector.

    ``log_size`` is the number of requests that the log keeps; the oldest leave first.
    """

    def __init__(self, database: str, *, log_size: int = 10_000) -> None:
        self._log_size = log_size
        self._connection = sqlite3.connect(database, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        # NORMAL loses nothing when the process is killed, and needs no fsync for each request.
        self._connection.executescript(
            f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA case_sensitive_like=ON; {_SCHEMA}"
        )

    def close(self) -> None:
        """Close the database; the store is of no use afterwards."""
        self._connection.close()

    def record(self, request: IngestRequest, events: Sequence[Mapping[str, object]], token: str | None) -> None:
        """Log a request and store its events, each unless it is there already; all or nothing.

        ``token`` is the fingerprint of the bearer token. Raises ``sqlite3.Error`` when the database cannot be written.
        """
        with self._transaction() as cursor:
            cursor.execute(_INSERT_REQUEST, _request_row(request))
            cursor.execute(_TRIM_REQUESTS, (self._log_size,))
            totals = {("status", "none" if request.status is None else str(request.status)): 1}
            for event in events:
                for total in _add_event(cursor, (*_content(event), request.received_at, token, request.path)):
                    totals[total] = totals.get(total, 0) + 1
            cursor.executemany(_ADD, [(*total, count) for total, count in totals.items()])

    def reset(self) -> None:
        """Forget all events, requests, totals and customers; the tokens stay."""
        with self._transaction() as cursor:
            for table in ("events", "requests", "totals", "customers", "attributions"):
                cursor.execute(f"DELETE FROM {table}")  # noqa: S608 - the names stand one line above

    def events(
        self,
        *,
        subject: str | None = None,
        type: str | None = None,  # noqa: A002 - the attribute's name in CloudEvents
        source: str | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> list[StoredEvent]:
        """Return events in order of arrival, from the one that follows the sequence number ``after``."""
        wanted = {"subject": subject, "type": type, "source": source, "after": after, "limit": limit}
        return [_stored_event(row) for row in self._connection.execute(_SELECT_EVENTS, wanted)]

    def newest(self, limit: int, below: int, until: float, narrowed: Narrowed) -> list[StoredEvent]:
        """Return events that came until then, the newest first, from below the sequence number ``below`` on."""
        asked = {name: value for name, value in vars(narrowed).items() if value is not None}
        select = _SELECT_NEWEST.format("".join(f"AND {_NARROWED[name]} " for name in asked))
        values = {
            name: orjson.dumps(value).decode() if isinstance(value, list) else value for name, value in asked.items()
        }
        wanted = {"limit": limit, "below": below, "until": until, **values}
        return [_stored_event(row) for row in self._connection.execute(select, wanted)]

    def customers(self) -> list[Customer]:
        """Return all customers, by name."""
        rows = self._connection.execute(_SELECT_CUSTOMERS)
        return [Customer(row[0], row[1], row[2], orjson.loads(row[3])) for row in rows]

    def customer_of(self, subject: str) -> Customer | None:
        """Return whose a subject is: the customer with that key, or one to which it is attributed."""
        select = (
            "SELECT customers.id, key, name FROM attributions JOIN customers ON customers.id = customer "
            "WHERE subject = ?"
        )
        row = self._connection.execute(select, (subject,)).fetchone()
        return None if row is None else Customer(row[0], row[1], row[2], [])

    def add_customer(self, name: str, key: str, subjects: Sequence[str]) -> Customer | None:
        """Make a customer; None when its key, or one of the subjects, is somebody's already."""
        customer = Customer(_new_id(), key, name, list(subjects))
        attributed = dict.fromkeys(subjects, 0)
        attributed.setdefault(key, 1)
        try:
            with self._transaction() as cursor:
                cursor.execute("INSERT INTO customers VALUES (?, ?, ?)", (customer.id, key, name))
                rows = [(subject, customer.id, is_key) for subject, is_key in attributed.items()]
                cursor.executemany("INSERT INTO attributions VALUES (?, ?, ?)", rows)
        except sqlite3.IntegrityError:
            return None
        return customer

    def requests(self, limit: int) -> list[IngestRequest]:
        """Return the newest requests, in order of arrival."""
        return [IngestRequest(*row) for row in self._connection.execute(_SELECT_REQUESTS, (limit,))]

    def usage(self, event_type: str | None = None) -> list[Usage]:
        """Return the usage of each subject, for one type of event or for each."""
        return [Usage(*row) for row in self._connection.execute(_SELECT_USAGE, {"type": event_type})]

    def stats(self) -> Stats:
        """Return the totals. Costs the same however many events there are."""
        totals: dict[str, dict[str, int]] = {"status": {}, "outcome": {}, "type": {}}
        for kind, name, value in self._connection.execute("SELECT kind, name, value FROM totals ORDER BY kind, name"):
            totals[kind][name] = value
        outcome = totals["outcome"]
        return Stats(
            requests=totals["status"],
            events=sum(outcome.values()),
            unique=outcome.get("unique", 0),
            duplicates=outcome.get("duplicate", 0),
            conflicts=outcome.get("conflict", 0),
            by_type=totals["type"],
        )

    @property
    def tokens(self) -> Tokens:
        """The accepted tokens, kept here so that they outlive a restart."""
        return Tokens(tuple(digest for (digest,) in self._connection.execute("SELECT digest FROM tokens")))

    @tokens.setter
    def tokens(self, tokens: Tokens) -> None:
        with self._transaction() as cursor:
            cursor.execute("DELETE FROM tokens")
            cursor.executemany("INSERT INTO tokens VALUES (?)", [(digest,) for digest in tokens.digests])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        with closing(self._connection.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")


def _new_id() -> str:
    """Return an id as OpenMeter's look."""
    return f"{uuid.uuid4().int:032X}"[:26]


def _add_event(cursor: sqlite3.Cursor, row: tuple[object, ...]) -> Iterator[tuple[str, str]]:
    """Insert an event and name the totals that it counts in."""
    if cursor.execute(_INSERT_EVENT, row).rowcount == 1:
        yield "outcome", "unique"
        yield "type", str(row[2])
    elif cursor.execute(_SAME_EVENT, row[:7]).fetchone():
        yield "outcome", "duplicate"
    else:
        yield "outcome", "conflict"


def _content(event: Mapping[str, object]) -> tuple[object, ...]:
    """Return what makes two deliveries of an event the same: its columns, with JSON in one canonical form."""
    data = event.get("data")
    others = {name: value for name, value in event.items() if name not in _COLUMNS}
    return (
        event["source"],
        event["id"],
        event["type"],
        event["subject"],
        event.get("time"),
        None if data is None else _json(data),
        _json(others),
    )


def _json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _request_row(request: IngestRequest) -> tuple[object, ...]:
    return (
        request.received_at,
        request.path,
        request.content_type,
        request.events,
        request.status,
        request.connection,
    )


def _stored_event(row: sqlite3.Row) -> StoredEvent:
    values = dict(zip(row.keys(), row, strict=True))
    values["data"] = orjson.loads(values["data"] or "null")
    values["attributes"] = orjson.loads(values["attributes"])
    return StoredEvent(**values)
