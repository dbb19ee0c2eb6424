"""Requests to running servers, as files: who is asked, who answers, and what becomes of those that nobody wants."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kong_metering.spool.identity import QueueIdentity
from kong_metering.spool.requests import REQUESTS, Answer, Asking, Kind, Request, RequestBox, new_id

QUEUE = QueueIdentity("id-1", "metering", "https://old.example/")
TARGET = QueueIdentity("id-1", "metering", "https://new.example/")
NOW = 1_800_000_000_000

ASKER = """
import sys, time
from pathlib import Path
from tests.unit.spool.test_requests import made
from kong_metering.spool.requests import Asking
with Asking(Path(sys.argv[1]), made()):
    print("asked", flush=True)
    time.sleep(60)
"""


def made(expires_ms: int = NOW + 1000) -> Request:
    return Request(new_id(), Kind.REDIRECT, QUEUE, ("proc-1-ab/key", "proc-2-cd/key"), expires_ms, TARGET)


def files_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / REQUESTS).iterdir())


def test_a_request_is_seen_and_answered_by_each_server(tmp_path: Path) -> None:
    request, one, other = made(), RequestBox(tmp_path), RequestBox(tmp_path)
    assert one.look(NOW) == []
    with Asking(tmp_path, request) as asking:
        assert one.look(NOW) == other.look(NOW) == [request]
        assert asking.answers() == []
        one.answer(request, Answer(1, ("proc-1-ab/key",)))
        first = Answer(1, ("proc-1-ab/key",), is_done=True, events=5)
        second = Answer(2, ("proc-2-cd/key",), is_done=True, left=3, problem="no room")
        one.answer(request, first)
        other.answer(request, second)
        assert sorted(asking.answers(), key=lambda answer: answer.process) == [first, second]
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / REQUESTS).iterdir()} == {0o600}
        assert (tmp_path / REQUESTS).stat().st_mode & 0o777 == 0o700
    assert files_in(tmp_path) == []
    one.answer(request, first)
    assert files_in(tmp_path) == []


def test_where_a_file_is_in_the_place_of_the_spool_nobody_asks(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("not a directory")
    assert RequestBox(tmp_path / "spool").look(NOW) == []


def test_what_an_asker_that_was_killed_leaves_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ASKER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"asked\n"
    box = RequestBox(tmp_path)
    (request,) = box.look(NOW)
    box.answer(request, Answer(1, ()))
    process.kill()
    process.communicate()
    assert box.look(NOW) == []
    assert files_in(tmp_path) == []


def test_a_draft_is_left_alone_as_long_as_somebody_may_be_at_it(tmp_path: Path) -> None:
    directory = tmp_path / REQUESTS
    directory.mkdir()
    (directory / "1.json.new").touch()
    made_ms = int((directory / "1.json.new").stat().st_mtime * 1000)
    box = RequestBox(tmp_path)
    assert box.look(made_ms + 50_000) == []
    assert files_in(tmp_path) == ["1.json.new"]
    assert box.look(made_ms + 70_000) == []
    assert files_in(tmp_path) == []


def test_a_request_expires(tmp_path: Path) -> None:
    box = RequestBox(tmp_path)
    with Asking(tmp_path, made(NOW)):
        assert box.look(NOW - 1) != []
        assert box.look(NOW) == []
        assert files_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["readable by others", "a link", "garbage", "another's name", "a pipe", "too large"])
def test_what_is_no_request_is_removed_and_told(tmp_path: Path, kind: str) -> None:
    box, path = RequestBox(tmp_path), tmp_path / REQUESTS / "1.json"
    with ExitStack() as stack:
        request = made()
        stack.enter_context(Asking(tmp_path, request))
        theirs = tmp_path / REQUESTS / f"{request.id}.json"
        if kind == "readable by others":
            path = theirs
            path.chmod(0o640)
        elif kind == "a link":
            path.symlink_to(theirs)
        elif kind == "a pipe":
            os.mkfifo(path, 0o600)
        else:
            data = {"garbage": b"{", "another's name": theirs.read_bytes(), "too large": bytes(5 << 20)}[kind]
            path.write_bytes(data)
            path.chmod(0o600)
        assert box.look(NOW) == ([] if path == theirs else [request])
        assert not os.path.lexists(path)
    assert len(box.refused) == (0 if kind == "another's name" else 1)


def test_another_versions_request_is_left_to_a_server_of_that(tmp_path: Path) -> None:
    request, box = made(), RequestBox(tmp_path)
    with Asking(tmp_path, request):
        path = tmp_path / REQUESTS / f"{request.id}.json"
        changed = json.loads(path.read_text()) | {"format_version": 99}
        with path.open("r+") as file:
            file.write(json.dumps(changed))
            file.truncate()
        assert box.look(NOW) == []
        assert path.exists()
        assert "another version" in box.refused[0]


def test_a_request_is_left_for_others_by_a_server_without_a_free_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, one, other = made(), RequestBox(tmp_path), RequestBox(tmp_path)
    with Asking(tmp_path, request):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", no_descriptors)
            with pytest.raises(OSError, match="Too many open files"):
                one.look(NOW)
        assert one.look(NOW) == other.look(NOW) == [request]


def no_descriptors(path: Path, *_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
