from __future__ import annotations

import errno
import fcntl
import logging
import os
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auditlog import (
    AuditLogger,
    AuditReader,
    DirectoryError,
    InvalidSetting,
    Retention,
    RetentionSweeper,
    SweepBusy,
)
from auditlog.background import SweepJob
from auditlog.testing import FailingFiles, FixedClock
from tests.helpers import Reading, contents, line, until, write_day

TODAY = date(2024, 8, 12)


def ago(days: int) -> date:
    return TODAY - timedelta(days=days)


def fill(directory: Path, days: list[int], size: int = 10) -> None:
    for day in days:
        write_day(directory, ago(day).isoformat(), b"x" * size)


def sweeper(directory: Path, clock: FixedClock, **options: Any) -> RetentionSweeper:
    return RetentionSweeper(directory, Retention(**options), clock=clock)


def test_exactly_thirty_dates_are_kept_today_included(directory: Path, clock: FixedClock) -> None:
    fill(directory, list(range(40)))
    report = sweeper(directory, clock).sweep()
    assert report.removed == tuple(ago(days) for days in range(39, 29, -1))
    assert report.kept == tuple(ago(days) for days in range(29, -1, -1))
    assert set(contents(directory)) == {f"{day}.jsonlog" for day in report.kept}
    assert (report.removed_bytes, report.kept_bytes) == (100, 300)
    assert report.oldest_kept == ago(29)
    assert report.next_due == datetime(2024, 8, 13, tzinfo=UTC)
    assert report.at == datetime(2024, 8, 12, 12, tzinfo=UTC)


def test_a_plan_says_what_a_sweep_does_and_removes_nothing(directory: Path, clock: FixedClock) -> None:
    fill(directory, [0, 1, 5, 9])
    before = contents(directory)
    plan = sweeper(directory, clock, days=3).plan()
    assert contents(directory) == before
    report = sweeper(directory, clock, days=3).sweep()
    assert (plan.removed, plan.kept, plan.removed_bytes) == (
        report.removed,
        report.kept,
        report.removed_bytes,
    )
    assert (plan.dry_run, report.dry_run) == (True, False)


def test_stray_names_are_left_alone(directory: Path, clock: FixedClock) -> None:
    fill(directory, [0, 90])
    for name in (
        "x.jsonlog",
        "2026-02-30.jsonlog",
        "2020-01-01.jsonlog.bak",
        "2020-01-01.txt",
        "2020-1-1.jsonlog",
    ):
        (directory / name).write_bytes(b"mine")
    (directory / "2020-01-02.jsonlog").mkdir()
    (directory / "2020-01-03.jsonlog").symlink_to(directory / "x.jsonlog")
    before = {path.name for path in directory.iterdir()}
    assert sweeper(directory, clock).sweep().removed == (ago(90),)
    after = {path.name for path in directory.iterdir()} - {".auditlog"}
    assert before - after == {f"{ago(90)}.jsonlog"}


def test_the_newest_day_and_those_ahead_of_the_clock_stay_however_old(
    directory: Path, clock: FixedClock
) -> None:
    fill(directory, [200, 100, -2, -400])
    assert sweeper(directory, clock, days=1, max_bytes=1).sweep().removed == (ago(200),)


def test_too_many_bytes_cost_whole_oldest_days(directory: Path, clock: FixedClock) -> None:
    fill(directory, [0, 1, 2, 3], size=100)
    assert sweeper(directory, clock, max_bytes=300).sweep().removed == (ago(3),)
    assert sweeper(directory, clock, max_bytes=299).sweep().removed == (ago(2),)
    assert sweeper(directory, clock, max_bytes=1).sweep().removed == (ago(1),)
    assert sweeper(directory, clock, max_bytes=1).sweep().kept == (TODAY,)


def test_the_zone_of_the_log_decides_what_today_is(directory: Path) -> None:
    clock = FixedClock(datetime(2024, 8, 12, 22, 30, tzinfo=UTC))  # the 13th in Berlin
    AuditLogger(directory, timezone="Europe/Berlin", retention=None, clock=clock).close()
    fill(directory, [0, 1])
    report = sweeper(directory, clock, days=2).sweep()
    assert report.removed == (ago(1),)
    assert report.next_due is not None
    assert report.next_due.isoformat() == "2024-08-14T00:00:00+02:00"


def test_what_was_swept_is_remembered_before_the_file_goes(directory: Path, clock: FixedClock) -> None:
    fill(directory, [0, 40, 50])
    files = FailingFiles()
    files.fail("remove", errno.EPERM)
    report = RetentionSweeper(directory, clock=clock, files=files).sweep()
    assert (directory / ".auditlog" / "state").read_bytes() == b'{"swept_through":"2024-07-03"}\n'
    assert report.removed == ()
    assert report.failed == ((ago(50), "Operation not permitted"), (ago(40), "Operation not permitted"))
    assert report.kept == (ago(50), ago(40), TODAY)
    files.heal()
    assert RetentionSweeper(directory, clock=clock, files=files).sweep().removed == (ago(50), ago(40))


