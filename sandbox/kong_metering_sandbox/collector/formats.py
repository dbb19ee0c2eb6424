"""The string formats that the OpenAPI descriptions name: ``date-time``, ``uri`` and ``uri-reference``.

jsonschema checks a format only when an optional library for it is installed, and is silent otherwise, so that
the rules stand here: RFC 3339 for times and the grammar of RFC 3986 for URIs; references are taken as OpenMeter does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from rfc3339_validator import validate_rfc3339  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from jsonschema import FormatChecker

_USERINFO: Final = r"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@"
_HOST: Final = r"(?:\[[0-9A-Fa-fvV:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"


def _grammars(others: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Write the grammars of an absolute URI and of a relative reference; `others` are more alternatives for a path."""
    pchar = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{{2}}{others})"
    segment_without_colon = rf"(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{{2}}{others})+"
    authority = rf"//(?:{_USERINFO})?{_HOST}(?::[0-9]*)?(?:/{pchar}*)*"
    absolute_path = rf"/(?:{pchar}+(?:/{pchar}*)*)?"
    tail = rf"(?:\?(?:{pchar}|[/?])*)?(?:#(?:{pchar}|[/?])*)?"
    uri = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{authority}|{absolute_path}|{pchar}+(?:/{pchar}*)*)?{tail}"
    relative = rf"(?:{authority}|{absolute_path}|{segment_without_colon}(?:/{pchar}*)*)?{tail}"
    return re.compile(uri), re.compile(relative)


_URI, _ = _grammars("")
# OpenMeter takes blanks and what is not ASCII in a source. (As a range, that takes a tenth of a second to compile.)
_LAX_URI, _LAX_RELATIVE = _grammars(r"|[^\x00-\x1f!-\x7f]")


def is_date_time(value: object) -> bool:
    """Whether a string is an RFC 3339 time; anything but a string passes, as JSON Schema has it."""
    # The library's pattern ends in `$`, which lets a line feed through.
    return not isinstance(value, str) or (not value.endswith("\n") and bool(validate_rfc3339(value)))


def is_uri(value: object) -> bool:
    """Whether a string is an absolute URI; anything but a string passes."""
    return not isinstance(value, str) or _URI.fullmatch(value) is not None


def is_uri_reference(value: object) -> bool:
    """Whether a string is a URI or a relative reference, blanks and non-ASCII allowed; anything but a string passes."""
    if not isinstance(value, str):
        return True
    return _LAX_URI.fullmatch(value) is not None or _LAX_RELATIVE.fullmatch(value) is not None


def format_checker() -> FormatChecker:
    """Make a checker that knows these three formats and no other."""
    from jsonschema import FormatChecker  # noqa: PLC0415 - takes long

    checker = FormatChecker(formats=())
    # FormatChecker.checks() would write into the class, and so into everyone's checkers.
    checker.checkers = {
        "date-time": (is_date_time, ()),
        "uri": (is_uri, ()),
        "uri-reference": (is_uri_reference, ()),
    }
    return checker
