"""The plugin's configuration, declared once.

Each setting stands here with its type, default, range, unit, description and marks; the Kong schema
(`schema.py`), the validation below and `docs/configuration.md` are derived from this file. Names, defaults and ranges
are those of the vendor's published schema, so that a configuration written for Kong Enterprise works unchanged; a test
compares the two field by field. No sockets, threads or environment here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kong_metering.errors import ConfigError
from kong_metering.log import printable

_BEARER = re.compile(r"bearer(?:\s+|$)", re.IGNORECASE)
_UNFIT = r"\s\x00-\x1f\x7f-\x9f"
_AROUND_A_NAME = re.compile(rf"^[{_UNFIT}]+|[{_UNFIT}]+$")
_AROUND_A_HEADER_NAME = re.compile(rf"^[{_UNFIT}:]+|[{_UNFIT}:]+$")
_IN_NO_HEADER_NAME = re.compile(rf"[{_UNFIT}:]")


@dataclass(frozen=True)
class Mark:
    """What Kong and the documentation say of a setting besides its type, default and range.

    `pattern` is a Lua pattern, for Kong's `match`, and `expected` what is said of a value that does not match it;
    `refused`, Lua patterns with what is wrong with a value that matches one, for its `match_none`. `referenceable`: a
    vault reference may stand in its place. `encrypted`: Kong stores it encrypted where a keyring is configured.
    """

    unit: str | None = None
    referenceable: bool = False
    encrypted: bool = False
    pattern: str | None = None
    expected: str | None = None
    refused: tuple[tuple[str, str], ...] = ()


_A_URL = "expected a URL such as https://us.api.konghq.com/v3/openmeter/events"
# A header's name has neither blanks nor colons anywhere (`schema.py`); others may have them inside.
_NAME = Mark(
    refused=(
        ("^%s", "must not begin with a blank"),
        ("%s$", "must not end with a blank"),
        ("%c", "must not contain control characters"),
    )
)


class Settings(BaseModel):
    """Base of all parts of the configuration: frozen, and deaf to fields that are not ours."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _undo_lua(cls, value: object) -> object:
        """Read what Kong's JSON cannot say: unset is null, and an empty Lua table is `{}` or `[]` alike."""
        if value == []:
            return {}
        if not isinstance(value, Mapping):
            return value
        lists = {name for name, field in cls.model_fields.items() if _is_list(field.annotation)}
        return {key: [] if key in lists and item == {} else item for key, item in value.items() if item is not None}


def _is_list(annotation: object) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_list(argument) for argument in get_args(annotation))
    return get_origin(annotation) is list


class Subject(Settings):
    """Who pays for a request."""

    look_up_value_in: Literal["application", "consumer", "header", "query"] = Field(
        default="consumer",
        description="Where the subject, the one who is billed, is found: in a request header or query argument, "
        "or as the authenticated consumer or application.",
    )
    field: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Name of the header or query argument that holds the subject, or of the field of the consumer "
            "or application to use instead of its id, such as username or custom_id.",
        ),
        _NAME,
    ] = None

    @field_validator("field")
    @classmethod
    def _is_trimmed(cls, value: str | None, info: ValidationInfo) -> str | None:
        is_header = info.data.get("look_up_value_in") == "header"
        return None if value is None else _trimmed(value, is_header=is_header)

    @model_validator(mode="after")
    def _field_is_needed(self) -> Subject:
        if self.look_up_value_in in ("header", "query") and self.field is None:
            raise ValueError(f"field is required when look_up_value_in is {self.look_up_value_in}")
        return self


class Attribute(Settings):
    """One more property of the events, taken from the request."""

    source: Literal["header", "query"] = Field(description="Where in the request the value is found.")
    look_up_value_in: Annotated[
        str, Field(min_length=1, description="Name of the header or query argument that holds the value."), _NAME
    ]
    event_property_name: Annotated[
        str,
        Field(
            min_length=1,
            description="Name of the property in the event's data. The names of the event's own fields are reserved, "
            "whether it has them or not: such an attribute is left out.",
        ),
        _NAME,
    ]

    @field_validator("look_up_value_in", "event_property_name")
    @classmethod
    def _is_trimmed(cls, value: str, info: ValidationInfo) -> str:
        is_header = info.field_name == "look_up_value_in" and info.data.get("source") == "header"
        return _trimmed(value, is_header=is_header)


def _trimmed(name: str, *, is_header: bool) -> str:
    around = _AROUND_A_HEADER_NAME if is_header else _AROUND_A_NAME
    trimmed = around.sub("", name)
    if not trimmed:
        raise ValueError("a name is more than blanks, colons and control characters")
    return trimmed


