"""From an event to the ingest endpoint: queue, trial, HTTP."""
