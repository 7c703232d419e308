"""What is sent on when the log is not what it was: cut, replaced, swept, damaged, ahead of the clock."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import orjson
import pytest

from auditlog import Position, Retention, RetentionSweeper
from auditlog.forward import Destination, forwarder
from auditlog.forward.forms import JsonLines
from auditlog.forward.sockets import StreamChannel
from auditlog.query.reader import AuditReader
from auditlog.storage.files import Files
from auditlog.storage.progress import Place, Progress
from auditlog.testing import FailingFiles, FixedClock
from tests.forward.sinks import (
    DAY,
    SINKS,
    Packets,
    Requests,
    Sink,
    Stream,
    append,
    forwarding,
    once,
    stored,
)
from tests.helpers import free_port, line, until, write_day

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.timeout(60)]

DAYS = [f"2024-08-{day:02}" for day in range(1, 13)]  # the last one is the clock's
GOING_ON_NOW = "going on with what is written from now on"

twice = pytest.mark.parametrize("sink", ["tcp", "http"], indirect=True)


@pytest.fixture(params=SINKS)
def sink(request: pytest.FixtureRequest) -> Iterator[Sink]:
    """A receiver, by each protocol."""
    with SINKS[request.param]() as sink:
        yield sink


def write_days(directory: Path, days: list[str]) -> None:
    """Two lines a day."""
    for day in days:
        number = 10 * int(day[-2:])
        write_day(directory, day, line(number) + line(number + 1))


def ids_of(days: list[str]) -> list[str]:
    return [str(10 * int(day[-2:]) + each) for day in days for each in (0, 1)]


def sweep(directory: Path, clock: FixedClock, days: int) -> list[str]:
    """Keep so many days; gives those that were removed."""
    report = RetentionSweeper(directory, Retention(days=days), clock=clock).sweep()
    return [str(day) for day in report.removed]


# ---------------------------------------------------------------------- a log that was changed

SHORT = line(0)


def cut(file: Path) -> None:
    os.truncate(file, 2 * len(SHORT))


def cut_and_written_again(file: Path) -> None:
    file.write_bytes(line(0) + line(1) + line(7, note="n" * 500))


def another_line_at_the_position(file: Path) -> None:
    os.truncate(file, 3 * len(SHORT))
    append(file.parent, 7, 8)


def another_file(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(line(7, note="n" * 500) + line(8))
    os.replace(other, file)


CHANGES = [cut, cut_and_written_again, another_line_at_the_position, another_file]


class TestChanged:
    @twice
    @pytest.mark.parametrize("change", CHANGES)
    def test_all_of_the_day_is_sent_again_and_what_comes_then(
        self, directory: Path, sink: Sink, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        write_day(directory, "2024-08-11", line(9))
        file = write_day(directory, DAY, b"".join(map(line, range(4))))
        once(directory, sink.endpoint)
        change(file)
        there = [entry.record["resource_id"] for entry in AuditReader(directory).read(DAY)]
        if change is not cut:
            once(directory, sink.endpoint)
        append(directory, 20)
        once(directory, sink.endpoint)
        until(lambda: sink.ids == ["9", "0", "1", "2", "3", *there, "20"])
        assert caplog.text.count("going on with all of 2024-08-12") == 1

    @pytest.mark.parametrize("change", CHANGES)
    def test_over_udp_what_is_new_is_sent(
        self, directory: Path, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        file = write_day(directory, DAY, b"".join(map(line, range(4))))
        with Packets() as packets:
            once(directory, packets.endpoint)
            change(file)
            with forwarding(directory, packets.endpoint):
                until(lambda: GOING_ON_NOW in caplog.text)
                append(directory, 20)
                until(lambda: packets.ids == ["0", "1", "2", "3", "20"])

    def test_a_log_that_was_not_changed_is_not_suspected(
        self, directory: Path, sink: Sink, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_day(directory, DAY, line(0))
        for number in range(1, 4):
            once(directory, sink.endpoint)
            append(directory, number)
        once(directory, sink.endpoint)
        until(lambda: sink.ids == ["0", "1", "2", "3"])
        assert caplog.text == ""

    def test_a_directory_that_cannot_be_opened_for_a_while_ends_nothing(self, directory: Path) -> None:
        write_day(directory, DAY, line(0))
        files = FailingFiles()
        with Requests() as requests, forwarding(directory, requests.endpoint, files=files) as late:
            until(lambda: requests.ids == ["0"])
            files.fail("open_directory", errno.EMFILE)
            append(directory, 1)
            until(lambda: late.progress.failing)
            files.heal()
            append(directory, 2)
            until(lambda: set(requests.ids) == {"0", "1", "2"}, 10)


# ---------------------------------------------------------------------- a clock that was wrong

AHEAD = "2024-08-15"
THREE_DAYS = timedelta(days=3)


class TestAhead:
    @twice
    def test_a_position_ahead_of_the_clock_makes_all_that_is_retained_be_sent(
        self, directory: Path, clock: FixedClock, sink: Sink, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock.step(THREE_DAYS)
        write_days(directory, [*DAYS[10:], AHEAD])
        once(directory, sink.endpoint, clock=clock)
        clock.step(-THREE_DAYS)
        once(directory, sink.endpoint, clock=clock)
        until(lambda: sink.ids == ids_of([*DAYS[10:], AHEAD, *DAYS[10:]]))
        assert caplog.text.count("its day is ahead of the clock") == 1
        assert "going on with all that is retained" in caplog.text
        clock.advance(THREE_DAYS)
        once(directory, sink.endpoint, clock=clock)
        until(lambda: sink.ids == ids_of([*DAYS[10:], AHEAD, *DAYS[10:], AHEAD]))

    @twice
    def test_a_clock_that_is_set_back_while_it_forwards_does_not_stop_it(
        self, directory: Path, clock: FixedClock, sink: Sink
    ) -> None:
        clock.step(THREE_DAYS)
        write_days(directory, [*DAYS[10:], AHEAD])
        with forwarding(directory, sink.endpoint, clock=clock):
            until(lambda: sink.ids == ids_of([*DAYS[10:], AHEAD]))
            clock.step(-THREE_DAYS)
            append(directory, 200)
            until(lambda: sink.ids == [*ids_of([*DAYS[10:], AHEAD, *DAYS[10:]]), "200"])

    def test_over_udp_what_is_new_is_sent(
        self, directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock.step(THREE_DAYS)
        write_days(directory, [*DAYS[10:], AHEAD])
        with Packets() as packets, forwarding(directory, packets.endpoint, clock=clock):
            until(lambda: packets.ids == ids_of([*DAYS[10:], AHEAD]))
            clock.step(-THREE_DAYS)
            until(lambda: GOING_ON_NOW in caplog.text)
            append(directory, 200)
            until(lambda: packets.ids == [*ids_of([*DAYS[10:], AHEAD]), "200"])

    @twice
    def test_what_was_sent_before_it_was_swept_is_not_told_as_missed_then(
        self, directory: Path, clock: FixedClock, sink: Sink
    ) -> None:
        write_days(directory, DAYS)
        once(directory, sink.endpoint, clock=clock)
        sweep(directory, clock, days=5)
        clock.step(THREE_DAYS)
        write_days(directory, [AHEAD])
        once(directory, sink.endpoint, clock=clock)
        clock.step(-THREE_DAYS)
        progress = once(directory, sink.endpoint, clock=clock)
        until(lambda: sink.ids == ids_of([*DAYS, AHEAD, *DAYS[7:]]))
        assert progress.swept == []

    def test_a_run_for_what_there_is_leaves_a_file_ahead_of_the_clock_for_its_day(
        self, directory: Path, clock: FixedClock, sink: Sink
    ) -> None:
        write_days(directory, [*DAYS[10:], AHEAD])
        once(directory, sink.endpoint, clock=clock)
        once(directory, sink.endpoint, clock=clock)
        until(lambda: sink.ids == ids_of(DAYS[10:]))
        clock.advance(THREE_DAYS)
        once(directory, sink.endpoint, clock=clock)
        until(lambda: sink.ids == ids_of([*DAYS[10:], AHEAD]))

    def test_a_log_of_the_future_alone_has_nothing_to_send(self, directory: Path, clock: FixedClock) -> None:
        write_days(directory, [AHEAD])
        assert once(directory, f"tcp://127.0.0.1:{free_port()}", clock=clock).sent == 0


# ---------------------------------------------------------------------- days that were swept


class TestSwept:
    def test_what_a_dead_receiver_loses_is_one_range_that_grows(
        self, directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_days(directory, DAYS)
        with forwarding(directory, f"tcp://127.0.0.1:{free_port()}/", clock=clock) as dead:
            until(lambda: dead.progress.failing)
            for keep, gone, first_kept in ((8, DAYS[:4], DAYS[4]), (5, DAYS[4:7], DAYS[7])):
                assert sweep(directory, clock, days=keep) == gone
                expected = [("2024-08-01:0", f"{first_kept}:0")]
                until(lambda expected=expected: stored(directory).swept == expected)  # type: ignore[misc]
                for _ in range(2):  # more attempts
                    at = dead.progress.last_error_ms
                    clock.advance(1)
                    until(lambda at=at: dead.progress.last_error_ms > at)  # type: ignore[misc]
        told = "destination siem: what was written from 2024-08-01:0 to {}:0 was swept before it was sent"
        assert caplog.messages.count(told.format("2024-08-05")) == 1
        assert caplog.messages.count(told.format("2024-08-08")) == 1

    @pytest.mark.parametrize("sent", [0, 2], ids=["nothing was sent", "some was sent"])
    def test_a_sweep_while_it_connects_is_told(
        self, directory: Path, clock: FixedClock, sent: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Slow(StreamChannel):
            def open(self, known: object = None) -> None:
                sweep(directory, clock, days=3)
                super().open()

        write_days(directory, DAYS[:sent])
        with Stream() as stream:
            begin = "2024-08-01:0"
            if sent:
                begin = str(once(directory, stream.endpoint, clock=clock).position)
            write_days(directory, DAYS[sent:])
            monkeypatch.setattr(forwarder, "channel_for", Slow)
            progress = once(directory, stream.endpoint, clock=clock)
            until(lambda: stream.ids == ids_of([*DAYS[:sent], *DAYS[9:]]))
        assert progress.swept == [(begin, "2024-08-10:0")]

    @twice
    def test_of_a_log_that_was_never_swept_nothing_is_told(
        self, directory: Path, sink: Sink, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_day(directory, DAY, b"".join(map(line, range(600))))  # more than are sent at once
        assert once(directory, sink.endpoint).swept == []
        assert caplog.text == ""

    def test_what_was_sent_before_it_was_swept_is_not_told(
        self, directory: Path, clock: FixedClock, sink: Sink
    ) -> None:
        write_days(directory, DAYS[:2])
        once(directory, sink.endpoint, clock=clock)
        write_days(directory, DAYS[11:])
        assert sweep(directory, clock, days=7) == DAYS[:2]
        assert once(directory, sink.endpoint, clock=clock).swept == []
        until(lambda: sink.ids == ids_of([*DAYS[:2], DAY]))

    def test_what_was_only_due_again_is_not_told(self, directory: Path, clock: FixedClock) -> None:
        write_days(directory, DAYS)
        with Stream() as stream, forwarding(directory, stream.endpoint, clock=clock) as late:
            until(lambda: stream.ids == ids_of(DAYS) and late.progress.sent == len(stream.ids))
            assert sweep(directory, clock, days=5) == DAYS[:7]
            stream.drop()
            until(lambda: stream.ids == ids_of([*DAYS, *DAYS[7:]]))
        assert late.progress.swept == []

    def test_a_day_that_was_put_back_is_sent_once_and_what_follows_it_too(
        self, directory: Path, clock: FixedClock, sink: Sink
    ) -> None:
        write_days(directory, DAYS)
        sweep(directory, clock, days=5)
        write_days(directory, DAYS[:1])
        expected = ids_of([DAYS[0], *DAYS[7:]])
        with forwarding(directory, sink.endpoint, clock=clock):
            until(lambda: len(sink.ids) >= len(expected))
            append(directory, 200)
            until(lambda: "200" in sink.ids)
        assert sink.ids == [*expected, "200"]


class TestHeld:
    def held(self, directory: Path, clock: FixedClock) -> list[str]:
        retention = Retention(days=5, hold_for_destinations=True)
        return [str(day) for day in RetentionSweeper(directory, retention, clock=clock).sweep().held]

    def store(self, directory: Path, name: str, day: str) -> None:
        position = Position(date.fromisoformat(day), 0)
        Place(str(directory), name, Files()).write(Progress(position=position))

    def test_files_of_others_beside_the_positions_hold_nothing(
        self, directory: Path, clock: FixedClock
    ) -> None:
        write_days(directory, DAYS)
        self.store(directory, "siem", DAYS[5])
        for name in ("siem~", ".siem.swp", "siem.1.new", "siem.lock", "ümläut"):
            (directory / ".auditlog/forward" / name).write_text("x")
        (directory / ".auditlog/forward/directory~").mkdir()
        assert self.held(directory, clock) == DAYS[5:7]

    def test_a_position_that_cannot_be_read_may_be_any(
        self, directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_days(directory, DAYS)
        self.store(directory, "siem", DAYS[5])
        (directory / ".auditlog/forward/damaged").write_text("x")
        assert self.held(directory, clock) == DAYS[2:7]
        assert "forward/damaged is damaged" in caplog.text


# ---------------------------------------------------------------------- what was left by the dead


def test_what_a_dead_process_was_about_to_store_is_removed_and_nothing_else(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    place = Place(str(directory), "siem", Files())
    place.write(Progress(sent=1))
    Place(str(directory), "siem.2", Files()).write(Progress(sent=2))  # another destination
    below = directory / ".auditlog/forward"
    kept = {"siem", "siem.2", "siem.2.77.new", "siem-b.77.new", "siem.x.new", "siem.77.new~", "b.77.new"}
    for name in {*kept, "siem.77.new", "siem.4194304.new"} - {"siem", "siem.2"}:
        (below / name).write_text("x")
    assert place.lock()
    place.unlock()
    assert {path.name for path in below.iterdir()} == kept | {"siem.lock"}


# ---------------------------------------------------------------------- lines that are damaged


class TestDamage:
    def test_it_is_counted_once_however_many_runs_meet_it(self, directory: Path, sink: Sink) -> None:
        write_day(directory, DAY, b"torn\n" + line(0) + b"torn, too\n")
        end = Position(date.fromisoformat(DAY), len(b"torn\n" + line(0)))
        for _ in range(3):
            with forwarding(directory, sink.endpoint) as late:
                until(lambda late=late: late.progress.sent_through == end)  # type: ignore[misc]
            assert stored(directory).damaged == 2
        append(directory, 1)
        assert once(directory, sink.endpoint).damaged == 2

    def test_it_is_counted_once_where_what_was_sent_is_sent_again(self, directory: Path) -> None:
        write_day(directory, DAY, b"torn\n" + line(0))
        with Stream() as stream:
            with forwarding(directory, stream.endpoint):
                until(lambda: stored(directory).sent == 1)
                left = stored(directory)  # as a kill would leave it
            assert left.position < left.sent_through
            Place(str(directory), "siem", Files()).write(left)
            progress = once(directory, stream.endpoint)
            until(lambda: stream.ids == ["0", "0"])
        assert progress.damaged == 1

    def test_it_is_counted_once_however_often_a_dead_receiver_is_tried(self, directory: Path) -> None:
        write_day(directory, DAY, b"torn\n" + line(1))
        with Stream() as stream, forwarding(directory, stream.endpoint) as late:
            for times in range(1, 4):
                until(lambda times=times: stream.ids == ["1"] * times)  # type: ignore[misc]
                stream.drop()
            until(lambda: len(stream.ids) == 4)
        assert late.progress.damaged == 1


# ---------------------------------------------------------------------- lines that are too deep

DEPTH = 900


def deep(size: int, depth: int = DEPTH) -> bytes:
    """A line of another program: it can be read, and cannot be written."""
    nested = b"[" * depth + b"]" * depth
    data = b'{"note":"%b","deep":%b}' % (b"x" * size, nested)
    return b'{"event_type":"create","resource_id":"1","event_ts":1,"event_data":%b}\n' % data


class TestDeep:
    @pytest.mark.parametrize("limit", [512, 2000, 65_507])
    @pytest.mark.parametrize("kind", [Packets, Stream])
    def test_a_line_that_must_be_cut_blocks_nothing(
        self, directory: Path, kind: type[Packets | Stream], limit: int
    ) -> None:
        write_day(directory, DAY, line(0) + deep(70_000) + line(2))
        with kind() as sink:
            progress = once(directory, sink.endpoint, max_message_bytes=limit)
            until(lambda: len(sink.messages) == 3)
        assert [each.get("resource_id") for each in sink.messages] == ["0", None, "2"]
        assert sink.messages[1]["truncated"] == {"bytes": len(deep(70_000))}
        assert (progress.cut, progress.sent) == (1, 3)

    @pytest.mark.parametrize("depth", [200, 260, DEPTH])
    @pytest.mark.parametrize("limit", [512, 600, 3000])
    def test_the_message_says_what_it_was_in_no_more_than_its_limit(
        self, directory: Path, depth: int, limit: int
    ) -> None:
        write_day(directory, DAY, deep(5000, depth))
        [entry] = AuditReader(directory).read()
        form = JsonLines(Destination(endpoint="udp://127.0.0.1:1", source="here", extra_tags={"rack": "r"}))
        message = form.cut(entry, limit)
        assert len(message) <= limit
        fields = orjson.loads(message)
        assert (fields["position"], fields["source"]) == ("2024-08-12:0", "here")
        assert b"truncated" in message or b"cut: 5000 bytes" in message
