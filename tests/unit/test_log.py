"""Log lines for Kong's error log: single, escaped, bounded, and never in the way."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_metering.log import (
    LOGGER,
    LineHandler,
    ProcessLog,
    Relay,
    Reminder,
    Repeats,
    cause_of,
    configure,
    flush,
    printable,
    trouble,
)

if TYPE_CHECKING:
    from tests.support.clock import FakeClock

any_text = st.text(alphabet=st.characters(codec=None, categories=None))


def log_record(message: object, *arguments: object, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("kong_metering", level, __file__, 1, message, arguments, None)


# -- text from outside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("plain text", "plain text"),
        ("Zoë-株式会社", "Zoë-株式会社"),
        ("a\nforged: line", "a\\nforged: line"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\x00b\x7f", "a\\x00b\\x7f"),
        ("\x85\u2028\u2029", "\\x85\\u2028\\u2029"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("a\u200bb\u200d\ufeff", "a\\u200bb\\u200d\\ufeff"),
        ("caf\udce9", "caf\\udce9"),
        ("\U000e0001", "\\U000e0001"),
        ("a\u00a0b", "a\\xa0b"),
        ("", ""),
    ],
)
def test_what_is_not_printable_is_escaped(hostile: str, shown: str) -> None:
    assert printable(hostile) == shown


@pytest.mark.parametrize("length", [200, 201, 100_000])
def test_long_text_is_cut(length: int) -> None:
    shown = printable("x" * length)
    assert shown == ("x" * 200 if length == 200 else "x" * 200 + "…")


def test_the_limit_can_be_set() -> None:
    assert printable("abcdef", 3) == "abc…"


@given(any_text, st.integers(1, 50))
def test_any_text_becomes_one_bounded_printable_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert len(shown) <= 10 * limit + 1


def test_a_cause_is_told_in_one_line_with_its_place() -> None:
    with pytest.raises(ValueError, match="a\nb") as caught:
        raise ValueError("a\nb" + "x" * 1000)
    told = cause_of(caught.value)
    assert told.startswith("ValueError: a\\nbxxx")
    assert "… at test_log.py:" in told
    assert told.isprintable()


def test_a_cause_that_was_never_raised_is_told_too() -> None:
    assert cause_of(KeyError("x")) == "KeyError: 'x'"


# -- lines to a descriptor -----------------------------------------------------------------------------------------


class Pipe:
    """A small pipe that Kong may or may not read."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.reader, False)
        self.handler = LineHandler(self.writer)

    def read(self) -> bytes:
        read = b""
        try:
            while chunk := os.read(self.reader, 65536):
                read += chunk
        except BlockingIOError:
            pass
        return read

    def fill(self) -> int:
        """Log until a line is lost; give how many were written."""
        written = 0
        line = b"warning: " + b"x" * 90 + b"\n"
        while written * len(line) + len(line) <= 4096:
            self.handler.emit(log_record("x" * 90))
            written += 1
        return written


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    for descriptor in (pipe.reader, pipe.writer):
        try:
            os.close(descriptor)
        except OSError:
            continue


@pytest.mark.parametrize(
    ("level", "name"),
    [(logging.DEBUG, b"debug"), (logging.INFO, b"info"), (logging.WARNING, b"warning"), (logging.ERROR, b"error")],
)
def test_a_record_is_one_line_with_its_level(pipe: Pipe, level: int, name: bytes) -> None:
    pipe.handler.emit(log_record("queue %s: %d lost", "orders\n", 3, level=level))
    assert pipe.read() == name + b": queue orders\\n: 3 lost\n"


@pytest.mark.parametrize("character", ["x", "é", "株", "\U0001f600", "\u202e", "\udcff"])
def test_a_long_line_is_cut_between_characters(pipe: Pipe, character: str) -> None:
    for shift in range(4):
        pipe.handler.emit(log_record("-" * shift + character * 5000))
        line = pipe.read()
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert 2000 < len(line) <= 2049
        line.decode("utf-8")


@given(any_text)
def test_any_message_is_one_line(message: str) -> None:
    pipe = Pipe()
    try:
        pipe.handler.emit(log_record("%s", message))
        line = pipe.read()
    finally:
        os.close(pipe.reader)
        os.close(pipe.writer)
    assert line.endswith(b"\n")
    assert line.decode("utf-8")[:-1].isprintable()


def test_a_pipe_that_nobody_reads_never_blocks_and_the_loss_is_told(pipe: Pipe) -> None:
    written = pipe.fill()
    for _ in range(3):
        pipe.handler.emit(log_record("x" * 90))
    assert pipe.read().count(b"\n") == written
    pipe.handler.emit(log_record("back again"))
    assert pipe.read() == b"warning: back again (3 log lines were lost before this one)\n"
    pipe.handler.emit(log_record("as usual"))
    assert pipe.read() == b"warning: as usual\n"


