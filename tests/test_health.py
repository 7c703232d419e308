"""What a logger says of itself: figures, metrics, and one line for a readiness probe."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from auditlog import AuditLogger, DiskFull, LockTimeout, Retention, Stats, SyncFailed
from auditlog.testing import FailingFiles, FixedClock, recorded_log
from tests.helpers import until, write_day


def test_stats_count_what_happened(directory: Path, clock: FixedClock) -> None:
    files = FailingFiles()
    with AuditLogger(
        directory,
        fsync="always",
        retention=Retention(days=1),
        files=files,
        clock=clock,
        on_failure={"update": "drop"},
    ) as log:
        until(lambda: log.stats().last_sweep)
        before = log.stats()
        assert (before.written, before.failed, before.last_error, before.last_error_at) == (0, 0, "", None)
        log.create("T", "1")
        log.create("T", "2")
        clock.advance(1)
        files.fail("write", errno.ENOSPC)
        log.update("T", "2")
        with pytest.raises(DiskFull):
            log.create("T", "3")
        stats = log.stats()
        assert (stats.written, stats.failed, stats.dropped) == (2, 2, 1)
        assert stats.syncs >= 2
        assert 0 < stats.longest_sync_seconds <= stats.sync_seconds
        assert "No space left on device" in stats.last_error
        assert stats.last_error_at == datetime(2024, 8, 12, 12, 0, 1, tzinfo=UTC)
        assert stats.last_sweep is not None
        assert stats.last_sweep.at == datetime(2024, 8, 12, 12, tzinfo=UTC)
        files.heal()


def test_the_wait_for_other_writers_is_measured(directory: Path) -> None:
    with AuditLogger(directory, fsync="never", retention=None) as log:
        log.create("T", "1")
        assert log.stats().lock_waits == 0
        holder = os.open(directory, os.O_RDONLY)
        fcntl.flock(holder, fcntl.LOCK_EX)
        writing = threading.Thread(target=log.create, args=("T", "2"))
        writing.start()
        writing.join(0.05)
        assert writing.is_alive()
        os.close(holder)
        writing.join()
        assert log.stats().lock_waits == 1
        assert log.stats().lock_wait_seconds >= 0.05


def test_a_wait_in_vain_is_measured_too(directory: Path) -> None:
    with AuditLogger(directory, fsync="never", retention=None, lock_timeout=0.05) as log:
        holder = os.open(directory, os.O_RDONLY)
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(LockTimeout):
            log.create("T", "1")
        os.close(holder)
        assert log.stats().lock_wait_seconds >= 0.05


def test_the_prometheus_text_says_the_same(tmp_path: Path) -> None:
    directory = tmp_path / 'a "quoted" \\ name\nof two lines'
    with AuditLogger(directory, fsync="always") as log:
        log.create("T", "1")
        until(lambda: log.stats().last_sweep)
        stats = log.stats()
    samples = {
        sample.name: sample
        for family in text_string_to_metric_families(stats.prometheus())
        for sample in family.samples
    }
    assert {name for name in samples if not name.startswith("auditlog_")} == set()
    assert samples["auditlog_events_written_total"].value == 1
    assert samples["auditlog_events_failed_total"].value == 0
    assert samples["auditlog_sync_seconds_total"].value == stats.sync_seconds
    assert stats.last_sweep is not None
    assert samples["auditlog_last_sweep_timestamp_seconds"].value == stats.last_sweep.at.timestamp()
    assert samples["auditlog_last_error_timestamp_seconds"].value == 0
    assert {sample.labels["directory"] for sample in samples.values()} == {str(directory)}
    assert stats.prometheus().endswith("\n")


def test_a_disabled_log_is_well_and_has_done_nothing() -> None:
    log = AuditLogger(None)
    assert log.check() == ""
    assert log.stats() == Stats()
    assert "auditlog_events_written_total" in log.stats().prometheus()


class TestCheck:
    def test_all_is_well_before_and_after_the_first_event(self) -> None:
        with recorded_log(retention=Retention()) as log:
            assert log.audit.check() == ""
            log.audit.create("T", "1")
            assert log.audit.check() == ""

    def test_a_failed_write_is_told_until_one_works_again(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files) as log:
            files.fail("write", errno.EROFS, times=1)
            with pytest.raises(Exception, match="Read-only"):
                log.audit.create("T", "1")
            assert "Read-only file system; do not go on" in log.audit.check()
            log.audit.create("T", "1")
            assert log.audit.check() == ""

    def test_a_failed_background_sync_is_told(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files, fsync="interval", fsync_interval=0.01) as log:
            files.fail("sync_data")
            log.audit.create("T", "1")
            until(lambda: "sync failed" in log.audit.check())
            assert "check the disk" in log.audit.check()
            assert log.audit.stats().sync_failures > 0
            assert "sync failed" in log.audit.stats().last_error
            files.heal()
            log.audit.create("T", "2")
            until(lambda: log.audit.check() == "")

    def test_a_sync_that_fails_for_the_gap_event_too_is_told(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files, fsync="always", on_failure="drop") as log:
            files.fail("sync_data")
            log.audit.create("T", "1")
            until(lambda: log.audit.stats().sync_failures >= 2)
            assert "a sync failed" in log.audit.check()
            files.heal()
            log.audit.create("T", "2")
            assert log.audit.check() == ""

    def test_a_stuck_writer_is_told(self, directory: Path) -> None:
        with AuditLogger(directory, retention=None) as log:
            holder = os.open(directory, os.O_RDONLY)
            fcntl.flock(holder, fcntl.LOCK_EX)
            assert "was not free for 1 s; look for a stopped process" in log.check()
            os.close(holder)
            assert log.check() == ""

    def test_a_directory_that_is_gone_is_told(self, directory: Path) -> None:
        with AuditLogger(directory, fsync="never", retention=None) as log:
            directory.rename(directory.with_suffix(".old"))
            assert "moved away" in log.check()

    def test_a_sweep_that_fails_is_told(self, directory: Path, clock: FixedClock) -> None:
        files = FailingFiles()
        files.fail("remove")
        for day in ("2024-01-01", "2024-08-12"):
            write_day(directory, day, b"x\n")
        with AuditLogger(directory, retention=Retention(days=1), files=files, clock=clock) as log:
            until(log.check)
            assert "2024-01-01 could not be removed" in log.check()
            assert log.stats().sweep_error

    def test_a_closed_log_is_told(self, directory: Path) -> None:
        log = AuditLogger(directory)
        log.close()
        assert "is closed; make a new one" in log.check()

    def test_it_is_one_line(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files, fsync="always") as log:
            files.fail("sync_data", times=1)
            with pytest.raises(SyncFailed):
                log.audit.create("T", "1")
            assert len(log.audit.check().splitlines()) == 1
            log.audit.create("T", "2")

    def test_a_forked_child_can_check_before_it_writes(self, directory: Path) -> None:
        with AuditLogger(directory) as log:
            pid = os.fork()
            if pid == 0:
                os._exit(log.check() != "")
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
