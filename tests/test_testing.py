from __future__ import annotations

import errno
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from auditlog import InvalidSetting
from auditlog.testing import FailingFiles, FixedClock, recorded_log


def test_recorded_log_gives_a_logger_and_what_it_wrote() -> None:
    with recorded_log() as log:
        assert log.entries == []
        log.audit.create("T", "1")
        assert [record["resource_id"] for record in log.records] == ["1"]
        directory = Path(log.directory)
        assert directory.exists()
    assert not directory.exists()


def test_a_fixed_clock_moves_when_it_is_told_to() -> None:
    clock = FixedClock(datetime(2024, 8, 12, tzinfo=UTC))
    before = clock.time_ns(), clock.boottime_ns()
    clock.advance(1.5)
    clock.step(timedelta(hours=-1))
    assert clock.time_ns() - before[0] == 1_500_000_000 - 3_600_000_000_000
    assert clock.boottime_ns() - before[1] == 1_500_000_000
    with pytest.raises(InvalidSetting, match="needs a time zone"):
        FixedClock(datetime(2024, 8, 12))  # noqa: DTZ001


def test_failing_files_fail_when_they_are_told_to(tmp_path: Path) -> None:
    files = FailingFiles()
    fd = files.create_append(files.open_directory(str(tmp_path)), "file")
    files.fail("write", errno.ENOSPC, after=1, times=1)
    files.shorten(2)
    assert files.write(fd, b"abc") == 2
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        files.write(fd, b"abc")
    assert files.write(fd, b"d") == 1
    assert (tmp_path / "file").read_bytes() == b"abd"
    assert files.calls["write"] == 3
    with pytest.raises(InvalidSetting, match="operation="):
        files.fail("wite")