def test_the_loss_is_told_with_a_long_line_too(pipe: Pipe) -> None:
    pipe.fill()
    pipe.handler.emit(log_record("x" * 90))
    pipe.read()
    pipe.handler.emit(log_record("y" * 10_000))
    line = pipe.read()
    assert line.endswith(b" (1 log line was lost before this one)\n")
    assert len(line) <= 2049


def test_a_reader_that_is_gone_is_no_error(pipe: Pipe) -> None:
    os.close(pipe.reader)
    for _ in range(2):
        pipe.handler.emit(log_record("x"))


def test_a_descriptor_that_was_closed_is_no_error(pipe: Pipe) -> None:
    os.close(pipe.writer)
    pipe.handler.emit(log_record("x"))


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("message", "argument"), [("%d events", "many"), ("%s", Unspeakable()), ("no place for it", 5), ("100%", 5)]
)
def test_a_message_that_cannot_be_put_together_does_not_raise(pipe: Pipe, message: str, argument: object) -> None:
    relay = Relay()
    record = log_record(message, argument)
    pipe.handler.emit(record)
    relay.emit(record)
    assert pipe.read() == f"warning: {message}\n".encode()
    assert relay.take() == (logging.WARNING, message)


# -- what Kong is to say -------------------------------------------------------------------------------------------


def test_the_relay_keeps_the_newest_warnings_in_their_order() -> None:
    relay = Relay()
    assert relay.take() is None
    for number in range(60):
        relay.handle(log_record("number %d\n", number, level=logging.ERROR))
    taken = list(iter(relay.take, None))
    assert taken == [(logging.ERROR, f"number {number}\\n") for number in range(10, 60)]


def test_an_empty_relay_is_a_relay() -> None:
    assert Relay()  # `relay or Relay()` would otherwise make another one


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    before = LOGGER.handlers[:], LOGGER.filters[:], LOGGER.level, LOGGER.propagate
    yield LOGGER
    LOGGER.handlers[:], LOGGER.filters[:], LOGGER.level, LOGGER.propagate = before


def test_the_log_goes_to_stderr_and_to_the_relay_each_trouble_once(
    logger: logging.Logger, clock: FakeClock, capfd: pytest.CaptureFixture[str]
) -> None:
    relay = Relay()
    configure(logging.INFO, ProcessLog(relay, Repeats(clock)))
    logger.debug("a detail")
    logger.info("started")
    for _ in range(2):
        logger.warning("slow", extra=trouble("slow"))
    flush()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "info: started\nwarning: slow\n"
    assert list(iter(relay.take, None)) == [(logging.WARNING, "slow")]


def test_configuring_again_does_not_say_everything_twice(
    logger: logging.Logger, clock: FakeClock, capfd: pytest.CaptureFixture[str]
) -> None:
    for level in (logging.INFO, logging.DEBUG):
        configure(level, ProcessLog(Relay(), Repeats(clock)))
    logger.debug("once")
    flush()
    assert capfd.readouterr().err == "debug: once\n"


# -- troubles ------------------------------------------------------------------------------------------------------


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.levels: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.levels.append(record.levelno)


class Troubled:
    """A logger of the test's own that counts repeats."""

    def __init__(self, clock: FakeClock) -> None:
        self.logger = logging.Logger("troubled")  # noqa: LOG001 - one of its own, not the process's
        self.repeats = Repeats(clock, logger=self.logger)
        self.said, self.relay = Said(), Relay()
        self.logger.addFilter(self.repeats)
        self.logger.addHandler(self.said)
        self.logger.addHandler(self.relay)

    def report(self, key: str, message: str, level: int = logging.ERROR) -> None:
        self.logger.log(level, "%s", message, extra=trouble(key))

    @property
    def messages(self) -> list[str]:
        return self.said.messages


@pytest.fixture
def log(clock: FakeClock) -> Troubled:
    return Troubled(clock)


def test_a_trouble_is_said_once_and_its_repeats_are_counted(log: Troubled, clock: FakeClock) -> None:
    for number in range(4):
        log.report("gone", f"the endpoint is gone, try {number}")
    assert log.messages == ["the endpoint is gone, try 0"]
    clock.advance(60)
    log.report("gone", "the endpoint is gone, still")
    assert log.messages[1:] == ["the endpoint is gone, still (and 3 more like this in the last minute)"]


def test_every_handler_gets_the_same_lines_the_relay_too(log: Troubled, clock: FakeClock) -> None:
    for _ in range(3):
        log.report("gone", "the endpoint is gone")
    clock.advance(60)
    log.repeats.summarise()
    assert [message for _, message in iter(log.relay.take, None)] == log.messages
    assert len(log.messages) == 2


