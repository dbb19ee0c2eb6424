"""Wrong configurations, one mistake each: what is said is enough to act on, and nothing else is said."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.unit.commands.check.helpers import CASES, above_notes, findings, run

ERROR, WARNING = "error", "warning"
KONNECT = "https://us.api.konghq.com/v3/openmeter/events"
OURS = "plugins[1].config"


@dataclass(frozen=True)
class Case:
    """A file with a mistake, where that is, and words that the person who made it needs."""

    file: str
    level: str
    line: int | None
    path: str | None
    said: tuple[str, ...]

    def __str__(self) -> str:
        return self.file


def case(file: str, level: str, line: int | None, path: str | None, *said: str) -> Case:
    return Case(file, level, line, path, said)


DECLARATIVE = [
    case("endpoint-without-path.yaml", ERROR, 7, f"{OURS}.ingest_endpoint", "has no path", "/api/v1/events"),
    case(
        "endpoint-of-konnect-with-wrong-path.yaml",
        ERROR,
        7,
        f"{OURS}.ingest_endpoint",
        "404",
        "write https://eu.api.konghq.com/v3/openmeter/events",
    ),
    case("endpoint-with-slash.yaml", ERROR, 7, f"{OURS}.ingest_endpoint", "ends with a slash", "answers 404"),
    case("endpoint-without-region.yaml", ERROR, 7, f"{OURS}.ingest_endpoint", KONNECT, "region"),
    case("endpoint-with-placeholder.yaml", ERROR, 7, f"{OURS}.ingest_endpoint", "placeholder", "us or eu"),
    case("endpoint-without-scheme.yaml", ERROR, 7, f"{OURS}.ingest_endpoint", f"a URL such as {KONNECT}"),
    case("endpoint-http.yaml", WARNING, 7, f"{OURS}.ingest_endpoint", "it is http", "write https"),
    case("endpoint-with-password.yaml", WARNING, 7, f"{OURS}.ingest_endpoint", "are not sent", "use a token"),
    case("endpoint-not-verified.yaml", WARNING, 8, f"{OURS}.ssl_verify", "leave ssl_verify out", "--ca-bundle"),
    case("field-unknown.yaml", ERROR, 8, f"{OURS}.meter_api_request", "no such setting", "is it meter_api_requests?"),
    case("field-misplaced.yaml", ERROR, 8, f"{OURS}.max_batch_size", "is it config.queue.max_batch_size?"),
    case("field-camel-case.yaml", ERROR, 8, f"{OURS}.sslVerify", "is it ssl_verify?"),
    case(
        "boolean-in-quotes.yaml", ERROR, 8, f"{OURS}.meter_ai_token_usage", "true or false", "without quotation marks"
    ),
    case("number-in-quotes.yaml", ERROR, 8, f"{OURS}.timeout", "expected a number", "without quotation marks"),
    case(
        "status-codes-as-number.yaml",
        ERROR,
        8,
        f"{OURS}.allow_status_codes[0]",
        "a text",
        'into quotation marks: "200-200"',
    ),
    case("status-codes-single.yaml", ERROR, 8, f"{OURS}.allow_status_codes[0]", "such as 200-299", "404-404"),
    case(
        "status-codes-backwards.yaml",
        ERROR,
        8,
        f"{OURS}.allow_status_codes",
        "299-200 holds no status code",
        "the lower one first",
    ),
    case("status-codes-no-list.yaml", ERROR, 8, f"{OURS}.allow_status_codes", "expected a list", "`[...]`"),
    case("timeout-in-seconds.yaml", WARNING, 8, f"{OURS}.timeout", "in milliseconds", "10000?"),
    case("meters-nothing.yaml", WARNING, 8, f"{OURS}.meter_api_requests", "meters nothing", "set one of them to true"),
    case(
        "subject-without-field.yaml",
        ERROR,
        8,
        f"{OURS}.subject.field",
        "required with look_up_value_in: query",
        "name of the header or query argument",
    ),
    case(
        "subject-place-misspelt.yaml",
        ERROR,
        8,
        f"{OURS}.subject.look_up_value_in",
        "one of application, consumer, header, query",
        "is it header?",
    ),
    case(
        "subject-place-forgotten.yaml",
        ERROR,
        8,
        f"{OURS}.subject.field",
        "without look_up_value_in",
        "nothing is billed",
        "set look_up_value_in: header",
    ),
    case(
        "subject-consumer-field.yaml", ERROR, 8, f"{OURS}.subject.field", "id, username, custom_id", "is it username?"
    ),
    case("subject-header-with-colon.yaml", ERROR, 8, f"{OURS}.subject.field", "a header's name has no blanks, colons"),
    case(
        "subject-header-dropped.yaml",
        WARNING,
        8,
        f"{OURS}.subject.field",
        "ignore_invalid_headers",
        "nothing is billed",
        "letters, digits, - and _",
    ),
    case("subject-is-a-secret.yaml", ERROR, 8, f"{OURS}.subject.field", "secret", "look_up_value_in: consumer"),
    case(
        "subject-claimed.yaml",
        WARNING,
        16,
        "services[1].plugins[1].config.subject.look_up_value_in",
        "clients choose this header themselves",
        "key-auth",
    ),
    case(
        "subject-without-consumers.yaml",
        WARNING,
        4,
        "plugins[0].config.subject.look_up_value_in",
        "nothing is billed",
        "key-auth",
    ),
    case("attribute-incomplete.yaml", ERROR, 9, f"{OURS}.attributes[0].event_property_name", "is required"),
    case(
        "attribute-reserved.yaml",
        WARNING,
        9,
        f"{OURS}.attributes[0].event_property_name",
        "left out",
        "choose another name",
    ),
    case(
        "attribute-is-a-secret.yaml",
        ERROR,
        9,
        f"{OURS}.attributes[0].look_up_value_in",
        "the client's own secret",
        "on disk and in OpenMeter",
        "take the attribute out",
    ),
    case(
        "attribute-header-dropped.yaml",
        WARNING,
        9,
        f"{OURS}.attributes[0].look_up_value_in",
        "the attribute is never there",
        "letters, digits, - and _",
    ),
    case("queue-range.yaml", ERROR, 8, f"{OURS}.queue.max_batch_size", "from 1 to 1,000,000", "found 2,000,000"),
    case(
        "queue-without-batches.yaml",
        WARNING,
        8,
        f"{OURS}.queue.concurrency_limit",
        "heavy traffic",
        "set max_batch_size to 100",
    ),
    case(
        "queue-commented-out.yaml",
        ERROR,
        8,
        f"{OURS}.queue",
        "nothing stands below queue",
        "Kong refuses",
        "remove the line, or put something below it: max_batch_size, ",
    ),
    case(
        "subject-commented-out.yaml",
        ERROR,
        8,
        f"{OURS}.subject",
        "nothing stands below subject",
        "remove the line, or put something below it: look_up_value_in, field",
    ),
    case("queue-delays.yaml", WARNING, 8, f"{OURS}.queue.initial_retry_delay", "longer than the longest"),
    case("queue-milliseconds.yaml", WARNING, 8, f"{OURS}.queue.max_coalescing_delay", "in seconds", "0.5?"),
    case("token-missing.yaml", ERROR, 5, f"{OURS}.api_token", "is required", "bearer token for the ingest endpoint"),
    case(
        "token-of-the-shell.yaml",
        ERROR,
        7,
        f"{OURS}.api_token",
        "$AUTH_TOKEN stands there as it is",
        '${{ env "DECK_AUTH_TOKEN" }}',
    ),
    case("token-of-deck.yaml", WARNING, 7, f"{OURS}.api_token", "DECK_AUTH_TOKEN is not set here", "deck file render"),
    case("token-is-a-name.yaml", ERROR, 7, f"{OURS}.api_token", "the name of the variable DECK_AUTH_TOKEN"),
    case("token-with-line-break.yaml", WARNING, 7, f"{OURS}.api_token", "a line break around the token", "without |"),
    case("token-in-two-lines.yaml", ERROR, 7, f"{OURS}.api_token", "without line breaks", "character 8 of 12"),
    case("token-with-bearer.yaml", WARNING, 7, f"{OURS}.api_token", "Bearer", "write the token alone"),
    case(
        "token-vault-nearly.yaml", ERROR, 7, f"{OURS}.api_token", "nearly a vault reference", "{vault://env/om-token}"
    ),
    case("token-number.yaml", ERROR, 7, f"{OURS}.api_token", "expected a text, found a number", "quotation marks"),
    case("token-placeholder.yaml", ERROR, 7, f"{OURS}.api_token", "a placeholder stands there", "write the value"),
    case("plugin-twice.yaml", ERROR, 14, "services[0].plugins[0]", "plugins[1] is the same plugin", "service orders"),
    case("plugin-misspelt.yaml", ERROR, 5, "consumers[0].plugins[0].name", "write metering-and-billing"),
    case("plugin-settings-outside-config.yaml", ERROR, 5, "plugins[1].subject", "is it config.subject?"),
    case("plugin-protocol.yaml", ERROR, 5, "plugins[1].protocols[1]", "one of grpc, grpcs, http, https"),
    case("plugins-no-list.yaml", ERROR, 2, "plugins", "expected a list of entities", "`- `"),
    case("version-is-a-number.yaml", ERROR, 1, "_format_version", '`_format_version: "3.0"`', "with quotation marks"),
    case("yaml-broken.yaml", ERROR, 6, None, "it is no YAML", "indentation"),
    case("yaml-name-twice.yaml", ERROR, 9, None, "api_token stands twice", "only the last one counts"),
    case("shared-by-deck.yaml", ERROR, 4, "_plugin_configs.metering.ingest_endpoint", f"write {KONNECT}"),
    case("no-metering.yaml", WARNING, None, None, "no plugin metering-and-billing is in it"),
    case("something-else.yaml", ERROR, 1, None, "neither a kong.yaml", "--kong-conf"),
]
BODIES = [
    case("body-shell.json", ERROR, 5, "config.api_token", "$AUTH_TOKEN stands there", "single quotation marks"),
    case(
        "body-flat.json", ERROR, 3, "config.api_token", "a plugin entity has no such member", "config: api_token: ..."
    ),
    case("body-trailing-comma.json", ERROR, 6, None, "it is no JSON", "a comma between two members"),
    case("body-of-patch.json", ERROR, 1, "config.queue.max_batch_sise", "is it max_batch_size?"),
]
MANIFESTS = [
    case("manifest-shell.yaml", ERROR, 9, "config.api_token", "Kubernetes fills in nothing", "configPatches"),
    case("manifest-spec.yaml", ERROR, 11, "spec", "stand at the top, beside `kind`"),
    case("manifest-two-configurations.yaml", ERROR, 4, "config", "with configFrom there can be no config"),
    case("manifest-global-label.yaml", ERROR, 6, "metadata.labels.global", "write `global: 'true'`"),
    case("manifest-without-class.yaml", WARNING, 3, "metadata.annotations", "add `kubernetes.io/ingress.class: kong`"),
]
KONG_CONF = [
    case("conf-plugin-not-loaded.conf", ERROR, None, "plugins", "write `plugins = bundled,metering-and-billing`"),
    case("conf-plugin-misspelt.conf", ERROR, 1, "plugins", "metering-and-billing in the place of metering-billing"),
    case("conf-without-bundled.conf", WARNING, 1, "plugins", "none of its own plugins, such as key-auth"),
    case("conf-no-server.conf", ERROR, None, "pluginserver_names", "does not start", "pluginserver_names = metering"),
    case("conf-socket.conf", ERROR, 3, "pluginserver_metering_socket", "answered with 500",
         "write `pluginserver_metering_socket = /usr/local/kong/metering-and-billing.sock`"),
    case("conf-query-without-dump.conf", ERROR, 5, "pluginserver_metering_query_cmd", "add --dump"),
    case("conf-without-path.conf", ERROR, 4, "pluginserver_metering_start_cmd", "no PATH", "the program's whole path"),
    case("conf-variables.conf", ERROR, 4, "pluginserver_metering_start_cmd", "use flags", "/usr/bin/env"),
    case("conf-no-spool.conf", WARNING, 4, "pluginserver_metering_start_cmd", "loses what waits", "--no-spool out"),
    case("conf-flag-value.conf", ERROR, 4, "pluginserver_metering_start_cmd", "--servers", "the default is used, 1"),
]  # fmt: skip
FINE = ["fine.yaml", "fine-commented-out.yaml", "fine.conf"]
CASES_OF_ONE = [*DECLARATIVE, *BODIES, *MANIFESTS, *KONG_CONF]


def test_there_are_more_than_forty() -> None:
    assert len({one.file for one in CASES_OF_ONE}) == len(CASES_OF_ONE) > 40


@pytest.mark.parametrize("wrong", CASES_OF_ONE, ids=str)
def test_the_mistake_is_said_with_its_place_and_what_to_do(wrong: Case) -> None:
    (found,) = above_notes(findings(CASES / wrong.file))
    assert (found["level"], found["line"], found["path"]) == (wrong.level, wrong.line, wrong.path)
    assert [words for words in wrong.said if words not in f"{found['problem']} {found['remedy']}"] == []
    assert found["remedy"]


@pytest.mark.parametrize("wrong", CASES_OF_ONE, ids=str)
def test_people_read_the_same_and_no_token(wrong: Case) -> None:
    result = run(CASES / wrong.file)
    assert result.exit_code == (1 if wrong.level == ERROR else 0)
    assert all(words in result.output for words in wrong.said)
    assert f":{wrong.line}: {wrong.level}" in result.output or wrong.line is None
    assert "s3cr3t" not in result.output
    assert "1234567" not in result.output


@pytest.mark.parametrize("file", FINE)
def test_nothing_is_said_of_what_is_right(file: str) -> None:
    assert above_notes(findings(CASES / file)) == []
    assert run(CASES / file, "--strict").exit_code == 0


def test_each_file_is_one_of_a_test() -> None:
    elsewhere = {*FINE, *MORE_THAN_ONE}
    assert {path.name for path in CASES.iterdir()} == {one.file for one in CASES_OF_ONE} | elsewhere


MORE_THAN_ONE: dict[str, list[tuple[str | None, str]]] = {
    "manifest-patch-path.yaml": [
        ("configPatches[0].path", "is it api_token?"),
        ("config.api_token", "is required, and not set"),
    ],
    "token-of-deck-without-prefix.yaml": [
        (None, "call it DECK_AUTH_TOKEN"),
        (f"{OURS}.api_token", "DECK_AUTH_TOKEN is not set here"),
    ],
    "conf-server-not-named.conf": [
        ("pluginserver_metering_socket", "metering is not in pluginserver_names"),
        ("pluginserver_meter_query_cmd", "Kong does not start without it"),
    ],
    "conf-unknown-flag.conf": [
        ("pluginserver_metering_start_cmd", "is it --spool-dir?"),
        ("pluginserver_metering_start_cmd", "/data is not understood"),
    ],
    "conf-setting-misspelt.conf": [
        ("pluginserver_metering_query_command", "is it pluginserver_metering_query_cmd?"),
        ("pluginserver_metering_query_cmd", "Kong does not start without it"),
    ],
}


@pytest.mark.parametrize("file", MORE_THAN_ONE)
def test_what_follows_from_a_mistake_is_said_too(file: str) -> None:
    found = above_notes(findings(CASES / file))
    wanted = MORE_THAN_ONE[file]
    missing = [
        words
        for path, words in wanted
        if not any(one["path"] == path and words in f"{one['problem']} {one['remedy']}" for one in found)
    ]
    assert missing == []
    assert len(found) == len(wanted)
