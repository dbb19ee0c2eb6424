"""The string formats that the OpenAPI descriptions name: ``date-time``, ``uri`` and ``uri-reference``.

jsonschema checks a format only when an optional library for it is installed, and is silent otherwise, so that
the rules stand here: RFC 3339 for times and the grammar of RFC 3986 for references.
"""

from __future__ import annotations

import re
from typing import Final

from jsonschema import FormatChecker
from rfc3339_validator import validate_rfc3339  # type: ignore[import-untyped]

_PCHAR: Final = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_SEGMENT_WITHOUT_COLON: Final = r"(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})+"
_USERINFO: Final = r"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@"
_HOST: Final = r"(?:\[[0-9A-Fa-fvV:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"
_AUTHORITY: Final = rf"//(?:{_USERINFO})?{_HOST}(?::[0-9]*)?(?:/{_PCHAR}*)*"
_ABSOLUTE_PATH: Final = rf"/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?"
_TAIL: Final = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_URI: Final = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{_AUTHORITY}|{_ABSOLUTE_PATH}|{_PCHAR}+(?:/{_PCHAR}*)*)?{_TAIL}")
_RELATIVE: Final = re.compile(rf"(?:{_AUTHORITY}|{_ABSOLUTE_PATH}|{_SEGMENT_WITHOUT_COLON}(?:/{_PCHAR}*)*)?{_TAIL}")


def is_date_time(value: object) -> bool:
    """Whether a string is an RFC 3339 time; anything but a string passes, as JSON Schema has it."""
    # The library's pattern ends in `$`, which lets a line feed through.
    return not isinstance(value, str) or (not value.endswith("\n") and bool(validate_rfc3339(value)))


def is_uri(value: object) -> bool:
    """Whether a string is an absolute URI; anything but a string passes."""
    return not isinstance(value, str) or _URI.fullmatch(value) is not None


def is_uri_reference(value: object) -> bool:
    """Whether a string is an absolute URI or a relative reference; anything but a string passes."""
    return is_uri(value) or (isinstance(value, str) and _RELATIVE.fullmatch(value) is not None)


def format_checker() -> FormatChecker:
    """Make a checker that knows these three formats and no other."""
    checker = FormatChecker(formats=())
    # FormatChecker.checks() would write into the class, and so into everyone's checkers.
    checker.checkers = {
        "date-time": (is_date_time, ()),
        "uri": (is_uri, ()),
        "uri-reference": (is_uri_reference, ()),
    }
    return checker