def test_lines_that_are_no_troubles_are_all_said(log: Troubled) -> None:
    for _ in range(3):
        log.logger.warning("a line of its own")
    assert log.messages == ["a line of its own"] * 3


def test_troubles_are_told_apart_by_their_key(log: Troubled) -> None:
    log.report("gone", "the endpoint is gone")
    log.report("full", "the queue is full", logging.WARNING)
    log.report("gone", "the endpoint is gone")
    assert log.messages == ["the endpoint is gone", "the queue is full"]
    assert log.said.levels == [logging.ERROR, logging.WARNING]


def test_repeats_are_summed_up_once_a_minute(log: Troubled, clock: FakeClock) -> None:
    for _ in range(3):
        log.report("gone", "the endpoint is gone")
    clock.advance(59.9)
    log.repeats.summarise()
    assert len(log.messages) == 1
    clock.advance(0.1)
    log.repeats.summarise()
    log.repeats.summarise()
    assert log.messages[1:] == ["the endpoint is gone (and 2 more like this in the last minute)"]


def test_a_summary_tells_the_latest_words_and_keeps_the_level(log: Troubled, clock: FakeClock) -> None:
    log.report("gone", "first", logging.WARNING)
    log.report("gone", "latest", logging.WARNING)
    clock.advance(60)
    log.repeats.summarise()
    assert log.messages[1] == "latest (and 1 more like this in the last minute)"
    assert log.said.levels == [logging.WARNING, logging.WARNING]


def test_a_trouble_that_goes_on_is_said_once_a_minute(log: Troubled, clock: FakeClock) -> None:
    for _ in range(600):
        log.report("gone", "the endpoint is gone")
        log.repeats.summarise()
        clock.advance(1)
    assert len(log.messages) == 10
    log.repeats.flush()
    repeats = sum(int(message.partition("(and ")[2].partition(" ")[0] or 0) for message in log.messages)
    assert 10 + repeats == 600


def test_a_quiet_trouble_is_forgotten_and_said_again_when_it_comes_back(log: Troubled, clock: FakeClock) -> None:
    log.report("gone", "the endpoint is gone")
    clock.advance(60)
    log.repeats.summarise()
    log.report("gone", "the endpoint is gone")
    assert log.messages == ["the endpoint is gone"] * 2


def test_at_the_end_all_that_was_only_counted_is_said(log: Troubled) -> None:
    log.report("gone", "the endpoint is gone")
    log.report("full", "the queue is full")
    log.report("full", "the queue is full")
    log.repeats.flush()
    log.repeats.flush()
    assert log.messages[2:] == ["the queue is full (and 1 more like this in the last minute)"]


def test_setting_the_systems_time_changes_nothing(log: Troubled, clock: FakeClock) -> None:
    log.report("gone", "the endpoint is gone")
    clock.set_wall(clock.wall() + 1e6)
    log.report("gone", "the endpoint is gone")
    clock.set_wall(0)
    log.repeats.summarise()
    log.report("gone", "the endpoint is gone")
    assert len(log.messages) == 1


def test_many_different_troubles_are_counted_together(log: Troubled) -> None:
    """However many there are, they take no more memory than the most that are told apart, and flood no log."""
    for number in range(10_000):
        log.report(f"trouble {number}", "it happened")
    assert len(log.messages) == 1001
    log.repeats.flush()
    assert log.messages[1001:] == ["it happened (and 8999 more like this in the last minute)"]


def test_a_forked_process_leaves_it_to_its_parent_to_say_what_was_counted(log: Troubled) -> None:
    for _ in range(3):
        log.report("gone", "the endpoint is gone")
    log.repeats.forget()
    log.repeats.flush()
    assert log.messages == ["the endpoint is gone"]


def test_a_trouble_whose_text_cannot_be_put_together_does_not_raise(log: Troubled) -> None:
    log.logger.removeHandler(log.said)
    for _ in range(2):
        log.logger.error("%d events", "many", extra=trouble("odd"))
    log.repeats.flush()
    taken = [message for _, message in iter(log.relay.take, None)]
    assert taken == ["%d events", "%d events (and 1 more like this in the last minute)"]


def test_what_is_wrong_with_a_start_is_said_again_each_hour(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    reminder = Reminder(["--spool-max-bytes: 1.5G is not a size", "--new is not understood"], clock)
    for _ in range(2 * 3600 + 1800):
        reminder.remind()
        clock.advance(1)
    assert caplog.messages == ["--spool-max-bytes: 1.5G is not a size", "--new is not understood"] * 2


def test_any_thread_may_log(log: Troubled) -> None:
    def report() -> None:
        for _ in range(500):
            log.report("gone", "the endpoint is gone")

    threads = [threading.Thread(target=report) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.repeats.flush()
    assert log.messages == [
        "the endpoint is gone",
        "the endpoint is gone (and 3999 more like this in the last minute)",
    ]