def test_what_went_before_it_was_remembered_is_remembered_by_the_next_sweep(
    directory: Path, clock: FixedClock
) -> None:
    fill(directory, [0, 40, 50])
    files = FailingFiles()
    sweeper = RetentionSweeper(directory, clock=clock, files=files)
    files.fail("replace", errno.ENOSPC)
    with pytest.raises(DirectoryError, match="no space left on device; free space"):
        sweeper.sweep()
    assert [path.name for path in sorted(directory.glob("*.jsonlog"))] == [
        f"{ago(days)}.jsonlog" for days in (40, 0)
    ]
    (directory / f"{ago(40)}.jsonlog").unlink()
    files.heal()
    assert sweeper.sweep().removed == ()
    assert (directory / ".auditlog" / "state").read_bytes() == b'{"swept_through":"%s"}\n' % str(
        ago(50)
    ).encode()


def test_a_started_read_finishes_the_file_it_is_in(directory: Path, clock: FixedClock) -> None:
    write_day(directory, ago(90).isoformat(), b"".join(line(number) for number in range(10)))
    write_day(directory, ago(80).isoformat(), line(10))
    write_day(directory, TODAY.isoformat(), line(11))
    reading = AuditReader(directory).read()
    first = next(reading)
    sweeper(directory, clock).sweep()
    ids = [entry.record["resource_id"] for entry in [first, *reading]]
    assert ids == [*map(str, range(10)), "11"]


def test_a_second_sweep_at_the_same_time_is_refused(directory: Path, clock: FixedClock) -> None:
    fill(directory, [0])
    sweeper(directory, clock).sweep()
    holder = os.open(directory / ".auditlog", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(SweepBusy, match="another process is sweeping"):
        RetentionSweeper(directory, clock=clock, lock_timeout=0.01).sweep()
    os.close(holder)
    sweeper(directory, clock).sweep()


@pytest.mark.parametrize("days", [0, -1, 1.5, True, "30", None, 10**6])
def test_days_that_are_none_are_refused(days: Any) -> None:
    with pytest.raises(InvalidSetting, match="days="):
        Retention(days=days)


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, "1G"])
def test_a_size_that_is_none_is_refused(max_bytes: Any) -> None:
    with pytest.raises(InvalidSetting, match="max_bytes="):
        Retention(max_bytes=max_bytes)


def test_a_missing_directory_is_refused_at_once(directory: Path) -> None:
    with pytest.raises(DirectoryError, match="no such file or directory; create it"):
        RetentionSweeper(directory)


@settings(deadline=None, max_examples=50)
@given(
    st.sets(st.integers(-5, 60), max_size=20),
    st.integers(1, 40),
    st.none() | st.integers(1, 300),
)
def test_a_sweep_keeps_what_it_must_and_removes_what_it_may(
    tmp_path_factory: pytest.TempPathFactory, days: set[int], keep: int, max_bytes: int | None
) -> None:
    directory = tmp_path_factory.mktemp("log")
    clock = FixedClock(datetime(2024, 8, 12, 12, tzinfo=UTC))
    fill(directory, sorted(days))
    report = RetentionSweeper(directory, Retention(keep, max_bytes), clock=clock).sweep()
    left = {day for day in days if (directory / f"{ago(day)}.jsonlog").exists()}
    near = [day for day in days if day >= -1]
    assert {day for day in days if day <= 0} <= left  # today's and those ahead
    if near:
        assert min(near) in left
    removed = days - left
    assert all(gone > stays for gone in removed for stays in left)  # oldest days only
    if max_bytes is None:
        assert all(day >= keep for day in removed)
        assert all(day < keep or day == min(near) for day in left)
    assert set(report.removed) == {ago(day) for day in removed}
    assert set(report.kept) == {ago(day) for day in left}


class TestBackground:
    def test_it_sweeps_at_the_start_and_says_so(self, directory: Path, clock: FixedClock) -> None:
        fill(directory, [0, 40])
        with AuditLogger(directory, clock=clock) as log:
            until(lambda: log.retention_status().report)
            report = log.retention_status().report
            assert report is not None
            assert report.removed == (ago(40),)
            assert log.retention_status().error == ""

    def test_it_comes_back_at_midnight_and_at_least_hourly(self, directory: Path, clock: FixedClock) -> None:
        fill(directory, [0, 29])
        job = SweepJob(sweeper(directory, clock), UTC, clock)
        assert job.run() == 3600.0
        clock.advance(timedelta(hours=11, minutes=50))
        assert job.run() == 600.0
        clock.advance(600)
        job.run()
        assert job.status.report is not None
        assert job.status.report.removed == (ago(29),)

    def test_it_pauses_while_the_wall_clock_has_jumped(
        self, directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(directory, [0, 1])
        job = SweepJob(sweeper(directory, clock), UTC, clock)
        clock.step(timedelta(days=400))
        with caplog.at_level(logging.WARNING, "auditlog"):
            job.run()
            job.run()
        assert "jumped by +9600.0 hours" in job.status.error
        assert caplog.text.count("jumped") == 1
        assert len(contents(directory)) == 2
        clock.step(timedelta(days=-400))
        job.run()
        assert job.status.error == ""

    def test_a_failing_sweep_is_shown_and_stops_nothing(self, directory: Path, clock: FixedClock) -> None:
        files = FailingFiles()
        with AuditLogger(directory, retention=Retention(), clock=clock, files=files) as log:
            until(lambda: log.retention_status().report)
            files.fail("names", errno.EIO)
            log._engine._sweep.run()  # type: ignore[union-attr]
            assert "input/output error" in log.retention_status().error
            assert log.retention_status().report is not None
            files.heal()
            log.create("T", "1")
        assert Reading(directory).ids == ["1"]
