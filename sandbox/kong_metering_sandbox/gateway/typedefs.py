"""The definitions of Kong's entities and of the bundled plugins that the stand-in plays, as schema data."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .query import normalize_path

if TYPE_CHECKING:
    from .values import Table, Value

HTTP_PROTOCOLS = ["grpc", "grpcs", "http", "https"]
ALL_PROTOCOLS = ["http", "https", "tcp", "tls", "tls_passthrough", "udp", "grpc", "grpcs"]
_DEFAULT_PORTS = {"http": 80, "https": 443}
_TIMEOUT = {"type": "integer", "default": 60000, "between": [1, 2**31 - 2]}
_STRINGS = {"type": "array", "default": [], "required": True, "elements": {"type": "string"}}


def _valid_uuid(value: str) -> str | None:
    try:
        return None if str(uuid.UUID(value)) == value.lower() else "expected a valid UUID"
    except ValueError:
        return "expected a valid UUID"


def _valid_route_path(value: str) -> str | None:
    if value.startswith("~"):
        try:
            re.compile(value[1:])
        except re.error as error:
            return f"invalid regex: '{value[1:]}' ({error})"
        return None
    normalized = normalize_path(value.encode()).decode("utf-8", "replace")
    return None if value == normalized else f"non-normalized path, consider use '{normalized}' instead"


def _valid_host(value: str) -> str | None:
    return None if re.fullmatch(r"[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:]+\]?", value) else f"invalid value: {value}"


def _valid_header_name(value: str) -> str | None:
    if re.fullmatch(r"[a-zA-Z0-9_-]+", value):
        return None
    return f"bad header name '{value}', allowed characters are A-Z, a-z, 0-9, '_', and '-'"


_ID = {"type": "string", "custom_validator": _valid_uuid}
_TAGS = {"type": "set", "elements": {"type": "string"}}
_TIMES: list[Table] = [{"created_at": {"type": "integer"}}, {"updated_at": {"type": "integer"}}]
_HEADER_NAME = {"type": "string", "custom_validator": _valid_header_name}


def _flag(*, default: bool) -> Table:
    return {"type": "boolean", "required": True, "default": default}


SERVICES: Table = {
    "fields": [
        {"id": _ID},
        *_TIMES,
        {"name": {"type": "string"}},
        {"retries": {"type": "integer", "default": 5, "between": [0, 32767]}},
        {"protocol": {"type": "string", "required": True, "default": "http", "one_of": ALL_PROTOCOLS}},
        {"host": {"type": "string", "required": True, "custom_validator": _valid_host}},
        {"port": {"type": "integer", "required": True, "default": 80, "between": [0, 65535]}},
        {"path": {"type": "string", "starts_with": "/"}},
        {"connect_timeout": _TIMEOUT},
        {"write_timeout": _TIMEOUT},
        {"read_timeout": _TIMEOUT},
        {"tags": _TAGS},
        {"client_certificate": {"type": "foreign"}},
        {"tls_verify": {"type": "boolean"}},
        {"tls_verify_depth": {"type": "integer", "between": [0, 64]}},
        {"ca_certificates": {"type": "array", "elements": {"type": "string"}}},
        {"enabled": _flag(default=True)},
    ],
}

ROUTES: Table = {
    "fields": [
        {"id": _ID},
        *_TIMES,
        {"name": {"type": "string"}},
        {
            "protocols": {
                "type": "set",
                "required": True,
                "default": ["http", "https"],
                "len_min": 1,
                "elements": {"type": "string", "one_of": ALL_PROTOCOLS},
            }
        },
        {
            "https_redirect_status_code": {
                "type": "integer",
                "required": True,
                "default": 426,
                "one_of": [426, 301, 302, 307, 308],
            }
        },
        {"strip_path": _flag(default=True)},
        {"preserve_host": _flag(default=False)},
        {"request_buffering": _flag(default=True)},
        {"response_buffering": _flag(default=True)},
        {"tags": _TAGS},
        {"service": {"type": "foreign"}},
        {"snis": {"type": "set", "elements": {"type": "string"}}},
        {"sources": {"type": "set", "elements": {"type": "any"}}},
        {"destinations": {"type": "set", "elements": {"type": "any"}}},
        {"methods": {"type": "set", "elements": {"type": "string", "match": "^%u+$"}}},
        {"hosts": {"type": "array", "elements": {"type": "string"}}},
        {
            "paths": {
                "type": "array",
                "elements": {
                    "type": "string",
                    "match_any": {
                        "patterns": ["^/", "^~/"],
                        "err": "should start with: / (fixed path) or ~/ (regex path)",
                    },
                    "match_none": [{"pattern": "//", "err": "must not have empty segments"}],
                    "custom_validator": _valid_route_path,
                },
            }
        },
        {"headers": {"type": "map"}},
        {"regex_priority": {"type": "integer", "default": 0}},
        {"path_handling": {"type": "string", "default": "v0", "one_of": ["v0", "v1"]}},
    ],
}

CONSUMERS: Table = {
    "fields": [
        {"id": _ID},
        *_TIMES,
        {"username": {"type": "string"}},
        {"custom_id": {"type": "string"}},
        {"tags": _TAGS},
    ],
    "entity_checks": [{"at_least_one_of": ["custom_id", "username"]}],
}

CREDENTIALS: Table = {
    "fields": [
        {"id": _ID},
        {"created_at": {"type": "integer"}},
        {"consumer": {"type": "foreign", "required": True}},
        {"key": {"type": "string"}},
        {"ttl": {"type": "integer"}},
        {"tags": _TAGS},
    ],
}

PLUGINS: Table = {
    "fields": [
        {"id": _ID},
        {"name": {"type": "string", "required": True}},
        {"instance_name": {"type": "string"}},
        *_TIMES,
        {"route": {"type": "foreign"}},
        {"service": {"type": "foreign"}},
        {"consumer": {"type": "foreign"}},
        {"config": {"type": "record", "required": True, "fields": []}},
        {
            "protocols": {
                "type": "set",
                "required": True,
                "default": HTTP_PROTOCOLS,
                "elements": {"type": "string", "one_of": ALL_PROTOCOLS},
            }
        },
        {"enabled": _flag(default=True)},
        {"tags": _TAGS},
    ],
}


def service_address(url: str) -> Table:
    """Return the fields of a service that the shorthand `url` sets."""
    parts = urlsplit(url)
    protocol = parts.scheme or "http"
    fields: Table = {
        "protocol": protocol,
        "host": parts.hostname,
        "port": parts.port or _DEFAULT_PORTS.get(protocol, 80),
        "path": parts.path or None,
    }
    return fields


def plugin_schema(config: Table, **fields: Table) -> Table:
    """Return a plugin's definition out of its configuration's and of what it says about other fields."""
    record = {"type": "record", "required": True, **config}
    protocols = next(entry["protocols"] for entry in PLUGINS["fields"] if "protocols" in entry)
    own = {"protocols": protocols, "config": record, **fields}
    return {"fields": [{name: spec} for name, spec in own.items()]}


def _config(*entries: Table) -> Table:
    return {"fields": list(entries)}


_NOT_PER_CONSUMER: Table = {"type": "foreign", "eq": None}

_KEY_AUTH = _config(
    {"key_names": {"type": "array", "required": True, "default": ["apikey"], "elements": _HEADER_NAME}},
    {"hide_credentials": _flag(default=False)},
    {"anonymous": {"type": "string"}},
    {"key_in_header": _flag(default=True)},
    {"key_in_query": _flag(default=True)},
    {"key_in_body": _flag(default=False)},
    {"run_on_preflight": _flag(default=True)},
    {"realm": {"type": "string"}},
)

_PERIODS = ["second", "minute", "hour", "day", "month", "year"]

_RATE_LIMITING = _config(
    *({period: {"type": "number", "gt": 0}} for period in _PERIODS),
    {
        "limit_by": {
            "type": "string",
            "default": "consumer",
            "one_of": ["consumer", "credential", "ip", "service", "header", "path"],
        }
    },
    {"header_name": _HEADER_NAME},
    {"path": {"type": "string", "starts_with": "/"}},
    {"policy": {"type": "string", "default": "local", "one_of": ["local", "redis"]}},
    {"fault_tolerant": _flag(default=True)},
    {"hide_client_headers": _flag(default=False)},
    {"error_code": {"type": "number", "default": 429, "gt": 0}},
    {"error_message": {"type": "string", "default": "API rate limit exceeded"}},
    {"sync_rate": {"type": "number", "required": True, "default": -1}},
)

_PAIRS = {
    "type": "array",
    "default": [],
    "required": True,
    "elements": {"type": "string", "match": "^[^:]+:.*$"},
}


def _transformation(strings: Table) -> Table:
    fields = [{"body": strings}, {"headers": strings}, {"querystring": strings}]
    return {"type": "record", "required": True, "fields": fields}


_REQUEST_TRANSFORMER = _config(
    {"http_method": {"type": "string", "match": "^%u+$"}},
    {"remove": _transformation(_STRINGS)},
    *({action: _transformation(_PAIRS)} for action in ("rename", "replace", "add", "append")),
)


def _valid_termination(config: Table) -> str | None:
    if config.get("message") and (config.get("content_type") or config.get("body")):
        return "message cannot be used with content_type or body"
    if config.get("content_type") and not config.get("body"):
        return "content_type requires a body"
    return None


_REQUEST_TERMINATION = {
    **_config(
        {"status_code": {"type": "integer", "required": True, "default": 503, "between": [100, 599]}},
        {"message": {"type": "string"}},
        {"content_type": {"type": "string"}},
        {"body": {"type": "string"}},
        {"trigger": _HEADER_NAME},
    ),
    "custom_validator": _valid_termination,
}

_AI_PROXY = {
    **_config(
        {
            "route_type": {
                "type": "string",
                "required": True,
                "one_of": ["llm/v1/chat", "llm/v1/completions", "preserve"],
            }
        },
        {
            "auth": {
                "type": "record",
                **_config(
                    {"header_name": {"type": "string", "referenceable": True}},
                    {"header_value": {"type": "string", "referenceable": True, "encrypted": True}},
                    {"param_name": {"type": "string", "referenceable": True}},
                    {"param_value": {"type": "string", "referenceable": True, "encrypted": True}},
                    {"param_location": {"type": "string", "one_of": ["query", "body"]}},
                    {"allow_override": {"type": "boolean", "default": False}},
                ),
            }
        },
        {
            "model": {
                "type": "record",
                "required": True,
                **_config(
                    {
                        "provider": {
                            "type": "string",
                            "required": True,
                            "one_of": [
                                "openai",
                                "azure",
                                "anthropic",
                                "cohere",
                                "mistral",
                                "llama2",
                                "gemini",
                                "bedrock",
                                "huggingface",
                            ],
                        }
                    },
                    {"name": {"type": "string"}},
                    {
                        "options": {
                            "type": "record",
                            **_config(
                                {"max_tokens": {"type": "integer"}},
                                {"input_cost": {"type": "number", "gt": 0}},
                                {"output_cost": {"type": "number", "gt": 0}},
                                {"temperature": {"type": "number", "between": [0, 5]}},
                                {"top_p": {"type": "number", "between": [0, 1]}},
                                {"top_k": {"type": "integer", "between": [0, 500]}},
                                {"llama2_format": {"type": "string", "one_of": ["raw", "openai", "ollama"]}},
                                {"mistral_format": {"type": "string", "one_of": ["openai", "ollama"]}},
                                {"anthropic_version": {"type": "string"}},
                                {"upstream_url": {"type": "string"}},
                                {"upstream_path": {"type": "string"}},
                            ),
                        }
                    },
                ),
            }
        },
        {
            "logging": {
                "type": "record",
                "required": True,
                **_config({"log_statistics": _flag(default=False)}, {"log_payloads": _flag(default=False)}),
            }
        },
        {"response_streaming": {"type": "string", "default": "allow", "one_of": ["allow", "deny", "always"]}},
        {"max_request_body_size": {"type": "integer", "default": 8192, "gt": 0}},
        {"model_name_header": {"type": "boolean", "default": True}},
        {"standin_ai_shape": {"type": "string", "default": "3.9", "one_of": ["3.6", "3.7", "3.8", "3.9"]}},
    ),
    "entity_checks": [{"mutually_required": ["auth.header_name", "auth.header_value"]}],
}

BUNDLED: dict[str, Table] = {
    "key-auth": plugin_schema(_KEY_AUTH, consumer=_NOT_PER_CONSUMER),
    "rate-limiting": {
        **plugin_schema(_RATE_LIMITING),
        "entity_checks": [{"at_least_one_of": [f"config.{period}" for period in _PERIODS]}],
    },
    "request-transformer": plugin_schema(_REQUEST_TRANSFORMER),
    "request-termination": plugin_schema(_REQUEST_TERMINATION),
    "ai-proxy": plugin_schema(_AI_PROXY),
}


def plugin_definition(own: Table) -> Table:
    """Return the definition of a plugin entity whose plugin is defined by `own` (a bundled or a dumped schema)."""
    special: dict[str, Value] = {name: spec for entry in own.get("fields") or [] for name, spec in entry.items()}
    fields = [
        {name: {**spec, **special[name]} if name in special else spec}
        for entry in PLUGINS["fields"]
        for name, spec in entry.items()
    ]
    return {"fields": fields, "entity_checks": own.get("entity_checks") or []}
