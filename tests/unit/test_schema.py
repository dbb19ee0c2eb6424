"""The schema that Kong gets, against the vendor's published one and against what Kong can check."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from kong_pdk.module import Module

import kong_metering
from kong_metering import PLUGIN_NAME, plugin
from kong_metering.config import parse_config
from kong_metering.errors import ConfigError
from kong_metering.plugin_identity import PRIORITY
from kong_metering.schema import config_fields, plugin_info, plugin_schema
from kong_metering_sandbox.gateway.schema import validate_field
from tests.support.records import DATA

Field = dict[str, Any]

VENDOR = json.loads((DATA / "kong-3.16-metering-and-billing.schema.json").read_text("utf-8"))
VENDOR_CONFIG: Field = VENDOR["properties"]["config"]

# What a field is called in Kong's schema language that is a JSON Schema type in the vendor's file.
KONG_TYPES = {
    "string": "string",
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
    "array": "array",
    "object": "record",
}
# Everything that Kong 3.9.1 was seen to accept in an external plugin's schema.
KONG_KEYS = frozenset(
    {
        "type",
        "fields",
        "elements",
        "default",
        "required",
        "one_of",
        "between",
        "len_min",
        "match",
        "match_none",
        "err",
        "referenceable",
        "encrypted",
        "description",
        "entity_checks",
    }
)


def vendor_fields(schema: Field = VENDOR_CONFIG, path: str = "config") -> dict[str, Field]:
    """Flatten the vendor's file: every field by its path, `[]` for the elements of an array."""
    found = {path: schema}
    for name, field in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        found |= vendor_fields({**field, "x-required": required}, f"{path}.{name}")
    if "items" in schema:
        found |= vendor_fields(schema["items"], f"{path}[]")
    return found


def kong_fields(schema: Field | None = None, path: str = "config") -> dict[str, Field]:
    """Flatten our schema in the same way."""
    if schema is None:
        schema = {"type": "record", "fields": config_fields()}
    found = {path: schema}
    for entry in schema.get("fields", ()):
        ((name, field),) = entry.items()
        found |= kong_fields(field, f"{path}.{name}")
    if "elements" in schema:
        found |= kong_fields(schema["elements"], f"{path}[]")
    return found


OURS = kong_fields()
THEIRS = vendor_fields()
every_field = pytest.mark.parametrize("path", sorted(THEIRS))
every_named_field = pytest.mark.parametrize(
    "path", sorted(path for path in OURS if not path.endswith(("config", "[]")))
)


def test_both_have_the_same_fields() -> None:
    assert sorted(OURS) == sorted(THEIRS)


@every_field
def test_the_type_is_the_vendors(path: str) -> None:
    assert OURS[path]["type"] == KONG_TYPES[THEIRS[path]["type"]]


@every_field
def test_the_default_is_the_vendors(path: str) -> None:
    assert OURS[path].get("default") == THEIRS[path].get("default")
    assert isinstance(OURS[path].get("default"), bool) == isinstance(THEIRS[path].get("default"), bool)


@every_field
def test_the_choices_are_the_vendors(path: str) -> None:
    assert OURS[path].get("one_of") == THEIRS[path].get("enum")


@every_field
def test_the_range_is_the_vendors(path: str) -> None:
    theirs = THEIRS[path]
    limits = [theirs[name] for name in ("minimum", "maximum") if name in theirs]
    assert OURS[path].get("between") == (limits or None)


@every_field
def test_it_is_required_where_the_vendor_requires_it(path: str) -> None:
    is_record = OURS[path]["type"] == "record"
    # Kong fills the defaults of a record in only where the record is required; it never has to be given.
    assert OURS[path].get("required", False) == THEIRS[path].get("x-required", False) or is_record


@every_field
def test_the_marks_are_the_vendors(path: str) -> None:
    assert OURS[path].get("referenceable", False) == THEIRS[path].get("x-referenceable", False)
    assert OURS[path].get("encrypted", False) == THEIRS[path].get("x-encrypted", False)


@pytest.mark.parametrize("name", ["queue", "subject"])
def test_a_record_that_is_not_given_has_its_defaults(name: str) -> None:
    assert OURS[f"config.{name}"]["required"] is True


