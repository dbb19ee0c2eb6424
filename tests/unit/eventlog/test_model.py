"""Random operations, crashes, failed writes and flipped bits, against a model of what a log has to keep."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kong_metering.eventlog.log import DamageKind, EventLog
from tests.unit.eventlog.helpers import NOW, failing_writes, filled, payload, read_all, segments

pytestmark = pytest.mark.slow
groups = st.lists(st.binary(max_size=300), min_size=1, max_size=12)
fractions = st.floats(0, 1)
times = st.integers(0, 20)
steps = st.sampled_from(["read", "look", "finish", "send", "drop", "save", "sync"])


class LogMachine(RuleBasedStateMachine):
    """The model: what was appended by number, how far it is done, and how far that was written down."""

    @initialize(segment_bytes=st.sampled_from([100, 700, 5000, 1 << 22]))
    def start(self, segment_bytes: int) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kong-metering-test-"))
        self.lives = 0
        self.segment_bytes = segment_bytes
        self.log = self.opened()
        self.events: dict[int, bytes] = {}
        # When they were appended; the clock is set back and forth.
        self.times: dict[int, int] = {}
        self.done = self.saved = 0
        self.after = 0
        self.sent: dict[int, int] = {}
        self.saved_sent: dict[int, int] = {}

    def teardown(self) -> None:
        # Its files are as many as the examples, and a user's processes may have 1,024 open each.
        self.log.close()
        shutil.rmtree(self.home)

    @property
    def directory(self) -> Path:
        return self.home / str(self.lives)

    def opened(self) -> EventLog:
        self.directory.mkdir(exist_ok=True)
        return EventLog.open(self.directory, segment_bytes=self.segment_bytes)

    @property
    def last(self) -> int:
        return max(self.events, default=0)

    @rule(group=groups, time_ms=times)
    def append(self, group: list[bytes], time_ms: int) -> None:
        numbers = self.log.append(group, time_ms)
        assert numbers == range(self.last + 1, self.last + 1 + len(group))
        self.times.update(dict.fromkeys(numbers, time_ms))
        self.events.update(zip(numbers, group, strict=True))

    @rule(
        group=groups, time_ms=times, steps=st.lists(steps, min_size=1, max_size=4), place=fractions, late=st.booleans()
    )
    def append_while_the_other_side_goes_on(
        self, group: list[bytes], time_ms: int, steps: list[str], place: float, *, late: bool
    ) -> None:
        """Let the reading side do things while the bytes are being written, or are written and not published yet."""
        pwrite = os.pwrite

        def interrupted(descriptor: int, data: bytes, offset: int) -> int:
            patch.stop()
            written = pwrite(descriptor, data, offset) if late else 0
            for step in steps:
                self.do(step, place)
            return written or pwrite(descriptor, data, offset)

        patch = mock.patch.object(os, "pwrite", interrupted)
        patch.start()
        self.append(group, time_ms)

    def do(self, step: str, place: float) -> None:
        count = 1 + int(9 * place)
        match step:
            case "read":
                self.read_on(count, 3000)
            case "look":
                self.look_for_older_ones(place, 2 * count)
            case "finish":
                self.finish(place)
            case "send":
                self.send(count, count, refused=False)
            case "drop":
                self.drop()
            case "save":
                self.save()
            case "sync":
                self.log.sync()

    @rule(group=groups, time_ms=times, place=fractions, looked_for=times)
    def look_while_the_other_side_appends(
        self, group: list[bytes], time_ms: int, place: float, looked_for: int
    ) -> None:
        after = max(int(self.last * place), self.done)
        pread = os.pread

        def interrupted(descriptor: int, size: int, offset: int) -> bytes:
            patch.stop()
            self.append(group, time_ms)
            return pread(descriptor, size, offset)

        patch = mock.patch.object(os, "pread", interrupted)
        patch.start()
        try:
            last = self.log.last_older_than(after, looked_for)
        finally:
            patch.stop()
        assert all(self.times.get(number, NOW) < looked_for for number in range(after + 1, last + 1))

    @rule(group=groups, room=st.integers(0, 2000))
    def append_on_a_full_disk(self, group: list[bytes], room: int) -> None:
        room = min(room, sum(map(len, group)))
        try:
            with failing_writes(room):
                self.log.append(group, NOW)
        except OSError:
            return
        raise AssertionError

    @rule(count=st.integers(1, 20), size=st.integers(1, 3000))
    def read_on(self, count: int, size: int) -> None:
        found = self.log.read(self.after, count, size)
        first = max(self.after, self.done) + 1
        expected = range(first, self.last + 1)[: len(found)]
        assert [(event.sequence, event.payload) for event in found] == [(n, self.events[n]) for n in expected]
        assert len(found) <= count
        assert len(found) <= 1 or sum(len(event.payload) for event in found) <= size
        assert found or first > self.last
        self.after = found[-1].sequence if found else self.after

    @rule(place=fractions)
    def read_elsewhere(self, place: float) -> None:
        self.after = int(self.last * place)

    @rule(place=fractions, time_ms=times)
    def look_for_older_ones(self, place: float, time_ms: int) -> None:
        after = int(self.last * place)
        expected = max(after, self.done)
        while expected < self.last and self.times.get(expected + 1, NOW) < time_ms:
            expected += 1
        assert self.log.last_older_than(after, time_ms) == expected

    @rule(place=fractions)
    def finish(self, place: float) -> None:
        up_to = int(self.last * place)
        self.log.done(up_to)
        self.done = max(self.done, up_to)

    @rule()
    def save(self) -> None:
        self.log.save_position()
        self.saved, self.saved_sent = self.done, dict(self.sent)

    @rule(count=st.integers(1, 10), time_ms=st.integers(0, 100), refused=st.booleans())
    def send(self, count: int, time_ms: int, refused: bool) -> None:  # noqa: FBT001 - hypothesis hands it in
        last = min(self.done + count, self.last)
        if last <= self.done:
            return
        marks = self.log.mark_ambiguous(self.done + 1, last, time_ms)
        if refused:
            self.log.unmark(marks)
        else:
            self.sent |= {n: time_ms for n in range(self.done + 1, last + 1) if n not in self.sent}

    @rule()
    def drop(self) -> None:
        waiting = self.last - self.done
        dropped = self.log.drop_oldest_segment()
        assert bool(dropped) == bool(waiting)
        self.done += dropped

    @rule()
    def sync(self) -> None:
        self.log.sync()
        assert not self.log.unsynced()

    @rule()
    def close_and_open(self) -> None:
        self.log.close()
        self.log = self.opened()
        assert self.log.done_up_to == self.done
        self.saved, self.saved_sent = self.done, dict(self.sent)
        assert self.log.take_damage() == []

    @rule()
    def crash(self) -> None:
        """Let the process die between two operations."""
        self.reincarnate()
        assert self.log.take_damage() == []
        assert self.log.next_sequence == self.last + 1

    @rule(group=groups, cut=fractions)
    def crash_while_appending(self, group: list[bytes], cut: float) -> None:
        """Let the process die when a part of a group is written."""
        before = {path.name: path.stat().st_size for path in segments(self.directory)}
        first = self.log.append(group, NOW).start
        newest = segments(self.directory)[-1]
        start = before.get(newest.name, 0)
        size = start + int((newest.stat().st_size - start) * cut)
        self.reincarnate(cut_newest_to=size)
        # What was written whole may be there, the rest is not; none of it was acknowledged.
        whole = self.log.next_sequence - first
        assert 0 <= whole <= len(group)
        self.events.update(enumerate(group[:whole], first))
        assert all(damage.kind is DamageKind.TORN and damage.events == 0 for damage in self.log.take_damage())

    def reincarnate(self, cut_newest_to: int | None = None) -> None:
        dead = self.directory
        self.lives += 1
        shutil.copytree(dead, self.directory)
        if cut_newest_to is not None:
            with segments(self.directory)[-1].open("r+b") as file:
                file.truncate(cut_newest_to)
        self.log.close()
        shutil.rmtree(dead)
        self.log = self.opened()
        assert self.saved <= self.log.done_up_to <= self.done
        self.done = self.saved = self.log.done_up_to
        self.after = 0
        # A mark that was never written down may be known all the same: removing segments writes them down too.
        for number, time_ms in self.saved_sent.items():
            if number > self.done:
                sent_at = self.log.sent_at(number)
                assert sent_at is not None
                assert sent_at <= time_ms
        known = {n: at for n in range(self.done + 1, self.last + 1) if (at := self.log.sent_at(n)) is not None}
        assert known.items() <= self.sent.items()
        self.sent = dict(known)
        self.saved_sent = dict(known)

    @invariant()
    def nothing_is_lost_and_nothing_invented(self) -> None:
        assert self.log.waiting == self.last - self.done
        assert self.log.bytes_on_disk == sum(path.stat().st_size for path in segments(self.directory))
        assert {n: self.log.sent_at(n) for n in self.sent if n > self.done} == {
            n: at for n, at in self.sent.items() if n > self.done
        }
        oldest = self.log.oldest()
        assert (oldest.sequence if oldest else None) == (self.done + 1 if self.last > self.done else None)
        view = EventLog.view(self.directory)
        whole = {event.sequence: event.payload for event in read_all(view)}
        view.close()
        assert {n: event for n, event in whole.items() if n > self.done} == {
            n: event for n, event in self.events.items() if n > self.done
        }
        assert whole.items() <= self.events.items()


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(max_examples=400, deadline=None)
@given(
    place=fractions,
    bit=st.integers(0, 7),
    file=fractions,
    done=st.integers(0, 25),
    segment_bytes=st.sampled_from([300, 1500, 1 << 22]),
)
def test_a_flipped_bit_in_any_file_costs_one_event_at_most(
    place: float, bit: int, file: float, done: int, segment_bytes: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="kong-metering-test-") as home:
        directory = Path(home)
        log = filled(directory, 40, segment_bytes=segment_bytes)
        log.mark_ambiguous(done + 1, done + 3, NOW)
        log.done(done)
        log.close()
        paths = sorted(directory.iterdir())
        path = paths[min(int(len(paths) * file), len(paths) - 1)]
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * place), len(data) - 1)] ^= 1 << bit
        path.write_bytes(data)
        again = EventLog.open(directory, segment_bytes=segment_bytes)
        found = {event.sequence: event.payload for event in read_all(again)}
        assert found.items() <= {number: payload(number) for number in range(1, 41)}.items()
        assert len(set(range(done + 1, 41)) - set(found)) <= 1
        assert again.waiting == len(found)
        # And it goes on: appending, reading, finishing.
        [number] = again.append([b"next"], NOW)
        assert again.read(number - 1, 1, 10) == [(number, NOW, b"next")]
        again.done(number)
        assert again.waiting == 0
        again.close()
