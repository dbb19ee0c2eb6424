"""`kong-metering send-test-event`, to real servers and to none."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kong_metering.commands.main import program
from kong_metering.commands.testevent.advice import advice_for
from kong_metering.commands.testevent.post import Answer
from kong_metering.events import EVENT_FIELDS
from tests.unit.ingest.ingest_server import Exchange, IngestServer, Reaction, answer, broken_off, running

TOKEN = {"KONG_METERING_API_TOKEN": "s3cr3t-t0ken"}


def run(*arguments: object, stdin: str | None = None, **environment: str) -> Result:
    result = CliRunner(env=environment).invoke(program, ["send-test-event", *map(str, arguments)], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "s3cr3t" not in result.output
    return result


def told(url: str, *arguments: object) -> dict[str, Any]:
    result = run("--ingest-endpoint", url, "--json", *arguments, **TOKEN)
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["accepted"] == (result.exit_code == 0)
    return {**found, "exit": result.exit_code}


@pytest.fixture
def refusing_url() -> Iterator[str]:
    """Give a URL whose port nobody listens on, and nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/events"


def test_an_event_that_bills_nobody_is_sent_with_the_token(endpoint: IngestServer) -> None:
    result = run("--ingest-endpoint", endpoint.url, **TOKEN)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Accepted. {endpoint.url} took the event ")
    assert "It bills nobody." in result.stdout
    (request,) = endpoint.requests
    assert request.headers["Authorization"] == "Bearer s3cr3t-t0ken"
    assert request.headers["Content-Type"] == "application/cloudevents+json"
    (event,) = request.events
    assert (event["type"], event["subject"]) == ("kong.metering_test", "kong-metering-test")
    assert event["type"] not in EVENT_FIELDS
    assert event["id"] in result.stdout


def test_each_event_has_an_id_of_its_own_and_the_subject_that_was_asked_for(endpoint: IngestServer) -> None:
    sent = [told(endpoint.url, "--subject", subject)["event"] for subject in ("acme", "acme", "ünïcode")]
    assert len({one["id"] for one in sent}) == 3
    assert [one["subject"] for one in sent] == ["acme", "acme", "ünïcode"]
    assert [request.events[0]["id"] for request in endpoint.requests] == [one["id"] for one in sent]


ANSWERS: list[tuple[Reaction, str, str]] = [
    (answer(401, b'{"detail": "s3cr3t-t0ken is unknown"}'), "token", "spat_"),
    (answer(403), "forbidden", "the right to ingest events"),
    (answer(404), "path", "/api/v1/events or /api/v3/openmeter/events"),
    (answer(405), "path", "Konnect at /v3/openmeter/events"),
    (
        answer(301, headers={"Location": "https://elsewhere.example/events"}),
        "redirect",
        "write the URL that it points to",
    ),
    (answer(400, b'{"detail": "no such type"}'), "refused", "is it the URL for events?"),
    (answer(429), "busy", "try again"),
    (answer(503), "endpoint", "the endpoint's own log"),
    (answer(200, b"<html>Log in</html>", {"Content-Type": "text/html"}), "no-acceptance", "/api/v1/events"),
    (answer(418), "refused", "/api/v1/events"),
]


