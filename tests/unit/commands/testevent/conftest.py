"""A certificate that no authority has given, and a server with it."""

from tests.unit.delivery.conftest import certificate, tls_context

__all__ = ["certificate", "tls_context"]
