"""The clock steps, days are short, long or missing: every line stands in one file, in order."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from auditlog import AuditLogger, AuditReader
from auditlog.storage.days import day_at, load_zone
from auditlog.testing import FixedClock
from tests.conftest import Start
from tests.helpers import Reading, until
from tests.programs.shared_clock import SharedClock

HALF_HOUR = timedelta(minutes=30)
DAY = timedelta(days=1)
MIDNIGHT_NS = round(datetime(2024, 8, 13, tzinfo=UTC).timestamp()) * 10**9


def open_log(directory: Path, clock: Any, **options: Any) -> AuditLogger:
    return AuditLogger(directory, fsync="never", retention=None, clock=clock, **options)


@pytest.mark.parametrize(
    ("zone", "first", "hours"),
    [
        ("Europe/Berlin", date(2024, 3, 30), [24, 23, 24]),
        ("Europe/Berlin", date(2024, 10, 26), [24, 25, 24]),
        ("America/Havana", date(2024, 3, 9), [24, 23, 24]),  # midnight never was
        ("America/Havana", date(2024, 11, 2), [24, 25, 24]),  # midnight was twice
        ("America/Santiago", date(2024, 4, 5), [24, 25, 24]),  # the hour before midnight was twice
        ("Pacific/Apia", date(2011, 12, 28), [24, 24, 0, 24]),  # a day never was
        ("UTC", date(2024, 2, 28), [24, 24, 24]),  # leap day
        ("UTC", date(2023, 2, 27), [24, 24, 24]),  # none
        ("Asia/Kathmandu", date(2024, 12, 31), [24, 24]),  # year end
    ],
)
def test_each_day_is_one_file_however_long_it_is(
    directory: Path, zone: str, first: date, hours: list[int]
) -> None:
    clock = FixedClock(datetime(first.year, first.month, first.day, tzinfo=load_zone(zone)[1]))
    with open_log(directory, clock, timezone=zone) as log:
        for number in range(2 * sum(hours)):
            log.create("T", str(number))
            clock.advance(HALF_HOUR)
    reading = Reading(directory)
    assert reading.ids == [str(number) for number in range(2 * sum(hours))]
    lengths = {first + number * DAY: 2 * length for number, length in enumerate(hours) if length}
    assert Counter(entry.day for entry in reading.entries) == lengths


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-36, 36) | st.just(0), max_size=30))
@example([0, 12, -25, 1])  # a day that was too far ahead, until the clock ran on
def test_whatever_the_clock_does_a_line_goes_to_the_newest_day_up_to_one_ahead(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("log")
    clock = FixedClock(datetime(2024, 8, 12, 12, tzinfo=UTC))
    expected: list[tuple[date, str, int]] = []
    with open_log(directory, clock) as log:
        for number, hours in enumerate(steps):
            clock.step(timedelta(hours=hours))
            today = day_at(clock.time_ns(), UTC)
            day = max([today, *(day for day, _, _ in expected if day <= today + DAY)])
            assert log.create("T", str(number)).day == day  # type: ignore[union-attr]
            expected.append((day, str(number), clock.time_ns() // 1_000_000))
    expected.sort(key=lambda line: line[0])  # within a day as they were written
    found = Reading(directory).entries
    assert [(entry.day, entry.record["resource_id"], entry.record["event_ts"]) for entry in found] == expected


def test_a_file_that_a_clock_left_ahead_is_written_again_when_its_day_comes(
    directory: Path, clock: FixedClock
) -> None:
    with open_log(directory, clock) as log:
        log.create("T", "1")
        clock.step(5 * DAY)
        log.create("T", "too early")
        clock.step(-5 * DAY)
        log.create("T", "2")
        clock.advance(3 * DAY)
        log.create("T", "3")
        clock.advance(DAY)  # a day before it: from now on lines stand in order there
        log.create("T", "4")
        clock.advance(DAY)
        log.create("T", "5")
    reading = Reading(directory)
    assert reading.ids == ["1", "2", "3", "too early", "4", "5"]
    assert [entry.day.day for entry in reading.entries] == [12, 12, 15, 17, 17, 17]


def test_two_clocks_on_the_two_sides_of_midnight_write_to_the_newer_file(directory: Path) -> None:
    midnight = datetime(2024, 8, 13, tzinfo=UTC)
    behind, ahead = FixedClock(midnight - timedelta(milliseconds=1)), FixedClock(midnight)
    with open_log(directory, behind) as first, open_log(directory, ahead) as second:
        assert first.create("T").day == date(2024, 8, 12)  # type: ignore[union-attr]
        assert second.create("T").day == date(2024, 8, 13)  # type: ignore[union-attr]
        until(lambda: first.create("T").day == date(2024, 8, 13), seconds=1)  # type: ignore[union-attr]
        behind.advance(0.001)
        assert first.create("T").day == date(2024, 8, 13)  # type: ignore[union-attr]


def show(clock: SharedClock, time_ns: int) -> None:
    """Set a clock of other processes; it runs on from there."""
    clock.move(time_ns - time.time_ns())


def until_it_grows(path: Path, size: int = 3 * 10**7) -> None:
    """Wait until processes have written so much that each of them has looked for a newer day."""
    until(path.exists)
    size += path.stat().st_size
    until(lambda: path.stat().st_size > size)


def test_midnight_comes_for_all_processes_at_once_and_a_step_back_opens_no_older_file(
    directory: Path, tmp_path: Path, start: Start
) -> None:
    clock = SharedClock(tmp_path / "clock")
    show(clock, MIDNIGHT_NS - 3600 * 10**9)
    processes = [
        start("write_events", directory, tmp_path / "clock", name, 2, 10**6, stdout=subprocess.DEVNULL)
        for name in ("a", "b")
    ]
    until_it_grows(directory / "2024-08-12.jsonlog")
    show(clock, MIDNIGHT_NS - 10**8)
    until_it_grows(directory / "2024-08-13.jsonlog")
    show(clock, MIDNIGHT_NS - 1800 * 10**9)
    until_it_grows(directory / "2024-08-13.jsonlog")
    for process in processes:
        process.kill()
        process.wait()

    times: dict[int, list[int]] = {12: [], 13: []}
    for entry in Reading(directory).entries:
        times[entry.day.day].append(entry.record["event_ts"])
    midnight = MIDNIGHT_NS // 1_000_000
    assert times[12] == sorted(times[12])
    assert times[12][-1] < midnight <= times[13][0]
    assert len([later for earlier, later in pairwise(times[13]) if later < earlier]) == 1
    assert times[13][-1] < midnight


def test_processes_on_the_two_sides_of_midnight_write_to_the_newer_file(
    directory: Path, tmp_path: Path, start: Start
) -> None:
    for name, minutes in (("behind", -30), ("ahead", 30)):
        show(SharedClock(tmp_path / name), MIDNIGHT_NS + minutes * 60 * 10**9)
        arguments = directory, tmp_path / name, name, 2, 10**6
        start("write_events", *arguments, stdout=subprocess.DEVNULL)
        until_it_grows(directory / f"2024-08-{12 if name == 'behind' else 13}.jsonlog")
    size = (directory / "2024-08-12.jsonlog").stat().st_size
    until_it_grows(directory / "2024-08-13.jsonlog")
    assert (directory / "2024-08-12.jsonlog").stat().st_size == size
    newest = islice(AuditReader(directory).read(newest_first=True), 10_000)
    assert {entry.record["resource_id"].partition("-")[0] for entry in newest} == {"behind", "ahead"}