@pytest.mark.parametrize(
    ("reaction", "outcome", "remedy"), ANSWERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_answer_is_told_with_what_to_do(
    endpoint: IngestServer, reaction: Reaction, outcome: str, remedy: str
) -> None:
    endpoint.on_request = reaction
    found = told(endpoint.url)
    assert (found["outcome"], found["exit"]) == (outcome, 1)
    assert remedy in found["remedy"]
    result = run("--ingest-endpoint", endpoint.url, **TOKEN)
    assert result.exit_code == 1
    assert f"Not accepted. {found['means']}" in result.stdout
    assert found["remedy"] in result.stdout


def test_what_the_endpoint_said_is_shown_without_the_token(endpoint: IngestServer) -> None:
    endpoint.on_request = answer(401, b"do not know s3cr3t-t0ken\x1b[31m")
    result = run("--ingest-endpoint", endpoint.url, **TOKEN)
    assert "do not know ***\\x1b[31m" in result.stdout


def test_konnects_own_path_is_named_for_konnect() -> None:
    """Without a word to Konnect."""
    advice = advice_for(Answer("404", "not found"), "https://eu.api.konghq.com/events")
    assert "https://us.api.konghq.com/v3/openmeter/events, with your region" in advice.remedy


def hang(exchange: Exchange) -> None:
    exchange.hang()


@pytest.mark.parametrize(
    ("reaction", "timeout", "outcome"),
    [
        (broken_off(b"220 smtp ready\r\n"), "1m", "no-http"),
        (broken_off(b""), "1m", "connection"),
        (hang, "0.2s", "timeout"),
    ],
)
def test_no_answer_is_told_by_its_cause(endpoint: IngestServer, reaction: Reaction, timeout: str, outcome: str) -> None:
    endpoint.on_request = reaction
    found = told(endpoint.url, "--timeout", timeout)
    assert (found["outcome"], found["exit"]) == (outcome, 3)
    assert found["remedy"]


def test_nobody_listening_and_names_that_nobody_knows_are_told(refusing_url: str) -> None:
    assert told(refusing_url)["outcome"] == "connection"
    found = told("http://kong-metering.invalid/events")
    assert (found["outcome"], found["exit"]) == ("name", 3)
    assert "spelt rightly" in found["remedy"]


def test_tls_is_told_apart(endpoint: IngestServer, certificate: Path, tls_context: ssl.SSLContext) -> None:
    assert told(endpoint.url.replace("http:", "https:"))["outcome"] == "tls"
    with running(IngestServer(tls_context)) as server:
        found = told(server.url)
        assert (found["outcome"], found["exit"]) == ("certificate", 3)
        assert "--ca-bundle" in found["remedy"]
        assert told(server.url, "--ca-bundle", certificate)["accepted"]
        wrong = run("--ingest-endpoint", server.url, "--ca-bundle", __file__, **TOKEN)
        assert (wrong.exit_code, f"{__file__} holds no certificate (PEM)" in wrong.stderr) == (2, True)
        assert told(server.url, "--insecure")["accepted"]


# ----------------------------------------------------------------------------------------- where it goes, which token


def configuration(url: str, **config: object) -> str:
    settings = {"ingest_endpoint": url, "api_token": "s3cr3t-of-the-file", **config}
    return json.dumps({"_format_version": "3.0", "plugins": [{"name": "metering-and-billing", "config": settings}]})


def test_a_plugin_of_another_name_is_taken_by_that_name(endpoint: IngestServer) -> None:
    usual = configuration("http://127.0.0.1:1/not-this-one")
    other = configuration(endpoint.url).replace("metering-and-billing", "kong-metering")
    plugins = [plugin for text in (usual, other) for plugin in json.loads(text)["plugins"]]
    both = json.dumps({"_format_version": "3.0", "plugins": plugins})
    for text in (other, both):
        assert run("-", "--plugin-name", "kong-metering", stdin=text).exit_code == 0
        assert run("-", stdin=text, KONG_METERING_PLUGIN_NAME="kong-metering").exit_code == 0
    assert len(endpoint.requests) == 4
    result = run("-", stdin=other)
    assert result.exit_code == 2
    assert "no plugin metering-and-billing is in -; is it --plugin-name kong-metering?" in result.output
    nothing = run("-", stdin='{"_format_version": "3.0", "plugins": [{"name": "key-auth"}]}')
    assert "no plugin metering-and-billing is in -; `kong-metering check` says more" in nothing.output


def tokens(endpoint: IngestServer) -> list[str]:
    return [str(request.headers["Authorization"]).removeprefix("Bearer ") for request in endpoint.requests]


def test_endpoint_and_token_come_out_of_a_configuration(endpoint: IngestServer, tmp_path: Path) -> None:
    (tmp_path / "kong.yaml").write_text(configuration(endpoint.url))
    assert run(tmp_path / "kong.yaml").exit_code == 0
    assert run("-", stdin=configuration(endpoint.url)).exit_code == 0
    reference = configuration(endpoint.url, api_token="{vault://env/om-token}")
    assert run("-", stdin=reference, OM_TOKEN="s3cr3t-of-the-vault").exit_code == 0
    shell = configuration(endpoint.url, api_token='${{ env "DECK_TOKEN" }}').replace('\\"', "'")
    assert run("-", stdin=shell, DECK_TOKEN="s3cr3t-of-deck").exit_code == 0
    assert run("-", stdin=shell, **TOKEN).exit_code == 0
    assert tokens(endpoint) == [
        "s3cr3t-of-the-file",
        "s3cr3t-of-the-file",
        "s3cr3t-of-the-vault",
        "s3cr3t-of-deck",
        "s3cr3t-t0ken",
    ]


def test_a_token_file_is_stronger_than_the_rest(endpoint: IngestServer, token: Path, tmp_path: Path) -> None:
    (tmp_path / "kong.yaml").write_text(configuration("http://127.0.0.1:1/not-this-one"))
    arguments = (tmp_path / "kong.yaml", "--ingest-endpoint", endpoint.url, "--token-file")
    assert run(*arguments, token, KONG_METERING_API_TOKEN="s3cr3t-no").exit_code == 0
    assert run(*arguments, "-", stdin="s3cr3t-of-stdin\n").exit_code == 0
    assert tokens(endpoint) == ["s3cr3t-t0ken", "s3cr3t-of-stdin"]


def test_one_of_several_plugins_has_to_be_chosen(endpoint: IngestServer) -> None:
    plugin = json.loads(configuration(endpoint.url))["plugins"][0]
    other = json.loads(configuration("http://127.0.0.1:1/"))["plugins"][0]
    text = json.dumps({"_format_version": "3.0", "plugins": [other], "services": [{"name": "s", "plugins": [plugin]}]})
    result = run("-", stdin=text)
    assert result.exit_code == 2
    assert "choose one with --plugin: plugins[0], services[0].plugins[0]" in result.output
    assert run("-", "--plugin", "services[0].plugins[0]", stdin=text).exit_code == 0
    assert run("-", "--plugin", "services[1]", stdin=text).exit_code == 2
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the endpoint with --ingest-endpoint"),
        (["--ingest-endpoint", "https://x.example/events"], "set KONG_METERING_API_TOKEN"),
        (["--ingest-endpoint", "https://x.example/events", "--subject", " "], "--subject is empty"),
        (["--ingest-endpoint", "https://x.example/events", "--token", "s3cr3t"], "No such option"),
        (["/nowhere/kong.yaml"], "No such file"),
    ],
)
def test_a_wrong_call_ends_with_2_and_sends_nothing(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(program, ["send-test-event", *arguments])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("url", ["us.api.konghq.com/v3/openmeter/events", "ftp://x/", "https://"])
def test_what_is_no_url_is_a_wrong_call(url: str) -> None:
    result = run("--ingest-endpoint", url, **TOKEN)
    assert result.exit_code == 2
    assert "expected a URL such as https://us.api.konghq.com/v3/openmeter/events" in result.output


def test_a_token_with_bearer_is_taken_as_the_plugin_takes_it(endpoint: IngestServer) -> None:
    assert run("--ingest-endpoint", endpoint.url, KONG_METERING_API_TOKEN="Bearer s3cr3t\n").exit_code == 0
    assert tokens(endpoint) == ["s3cr3t"]
    result = run("--ingest-endpoint", endpoint.url, KONG_METERING_API_TOKEN="s3cr3t\u00e9")
    assert result.exit_code == 2
    assert "printable ASCII" in result.output


def test_a_password_in_the_url_is_not_shown(endpoint: IngestServer) -> None:
    url = endpoint.url.replace("http://", "http://me:s3cr3t@")
    assert "http://***@127.0.0.1" in run("--ingest-endpoint", url, **TOKEN).stdout
    assert told(url)["endpoint"].startswith("http://***@127.0.0.1")
