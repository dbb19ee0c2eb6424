"""Whether a file names certificate authorities, for those who are to verify endpoints with it."""

from __future__ import annotations

import ssl
from pathlib import Path


def holds_certificates(path: Path) -> bool:
    """Tell whether a file has certificates in PEM; what is no file, such as a directory of them, is not looked into."""
    if not path.is_file():
        return True
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True
