"""`kong-metering spool status`, and what all commands say of a spool that they cannot use."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from zlib import crc32

import pytest

from kong_metering.commands.spoolstatus import LogStatus, QueueStatus
from kong_metering.spool.deadletters import DEAD_LETTERS, DeadLetters
from kong_metering.spool.delivered import Delivered
from kong_metering.spool.directory import SpoolDirectory, survey
from kong_metering.spool.identity import FILES, QueueIdentity
from tests.unit.commands.helpers import (
    HOUR,
    NOW,
    OTHER,
    PLUGIN,
    QUEUE,
    dead_letters,
    event,
    holder,
    killed_before_it_wrote,
    leave_damaged_file,
    letter,
    run,
    run_json,
    sent_at,
    start,
    waiting,
)
from tests.unit.eventlog.helpers import segments

HOSTILE = 'a\x1b[31mb\x07[bold]c[/bold]\u202ed\x9b2Je\\[/]"'


def test_an_empty_spool_says_so(root: Path) -> None:
    SpoolDirectory(root)
    result = run(root, "status")
    assert result.exit_code == 0
    assert "Nothing waits, and there are no dead letters." in result.stdout
    assert run_json(root, "status")["queues"] == []


@pytest.mark.parametrize("command", ["status", "list"])
def test_a_directory_that_is_no_spool_is_no_clean_bill(root: Path, command: str) -> None:
    """Its parent is easily taken for it."""
    waiting(root, [event(1)])
    result = run(root.parent, command)
    assert result.exit_code == 1
    assert f"{root.parent} is no spool" in result.stderr
    assert f"is it {root}?" in result.stderr
    (root / "lock").unlink()
    assert run(root, command).exit_code == 0
    (root.parent / "empty").mkdir()
    result = run(root.parent / "empty", command)
    assert result.exit_code == 1
    assert "is no spool" in result.stderr


def test_a_server_is_asked_about_logs_in_which_something_waits() -> None:
    """Of one that it is done with it may know nothing any more, and would never answer."""

    def log(waiting: int, held_by: int | None) -> LogStatus:
        return LogStatus("d", waiting, 0, 0, None, held_by, None)

    done, full, free = log(0, 7), log(2, 7), log(3, None)
    assert QueueStatus(None, [done, full, free]).asked_about == [full]
    assert QueueStatus(None, [done, free]).asked_about == [done]
    assert QueueStatus(None, [free]).asked_about == []


def test_several_logs_of_one_queue_are_joined(root: Path) -> None:
    waiting(root, [event(n) for n in range(3)], accepted=NOW - 2 * HOUR)
    waiting(root, [event(n) for n in range(4)])
    waiting(root, [event(9)], OTHER)
    dead_letters(root, letter("rejected", event(5)), letter("rejected", event(6)), letter("unreadable", b""))
    sent_at(root, 1, NOW)
    status = run_json(root, "status")
    mine = next(queue for queue in status["queues"] if queue["plugin_id"] == PLUGIN)
    assert (mine["waiting"], mine["waiting_unheld"], mine["held_by"]) == (7, 7, [])
    assert len(mine["logs"]) == 2
    assert sum(log["bytes"] for log in mine["logs"]) == mine["bytes"] > 0
    assert mine["dead_letters"] == {"rejected": 2, "unreadable": 1}
    assert mine["oldest_age_seconds"] >= 2 * HOUR / 1000
    assert (status["waiting"], status["dead_letters"]["count"]) == (8, 3)
    text = run(root, "status").stdout
    assert "7 events" in text
    assert "2 rejected, 1 unreadable" in text
    assert "nobody: waits until an instance of the plugin starts" in text
    assert "In all: 8 events waiting, 3 dead letters." in text


def test_events_that_were_sent_without_an_answer_are_told(root: Path) -> None:
    waiting(root, [event(n) for n in range(5)])
    sent_at(root, 2, NOW)
    assert run_json(root, "status")["queues"][0]["may_have_arrived"] == 2
    assert "2 of them were sent, and may have arrived: the first at" in run(root, "status", width=200).stdout
    queue = run_json(root, "status")["queues"][0]
    assert [(mark["first"], mark["events"], mark["sent"]) for mark in queue["logs"][0]["unanswered"]] == [
        (1, 2, queue["first_sent"])
    ]


def test_one_event_that_was_sent_is_told_as_one(root: Path) -> None:
    waiting(root, [event(n) for n in range(5)])
    sent_at(root, 1, NOW)
    assert "1 of them was sent, and may have arrived" in run(root, "status", width=200).stdout


@pytest.mark.parametrize("width", range(64, 100, 3))
def test_no_time_and_no_number_is_torn(root: Path, width: int) -> None:
    endpoint = "https://us.api.konghq.com/v3/openmeter/organisations/customer-facing-apis/events?workspace=eu-central-1"
    waiting(root, [event(n) for n in range(5)], QueueIdentity(PLUGIN, PLUGIN, endpoint))
    sent_at(root, 2, NOW)
    told = run(root, "status", width=width).stdout
    times = re.findall(r"\d{4}-\d\d-\d\d", told)
    assert len(re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", told)) == len(times) == 2
    assert "  5 events, " in told
    assert endpoint in re.sub(r"\s", "", told)
    assert not [line for line in told.splitlines() if line.endswith(" ")]


def test_a_plugin_whose_name_has_its_id_is_told_once(root: Path) -> None:
    """As the server names it: by its instance name and id, or by its id alone."""
    for name in (f"orders ({PLUGIN})", PLUGIN):
        waiting(root, [event(1)], QueueIdentity(PLUGIN, name, f"https://{name[:3]}.example/events"))
    told = run(root, "status", width=200).stdout
    assert told.count(PLUGIN) == 2
    assert f"\norders ({PLUGIN})\n" in told


def test_a_log_beside_its_writer(root: Path) -> None:
    with holder(root) as pid:
        for _ in range(10):
            queue = run_json(root, "status")["queues"][0]
            assert queue["held_by"] == [pid]
            assert queue["holders"] == [{"process": pid, "waiting": queue["waiting"]}]
            assert queue["waiting"] >= 100
            assert queue["waiting_unheld"] == 0
            assert queue["logs"][0]["problem"] is None
        assert f"process {pid}" in run(root, "status").stdout
        waiting(root, [event(n) for n in range(7)])
        text = run(root, "status", width=200).stdout
        assert re.search(rf"process {pid} \(\d+ events\); 7 by nobody: waits", text)


def test_a_log_of_a_newer_format_is_shown_as_one(root: Path) -> None:
    log = waiting(root, [event(1)])
    (segment,) = segments(log.directory)
    data = bytearray(segment.read_bytes())
    data[8:12] = (9).to_bytes(4, "little")
    data[12:16] = crc32(data[:12]).to_bytes(4, "little")
    segment.write_bytes(data)
    assert "format version 9" in run_json(root, "status")["queues"][0]["logs"][0]["problem"]
    assert "unreadable" in run(root, "status").stdout
    assert "format version 9" in run(root, "list").stderr
    assert run(root, "export").exit_code == 1


def test_a_queue_of_a_newer_format_is_told_from_damage(root: Path) -> None:
    log = waiting(root, [event(1)])
    for name in FILES:
        members = json.loads((log.directory / name).read_text())
        members["format_version"] = 9
        del members["checksum"]
        members["checksum"] = crc32(json.dumps(members, sort_keys=True).encode())
        (log.directory / name).write_text(json.dumps(members))
    queue = run_json(root, "status")["queues"][0]
    assert queue["plugin_id"] is None
    assert "update kong-metering" in queue["logs"][0]["problem"]


def test_a_log_of_which_nobody_knows_whose_it_is(root: Path) -> None:
    log = waiting(root, [event(1)])
    for name in FILES:
        (log.directory / name).write_text("garbage")
    assert "unknown plugin" in run(root, "status").stdout
    assert run_json(root, "status")["queues"][0]["waiting"] == 1
    assert run(root, "export", "--plugin-id", "unknown").stdout.encode() == event(1) + b"\n"
    assert run(root, "export", "--plugin-id", PLUGIN).stdout == ""


def test_damaged_files_are_counted(root: Path) -> None:
    leave_damaged_file(root)
    assert run_json(root, "status")["damaged"]["files"] == 1
    assert "1 damaged file" in run(root, "status").stdout


def test_dead_letters_that_were_dropped_are_told(root: Path) -> None:
    dead_letters(root, *[letter("rejected", event(n)) for n in range(3)])
    bounded = DeadLetters(root / DEAD_LETTERS, max_bytes=1, segment_bytes=1)
    bounded.add([letter("rejected", event(3))], NOW)
    bounded.add([letter("rejected", event(4))], NOW)
    assert "4 dead letters dropped so far, the oldest, to make room for newer ones" in run(root, "status").stdout
    found = run_json(root, "status")["dead_letters"]
    assert (found["count"], found["dropped"]) == (1, 4)


def test_shared_memory_of_a_spool_that_was_replaced_is_told(root: Path) -> None:
    killed_before_it_wrote(root, 3)
    root.rename(root.with_name("before"))
    SpoolDirectory(root)
    (found,) = run_json(root, "status")["strays"]
    assert found["events"] == 3
    assert "3 events of another spool, whose servers do not run" in " ".join(run(root, "status").stdout.split())


def test_hostile_names_do_not_reach_the_terminal(root: Path) -> None:
    waiting(root, [event(1)], QueueIdentity(HOSTILE, HOSTILE, f"https://user:pass@x/{HOSTILE}"))
    for arguments in (["status"], ["status", "--json"], ["list"], ["list", "--json"]):
        output = run(root, *arguments).stdout
        assert all(char.isprintable() or char == "\n" for char in output)
        assert "pass" not in output
    assert "[bold]c[/bold]" in run(root, "status", width=200).stdout


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(root: Path, width: int) -> None:
    waiting(root, [event(1, subject="s" * 3000)])
    waiting(root, [event(2)], OTHER)
    dead_letters(root, letter("rejected", event(5, subject="中" * 500), answer="x " * 500))
    for arguments in (["status"], ["list"], ["list", "--dead-letters"]):
        lines = run(root, *arguments, width=width).stdout.splitlines()
        assert max(map(len, lines)) <= width


# ------------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["list"], ["show", 1], ["export"], ["replay", "--all"], ["purge", "--damaged"]],
    ids=lambda arguments: str(arguments[0]),
)
def test_a_spool_that_is_not_there(root: Path, arguments: list[object]) -> None:
    result = run(root, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: there is no spool at {root}: name Kong's prefix with -p")
    assert not root.exists()


def test_a_file_in_its_place(root: Path) -> None:
    root.write_text("")
    assert "is not a directory: name the spool's with --spool-dir" in run(root, "status").stderr


def test_the_spool_is_found_by_kongs_prefix(root: Path) -> None:
    SpoolDirectory(root)
    elsewhere = root.parent / "nowhere"
    assert run(elsewhere, "status").exit_code == 1
    assert run(elsewhere, "status", "-p", root.parent).exit_code == 0
    assert run(elsewhere, "status", "-p", root.parent, "--spool-dir", elsewhere).exit_code == 1
    assert run(elsewhere, "status", "-p", elsewhere, "--spool-dir", root).exit_code == 0


def test_a_terminal_that_knows_ascii_only(root: Path) -> None:
    waiting(root, [event(1, subject="中" * 300)])
    with start(root, "list", env={**os.environ, "PYTHONIOENCODING": "ascii"}) as process:
        stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, b"")
    assert b"00000001:api_request" in stdout
    assert stdout.isascii()


@pytest.fixture
def anybody(root: Path) -> Path:
    """Give a spool in a directory that all users can reach."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    waiting(root, [event(1)])
    dead_letters(root, letter("rejected", event(5)))
    for parent in root.parents:
        if not os.access(parent, os.W_OK) or parent.stat().st_mode & 0o055 == 0o055:
            break
        parent.chmod(parent.stat().st_mode | 0o055)
    return root


