"""What the soak reads from others: the words of a plugin server's last line, and the log phases of the stand-in."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from kong_metering import app
from kong_metering.log import LOGGER
from kong_metering.reasons import Buried, Dropped, Skipped
from kong_metering.stats import Stats
from kong_metering_soak.evidence import answered, final_accounts
from kong_metering_soak.verdict import Answered, ProcessAccount

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from kong_metering.runtime import Runtime


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname.lower()}: {record.getMessage()}")


def last_line_of(stats: Stats, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the last line of a plugin server as Kong writes it into its log."""
    handler = Lines()
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    app._say_account(cast("Runtime", SimpleNamespace(stats=stats)))
    return f"2026/11/22 19:35:38 [info] 27475#0: [metering:42] {handler.lines[-1]}\n"


def test_the_account_in_a_last_line_is_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    for _ in range(20):
        stats.accept()
    stats.adopt(7)
    stats.deliver(11)
    stats.leave(6)
    stats.bury(Buried.REJECTED, 4)
    stats.bury(Buried.AMBIGUOUS, 1)
    stats.drop(Dropped.QUEUE_FULL, 2)
    stats.drop(Dropped.PROCESS_ENDED, 3)
    stats.skip(Skipped.NO_SUBJECT)
    line = last_line_of(stats, monkeypatch)
    assert "; dead letters rejected 4, ambiguous 1; " in line
    assert line.endswith("; requests without an event no_subject 1\n")
    (account,) = final_accounts(line)
    went = {"delivered": 11, "dead letters": 5, "dropped": 5, "left": 6}
    assert account == ProcessAccount(os.getpid(), "its last line", {"accepted": 20, "adopted": 7}, went)
    assert account.holds


def test_an_empty_account_is_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    (account,) = final_accounts(last_line_of(Stats(), monkeypatch))
    assert account.holds
    assert account.came == {"accepted": 0, "adopted": 0}


def test_only_answered_log_phases_of_numbered_requests_count(tmp_path: Path) -> None:
    line = '{"target": "%s", "request_id": "r", "plugin": "p", "answered_at": %s, "server_pid": %s, "access_pid": 1}\n'
    path = tmp_path / "log-phases"
    path.write_text(line % ("/orders/7", 1.5, 42) + line % ("/orders/8", "null", "null") + line % ("/", 2.5, 42))
    assert list(answered(path)) == [Answered(7, "r", 1.5, 42, access_pid=1)]
