"""Following: every entry once, in order, whatever happens to the files."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    AuditReader,
    CorruptLine,
    Entry,
    Event,
    Filter,
    InvalidRange,
    InvalidSetting,
    Position,
    PositionExpired,
    PositionInvalid,
    Retention,
    RetentionSweeper,
)
from auditlog.testing import FixedClock
from tests.conftest import Start
from tests.helpers import line, until, write_day

DAY = timedelta(days=1)
OpenLog = Callable[..., AuditLogger]


@pytest.fixture
def log(directory: Path, clock: FixedClock) -> Iterator[AuditLogger]:
    with AuditLogger(directory, fsync="never", retention=None, clock=clock) as log:
        yield log


class Following:
    """A follower in a thread of its own, and what it has met."""

    def __init__(self, directory: Path, clock: FixedClock | None = None, **arguments: Any) -> None:
        self.ids: list[str] = []
        self.damage: list[CorruptLine] = []
        self.error: BaseException | None = None
        self.stop = threading.Event()
        reader = AuditReader(directory, on_corrupt=self.damage.append, clock=clock)
        self.follower = reader.follow(**arguments, stop=self.stop)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for entry in self.follower:
                self.ids.append(entry.record["resource_id"])
                assert self.follower.position == entry.position
        except Exception as error:
            self.error = error

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop.set()
        self._thread.join()

    def until(self, *ids: str) -> None:
        """Wait until these, and no others, came."""
        until(lambda: len(self.ids) >= len(ids), 10)
        assert self.ids == list(ids)


def test_by_default_it_gives_what_is_written_from_now_on(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    position = log.create("T", "old")
    with Following(directory, clock) as following:
        assert following.follower.position == position
        log.create("T", "1")
        log.create("T", "2")
        following.until("1", "2")


def test_it_can_begin_in_an_empty_log(directory: Path, log: AuditLogger, clock: FixedClock) -> None:
    with Following(directory, clock) as following:
        assert following.follower.position == Position.START
        log.create("T", "1")
        following.until("1")


def test_it_resumes_behind_a_position_and_its_own_is_one_to_resume_from(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    for number in range(10):
        log.create("T", str(number))
        clock.advance(DAY / 4)
    reader = AuditReader(directory, clock=clock)
    seen: list[str] = []
    position = Position.START
    while len(seen) < 10:
        with reader.follow(after=position) as follower:
            seen += [entry.record["resource_id"] for entry in islice(follower, 3 if len(seen) < 9 else 1)]
            position = follower.position
    assert seen == [str(number) for number in range(10)]


@pytest.mark.parametrize("start", ["2024-08-12", datetime(2024, 8, 12, 6, tzinfo=UTC)])
def test_it_can_begin_at_a_time(directory: Path, log: AuditLogger, clock: FixedClock, start: Any) -> None:
    clock.step(-DAY)
    log.create("T", "yesterday")
    clock.step(DAY)
    log.create("T", "today")
    with Following(directory, clock, start=start) as following:
        log.create("T", "now")
        following.until("today", "now")


def test_a_filter_chooses_and_the_position_goes_on_with_what_it_passes_over(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    with Following(directory, clock, where=Filter(resource_type="A")) as following:
        log.create("A", "1")
        log.create("B", "2")
        log.create("A", "3")
        position = log.create("B", "4")
        following.until("1", "3")
        until(lambda: following.follower.position == position)


def test_it_goes_on_over_midnight_with_nothing_missed(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    with Following(directory, clock) as following:
        for number in range(5):
            log.create("T", f"{number}-before")
            clock.advance(DAY)
            log.create("T", f"{number}-after")
        following.until(*(f"{number}-{when}" for number in range(5) for when in ("before", "after")))


def test_a_file_ahead_of_the_clock_is_passed_over_until_its_day(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    write_day(directory, "2024-08-15", line(15))
    with Following(directory, clock) as following:
        log.create("T", "12")
        following.until("12")
        clock.advance(2 * DAY)
        following.until("12", "15")
        log.create("T", "16")
        following.until("12", "15", "16")


def test_a_torn_tail_is_no_entry_and_is_reported_once_it_is_closed(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    with Following(directory, clock) as following:
        log.create("T", "1")
        following.until("1")
        path = directory / "2024-08-12.jsonlog"
        with path.open("ab") as file:
            file.write(b'{"torn":')
        log.create("T", "2")
        following.until("1", "2")
        assert [damage.raw for damage in following.damage] == [b'{"torn":\n']


def test_a_line_that_comes_in_pieces_is_given_when_it_is_whole(directory: Path, clock: FixedClock) -> None:
    path = write_day(directory, "2024-08-12", b"")
    with Following(directory, clock) as following:
        for piece in (line(1)[:20], line(1)[20:-1], b"\n" + line(2)[:1], line(2)[1:]):
            with path.open("ab") as file:
                file.write(piece)
            time.sleep(0.01)  # it looks at each piece, or not: nothing tells which
        following.until("1", "2")
        assert following.damage == []


def test_a_replaced_file_is_read_to_its_end_and_then_the_new_one(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    with Following(directory, clock) as following:
        log.create("T", "1")
        following.until("1")
        path = directory / "2024-08-12.jsonlog"
        path.rename(path.with_suffix(".old"))
        until(lambda: log.create("T", "2") and path.exists())
        log.create("T", "3")
        until(lambda: following.ids[-1] == "3")
        assert set(following.ids) == {"1", "2", "3"}


def test_a_replaced_file_is_read_too_where_the_next_day_has_begun_meanwhile(
    directory: Path, clock: FixedClock
) -> None:
    path = write_day(directory, "2024-08-12", line(0))
    with AuditReader(directory, clock=clock).follow(after=Position.START) as follower:
        assert next(follower).record["resource_id"] == "0"
        path.unlink()
        write_day(directory, "2024-08-12", line(1) + line(2))
        write_day(directory, "2024-08-13", line(3))
        assert [entry.record["resource_id"] for entry in islice(follower, 3)] == ["1", "2", "3"]


@pytest.mark.parametrize("stray", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_file_in_a_days_place_is_passed_over(
    directory: Path, clock: FixedClock, stray: Callable[[Path], None]
) -> None:
    write_day(directory, "2024-08-11", line(1))
    stray(directory / "2024-08-12.jsonlog")
    write_day(directory, "2024-08-13", line(2))
    with AuditReader(directory, clock=clock).follow(after=Position.START) as follower:
        assert [entry.record["resource_id"] for entry in islice(follower, 2)] == ["1", "2"]


def test_what_was_read_comes_before_the_news_that_days_were_missed(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    log.create("T", "0")
    follower = AuditReader(directory, clock=clock).follow(after=Position.START)
    assert next(follower).record["resource_id"] == "0"
    for number in range(1, 10):
        log.create("T", str(number))
    for _ in range(3):
        clock.advance(DAY)
        log.create("T", "missed")
    RetentionSweeper(directory, Retention(days=1), clock=clock).sweep()
    assert [next(follower).record["resource_id"] for _ in range(9)] == [
        str(number) for number in range(1, 10)
    ]
    with pytest.raises(PositionExpired):
        next(follower)
    follower.close()


def test_it_can_be_closed_by_what_is_told_of_damage(directory: Path, clock: FixedClock) -> None:
    write_day(directory, "2024-08-12", line(1) + b"torn\n" + line(2))
    reader = AuditReader(directory, on_corrupt=lambda _: follower.close(), clock=clock)
    follower = reader.follow(after=Position.START)
    assert [entry.record["resource_id"] for entry in follower] == []


def test_a_truncated_file_is_read_on_and_told(
    directory: Path, log: AuditLogger, clock: FixedClock, caplog: pytest.LogCaptureFixture
) -> None:
    with Following(directory, clock) as following:
        log.create("T", "1")
        log.create("T", "2")
        following.until("1", "2")
        os.truncate(directory / "2024-08-12.jsonlog", 0)
        until(lambda: "was truncated while it was followed" in caplog.text)
        log.create("T", "3")
        following.until("1", "2", "3")


def test_a_sweep_of_what_was_read_disturbs_nobody(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    sweeper = RetentionSweeper(directory, Retention(days=1), clock=clock)
    with Following(directory, clock) as following:
        for number in range(4):
            log.create("T", str(number))
            following.until(*map(str, range(number + 1)))
            clock.advance(2 * DAY)
            sweeper.sweep()
        assert following.error is None


def test_days_that_were_swept_before_they_were_read_are_told(
    directory: Path, log: AuditLogger, clock: FixedClock
) -> None:
    position = log.create("T", "1")
    reader = AuditReader(directory, clock=clock)
    follower = reader.follow()
    for _ in range(3):
        clock.advance(DAY)
        log.create("T", "missed")
    RetentionSweeper(directory, Retention(days=1), clock=clock).sweep()
    with pytest.raises(PositionExpired, match="days up to 2024-08-14 were swept") as caught:
        next(follower)
    assert caught.value.position == follower.position == position
    with pytest.raises(PositionExpired, match="its day is gone"):
        reader.follow(after=position)
    follower.close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"start": "soon"}, InvalidRange),
        ({"where": "alice"}, InvalidSetting),
        ({"after": "start"}, InvalidSetting),
        ({"after": Position.parse("2024-08-12:1")}, PositionInvalid),
        ({"after": Position.parse("2024-09-12:0")}, PositionInvalid),
        ({"start": "2024-08-12", "after": Position.START}, InvalidRange),
    ],
)
def test_bad_arguments_are_refused_by_the_call(
    directory: Path, log: AuditLogger, arguments: dict[str, Any], error: type[Exception]
) -> None:
    log.create("T", "1")
    with pytest.raises(error):
        AuditReader(directory).follow(**arguments)
    with pytest.raises(error):
        AuditReader(directory).afollow(**arguments)


def test_it_ends_when_it_is_told_to_and_closes_its_files(directory: Path, log: AuditLogger) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd"))

    log.create("T", "1")
    before = open_files()
    stop = threading.Event()
    follower = AuditReader(directory).follow(stop=stop)
    stop.set()
    assert list(follower) == []
    with AuditReader(directory).follow(after=Position.START) as follower:
        assert next(follower).record["resource_id"] == "1"
    assert list(follower) == []
    assert open_files() == before, "closed, not only given up"


def test_of_many_events_each_match_comes_once_and_in_order(directory: Path, long: bool) -> None:
    count = 1_000_000 if long else 100_000
    events = [Event(event_type="create", resource_type=f"T{number % 10}") for number in range(64)]

    def write_all() -> None:
        with AuditLogger(directory, retention=None) as log:
            for number in range(0, count, 64):
                log.write_many([event.model_copy(update={"resource_id": str(number)}) for event in events])

    AuditLogger(directory, retention=None).close()
    follower = AuditReader(directory).follow(where=Filter(resource_type="T3"))
    writer = threading.Thread(target=write_all)
    writer.start()
    expected = [str(number) for number in range(0, count, 64) for _ in range(7)]
    assert [entry.record["resource_id"] for entry in islice(follower, len(expected))] == expected
    writer.join()
    follower.close()


def test_an_entry_of_another_process_comes_within_a_tenth_of_a_second(
    directory: Path, tmp_path: Path, start: Start
) -> None:
    AuditLogger(directory).close()
    follower = AuditReader(directory).follow()
    time.sleep(0.3)  # until it looks as rarely as it ever does
    writer = start("write_now_and_then", directory, 10)
    delays = [time.time() - entry.record["event_ts"] / 1000 for entry in islice(follower, 10)]
    writer.wait()
    follower.close()
    assert sorted(delays)[7] < 0.1, delays  # the machine may be busy now and then


def test_idle_it_uses_next_to_no_processor_time(directory: Path) -> None:
    AuditLogger(directory).close()
    stop = threading.Event()
    follower = AuditReader(directory).follow(stop=stop)
    threading.Timer(1.0, stop.set).start()
    used = time.process_time()
    assert list(follower) == []
    assert time.process_time() - used < 0.05


class TestAfollow:
    def test_entries_come_as_they_are_written_and_the_loop_goes_on(
        self, directory: Path, log: AuditLogger, clock: FixedClock
    ) -> None:
        async def follow() -> tuple[list[str], int]:
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            turning = asyncio.create_task(turn())
            ids = []
            async with AuditReader(directory, clock=clock).afollow() as follower:
                asyncio.get_running_loop().call_later(0.05, log.create, "T", "1")
                async for entry in follower:
                    ids.append(entry.record["resource_id"])
                    if len(ids) < 3:
                        clock.advance(DAY)
                        log.create("T", str(len(ids) + 1))
                    else:
                        break
                assert follower.position == entry.position
            turning.cancel()
            return ids, turns

        ids, turns = asyncio.run(follow())
        assert ids == ["1", "2", "3"]
        assert turns > 10

    def test_it_stops_on_an_event_and_on_cancellation(self, directory: Path, log: AuditLogger) -> None:
        async def until_stopped() -> list[Entry]:
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(0.05, stop.set)
            return [entry async for entry in AuditReader(directory).afollow(stop=stop)]

        async def until_cancelled() -> None:
            async with asyncio.timeout(0.05), AuditReader(directory).afollow() as follower:
                async for _ in follower:
                    pass

        assert asyncio.run(until_stopped()) == []
        with pytest.raises(TimeoutError):
            asyncio.run(until_cancelled())


class TestTake:
    def test_all_that_is_at_hand_comes_at_once(self, log: AuditLogger, directory: Path) -> None:
        for number in range(10):
            log.create("Odd" if number % 2 else "Even", str(number))
        with AuditReader(directory).follow(
            after=Position.START, where=Filter(resource_type="Odd")
        ) as follower:
            assert [entry.record["resource_id"] for entry in follower.take(0)] == ["1", "3", "5", "7", "9"]
            assert follower.take(0.01) == []
            log.create("Even", "10")
            position = log.create("Even", "11")
            assert follower.take(0.01) == []
            assert follower.position == position  # it moves with what the filter passes over, too

    def test_a_batch_is_bounded_by_entries_and_by_bytes(self, directory: Path) -> None:
        small, large = [line(number) for number in range(300)], [line(300, note="x" * 600_000)] * 5
        write_day(directory, "2024-08-12", b"".join(small + large))
        with AuditReader(directory).follow(after=Position.START) as follower:
            batches = list(iter(lambda: follower.take(0), []))
        assert [len(batch) for batch in batches] == [256, 46, 2, 1]
        assert [entry.line for batch in batches for entry in batch] == small + large

    def test_it_waits_for_the_first_and_not_after_the_end(self, log: AuditLogger, directory: Path) -> None:
        stop = threading.Event()
        with AuditReader(directory).follow(stop=stop) as follower:
            writer = threading.Thread(target=log.create, args=("T", "1"))
            writer.start()
            assert [entry.record["resource_id"] for entry in follower.take(20)] == ["1"]
            writer.join()
            log.create("T", "2")
            stop.set()
            assert follower.take(20) == []
        assert follower.take(20) == []
