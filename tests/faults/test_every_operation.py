"""Every file operation fails in turn, at each of its calls: nothing is lost, and nothing false is told."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    DirectoryError,
    DiskFull,
    Event,
    Position,
    Retention,
    RetentionSweeper,
    SyncFailed,
    WriteFailed,
)
from auditlog.storage.files import Files
from auditlog.testing import FailingFiles, FixedClock
from tests.helpers import Reading, line, write_day

OPERATIONS = sorted(name for name in vars(Files) if not name.startswith("_"))
FULL = (errno.ENOSPC, errno.EDQUOT)
ERRORS = (*FULL, errno.EROFS, errno.EIO)
MODES = ("always", "interval", "never")
FOREVER = 1 << 62
DAY = timedelta(days=1)


class Story:
    """The life of a log while one operation fails, and what its callers were told.

    `told`: the positions of acknowledged events by their ids. `asked`: all ids. `refused`: the
    steps whose events were not acknowledged, `errors` how. `durable`: `durable_through()` after
    each failed sync.
    """

    def __init__(self, directory: Path, fsync: str, files: FailingFiles, kind: type[WriteFailed]) -> None:
        self.directory, self.files = directory, files
        self.told: dict[str, Position | None] = {}
        self.asked: list[str] = []
        self.refused: set[str] = set()
        self.errors: list[WriteFailed] = []
        self.durable: list[Position | None] = []
        self._kind = kind
        self._clock = FixedClock(datetime(2024, 8, 12, 12, tzinfo=UTC))
        self.log = self._open(fsync)

    def _open(self, fsync: str) -> AuditLogger:
        options: dict[str, Any] = {"fsync": fsync, "fsync_interval": 1000, "retention": None}
        try:
            return AuditLogger(self.directory, clock=self._clock, files=self.files, **options)
        except DirectoryError:
            self.files.heal()
            return self._open(fsync)

    def live(self) -> None:
        """All that a log is for, until it is closed."""
        write_day(self.directory, "2024-07-01", line(0))
        self.create("first")
        self.write_many("several")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.create, ("at once",) * 2, ("a", "b")))
        self._clock.advance(DAY)
        self.create("next day")
        with suppress(DirectoryError):
            self.sweep()
        self.create("swept")
        self.sync(self.log.flush)

    def sweep(self) -> None:
        """Remove what is older than yesterday."""
        RetentionSweeper(self.directory, Retention(days=2), clock=self._clock, files=self.files).sweep()

    def create(self, step: str, name: str = "") -> None:
        """Write one event."""
        self._write(step, [step + name], lambda: [self.log.create("T", step + name)])

    def write_many(self, step: str) -> None:
        """Write three events together."""
        ids = [f"{step} {number}" for number in range(3)]
        events = [Event(event_type="create", resource_id=name) for name in ids]
        self._write(step, ids, lambda: self.log.write_many(events))

    def _write(self, step: str, ids: list[str], write: Callable[[], Iterable[Position | None]]) -> None:
        self.asked += ids
        try:
            self.told |= dict(zip(ids, write(), strict=True))
        except WriteFailed as error:
            self.refused.add(step)
            self.errors.append(error)
            if isinstance(error, SyncFailed):
                self._note_failed_sync()

    def sync(self, sync: Callable[[], None]) -> None:
        """Flush, or close."""
        try:
            sync()
        except SyncFailed:
            self._note_failed_sync()

    def _note_failed_sync(self) -> None:
        self.durable.append(self.log.durable_through())

    def check(self) -> None:
        """What was told is in the files, once; what else is there was asked for, or is reported."""
        reading = Reading(self.directory, start="2024-08-01")
        found = {entry.record["resource_id"]: entry.position for entry in reading.entries}
        assert found == found | self.told
        assert Counter(reading.ids) <= Counter(self.asked)
        sizes: Counter[str] = Counter()
        for entry in reading.entries:
            sizes[f"{entry.day}.jsonlog"] += len(entry.line)
        for damage in reading.damage:
            sizes[f"{damage.position.day}.jsonlog"] += damage.length
        files = self.directory.glob("2024-08-*")
        assert sizes == {path.name: size for path in files if (size := path.stat().st_size)}
        assert [error for error in self.errors if not isinstance(error, self._kind)] == []
        durable = self.log.durable_through()
        assert {*self.durable} <= {durable}  # a failed sync is never made good by a later one
        for error in self.errors:
            if isinstance(error, SyncFailed):
                assert durable is None or durable < error.positions[0]


def stories(path: Path, operation: str, fsync: str, times: int, long: bool) -> Iterator[Story]:
    """A story for each call of the operation, which fails there, until one no longer meets it."""
    for after in count():
        for error in ERRORS if long else [ERRORS[(after + MODES.index(fsync)) % len(ERRORS)]]:
            kind = WriteFailed
            if operation in ("write", "create_append") and error in FULL:
                kind = DiskFull
            if operation.startswith("sync_"):
                kind = SyncFailed
            files = FailingFiles()
            files.fail(operation, error, after=after, times=times)
            yield Story(path / f"{after}-{error}", fsync, files, kind)
        if files.calls.get(operation, 0) <= after:
            assert after > 0, f"{operation} is not in the story"
            return


@pytest.mark.parametrize("fsync", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_goes_on_failing_callers_are_told_and_all_is_well_when_it_heals(
    tmp_path: Path, operation: str, fsync: str, long: bool
) -> None:
    for story in stories(tmp_path, operation, fsync, FOREVER, long):
        story.live()
        story.files.heal()
        story.create("healed")
        assert "healed" in story.told
        story.log.close()
        story.check()


@pytest.mark.parametrize("fsync", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_fails_once_costs_no_more_than_the_events_that_waited_for_it(
    tmp_path: Path, operation: str, fsync: str, long: bool
) -> None:
    for story in stories(tmp_path, operation, fsync, 1, long):
        story.live()
        story.sync(story.log.close)
        assert len(story.refused) <= 1
        story.check()


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "close"])
def test_a_logger_that_cannot_be_opened_leaves_no_thread_and_no_descriptor(
    tmp_path: Path, operation: str
) -> None:
    for after in count():
        files = FailingFiles()
        files.fail(operation, errno.EIO, after=after)
        before = sorted(os.listdir("/dev/fd")), threading.enumerate()
        try:
            log = AuditLogger(tmp_path / str(after), files=files)
        except DirectoryError:
            assert (sorted(os.listdir("/dev/fd")), threading.enumerate()) == before
        else:
            log.close()
            break


BATCH = [Event(event_type="create", resource_id=f"batch {number}", event_ts=1) for number in range(3)]


@pytest.fixture
def batch_bytes(directory: Path, clock: FixedClock) -> int:
    """How long the lines of BATCH are together."""
    with AuditLogger(directory.with_name("other"), retention=None, clock=clock) as log:
        log.write_many(BATCH)
    return sum(path.stat().st_size for path in directory.with_name("other").glob("*.jsonlog"))


def test_a_write_that_is_cut_anywhere_goes_on_where_it_stopped(
    directory: Path, clock: FixedClock, batch_bytes: int
) -> None:
    files = FailingFiles()
    with AuditLogger(directory, fsync="never", retention=None, clock=clock, files=files) as log:
        told: list[Position] = []
        for cut in range(batch_bytes + 1):
            files.shorten(cut)
            told += log.write_many(BATCH)
    reading = Reading(directory)
    assert [entry.position for entry in reading.entries] == told
    assert reading.damage == []


@pytest.mark.parametrize("failures", [1, 2], ids=["the write fails", "closing its tail fails, too"])
@pytest.mark.parametrize("next_day", [False, True])
def test_a_disk_that_is_full_anywhere_in_a_batch_costs_no_other_line(
    directory: Path, clock: FixedClock, batch_bytes: int, failures: int, next_day: bool
) -> None:
    files = FailingFiles()
    with AuditLogger(directory, fsync="never", retention=None, clock=clock, files=files) as log:
        told: list[Position] = []
        for cut in range(0, batch_bytes, 7 if next_day else 1):
            files.shorten(cut)
            files.fail("write", errno.ENOSPC, after=1, times=failures)
            with pytest.raises(DiskFull) as caught:
                log.write_many(BATCH)
            told += caught.value.positions
            if next_day:
                clock.advance(DAY)
            with suppress(DiskFull):  # where there is a tail that cannot be closed
                told += log.write_many(BATCH)
            files.heal()
            told += log.write_many(BATCH)
    reading = Reading(directory)
    found = [entry.position for entry in reading.entries]
    assert set(told) <= set(found)
    assert len(set(found)) == len(found)
    assert sum(len(entry.line) for entry in reading.entries) + sum(
        damage.length for damage in reading.damage
    ) == sum(path.stat().st_size for path in directory.glob("*.jsonlog"))
