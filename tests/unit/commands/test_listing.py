"""`kong-metering spool list`, `show` and `export`."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.unit.commands.helpers import (
    OTHER,
    PLUGIN,
    QUEUE,
    damage,
    dead_letters,
    event,
    event_ids,
    holder,
    letter,
    run,
    run_json,
    start,
    waiting,
)

HOSTILE = 'a\x1b[31mb\x07[bold]c[/bold]\u202ed\x9b2Je\\[/]"\x7f'


def json_lines(root: Path, *arguments: object) -> list[Any]:
    result = run(root, *arguments, "--json")
    assert result.exit_code == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_waiting_events_are_listed_with_what_tells_them_apart(root: Path) -> None:
    waiting(root, [event(n) for n in range(3)])
    (first, *_) = json_lines(root, "list")
    assert first["sequence"] == 1
    assert first["event_id"] == "00000000:api_request"
    assert (first["subject"], first["type"], first["plugin_id"]) == ("acme", "kong.api_request", PLUGIN)
    text = run(root, "list").stdout
    assert "00000002:api_request" in text
    assert "acme" in text


def test_a_list_ends_at_its_limit_and_tells_how_many_there_are(root: Path) -> None:
    waiting(root, [event(n) for n in range(60)])
    dead_letters(root, *[letter("rejected", event(n)) for n in range(70)])
    result = run(root, "list")
    assert result.stdout.count("acme") == 50
    assert result.stderr == "10 more are not listed: --limit 0 lists all.\n"
    assert run(root, "list", "--limit", 0).stdout.count("acme") == 60
    assert "65 more" in run(root, "list", "--dead-letters", "--limit", 5).stderr
    assert len(json_lines(root, "list", "--dead-letters")) == 70
    assert len(json_lines(root, "list", "--limit", 2)) == 2
    beyond = run(root, "list", "--limit", 99999999999999999999)
    assert (beyond.exit_code, "is not in the range 0<=x<=1000000000" in beyond.stderr) == (2, True)
    assert "'abc' is not a valid whole number" in run(root, "show", "abc").stderr


def test_filters_choose_the_queue_and_the_reason(root: Path) -> None:
    waiting(root, [event(1)])
    waiting(root, [event(2)], OTHER)
    dead_letters(
        root, letter("rejected", event(3)), letter("ambiguous", event(4)), letter("ambiguous", event(5), OTHER)
    )
    assert [line["event_id"][:8] for line in json_lines(root, "list", "--plugin-id", PLUGIN)] == ["00000001"]
    assert len(json_lines(root, "list", "--endpoint", QUEUE.endpoint)) == 2
    assert json_lines(root, "list", "--endpoint", "https://nowhere") == []
    letters = json_lines(root, "list", "--dead-letters", "--reason", "ambiguous", "--plugin-id", PLUGIN)
    assert [line["id"] for line in letters] == [2]


def test_nothing_to_list_is_said(root: Path) -> None:
    dead_letters(root, letter("rejected", event(3)))
    assert run(root, "list").stdout == "Nothing is waiting.\n"
    assert run(root, "list", "--plugin-id", "x").stdout == "Nothing that matches is waiting.\n"
    said = run(root, "list", "--dead-letters", "--reason", "ambigous").stdout
    assert said == "No dead letter matches; there are 1 rejected.\n"


def test_a_reason_without_dead_letters_is_a_wrong_call(root: Path) -> None:
    waiting(root, [event(1)])
    for command in ("list", "export"):
        result = run(root, command, "--reason", "rejected")
        assert result.exit_code == 2
        assert "add --dead-letters" in result.stderr


def test_a_dead_letter_is_shown_in_full(root: Path) -> None:
    dead_letters(root, letter("rejected", event(3), answer='answered 400: Error at "/0/subject"'))
    text = run(root, "show", 1).stdout
    for words in ("rejected", 'answered 400: Error at "/0/subject"', PLUGIN, QUEUE.endpoint, '  "subject": "acme",'):
        assert words in text
    shown = run_json(root, "show", 1)
    assert shown["event"] == json.loads(event(3))
    assert (shown["id"], shown["reason"]) == (1, "rejected")
    missing = run(root, "show", 2)
    assert missing.exit_code == 1
    assert "there is no dead letter 2" in missing.stderr


def test_a_letter_without_an_event(root: Path) -> None:
    dead_letters(root, letter("unreadable", b"", answer="unreadable: 20 bytes at 40"))
    text = run(root, "show", 1).stdout
    assert "The event itself could not be read." in text
    assert "1970" not in text
    assert run_json(root, "show", 1)["event"] is None
    assert run_json(root, "show", 1)["accepted"] is None


@pytest.mark.parametrize(
    "body",
    [
        event(1, subject=HOSTILE, type=HOSTILE, id=HOSTILE),
        HOSTILE.encode(),
        b"\xff\xfe\x00{",
        b"[" * 5000,
        b"[1, 2]",
        b'"text"',
        b'{"id": 1' + b"0" * 5000 + b"}",
        b'{"id": null, "subject": ["x"], "type": {"a": "\\ud800"}}',
    ],
)
def test_hostile_events_do_not_reach_the_terminal(root: Path, body: bytes) -> None:
    waiting(root, [body])
    dead_letters(root, letter("rejected", body, answer=HOSTILE))
    for arguments in (["list"], ["list", "--dead-letters"], ["show", 1]):
        for options in ([], ["--json"]):
            output = run(root, *arguments, *options).stdout
            assert output
            assert all(char.isprintable() or char == "\n" for char in output)


def test_an_export_is_byte_by_byte(root: Path) -> None:
    bodies = [event(1, subject=HOSTILE), b'{"id":  "\xff\xfe"}', event(3)]
    waiting(root, bodies)
    with start(root, "export") as process:
        stdout, stderr = process.communicate()
    assert stdout == b"".join(body + b"\n" for body in bodies)
    assert stderr == b"3 events exported.\n"


def test_dead_letters_without_an_event_are_left_out_of_an_export_and_counted(root: Path, tmp_path: Path) -> None:
    dead_letters(root, letter("rejected", event(1)), letter("unreadable", b""), letter("ambiguous", event(2)))
    target = tmp_path / "events.jsonl"
    result = run(root, "export", "--dead-letters", "--output", target)
    assert event_ids(target.read_bytes()) == [1, 2]
    assert result.stderr == f"2 events exported to {target}.\n1 event left out: unreadable.\n"


def test_damage_is_left_out_of_an_export_and_counted(root: Path) -> None:
    log = waiting(root, [event(n) for n in range(3)])
    damage(log, 1)
    result = run(root, "export")
    assert event_ids(result.stdout.encode()) == [0, 2]
    assert result.stderr == "2 events exported.\n1 event left out: unreadable.\n"
    assert not (log.directory / "damaged").exists()


def test_an_exported_file_is_private_and_replaced_only_by_force(root: Path, tmp_path: Path) -> None:
    waiting(root, [event(1)])
    target = tmp_path / "events.jsonl"
    os.umask(0)
    try:
        assert run(root, "export", "-o", target).exit_code == 0
    finally:
        os.umask(0o022)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    target.write_text("mine")
    refused = run(root, "export", "-o", target)
    assert refused.exit_code == 1
    assert "exists already: name another file, or replace it with --force" in refused.stderr
    assert target.read_text() == "mine"
    assert run(root, "export", "-o", target, "--force").exit_code == 0
    assert event_ids(target.read_bytes()) == [1]
    assert "is not a file" in run(root, "export", "-o", "/dev/null", "--force").stderr
    assert run(root, "export", "-o", tmp_path / "no" / "where").stderr == (
        f"Error: {tmp_path}/no/where: No such file or directory\n"
    )
    assert sorted(tmp_path.iterdir()) == [target.with_name("events.jsonl"), root]


def test_an_export_that_fails_leaves_the_file_as_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(root, [event(1)])
    target = tmp_path / "events.jsonl"
    target.write_text("mine")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    result = run(root, "export", "-o", target, "--force")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert target.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_lists_and_exports_beside_a_writer_that_finishes_events(root: Path) -> None:
    with holder(root):
        for _ in range(5):
            ids = event_ids(run(root, "export").stdout.encode())
            assert len(ids) >= 50
            assert ids == sorted(ids)
            assert len(json_lines(root, "list", "--limit", 5)) == 5


def test_a_reader_that_has_had_enough_ends_it_quietly(root: Path) -> None:
    waiting(root, [event(n) for n in range(20_000)])
    with start(root, "export") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(20) == 1
