"""Kong's log record, read as what it is: data from outside.

The record is the JSON that `kong.log.serialize()` gives. Its fields come from clients, upstreams, other plugins and
whatever version of Kong runs; none is taken for granted. What has the type that it should have is read as it is parsed;
where anything has not, the whole record is read again, leniently, and what is nonsense counts as missing. Bytes that
are not UTF-8 arrive as Python's surrogate escapes and stay so until a value is used: `readable` is for any value,
`subject_text` for the one that is billed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import msgspec

# What nginx puts between the lines of a header that it joins.
LINE_SEPARATOR = ", "
# Request headers whose values Kong's record does not show: it has a word of Kong's own in their place.
REDACTED = frozenset({"authorization", "proxy-authorization"})

_KONGS_WORD = "REDACTED"
_ESCAPE = "\u241b"
# What `str.strip` takes off, but for five control characters (U+001C to U+001F, U+0085): these are made legible.
_WHITE_SPACE = " \t\n\v\f\r\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(f"{chr(end)}{chr(end + 1)}" for end in range(0xFFFE, 0x110000, 0x10000))
_ILLEGIBLE = re.compile(f"[\x00-\x1f\x7f-\x9f{_NONCHARACTERS}{_ESCAPE}]")

_NOTHING: Mapping[str, Any] = {}
# Kong and OpenMeter hold numbers as doubles: above it, two different counts look the same.
_LARGEST_INTEGER = 2**53
_MAX_DIGITS = 16
_MOST_HEADERS = 100  # that Kong looks at, unless it is told otherwise (`lua_max_req_headers`)

Headers = Mapping[str, Any]
# What `text` and `integer` take as they are; msgspec sees to it while it parses, at next to no cost.
_Text = Annotated[str, msgspec.Meta(min_length=1)] | None
_Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_INTEGER)] | None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the client sent; a header is a string, or a list where several lines came, or nonsense."""

    headers: dict[str, Any] = {}
    id: _Text = None
    method: _Text = None
    size: _Count = None
    uri: _Text = None
    url: _Text = None


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What the client got."""

    size: _Count = None
    status: _Count = None


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The route that the request took."""

    id: _Text = None
    name: _Text = None


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The service behind it."""

    id: _Text = None
    name: _Text = None
    port: _Count = None
    protocol: _Text = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a log record; the rest, more than half of it, is passed over without a Python object made of it.

    What is nonsense or missing is None, and a section of it empty. `Any` is for what has to be looked at before use.
    """

    request: Request = Request()
    response: Response = Response()
    route: Route = Route()
    service: Service = Service()
    client_ip: _Text = None
    started_at: Any = None
    upstream_status: Any = None
    consumer: Any = None
    ai: Any = None
    application: Any = None
    api_id: Any = None
    api_package_id: Any = None
    api_product_version_id: Any = None
    application_id: Any = None
    control_plane_id: Any = None
    portal_id: Any = None


_DECODER = msgspec.json.Decoder(Record)


def parse_record(text: object) -> Record | None:
    """Parse the record; None where Kong could not give one (lua-cjson refuses NaN, infinity and deep nesting)."""
    if not isinstance(text, str):
        return None
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):  # nonsense in some place, no JSON, or bytes that are not UTF-8
        return parsed_leniently(text)


def parsed_leniently(text: str) -> Record | None:
    """Parse whatever the standard library takes: it lets bytes through that are not UTF-8."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record_of(found) if isinstance(found, dict) else None


def record_of(found: Mapping[str, Any]) -> Record:
    """Make a record of whatever stands where its parts should be."""
    request, response = section(found, "request"), section(found, "response")
    route, service = section(found, "route"), section(found, "service")
    headers = request.get("headers")
    return Record(
        request=Request(
            headers=headers if isinstance(headers, dict) else {},
            id=text(request.get("id")),
            method=text(request.get("method")),
            size=integer(request.get("size")),
            uri=text(request.get("uri")),
            url=text(request.get("url")),
        ),
        response=Response(size=integer(response.get("size")), status=integer(response.get("status"))),
        route=Route(id=text(route.get("id")), name=text(route.get("name"))),
        service=Service(
            id=text(service.get("id")),
            name=text(service.get("name")),
            port=integer(service.get("port")),
            protocol=text(service.get("protocol")),
        ),
        client_ip=text(found.get("client_ip")),
        **{name: found.get(name) for name in _UNCHECKED},
    )


_UNCHECKED = tuple(field.name for field in msgspec.structs.fields(Record) if field.type is Any)


def section(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Give the object that stands under `name`, empty where there is none (an empty Lua table is also `[]`)."""
    return mapping(found.get(name))


def mapping(value: object) -> Mapping[str, Any]:
    """Take an object, or an empty one where there is none."""
    return value if isinstance(value, dict) else _NOTHING


def text(value: object) -> str | None:
    """Take a non-empty string, or nothing."""
    return value if isinstance(value, str) and value else None