class Queue(Settings):
    """How events wait, leave in batches, and are tried again."""

    max_batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="How many events leave in one request, at most. 1: an event leaves alone, at once; while more "
            "come, up to `--adaptive-batch` leave together.",
        ),
    ] = 1
    max_coalescing_delay: Annotated[
        float,
        Field(ge=0, le=3600, description="How long the first event of a batch waits for others to fill it."),
        Mark(unit="seconds"),
    ] = 1
    max_entries: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="How many events may wait in memory; beyond it the oldest are dropped. Only with --no-spool, "
            "or while the disk takes no writes: with the spool any number waits on disk.",
        ),
    ] = 10_000
    max_bytes: Annotated[
        int | None,
        Field(
            description="How many bytes of events may wait in memory, as max_entries; and how large a batch may be. "
            "Unset: no limit."
        ),
        Mark(unit="bytes"),
    ] = None
    initial_retry_delay: Annotated[
        float,
        Field(ge=0.001, le=1_000_000, description="Pause before what failed is sent again; doubled each time."),
        Mark(unit="seconds"),
    ] = 0.01
    max_retry_delay: Annotated[
        float,
        Field(ge=0.001, le=1_000_000, description="The longest pause between two tries."),
        Mark(unit="seconds"),
    ] = 60
    max_retry_time: Annotated[
        float,
        Field(
            description="How long a batch may fail until that counts for the circuit breaker, and until it is dropped "
            "with --no-spool (-1: after one try). With the spool it is never given up."
        ),
        Mark(unit="seconds"),
    ] = 60
    concurrency_limit: Literal[-1, 1] = Field(
        default=1,
        description="1: one batch at a time, in order. -1: each event is sent at once, alone, many at a time.",
    )
    failure_threshold: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="After how many batches in a row that failed for max_retry_time the circuit breaker opens, and "
            "nothing is tried; with --no-spool events are dropped meanwhile. 0: never.",
        ),
    ] = 0
    breaker_cooldown: Annotated[
        float,
        Field(ge=0, le=1_000_000, description="How long the open circuit breaker waits before it tries one batch."),
        Mark(unit="seconds"),
    ] = 60


class PluginConfig(Settings):
    """The `config` of one `metering-and-billing` plugin entity."""

    ingest_endpoint: Annotated[
        str,
        Field(description="URL that the events are posted to: Konnect Metering & Billing, or an OpenMeter of yours."),
        Mark(referenceable=True, pattern="^https?://[^%s/?#]+[^%s]*$", expected=_A_URL),
    ]
    api_token: Annotated[
        str,
        Field(min_length=1, description="Bearer token for the ingest endpoint."),
        Mark(referenceable=True, encrypted=True),
    ]
    meter_api_requests: bool = Field(default=True, description="Whether each API request gives an event.")
    meter_ai_token_usage: bool = Field(
        default=True, description="Whether requests to AI models give events with their prompt and completion tokens."
    )
    subject: Subject = Field(default=Subject(), description="Who is billed for a request.")
    attributes: Annotated[
        list[Attribute] | None,
        Field(description="Further properties of the events, read from headers and query arguments."),
    ] = None
    allow_status_codes: Annotated[
        list[
            Annotated[
                str,
                Field(pattern="^[0-9]{3}-[0-9]{3}$"),
                Mark(
                    pattern="^[0-9][0-9][0-9]%-[0-9][0-9][0-9]$",
                    expected="expected a range of status codes such as 200-299, or 404-404 for one",
                ),
            ]
        ]
        | None,
        Field(
            description="Ranges of response status codes, such as 200-299; only requests answered with one of them are "
            "metered. Unset or empty: all are."
        ),
    ] = None
    timeout: Annotated[
        float,
        Field(description="How long to wait for the endpoint to connect or answer. 0: 60,000, as in Kong."),
        Mark(unit="milliseconds"),
    ] = 10_000
    keepalive: Annotated[
        float,
        Field(
            description="How long an idle connection to the endpoint is kept for reuse. 0: until the endpoint ends it."
        ),
        Mark(unit="milliseconds"),
    ] = 60_000
    ssl_verify: bool = Field(default=True, description="Whether the endpoint's TLS certificate is verified.")
    queue: Queue = Field(default=Queue(), description="How events wait, leave in batches, and are tried again.")

    @field_validator("ingest_endpoint")
    @classmethod
    def _is_http_url(cls, value: str) -> str:
        if trouble := _trouble_of_url(value):
            # Without the URL: there may be a password in it.
            raise ValueError(f"{trouble}: {_A_URL}")
        return value

    @field_validator("allow_status_codes")
    @classmethod
    def _ranges_hold_something(cls, value: list[str] | None) -> list[str] | None:
        for item in value or []:
            first, last = item.split("-")
            if first > last:
                raise ValueError(f"{item} holds no status code: expected the lower one first, as in 200-299")
        return value

    @field_validator("api_token")
    @classmethod
    def _fits_a_header(cls, value: str) -> str:
        stripped = value.strip()
        bearer = _BEARER.match(stripped)
        token = stripped[bearer.end() :] if bearer else stripped
        if not token:
            raise ValueError("there is no token in it, only blanks or the word Bearer")
        for place, char in enumerate(token, 1):
            if not char.isascii() or not char.isprintable():
                what = "a control character" if char.isascii() else "not ASCII"
                raise ValueError(
                    "it cannot stand in a header: a token is printable ASCII without line breaks, and character "
                    f"{place} of {len(token)} is {what}"
                )
        return token


