"""Reading what Kong sends as a plugin's configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.config import Entity, PluginConfig, parse_config, parse_entity, remarks
from kong_metering.errors import ConfigError

MINIMAL = {"ingest_endpoint": "https://us.api.konghq.com/v3/openmeter/events", "api_token": "spat_token"}

# As Kong 3.9.1 sent it (transcript start_instance_dbless_vault_reference).
FROM_KONG = (
    '{"attributes":[{"source":"header","look_up_value_in":"x-department","event_property_name":"department"}],'
    '"__key__":"plugins:metering-and-billing:::::0dc6f45b-8f8d-40d2-a504-473544ee190b",'
    '"$refs":{"api_token":"{vault://env/om-token}"},"meter_api_requests":true,'
    '"queue":{"max_batch_size":1,"max_coalescing_delay":1},"__plugin_id":"276df434-3e72-5032-b483-19156b86f1ca",'
    '"subject":{"look_up_value_in":"header","field":"x-tenant-id"},'
    '"ingest_endpoint":"http://127.0.0.1:9100/api/v3/openmeter/events","__seq__":9,'
    '"plugin_instance_name":"global-metering","timeout":10000,"__ws_id":"0dc6f45b-8f8d-40d2-a504-473544ee190b",'
    '"api_token":"om_secret_from_vault"}'
)


def config(**settings: Any) -> dict[str, Any]:
    return {**MINIMAL, **settings}


def error_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


# -- what is understood --------------------------------------------------------------------------------------------


def test_what_is_not_given_has_its_default() -> None:
    parsed = parse_config(MINIMAL)
    assert parsed.model_dump() == {
        **MINIMAL,
        "meter_api_requests": True,
        "meter_ai_token_usage": True,
        "subject": {"look_up_value_in": "consumer", "field": None},
        "attributes": None,
        "allow_status_codes": None,
        "timeout": 10_000,
        "keepalive": 60_000,
        "ssl_verify": True,
        "queue": {
            "max_batch_size": 1,
            "max_coalescing_delay": 1,
            "max_entries": 10_000,
            "max_bytes": None,
            "initial_retry_delay": 0.01,
            "max_retry_delay": 60,
            "max_retry_time": 60,
            "concurrency_limit": 1,
            "failure_threshold": 0,
            "breaker_cooldown": 60,
        },
    }


def test_what_kong_sends_is_understood() -> None:
    raw = json.loads(FROM_KONG)
    parsed = parse_config(raw)
    assert parsed.api_token == "om_secret_from_vault"
    assert (parsed.subject.look_up_value_in, parsed.subject.field) == ("header", "x-tenant-id")
    assert [item.event_property_name for item in parsed.attributes or ()] == ["department"]
    assert parse_entity(raw) == Entity(
        "276df434-3e72-5032-b483-19156b86f1ca", "global-metering (276df434-3e72-5032-b483-19156b86f1ca)"
    )


@pytest.mark.parametrize("name", sorted(PluginConfig.model_fields.keys() - MINIMAL.keys()))
def test_null_means_not_given(name: str) -> None:
    assert parse_config(config(**{name: None})) == parse_config(MINIMAL)


def test_null_inside_a_record_means_not_given() -> None:
    raw = config(subject={"look_up_value_in": None, "field": None}, queue={"max_bytes": None, "max_batch_size": None})
    assert parse_config(raw) == parse_config(MINIMAL)


@pytest.mark.parametrize("empty", [{}, []], ids=["object", "array"])
@pytest.mark.parametrize("name", ["attributes", "allow_status_codes"])
def test_an_empty_lua_table_is_an_empty_list(name: str, empty: object) -> None:
    assert getattr(parse_config(config(**{name: empty})), name) == []


@pytest.mark.parametrize("empty", [{}, []], ids=["object", "array"])
@pytest.mark.parametrize("name", ["subject", "queue"])
def test_an_empty_lua_table_is_an_empty_record(name: str, empty: object) -> None:
    assert parse_config(config(**{name: empty})) == parse_config(MINIMAL)


def test_fields_that_are_not_ours_are_ignored() -> None:
    raw = config(__key__="plugins:x", __seq__=7, __ws_id="w", future=True, queue={"future": 1}, subject={"future": [1]})
    assert parse_config(raw) == parse_config(MINIMAL)


def test_large_values_hold() -> None:
    parsed = parse_config(
        config(
            timeout=0,
            keepalive=1e12,
            queue={
                "max_batch_size": 1_000_000,
                "max_coalescing_delay": 3600,
                "max_entries": 1_000_000,
                "max_bytes": 2**53,
                "initial_retry_delay": 1_000_000,
                "max_retry_delay": 1_000_000,
                "max_retry_time": 1e12,
                "failure_threshold": 1_000_000,
                "breaker_cooldown": 1_000_000,
            },
        )
    )
    assert parsed.timeout == 0
    assert parsed.queue.max_batch_size == 1_000_000
    assert parsed.queue.max_coalescing_delay == 3600
    assert parsed.queue.max_bytes == 2**53


def test_small_values_hold() -> None:
    queue = {"max_coalescing_delay": 0, "initial_retry_delay": 0.001, "max_retry_delay": 0.001, "breaker_cooldown": 0}
    parsed = parse_config(config(queue={**queue, "max_retry_time": -1, "concurrency_limit": -1, "max_entries": 1}))
    assert parsed.queue.max_retry_time == -1
    assert parsed.queue.concurrency_limit == -1


def test_numbers_that_lua_writes_as_floats_are_whole_numbers() -> None:
    parsed = parse_config(config(queue={"max_batch_size": 1e3, "max_bytes": 1e16}))
    assert (parsed.queue.max_batch_size, parsed.queue.max_bytes) == (1000, 10**16)


@pytest.mark.parametrize("look_up", ["consumer", "application"])
def test_a_consumer_or_application_needs_no_field(look_up: str) -> None:
    assert parse_config(config(subject={"look_up_value_in": look_up})).subject.field is None


def test_a_configuration_cannot_be_changed() -> None:
    parsed = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        parsed.queue.max_batch_size = 5


# -- what is nearly right ------------------------------------------------------------------------------------------


def remarks_on(**settings: Any) -> list[str]:
    raw = config(**settings)
    return remarks(raw, parse_config(raw))


def test_a_configuration_that_is_right_is_not_remarked_on() -> None:
    assert remarks_on(subject={"look_up_value_in": "header", "field": "x-tenant-id"}) == []


@pytest.mark.parametrize(
    "written", ["t0k3n\n", "t0k3n\r\n", " t0k3n ", "Bearer t0k3n", "bearer  t0k3n\n", "t0k3n\u2003"]
)
def test_a_token_is_taken_out_of_what_is_around_it_which_is_said_without_it(written: str) -> None:
    assert parse_config(config(api_token=written)).api_token == "t0k3n"
    (remark,) = remarks_on(api_token=written)
    assert "config.api_token: " in remark
    assert "t0k3n" not in remark


@pytest.mark.parametrize("token", ["bearer-of-news", "Bearer_x", "a b"])
def test_a_token_that_only_looks_like_it_is_left(token: str) -> None:
    assert parse_config(config(api_token=token)).api_token == token


@pytest.mark.parametrize("written", ["X-Tenant-ID:", " X-Tenant-ID", "X-Tenant-ID\n", "\x7fX-Tenant-ID: "])
def test_the_name_of_a_header_is_trimmed_which_is_said(written: str) -> None:
    subject = {"look_up_value_in": "header", "field": written}
    assert parse_config(config(subject=subject)).subject.field == "X-Tenant-ID"
    assert remarks_on(subject=subject) == ["config.subject.field: is taken for X-Tenant-ID, without what is around it"]


def test_the_name_of_an_argument_keeps_its_colon() -> None:
    subject = {"look_up_value_in": "query", "field": " tenant: "}
    assert parse_config(config(subject=subject)).subject.field == "tenant:"


def test_the_names_of_an_attribute_are_trimmed_which_is_said() -> None:
    attributes = [{"source": "header", "look_up_value_in": "X-Plan:", "event_property_name": "plan\n"}]
    (attribute,) = parse_config(config(attributes=attributes)).attributes or []
    assert (attribute.look_up_value_in, attribute.event_property_name) == ("X-Plan", "plan")
    assert [remark.partition(":")[0] for remark in remarks_on(attributes=attributes)] == [
        "config.attributes.0.look_up_value_in",
        "config.attributes.0.event_property_name",
    ]


def test_a_header_that_no_request_can_have_is_remarked_on() -> None:
    assert remarks_on(subject={"look_up_value_in": "header", "field": "x tenant"}) == [
        "config.subject.field: no request has a header of the name x tenant"
    ]


# -- what is wrong is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "path", "remedy"),
    [
        ({"ingest_endpoint": None}, "config.ingest_endpoint", "Field required"),
        ({"api_token": None}, "config.api_token", "Field required"),
        ({"ingest_endpoint": 8888}, "config.ingest_endpoint", "a valid string"),
        ({"ingest_endpoint": "openmeter"}, "config.ingest_endpoint", "a URL such as https://"),
        ({"ingest_endpoint": "http://x:99999/"}, "config.ingest_endpoint", "a URL such as https://"),
        ({"ingest_endpoint": "http://x:0/"}, "config.ingest_endpoint", "a URL such as https://"),
        ({"ingest_endpoint": "http://[::1/"}, "config.ingest_endpoint", "a URL such as https://"),
        ({"ingest_endpoint": "https://x.test/a\n"}, "config.ingest_endpoint", "character 17 of 17 is a blank, a line"),
        ({"ingest_endpoint": " https://x.test/a"}, "config.ingest_endpoint", "character 1 of 17 is a blank"),
        ({"ingest_endpoint": "https://x.test/\x07"}, "config.ingest_endpoint", "control character"),
        ({"ingest_endpoint": "x.test/events"}, "config.ingest_endpoint", "does not begin with https:// or http://"),
        ({"ingest_endpoint": "ftp://x.test/events"}, "config.ingest_endpoint", "does not begin with https://"),
        ({"ingest_endpoint": "https:///events"}, "config.ingest_endpoint", "there is no host in it"),
        (
            {"ingest_endpoint": "https://x.test:99999/"},
            "config.ingest_endpoint",
            "port is not a number from 1 to 65535",
        ),
        ({"ingest_endpoint": "https://x.test:http/"}, "config.ingest_endpoint", "port is not a number from 1 to 65535"),
        ({"ingest_endpoint": "http://[::1"}, "config.ingest_endpoint", "its host is none"),
        ({"api_token": ""}, "config.api_token", "at least 1 character"),
        ({"api_token": "spat_zoë"}, "config.api_token", "printable ASCII"),
        ({"api_token": "spat\r\nx-forged: 1"}, "config.api_token", "printable ASCII without line breaks"),
        ({"api_token": "spat\x07"}, "config.api_token", "character 5 of 5 is a control character"),
        ({"api_token": "spät"}, "config.api_token", "character 3 of 4 is not ASCII"),
        ({"api_token": " \n"}, "config.api_token", "there is no token in it"),
        ({"api_token": "Bearer "}, "config.api_token", "there is no token in it"),
        ({"subject": {"look_up_value_in": "header", "field": " : "}}, "config.subject.field", "more than blanks"),
        ({"api_token": ["spat"]}, "config.api_token", "a valid string"),
        ({"meter_api_requests": "perhaps"}, "config.meter_api_requests", "valid boolean"),
        ({"timeout": "soon"}, "config.timeout", "valid number"),
        ({"subject": "consumer"}, "config.subject", "valid dictionary"),
        ({"subject": {"look_up_value_in": "cookie"}}, "config.subject.look_up_value_in", "'header' or 'query'"),
        ({"subject": {"look_up_value_in": "header"}}, "config.subject", "field is required"),
        ({"subject": {"look_up_value_in": "query"}}, "config.subject", "when look_up_value_in is query"),
        ({"subject": {"look_up_value_in": "header", "field": ""}}, "config.subject.field", "at least 1 character"),
        ({"attributes": "x"}, "config.attributes", "valid list"),
        ({"attributes": [{}]}, "config.attributes.0.source", "Field required"),
        ({"attributes": [[]]}, "config.attributes.0.source", "config.attributes.0.event_property_name: Field required"),
        (
            {"attributes": [{"source": "cookie", "look_up_value_in": "a", "event_property_name": "b"}]},
            "config.attributes.0.source",
            "'header' or 'query'",
        ),
        ({"allow_status_codes": ["200-299", "4xx"]}, "config.allow_status_codes.1", "should match pattern"),
        ({"allow_status_codes": ["299-200"]}, "config.allow_status_codes", "the lower one first, as in 200-299"),
        ({"queue": {"max_batch_size": 0}}, "config.queue.max_batch_size", "greater than or equal to 1"),
        ({"queue": {"max_batch_size": 1.5}}, "config.queue.max_batch_size", "valid integer"),
        ({"queue": {"max_batch_size": 1_000_001}}, "config.queue.max_batch_size", "less than or equal to 1000000"),
        ({"queue": {"max_coalescing_delay": 3601}}, "config.queue.max_coalescing_delay", "less than or equal to 3600"),
        ({"queue": {"max_coalescing_delay": -1}}, "config.queue.max_coalescing_delay", "greater than or equal to 0"),
        ({"queue": {"initial_retry_delay": 0}}, "config.queue.initial_retry_delay", "greater than or equal to 0.001"),
        ({"queue": {"max_retry_delay": 0}}, "config.queue.max_retry_delay", "greater than or equal to 0.001"),
        ({"queue": {"concurrency_limit": 2}}, "config.queue.concurrency_limit", "-1 or 1"),
        ({"queue": {"failure_threshold": -1}}, "config.queue.failure_threshold", "greater than or equal to 0"),
        ({"queue": {"breaker_cooldown": -1}}, "config.queue.breaker_cooldown", "greater than or equal to 0"),
        ({"queue": [1]}, "config.queue", "valid dictionary"),
    ],
)
def test_a_bad_setting_is_told_with_its_path_and_what_is_expected(
    settings: dict[str, Any], path: str, remedy: str
) -> None:
    message = error_of(config(**settings))
    assert message.startswith(f"{path}: ")
    assert remedy in message


def test_everything_that_is_wrong_is_told_at_once() -> None:
    message = error_of({"ingest_endpoint": "x", "queue": {"max_entries": 0}, "subject": {"look_up_value_in": "x"}})
    assert [part.partition(":")[0] for part in message.split("; ")] == [
        "config.ingest_endpoint",
        "config.api_token",
        "config.subject.look_up_value_in",
        "config.queue.max_entries",
    ]


def test_a_vault_reference_that_did_not_resolve_is_named() -> None:
    message = error_of(config(api_token="", **{"$refs": {"api_token": "{vault://env/om-token}"}}))
    assert "config.api_token" in message
    assert "{vault://env/om-token}: does it resolve?" in message


@pytest.mark.parametrize("references", [None, [], {}, "x", {"ingest_endpoint": "{vault://env/url}"}])
def test_other_references_do_not_matter(references: object) -> None:
    assert "vault" not in error_of(config(api_token="", **{"$refs": references}))


BAD_SETTINGS = st.sampled_from(
    [
        {},
        {"ingest_endpoint": 5},
        {"queue": {"max_batch_size": 0}},
        {"subject": {"look_up_value_in": "header"}},
        {"attributes": [{"source": "x"}]},
        {"allow_status_codes": ["9"]},
    ]
)


@given(st.text(max_size=30), BAD_SETTINGS, st.booleans())
def test_the_token_is_never_told(noise: str, bad: dict[str, Any], in_a_list: bool) -> None:  # noqa: FBT001
    token = f"sp\u00e4t_s3cr3t{noise}"  # never usable: not ASCII
    raw = {**MINIMAL, **bad, "api_token": [token] if in_a_list else token}
    message = error_of(raw)
    assert "s3cr3t" not in message
    assert "config.api_token" in message


@given(st.text(alphabet=st.characters(codec="ascii"), min_size=1).map("s3cr3t{}".format), BAD_SETTINGS)
def test_a_good_token_is_not_told_when_something_else_is_wrong(token: str, bad: dict[str, Any]) -> None:
    message = error_of({**MINIMAL, "queue": {"max_entries": 0}, **bad, "api_token": token, "ssl_verify": "perhaps"})
    assert "s3cr3t" not in message


def test_a_password_in_the_endpoint_is_not_told() -> None:
    assert "hunter2" not in error_of(config(ingest_endpoint="https://me:hunter2@open meter/"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*PluginConfig.model_fields, "$refs", "__plugin_id"]), json_values))
def test_any_configuration_is_either_taken_or_explained(raw: dict[str, Any]) -> None:
    assert parse_entity(raw).id
    try:
        message = parse_config(raw).model_dump_json()
    except ConfigError as error:
        message = str(error)
    assert message.startswith(("{", "config"))


# -- which entity it is of -----------------------------------------------------------------------------------------


def test_the_entity_is_kongs_plugin_id() -> None:
    assert parse_entity(config(__plugin_id="276df434")) == Entity("276df434", "276df434")


def test_the_entity_knows_its_vault_references() -> None:
    raw = config(__plugin_id="276df434", **{"$refs": {"api_token": "{vault://env/om-token}", "x": 5}})
    assert parse_entity(raw).references == {"api_token": "{vault://env/om-token}"}


def test_an_instance_name_is_how_the_log_calls_it() -> None:
    raw = config(__plugin_id="276df434", plugin_instance_name="orders")
    assert parse_entity(raw) == Entity("276df434", "orders (276df434)")


@pytest.mark.parametrize("plugin_id", [None, "", 5, {}])
def test_without_an_id_the_same_configuration_is_the_same_entity(plugin_id: object) -> None:
    raw = config(__plugin_id=plugin_id, __seq__=1, queue={"max_entries": 5})
    again = dict(reversed(config(__plugin_id=plugin_id, __seq__=2, queue={"max_entries": 5}).items()))
    other = config(__plugin_id=plugin_id, queue={"max_entries": 6})
    assert parse_entity(raw).id == parse_entity(again).id != parse_entity(other).id
    assert MINIMAL["api_token"] not in parse_entity(raw).name


@pytest.mark.parametrize("name", [None, "", 5, []])
def test_an_entity_without_a_name_is_called_by_its_id(name: object) -> None:
    assert parse_entity(config(__plugin_id="276df434", plugin_instance_name=name)).name == "276df434"