def integer(value: object) -> int | None:
    """Take a count: a whole number from 0 to 2^53, also as a float or in digits; anything else is nothing."""
    if type(value) is int:
        return value if 0 <= value <= _LARGEST_INTEGER else None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS else None
    elif isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if isinstance(value, int) and 0 <= value <= _LARGEST_INTEGER else None


def milliseconds(value: object) -> int | None:
    """Take a moment in milliseconds since 1970; Lua calculates it, so that it may be off by a fraction."""
    return integer(round(value) if isinstance(value, float) and math.isfinite(value) else value)


def readable(value: str) -> str:
    """Give text that UTF-8 can hold: bytes that are not UTF-8 become replacement characters."""
    if value.isascii():
        return value
    return _utf8(value).decode("utf-8", "replace")


def subject_text(value: str) -> str | None:
    """Give a subject's text without surrounding white space, None if nothing is left.

    A subject that is not UTF-8 is read as latin-1, byte for byte: two different ones must not become the same.
    """
    if value.isascii():
        return value.strip(_WHITE_SPACE) or None
    if _escaped_bytes(value):
        # Latin-1 has white space of its own. It is none in a header: without it, different ones would be the same.
        value = _utf8(value).strip().decode("latin-1")
        return value if value.strip(_WHITE_SPACE) else None
    return readable(value.strip(_WHITE_SPACE)) or None


def legible(value: str) -> str:
    """Return text without control characters and noncharacters, which OpenMeter and what is behind it stumble over.

    Each becomes `␛` (U+241B), its number in hexadecimal digits and a semicolon, and so does a `␛` itself: two different
    texts stay different, and none becomes one that was sent as it is. Text that has none of them is not changed.
    """
    if value.isprintable() and _ESCAPE not in value:
        return value
    return _ILLEGIBLE.sub(lambda found: f"{_ESCAPE}{ord(found[0]):X};", value)


def first_not_blank(values: Iterable[str]) -> str | None:
    """Give the first value that does not count as absent; None if there is none."""
    return next((value for value in values if not is_blank(value)), None)


def is_blank(value: str) -> bool:
    """Whether a value from a client counts as absent: it is empty, or only white space."""
    return not value.strip(_WHITE_SPACE) if value.isascii() else subject_text(value) is None


def _utf8(value: str) -> bytes:
    """Give the bytes that came; where the value cannot have come as bytes, question marks."""
    return value.encode("utf-8", "surrogateescape" if _escaped_bytes(value) else "replace")


def _escaped_bytes(value: str) -> bool:
    """Whether the value has bytes that are not UTF-8, and nothing else that UTF-8 cannot hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return not any("\ud800" <= char < "\udc80" or "\udcff" < char <= "\udfff" for char in value)
    return False


def header_values(headers: Headers, name: str) -> list[str]:
    """List the values of a request header, in the order of the request; `name` in any case.

    Kong's own lookup takes dashes and underscores for the same (`kong/tools/http.lua`), and so does this one: where the
    name as it is has no value that is not blank, those of its other spellings follow, by their names. In which order
    they came, nobody knows any more.
    """
    exact, wanted = name.lower(), _normalised(name)
    values = _lines(headers.get(exact))
    if all(map(is_blank, values)):
        others = sorted(key for key in headers if key != exact and _normalised(key) == wanted)
        values += [value for key in others for value in _lines(headers[key])]
    own = _KONGS_WORD if wanted in REDACTED else None
    return [value for value in values if value != own]


def _lines(found: object) -> list[str]:
    """List the lines that Kong has under one name: a string, or several in a list."""
    return [value for value in (found if isinstance(found, list) else [found]) if isinstance(value, str)]


def header_lines(headers: Headers, name: str) -> list[str]:
    """List the lines of a request header, in any spelling of its name that nginx takes for the same; in any order."""
    wanted = _normalised(name)
    lines: list[str] = []
    for key, found in headers.items():
        if _normalised(key) == wanted:
            lines += _lines(found)
    return lines


def may_hide_headers(headers: Headers) -> bool:
    """Tell whether the request may have had more headers than the record shows."""
    if len(headers) >= _MOST_HEADERS:
        return True
    return sum(len(value) if isinstance(value, list) else 1 for value in headers.values()) >= _MOST_HEADERS


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-")


def query_values(uri: str, name: str) -> Iterator[str]:
    """Yield the values of a query argument, decoded, in the order of the request target.

    Decoded as Kong does it (`ngx.decode_args`): `&` separates, `+` is a space, a broken escape stays as it is.
    """
    for pair in uri.partition("#")[0].partition("?")[2].split("&"):
        key, _, value = pair.partition("=")
        if _decoded(key) == name:
            yield _decoded(value)


def _decoded(part: str) -> str:
    if "%" not in part:
        return part.replace("+", " ")
    raw = unquote_to_bytes(_utf8(part.replace("+", " ")))
    return raw.decode("utf-8", "surrogateescape")
