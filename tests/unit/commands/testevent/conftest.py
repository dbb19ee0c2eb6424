"""A certificate that no authority has given, and a server with it."""

from tests.unit.ingest.conftest import certificate, tls_context

__all__ = ["certificate", "tls_context"]
