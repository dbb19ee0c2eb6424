"""URLs as they may be stored and shown: without the user and the password that may stand in them. Pure."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

# From where an authority begins to where the next one does; to look for the scheme too would take time squared.
_IN_TEXT = re.compile(r"//(?=[^/\s])\S+?(?=//[^/\s]|\s|$)")
# What cannot be read as a URL could hold them anywhere.
_UNREADABLE = "***"


def without_credentials(url: str, instead: str = "") -> str:
    """Return a URL with `instead` in the place of its user and password; nothing else in it changes.

    A URL that cannot be read is left out as a whole.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return _UNREADABLE
    credentials, _, host = parts.netloc.rpartition("@")
    if not credentials and host == parts.netloc:
        return url
    authority, shown = f"//{parts.netloc}", f"//{instead}{host}"
    if authority in url:
        # By hand, for queues are known by their URLs: put together again, it may differ in what does not matter.
        return url.replace(authority, shown, 1)
    return urlunsplit(parts._replace(netloc=f"{instead}{host}"))


def text_without_credentials(text: str) -> str:
    """Return a text with `***` in the place of user and password in each URL that it has, also in another URL."""
    return _IN_TEXT.sub(lambda match: without_credentials(match[0], "***@"), text)