@every_named_field
def test_each_field_has_a_description_of_our_own(path: str) -> None:
    description = OURS[path]["description"]
    assert len(description) > 20
    assert description.endswith(".")
    assert description != THEIRS[path].get("description")


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("config.timeout", "milliseconds"),
        ("config.keepalive", "milliseconds"),
        ("config.queue.max_bytes", "bytes"),
        ("config.queue.max_coalescing_delay", "seconds"),
        ("config.queue.initial_retry_delay", "seconds"),
        ("config.queue.max_retry_delay", "seconds"),
        ("config.queue.max_retry_time", "seconds"),
        ("config.queue.breaker_cooldown", "seconds"),
    ],
)
def test_durations_and_sizes_tell_their_unit(path: str, unit: str) -> None:
    assert OURS[path]["description"].endswith(f"Unit: {unit}.")


def test_no_other_field_has_a_unit() -> None:
    assert sum("Unit:" in field.get("description", "") for field in OURS.values()) == 8


@pytest.mark.parametrize("path", sorted(OURS))
def test_only_what_kong_knows_stands_in_it(path: str) -> None:
    assert set(OURS[path]) <= KONG_KEYS


# -- what Kong can check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "config.api_token",
        "config.subject.field",
        "config.attributes[].look_up_value_in",
        "config.attributes[].event_property_name",
    ],
)
def test_an_empty_text_is_refused(path: str) -> None:
    assert OURS[path]["len_min"] == 1


def matches(lua_pattern: str, value: str) -> bool:
    """Match as Lua does; ours have no quantifier but `*`, `+`, `?`, and no class but `%s`."""
    pattern = re.sub(r"%(.)", r"\\\1", lua_pattern)
    return re.search(re.sub(r"\$$", r"\\Z", pattern), value) is not None  # Python's `$` also stands before a line feed


USABLE_URLS = [
    "https://us.api.konghq.com/v3/openmeter/events",
    "http://127.0.0.1:8888/api/v1/events",
    "http://[::1]:8888/api/v1/events",
    "http://collector",
    "https://user:password@openmeter.example/events?a=b",
]
UNUSABLE_URLS = [
    "",
    "us.api.konghq.com/v3/openmeter/events",
    "ftp://openmeter.example/events",
    "https://",
    "https:///events",
    "https://openmeter.example/a b",
    "https://open meter.example/",
    " https://openmeter.example/",
    "https://openmeter.example/\n",
]


@pytest.mark.parametrize("url", USABLE_URLS)
def test_kong_takes_the_endpoints_that_we_take(url: str) -> None:
    assert matches(OURS["config.ingest_endpoint"]["match"], url)
    assert parse_config({"api_token": "om_token", "ingest_endpoint": url}).ingest_endpoint == url


@pytest.mark.parametrize("url", UNUSABLE_URLS)
def test_kong_refuses_what_is_no_endpoint_before_we_see_it(url: str) -> None:
    assert not matches(OURS["config.ingest_endpoint"]["match"], url)
    with pytest.raises(ConfigError):
        parse_config({"api_token": "om_token", "ingest_endpoint": url})


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("config.ingest_endpoint", "us.api.konghq.com", "expected a URL such as https://us.api.konghq.com"),
        ("config.allow_status_codes[]", "200", "expected a range of status codes such as 200-299"),
    ],
)
def test_kong_says_what_is_expected_where_a_pattern_decides(path: str, value: str, words: str) -> None:
    """Measured on a real 3.9.3: POST /schemas/plugins/validate answers with these very words."""
    assert words in str(validate_field(OURS[path], value))


@pytest.mark.parametrize("codes", ["200-299", "404-404", "100-599"])
def test_kong_takes_ranges_of_status_codes(codes: str) -> None:
    assert matches(OURS["config.allow_status_codes[]"]["match"], codes)


@pytest.mark.parametrize("codes", ["", "200", "2xx", "200-", "-299", "200 - 299", "200-299,400-499", "200-2999"])
def test_kong_refuses_what_is_no_range_of_status_codes(codes: str) -> None:
    assert not matches(OURS["config.allow_status_codes[]"]["match"], codes)
    with pytest.raises(ConfigError):
        parse_config({"api_token": "t", "ingest_endpoint": "http://x", "allow_status_codes": [codes]})


