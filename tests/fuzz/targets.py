"""All targets."""

from __future__ import annotations

from tests.fuzz import frames, headers, queries, records

TARGETS = [records.TARGET, headers.TARGET, queries.TARGET, frames.TARGET]