def test_another_user_is_told_who_may_look(anybody: Path) -> None:
    # What python loads late, it could not load as that user.
    assert run(anybody, "status").exit_code == 0
    assert run(anybody, "list", "--reason", "x").exit_code == 2
    os.seteuid(65534)
    try:
        results = [run(anybody, command, width=300) for command in ("status", "list", "export")]
    finally:
        os.seteuid(0)
    for result in results:
        assert result.exit_code == 1
        assert f"{anybody} may be read by root only, and you are nobody: run this as root" in result.stderr


def test_nobody_but_the_owner_may_change_anything_not_even_root(anybody: Path) -> None:
    before = sorted(anybody.rglob("*"))
    for path in [anybody, *before]:
        os.chown(path, 65534, 65534)
    deliver = ["deliver", "--plugin-id", "x", "--token-file", "x"]
    for arguments in (["replay", "--all"], ["purge", "--dead-letters"], deliver):
        result = run(anybody, *arguments, width=300)
        assert result.exit_code == 1
        assert "belongs to nobody, and you are root: run this as nobody, for example with `sudo -u" in result.stderr
    assert run(anybody, "status").exit_code == 0
    assert run(anybody, "export", "--dead-letters").stdout
    assert sorted(anybody.rglob("*")) == before
    assert all(path.stat().st_uid == 65534 for path in before)


def test_a_log_that_vanishes_meanwhile_is_no_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = waiting(root, [event(1)])
    found = survey(root)
    for path in log.directory.iterdir():
        path.unlink()
    log.directory.rmdir()
    monkeypatch.setattr("kong_metering.commands.logs.survey", lambda _: found)
    assert run_json(root, "status")["queues"] == []


def test_what_is_kept_of_delivered_events_is_told(root: Path) -> None:
    spool = SpoolDirectory(root, delivered=Delivered(root, lambda: NOW))
    held = spool.log_for(QUEUE)
    held.log.append([event(1)], NOW)
    held.log.done(1)
    spool.close()
    told = run_json(root, "status")["delivered"]
    assert (told["segments"], told["verified"]) == (1, 0)
    assert told["bytes"] > len(event(1))
    assert "of delivered events kept since" in run(root, "status", width=200).output