def test_a_field_is_required_for_a_subject_in_a_header_or_query() -> None:
    check, _ = OURS["config.subject"]["entity_checks"]
    assert check == {
        "conditional": {
            "if_field": "look_up_value_in",
            "if_match": {"one_of": ["header", "query"]},
            "then_field": "field",
            "then_match": {"required": True},
        }
    }
    assert {path for path, field in OURS.items() if "entity_checks" in field} == {
        "config.subject",
        "config.attributes[]",
    }


# -- the whole entity ----------------------------------------------------------------------------------------------


def refusals(subject: Field) -> object:
    """Check a subject by our schema, as Kong does; the stand-in's rules are compared with Kong's own elsewhere."""
    return validate_field(OURS["config.subject"], subject)


@pytest.mark.parametrize("field", ["x-tenant-id", "X_Tenant.Id", "a"])
@pytest.mark.parametrize("place", ["header", "query", "consumer"])
def test_kong_takes_names_that_can_be_found(place: str, field: str) -> None:
    assert refusals({"look_up_value_in": place, "field": field}) is None


@pytest.mark.parametrize("field", ["x-tenant-id ", "\tx-tenant-id", "x-tenant-id\n", "x-\x00id", "x-\x7fid", " "])
@pytest.mark.parametrize("place", ["header", "query", "consumer"])
def test_kong_refuses_names_with_blanks_around_or_control_characters(place: str, field: str) -> None:
    assert refusals({"look_up_value_in": place, "field": field}) is not None


@pytest.mark.parametrize("field", ["X-Tenant-ID:", "x tenant", "x:tenant"])
def test_kong_refuses_blanks_and_colons_in_the_name_of_a_header_and_not_of_an_argument(field: str) -> None:
    assert "a header's name has no blanks" in str(refusals({"look_up_value_in": "header", "field": field}))
    assert refusals({"look_up_value_in": "query", "field": field}) is None


@pytest.mark.parametrize("source", ["header", "query"])
def test_kong_checks_the_names_of_attributes_in_the_same_way(source: str) -> None:
    spec = OURS["config.attributes"]
    good = {"source": source, "look_up_value_in": "x-plan", "event_property_name": "pricing plan"}
    assert validate_field(spec, [good]) is None
    assert validate_field(spec, [{**good, "look_up_value_in": "x-plan "}]) is not None
    assert validate_field(spec, [{**good, "event_property_name": "plan\n"}]) is not None
    assert (validate_field(spec, [{**good, "look_up_value_in": "X-Plan:"}]) is None) == (source == "query")


def test_the_plugin_is_for_the_vendors_protocols() -> None:
    protocols, _ = plugin_schema()["fields"]
    expected = ["grpc", "grpcs", "http", "https"]
    assert protocols == {
        "protocols": {
            "type": "set",
            "required": True,
            "default": expected,
            "elements": {"type": "string", "one_of": expected},
        }
    }
    assert VENDOR["properties"]["protocols"]["default"] == expected


def test_the_schema_holds_the_configuration() -> None:
    schema = plugin_schema()
    added_by_kong = {"consumer", "route", "service"}
    assert {name for entry in schema["fields"] for name in entry} == set(VENDOR["properties"]) - added_by_kong
    assert schema["name"] == "metering-and-billing"
    assert schema["fields"][1] == {"config": {"type": "record", "required": True, "fields": config_fields()}}
    assert VENDOR["required"] == ["config"]


def test_the_schema_survives_json() -> None:
    info = plugin_info(["access", "log"])
    assert json.loads(json.dumps(info)) == info


def test_kong_is_told_what_its_query_command_wants_to_know() -> None:
    info = plugin_info(iter(["access", "log"]))
    assert info == {
        "Name": PLUGIN_NAME,
        "Phases": ["access", "log"],
        "Priority": 850,
        "Version": kong_metering.__version__,
        "Schema": plugin_schema(),
    }


def test_the_priority_is_after_authentication_and_limits_and_before_transformers() -> None:
    rate_limiting, request_transformer = 910, 801
    assert rate_limiting > PRIORITY > request_transformer


def test_the_module_is_an_ordinary_one_for_kong_pdks_server() -> None:
    module = Module("metering-and-billing", module=plugin)
    assert module.cls is plugin.Plugin
    assert sorted(module.phases) == ["access", "log"]
    assert module.priority == 850
    assert module.version == kong_metering.__version__
    assert module.schema == config_fields()
