"""`kong-metering check` as a program: what it takes, what it prints, how it ends."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kong_metering.commands.check import command
from kong_metering.commands.check.rules import RULES
from kong_metering.commands.check.violations import Kind
from tests.support.settings import BY_HEADER
from tests.unit.commands.check.helpers import CASES, above_notes, findings, run
from tests.unit.commands.helpers import PROGRAM, REPOSITORY

EXAMPLES = REPOSITORY / "examples"
SETTINGS = {"ingest_endpoint": "https://us.api.konghq.com/v3/openmeter/events", "api_token": "spat_s3cr3t"}
DECK = {"DECK_AUTH_TOKEN": "spat_s3cr3t", "DECK_SUBJECT_HEADER": "x-tenant-id"}


@pytest.mark.parametrize("scope", ["global", "service", "route", "consumer"])
def test_the_missions_files_for_deck_are_right_once_their_variables_are_set(scope: str) -> None:
    rules = {one["rule"] for one in above_notes(findings(EXAMPLES / "deck" / f"{scope}.yaml", **DECK))}
    # A consumer is authenticated; elsewhere the header is the client's to choose, as the page on security says.
    assert rules == (set() if scope == "consumer" else {"claimed-subject"})


@pytest.mark.parametrize("scope", ["global", "service", "route", "consumer"])
def test_the_missions_manifests_ask_for_what_the_shell_is_to_fill_in(scope: str) -> None:
    found = above_notes(findings(EXAMPLES / "kic" / f"{scope}.yaml"))
    assert [(one["rule"], one["path"]) for one in found] == [
        ("not-filled-in", "config.api_token"),
        ("not-filled-in", "config.subject.field"),
    ]
    filled = (EXAMPLES / "kic" / f"{scope}.yaml").read_text("utf-8").replace("$AUTH_TOKEN", "t0ken")
    assert above_notes(findings("-", stdin=filled.replace("$SUBJECT_HEADER", "x-tenant-id"))) == []


@pytest.mark.parametrize("kind", ["admin-api", "konnect-api"])
def test_the_missions_bodies_are_right_once_they_are_filled_in(kind: str) -> None:
    for request in json.loads((EXAMPLES / kind / "requests.json").read_text("utf-8")):
        text = json.dumps(request["body"]).replace("$AUTH_TOKEN", "t0ken").replace("$SUBJECT_HEADER", "x-tenant-id")
        assert above_notes(findings("-", stdin=text)) == []


def test_the_example_of_kong_conf_is_right() -> None:
    assert above_notes(findings("--kong-conf", REPOSITORY / "kong.conf.example")) == []


def test_the_variables_of_this_environment_are_not_those_of_kongs_plugin_server() -> None:
    environment = {"KONG_METERING_SOCKET_NAME": "other.sock", "KONG_METERING_NO_SPOOL": "1"}
    assert above_notes(findings(CASES / "fine.conf", **environment)) == []


@pytest.mark.parametrize(
    ("file", "tool"),
    [("token-of-deck.yaml", "decK"), ("manifest-shell.yaml", "the Kubernetes ingress controller")],
)
def test_start_cmd_beside_a_tool_that_it_breaks_is_a_warning(file: str, tool: str) -> None:
    found = findings(CASES / file, "--kong-conf", CASES / "fine.conf")
    (said,) = [one for one in found if one["rule"] == "start-cmd"]
    assert (said["level"], said["line"], said["file"]) == ("warning", 4, str(CASES / "fine.conf"))
    assert f"Kong/kong#14260), and {tool} asks for it" in said["problem"]
    assert "leave start_cmd out" in said["remedy"]


def test_start_cmd_alone_is_good_to_know() -> None:
    (said,) = findings(CASES / "fine.conf")
    assert (said["level"], said["rule"]) == ("note", "start-cmd")


def test_secrets_are_said_to_be_unread() -> None:
    found = findings(CASES / "manifest-patch-path.yaml")
    assert "is in a Secret, which is not read here" in {one["rule"]: one["problem"] for one in found}["secret-not-read"]


def test_a_configuration_out_of_a_secret_is_checked_alone() -> None:
    text = '{"ingest_endpoint": "https://eu.api.konghq.com/v3/openmeter/events", "subject": {"field": 7}}'
    assert [(one["path"], one["rule"]) for one in above_notes(findings("-", stdin=text))] == [
        ("api_token", "missing"),
        ("subject.field", "wrong-type"),
    ]


def test_what_the_admin_api_gives_can_be_checked() -> None:
    entity = {"id": "x", "name": "metering-and-billing", "config": {**SETTINGS, "attributes": None}}
    text = json.dumps({"data": [{"name": "key-auth", "config": {}}, entity], "next": None})
    assert above_notes(findings("-", stdin=text)) == []
    wrong = json.dumps({"data": [{**entity, "config": {"queue": {"max_entries": "x"}}}]})
    assert "data[0].config.queue.max_entries" in {one["path"] for one in findings("-", stdin=wrong)}


@pytest.mark.parametrize("name", ["subject", "queue"])
def test_null_in_the_place_of_settings_is_refused_in_a_patch_too(name: str) -> None:
    for text in (
        json.dumps({"config": {name: None}}),
        json.dumps({"name": "metering-and-billing", "config": SETTINGS | {name: None}}),
    ):
        assert [(one["path"], one["rule"]) for one in above_notes(findings("-", stdin=text))] == [
            (f"config.{name}", "nothing-below")
        ]
    assert above_notes(findings("-", stdin='{"config": {"attributes": null}}')) == []


@pytest.mark.parametrize(("code", "said"), [(404, '"404-404"'), (1404, "404-404 for one"), (4.5, "404-404 for one")])
def test_a_status_code_without_quotation_marks_is_said_in_its_final_form(code: float, said: str) -> None:
    text = json.dumps({"name": "metering-and-billing", "config": {**SETTINGS, "allow_status_codes": [code]}})
    (found,) = above_notes(findings("-", stdin=text))
    assert (found["rule"], said in found["remedy"]) == ("wrong-type", True)


@pytest.mark.parametrize(
    ("header", "is_dropped"), [("x_tenant-1", False), ("X-Tenant", False), ("x.y", True), ("x$", True), ("ü", True)]
)
def test_a_header_that_nginx_drops_is_said(header: str, is_dropped: bool) -> None:  # noqa: FBT001 - a parameter of a test
    config = {**SETTINGS, "subject": {"look_up_value_in": "header", "field": header}}
    found = above_notes(findings("-", stdin=json.dumps({"name": "metering-and-billing", "config": config})))
    assert [(one["rule"], one["level"]) for one in found] == ([("dropped-header", "warning")] if is_dropped else [])
    config["subject"] = {"look_up_value_in": "query", "field": header}
    assert above_notes(findings("-", stdin=json.dumps({"name": "metering-and-billing", "config": config}))) == []


HEADERS = [
    ("Proxy-Authorization", "error"),
    *((name, "warning") for name in ("cookie", "apikey", "X-Api-Key", "api-key")),
]


def test_null_in_the_place_of_a_default_is_refused_as_kong_refuses_it() -> None:
    """As seen on Kong 3.9."""
    entity = {"name": "metering-and-billing", "config": SETTINGS, "protocols": None}
    (found,) = above_notes(findings("-", stdin=json.dumps(entity)))
    assert (found["rule"], found["path"]) == ("nothing-below", "protocols")
    assert "remove the line" in found["remedy"]
    config = {**SETTINGS, "subject": {"look_up_value_in": None}}
    (found,) = above_notes(findings("-", stdin=json.dumps({"name": "metering-and-billing", "config": config})))
    assert (found["rule"], found["path"]) == ("missing", "config.subject.field")
    assert "is required with look_up_value_in: null" in found["problem"]


@pytest.mark.parametrize(("header", "level"), HEADERS)
def test_a_header_with_a_secret_is_said_of_the_subject_and_of_attributes_alike(header: str, level: str) -> None:
    attributes = [
        {"source": "header", "look_up_value_in": "x-dept", "event_property_name": "department"},
        {"source": "header", "look_up_value_in": header, "event_property_name": "client"},
        {"source": "query", "look_up_value_in": header, "event_property_name": "of-the-query"},
    ]
    subject = {"look_up_value_in": "header", "field": header}
    entity = {"name": "metering-and-billing", "config": {**SETTINGS, "subject": subject, "attributes": attributes}}
    found = above_notes(findings("-", stdin=json.dumps(entity)))
    assert [(one["rule"], one["level"], one["path"]) for one in found] == [
        ("secret-as-subject", level, "config.subject.field"),
        ("secret-as-attribute", level, "config.attributes[1].look_up_value_in"),
    ]


def test_authentication_counts_on_the_service_the_route_and_all_routes() -> None:
    def document(**where: Any) -> str:
        metering = {"name": "metering-and-billing", "config": {**SETTINGS, "subject": BY_HEADER}}
        auth = {"name": "key-auth"}
        routes = [
            {"name": "a", "plugins": [auth] if where.get("a") else []},
            {"name": "b", "plugins": [auth] if where.get("b") else []},
        ]
        service = {"name": "s", "routes": routes, "plugins": [metering, *([auth] if where.get("service") else [])]}
        plugins = [auth] if where.get("everywhere") else []
        return json.dumps({"_format_version": "3.0", "services": [service], "plugins": plugins})

    def warned(**where: Any) -> bool:
        return "claimed-subject" in {one["rule"] for one in above_notes(findings("-", stdin=document(**where)))}

    assert warned()
    assert warned(a=True)
    assert not warned(a=True, b=True)
    assert not warned(service=True)
    assert not warned(everywhere=True)


def test_warnings_count_with_strict_and_rules_can_be_left_out() -> None:
    file = CASES / "endpoint-http.yaml"
    assert run(file).exit_code == 0
    assert run(file, "--strict").exit_code == 1
    assert run(file, "--strict", "--ignore", "http-with-token").exit_code == 0
    unknown = run(file, "--ignore", "no-such-rule")
    assert unknown.exit_code == 2
    assert "'no-such-rule' is not one of 'api-version', 'application', " in unknown.stderr


def test_all_rules_are_known_by_their_names() -> None:
    sources = [ast.parse(path.read_text("utf-8")) for path in Path(command.__file__).parent.glob("*.py")]
    calls = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Call)]
    finders = {"find", "finding", "Finding", "_missing"}
    finding = [call for call in calls if ast.unparse(call.func).rpartition(".")[2] in finders and len(call.args) > 1]
    named = {call.args[1].value for call in finding if isinstance(call.args[1], ast.Constant)}
    assert sorted(named | {kind.value for kind in Kind}, key=str) == list(RULES)


@pytest.mark.parametrize("arguments", [[], ["/nowhere/kong.yaml"], ["--kong-conf", "/nowhere/kong.conf"], ["--jsn"]])
def test_a_wrong_call_and_a_missing_file_end_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_help_tells_the_exit_statuses_a_line_each() -> None:
    assert "  1  errors; with --strict, warnings too\n" in run("--help").output


def test_a_file_that_is_no_text_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "kong.yaml").write_bytes(b"\xff\xfe\x00")
    result = run(tmp_path / "kong.yaml")
    assert result.exit_code == 2
    assert "is not in UTF-8" in result.output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "[]",
        "7",
        "- a\n- b\n",
        "{",
        "&a [*a]",
        "plugins: &a [*a]",
        "a: !!int s3cr3t",
        "!!binary s3cr3t: 1",
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_whatever_is_in_a_file_it_is_told_and_not_raised(text: str) -> None:
    result = run("-", stdin=text)
    assert result.exit_code == 1
    assert "s3cr3t" not in result.output


def test_of_an_empty_file_it_is_said_that_it_is_empty() -> None:
    assert [one["rule"] for one in findings("-", stdin="# nothing\n")] == ["empty"]


def test_an_alias_that_holds_itself_ends() -> None:
    text = "_format_version: '3.0'\nplugins:\n- name: metering-and-billing\n  config: &a\n    subject: *a\n"
    assert run("-", stdin=text).exit_code == 1
    assert run("-", stdin="_format_version: '3.0'\nservices: &s\n- services: *s\n  routes: *s\n").exit_code == 0


def test_values_that_could_be_tokens_in_the_wrong_place_are_not_printed() -> None:
    token = "spat_s3cr3t"
    config = {
        "ingest_endpoint": token,
        "api_token": f"Bearer  {token}\u00e9",
        "subject": {"look_up_value_in": token, "field": [token]},
        "allow_status_codes": [token],
        "timeout": token,
        "url": f"https://{token}@x/",
        "queue": token,
    }
    text = json.dumps({"name": "metering-and-billing", "config": config})
    for arguments in (["-"], ["-", "--json"]):
        result = run(*arguments, stdin=text)
        assert result.exit_code == 1
        assert "s3cr3t" not in result.output


def test_a_token_that_breaks_the_yaml_is_not_printed() -> None:
    for text in ("plugins:\n- config:\n    api_token: *s3cr3t\n", "a: !s3cr3t x\n", "a: 's3cr3t\nb: 1\n"):
        result = run("-", stdin=text)
        assert result.exit_code == 1
        assert "s3cr3t" not in result.output


def test_a_pipe_gets_no_colours_and_each_problem_in_a_line() -> None:
    done = subprocess.run(
        [*PROGRAM, "check", str(CASES / "queue-range.yaml")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    first, problem, remedy, summary = done.stdout.splitlines()
    assert first.endswith("queue-range.yaml:8: error [wrong-value] plugins[1].config.queue.max_batch_size")
    assert problem == "  expected a whole number from 1 to 1,000,000, found 2,000,000"
    assert remedy.startswith("  -> set max_batch_size to a whole number from 1 to 1,000,000: how many events leave")
    assert summary == "1 error in 1 metering plugin."


def test_the_page_shows_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "commands.md").read_text("utf-8")
    configuration = page.partition("```yaml\n")[2].partition("```")[0]
    shown = page.partition("$ kong-metering check kong.yaml\n")[2].partition("```")[0]
    (tmp_path / "kong.yaml").write_text(configuration, "utf-8")
    monkeypatch.chdir(tmp_path)
    assert run("kong.yaml").output == shown