def _trouble_of_url(value: str) -> str | None:
    """Tell why nothing can be posted to a URL; None when it can be."""
    place = next((place for place, char in enumerate(value, 1) if char.isspace() or not char.isprintable()), None)
    if place is not None:
        return f"character {place} of {len(value)} is a blank, a line break or a control character"
    if not value.lower().startswith(("http://", "https://")):
        return "it does not begin with https:// or http://"
    try:
        host = urlsplit(value).hostname
    except ValueError:
        return "its host is none"
    try:
        port = urlsplit(value).port
    except ValueError:
        port = 0
    if not host:
        return "there is no host in it"
    return "its port is not a number from 1 to 65535" if port == 0 else None


@dataclass(frozen=True)
class Entity:
    """The plugin entity that a configuration belongs to, from Kong's own keys in it.

    `id` is stable over restarts and changes of the configuration; `name` is how the log calls it. `sequence` is the
    number that Kong gave the configuration, from 1; a newer one has a higher number, until Kong restarts or reloads.
    0: none is known. `references`: the vault references that stand in the place of settings, by the setting's name.
    """

    id: str
    name: str
    sequence: int = field(default=0, compare=False)  # it is the same entity under any number
    references: Mapping[str, str] = field(default_factory=dict, compare=False)


def parse_config(raw: Mapping[str, Any]) -> PluginConfig:
    """Validate what Kong sent as a plugin's configuration.

    Raises `ConfigError`, which names every setting that is wrong and tells no value.
    """
    try:
        return PluginConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(item["loc"], item["msg"], raw) for item in error.errors(include_input=False)]
        raise ConfigError("; ".join(problems)) from None


def parse_entity(raw: Mapping[str, Any]) -> Entity:
    """Read which plugin entity a configuration belongs to.

    Kong passes `__plugin_id` (measured on 3.9.1; in the sources since 3.4). Without it, as under a foreign host, the
    same configuration counts as the same entity. `__seq__` is 0 when Kong could not count.
    """
    plugin_id, instance_name = raw.get("__plugin_id"), raw.get("plugin_instance_name")
    number = raw.get("__seq__")
    sequence = number if type(number) is int and number > 0 else 0
    if not isinstance(plugin_id, str) or not plugin_id:
        own = {key: value for key, value in raw.items() if key in PluginConfig.model_fields}
        plugin_id = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]
    is_named = isinstance(instance_name, str) and instance_name
    return Entity(
        id=plugin_id,
        name=f"{instance_name} ({plugin_id})" if is_named else plugin_id,
        sequence=sequence,
        references=_references(raw),
    )


def remarks(raw: Mapping[str, Any], config: PluginConfig) -> list[str]:
    """Tell what of a configuration is not used as it came, or can never be found; tells no secret."""
    found = []
    if raw.get("api_token") != config.api_token:
        found.append("config.api_token: blanks or line breaks around it, or a leading Bearer, were taken off")
    subject, attributes = raw.get("subject"), raw.get("attributes")
    if isinstance(subject, Mapping):
        is_header = config.subject.look_up_value_in == "header"
        found += _remarks_on_name("subject.field", subject.get("field"), config.subject.field, is_header=is_header)
    for index, attribute in enumerate(config.attributes or ()):
        came = attributes[index] if isinstance(attributes, list) else {}
        for name in ("look_up_value_in", "event_property_name"):
            is_header = name == "look_up_value_in" and attribute.source == "header"
            path, used = f"attributes.{index}.{name}", getattr(attribute, name)
            found += _remarks_on_name(path, came.get(name), used, is_header=is_header)
    return found


def _remarks_on_name(path: str, came: object, used: str | None, *, is_header: bool) -> list[str]:
    if used is None:
        return []
    if is_header and _IN_NO_HEADER_NAME.search(used):
        return [f"config.{path}: no request has a header of the name {printable(used)}"]
    return [] if came == used else [f"config.{path}: is taken for {printable(used)}, without what is around it"]


def _references(raw: Mapping[str, Any]) -> dict[str, str]:
    references = raw.get("$refs")
    if not isinstance(references, Mapping):
        return {}
    return {name: one for name, one in references.items() if isinstance(name, str) and isinstance(one, str)}


def _problem(location: tuple[int | str, ...], message: str, raw: Mapping[str, Any]) -> str:
    path = ".".join(["config", *(str(part) for part in location)])
    references = raw.get("$refs")
    if len(location) == 1 and isinstance(references, Mapping) and location[0] in references:
        message += f" (from the vault reference {references[location[0]]}: does it resolve?)"
    return f"{path}: {message.removeprefix('Value error, ')}"
