"""From an event to the ingest endpoint: queue, delivery policy, HTTP."""
