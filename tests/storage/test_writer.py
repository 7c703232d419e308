from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    DirectoryError,
    DiskFull,
    Event,
    LockTimeout,
    LoggerClosed,
    Position,
    ReentrantWrite,
    Session,
    SyncFailed,
    WriteFailed,
)
from auditlog.events.codec import Encoded, encode
from auditlog.storage.files import Files
from auditlog.testing import FailingFiles, FixedClock
from tests.helpers import Reading, contents, line, until, write_day

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture
def open_log(directory: Path, clock: FixedClock) -> Any:
    """Makes loggers on one directory and one clock, and closes them."""
    logs: list[AuditLogger] = []

    def make(**options: Any) -> AuditLogger:
        defaults: dict[str, Any] = {"fsync": "never", "retention": None, "clock": clock}
        logs.append(AuditLogger(directory, **(defaults | options)))
        return logs[-1]

    yield make
    for log in logs:
        with suppress(SyncFailed):  # a test that made a sync fail has said so
            log.close()


OpenLog = Callable[..., AuditLogger]


def event_of(resource_id: str) -> Encoded:
    return encode("create", "T", resource_id, {}, b"{}")


def test_the_first_event_begins_the_days_file(directory: Path, open_log: OpenLog) -> None:
    assert open_log().create("T", "a") == Position(date(2024, 8, 12), 0)
    assert contents(directory) == {
        "2024-08-12.jsonlog": b'{"event_type":"create","resource_type":"T","resource_id":"a",'
        b'"event_ts":1723464000000,"event_data":{"session":{"user_agent":"Omni-Internal-Agent"}}}\n'
    }


def test_directory_and_files_are_for_their_owner_only_whatever_the_umask(
    directory: Path, open_log: OpenLog
) -> None:
    for umask in (0o277, 0o000, 0o777):
        previous = os.umask(umask)
        try:
            open_log().create("T", str(umask))
        finally:
            os.umask(previous)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.rglob("*")]}
        assert modes == {"audit-log": 0o700, ".auditlog": 0o700, "2024-08-12.jsonlog": 0o600, "state": 0o600}


def test_a_day_ends_at_midnight_of_the_zone(directory: Path, open_log: OpenLog, clock: FixedClock) -> None:
    log = open_log(timezone="Europe/Berlin")
    clock.advance(10 * HOUR - timedelta(milliseconds=1))  # 23:59:59.999 in Berlin
    log.create("T", "before")
    clock.advance(0.001)
    log.create("T", "after")
    assert Reading(directory).positions == ["2024-08-12:0", "2024-08-13:0"]


def test_time_is_assigned_under_the_lock_and_an_explicit_time_is_kept(
    open_log: OpenLog, directory: Path
) -> None:
    log = open_log()
    log.write_many([Event(event_type="create", event_ts=5), Event(event_type="create")])
    assert [entry.record["event_ts"] for entry in Reading(directory).entries] == [5, 1723464000000]


def test_a_clock_that_steps_back_over_midnight_never_reopens_an_older_file(
    directory: Path, open_log: OpenLog, clock: FixedClock
) -> None:
    log = open_log()
    log.create("T", "1")
    clock.advance(13 * HOUR)
    log.create("T", "2")
    clock.step(-2 * HOUR)
    log.create("T", "3")
    open_log().create("T", "4")  # another writer sees the same
    clock.step(2 * HOUR)
    log.create("T", "5")
    reading = Reading(directory)
    assert reading.ids == ["1", "2", "3", "4", "5"]
    assert [position[:10] for position in reading.positions] == ["2024-08-12"] + ["2024-08-13"] * 4


def test_a_file_further_ahead_is_warned_about_and_never_written(
    directory: Path, open_log: OpenLog, caplog: pytest.LogCaptureFixture
) -> None:
    future = write_day(directory, "2024-08-14", line(1))
    log = open_log()
    with caplog.at_level(logging.WARNING, "auditlog"):
        log.create("T", "a")
        log.create("T", "b")
    assert [record.message for record in caplog.records if "ahead of the clock" in record.message] == [
        f"{directory}: 2024-08-14.jsonlog is ahead of the clock (2024-08-12): it is neither written nor "
        "swept before its day; check the clock, or move the file away"
    ]
    assert future.read_bytes() == line(1)
    assert Reading(directory).ids == ["a", "b", "1"]  # read last


@pytest.mark.parametrize("tail", [b"{", b'{"event_type":"cre', b"\0" * 100, b"x"])
def test_a_torn_tail_is_closed_before_the_next_line(directory: Path, open_log: OpenLog, tail: bytes) -> None:
    write_day(directory, "2024-08-12", line(1) + tail)
    open_log().create("T", "2")
    reading = Reading(directory)
    assert reading.ids == ["1", "2"]
    assert [(damage.raw, str(damage.position)) for damage in reading.damage] == [
        (tail + b"\n", f"2024-08-12:{len(line(1))}")
    ]


def test_a_tail_torn_by_another_process_meanwhile_is_closed_too(directory: Path, open_log: OpenLog) -> None:
    log = open_log()
    log.create("T", "1")
    with (directory / "2024-08-12.jsonlog").open("ab") as file:
        file.write(b'{"torn')
    log.create("T", "2")
    assert Reading(directory).ids == ["1", "2"]


def test_the_torn_tail_of_a_day_that_ends_is_closed_before_the_next_day_begins(
    directory: Path, open_log: OpenLog
) -> None:
    path = write_day(directory, "2024-08-10", line(1) + b"{torn")
    path.chmod(0o600)
    open_log().create("T", "2")
    assert path.read_bytes() == line(1) + b"{torn\n"


def test_a_short_write_goes_on_where_it_stopped(directory: Path, open_log: OpenLog) -> None:
    files = FailingFiles()
    log = open_log(files=files)
    files.shorten(10)
    log.create("T", "1")
    assert Reading(directory).ids == ["1"]
    assert files.calls["write"] >= 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EIO, WriteFailed),
        (errno.EROFS, WriteFailed),
    ],
)
@pytest.mark.parametrize("short", [None, 10])
def test_a_failed_write_is_an_error_and_the_next_one_works(
    directory: Path, open_log: OpenLog, error: int, kind: type[WriteFailed], short: int | None
) -> None:
    files = FailingFiles()
    log = open_log(files=files)
    log.create("T", "1")
    if short is not None:
        files.shorten(short)
    files.fail("write", error, after=0 if short is None else 1)
    with pytest.raises(kind) as caught:
        log.create("T", "lost")
    assert caught.value.positions == ()
    assert str(directory) in str(caught.value)
    files.heal()
    log.create("T", "2")
    reading = Reading(directory)
    assert reading.ids == ["1", "2"]
    assert len(reading.damage) == (0 if short is None else 1)


def test_a_failed_batch_names_the_events_that_are_whole_in_the_file(
    directory: Path, open_log: OpenLog
) -> None:
    files = FailingFiles()
    log = open_log(files=files)
    events = [Event(event_type="create", resource_id=str(number)) for number in range(5)]
    files.shorten(300)  # two lines and a bit
    files.fail("write", errno.ENOSPC, after=1)
    with pytest.raises(DiskFull) as caught:
        log.write_many(events)
    files.heal()
    assert caught.value.positions == tuple(entry.position for entry in Reading(directory).entries)
    assert len(caught.value.positions) == 2
    log.write_many(events)
    assert Reading(directory).ids == ["0", "1", "0", "1", "2", "3", "4"]


@pytest.mark.parametrize("operation", ["create_append", "stat", "seek"])
def test_a_failure_before_the_write_is_an_error_too(
    open_log: OpenLog, operation: str, directory: Path
) -> None:
    files = FailingFiles()
    log = open_log(files=files)
    files.fail(operation)
    with pytest.raises(WriteFailed):
        log.create("T", "1")
    files.heal()
    log.create("T", "2")
    assert Reading(directory).ids == ["2"]


def obstacle_directory(path: Path) -> None:
    path.mkdir()


def obstacle_link(path: Path) -> None:
    target = path.parent / "target"
    target.write_bytes(b"")
    path.symlink_to(target)


def obstacle_fifo(path: Path) -> None:
    os.mkfifo(path)


def obstacle_hard_link(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o644)
    os.link(path, path.parent / "other")


def obstacle_foreign(path: Path) -> None:
    path.write_bytes(b"")
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    "obstacle", [obstacle_directory, obstacle_link, obstacle_fifo, obstacle_hard_link, obstacle_foreign]
)
def test_what_is_no_file_of_ours_in_the_days_place_is_refused(
    directory: Path, open_log: OpenLog, obstacle: Callable[[Path], None]
) -> None:
    if obstacle is obstacle_foreign and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    log = open_log()
    place = directory / "2024-08-12.jsonlog"
    obstacle(place)
    before = contents(directory)
    with pytest.raises(WriteFailed, match=r"2024-08-12\.jsonlog .*move it away"):
        log.create("T", "1")
    assert contents(directory) == before
    place.rmdir() if place.is_dir() else place.unlink()
    log.create("T", "2")
    assert Reading(directory).ids == ["2"]


@pytest.mark.parametrize("how", ["remove", "rename"])
def test_a_file_that_is_removed_or_renamed_is_noticed_and_begun_anew(
    directory: Path, open_log: OpenLog, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    log = open_log()
    log.create("T", "1")
    path = directory / "2024-08-12.jsonlog"
    if how == "remove":
        path.unlink()
    else:
        path.rename(directory / "2024-08-12.jsonlog.1")
    until(lambda: log.create("T", "2") and path.exists(), seconds=1)
    assert Reading(directory).ids == ["2"]
    assert "was removed or replaced while it was written" in caplog.text


def test_a_write_or_a_close_from_inside_a_write_is_refused(directory: Path, clock: FixedClock) -> None:
    class SignalledFiles(Files):
        """A write during which the same thread writes again, as a signal handler may."""

        called = False

        def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
            with pytest.raises(ReentrantWrite, match="was written from inside"):
                log.create("T", "nested")
            with pytest.raises(ReentrantWrite, match="was closed from inside"):
                log.close()
            self.called = True
            return os.write(fd, data)

    files = Files()
    with AuditLogger(directory, fsync="never", retention=None, clock=clock, files=files) as log:
        log._engine.writer._files = files = SignalledFiles()  # type: ignore[union-attr]
        log.create("T", "outer")
        assert files.called
    assert Reading(directory).ids == ["outer"]


def test_a_lock_that_is_never_free_times_out(directory: Path, open_log: OpenLog) -> None:
    log = open_log(lock_timeout=0.05)
    holder = os.open(directory, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(LockTimeout, match=r"not free for 0\.05 s"):
        log.create("T", "1")
    os.close(holder)
    log.create("T", "2")
    assert Reading(directory).ids == ["2"]


class GatedFiles(FailingFiles):
    """A sync waits, from `hold` on, until `release` is set; `entered` is set while it does.

    Where `broken` is set it fails then, once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.release, self.broken = threading.Event(), threading.Event(), threading.Event()
        self.release.set()

    def hold(self) -> None:
        self.entered.clear()
        self.release.clear()

    def sync_data(self, fd: int) -> None:
        self.entered.set()
        assert self.release.wait(10)
        if self.broken.is_set():
            self.broken.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_data(fd)


class TestSync:
    def test_always_syncs_data_and_name_before_the_first_acknowledgement(self, open_log: OpenLog) -> None:
        files = FailingFiles()
        log = open_log(fsync="always", files=files)
        files.calls.clear()
        log.create("T", "1")
        assert (files.calls["sync_data"], files.calls["sync_directory"]) == (1, 1)
        position = log.create("T", "2")
        assert (files.calls["sync_data"], files.calls["sync_directory"]) == (2, 1)
        assert log.durable_through() == position

    def test_never_syncs_nothing(self, open_log: OpenLog) -> None:
        files = FailingFiles()
        log = open_log(fsync="never", files=files)
        files.calls.clear()
        log.create("T", "1")
        log.flush()
        log.close()
        assert "sync_data" not in files.calls
        assert log.durable_through() is None

    def test_interval_syncs_in_the_background(self, open_log: OpenLog) -> None:
        log = open_log(fsync="interval", fsync_interval=0.01)
        position = log.create("T", "1")
        until(lambda: log.durable_through() == position)

    def test_flush_and_close_sync(self, open_log: OpenLog) -> None:
        files = FailingFiles()
        log = open_log(fsync="interval", fsync_interval=1000, files=files)
        position = log.create("T", "1")
        log.flush()
        assert log.durable_through() == position
        log.create("T", "2")
        log.close()
        assert files.calls["sync_data"] >= 2

    def test_a_day_that_ended_is_synced_too(self, open_log: OpenLog, clock: FixedClock) -> None:
        files = FailingFiles()
        log = open_log(fsync="interval", fsync_interval=1000, files=files)
        log.create("T", "1")
        clock.advance(DAY)
        position = log.create("T", "2")
        files.calls.clear()
        log.flush()
        assert files.calls["sync_data"] == 2
        assert log.durable_through() == position

    def test_a_failed_sync_is_never_made_good_by_a_later_one(
        self, open_log: OpenLog, directory: Path
    ) -> None:
        files = FailingFiles()
        log = open_log(fsync="always", files=files)
        durable = log.create("T", "1")
        files.fail("sync_data", errno.EIO, times=1)
        with pytest.raises(SyncFailed) as caught:
            log.create("T", "2")
        assert len(caught.value.positions) == 1
        with pytest.raises(SyncFailed, match="an earlier sync failed"):
            log.flush()
        files.calls.clear()
        log.create("T", "3")
        assert files.calls["open_append"] == 1  # a new descriptor
        assert log.durable_through() == durable
        assert Reading(directory).ids == ["1", "2", "3"]

    def test_threads_that_wait_together_share_one_sync(self, open_log: OpenLog) -> None:
        files = GatedFiles()
        log = open_log(fsync="always", files=files)
        files.hold()
        files.calls.clear()
        threads = [threading.Thread(target=log.create, args=("T", str(number))) for number in range(16)]
        threads[0].start()
        assert files.entered.wait(10)  # the leader is inside its sync; all others come too late for it
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(log._engine._group._waiters) == 15)  # type: ignore[union-attr]
        files.release.set()
        for thread in threads:
            thread.join()
        assert files.calls["sync_data"] == 2

    def test_a_line_that_comes_between_a_sync_and_the_end_of_the_day_is_synced(
        self, open_log: OpenLog, clock: FixedClock, directory: Path
    ) -> None:
        entered, release = threading.Event(), threading.Event()
        release.set()
        synced: set[tuple[int, int]] = set()

        class SlowFiles(FailingFiles):
            def sync_data(self, fd: int) -> None:
                synced.add((os.fstat(fd).st_ino, os.fstat(fd).st_size))
                super().sync_data(fd)
                entered.set()
                release.wait(10)

        log = open_log(fsync="interval", fsync_interval=1000, files=SlowFiles())
        log.create("T", "1")
        until(lambda: not log._engine.writer.syncer._owner)  # type: ignore[union-attr]
        entered.clear()
        release.clear()
        leader = threading.Thread(target=log.flush)
        leader.start()
        assert entered.wait(10)  # "1" is on the disk, and the leader has not told so yet
        log.create("T", "2")
        clock.advance(DAY)
        log.create("T", "3")  # the first day's file gets no further line
        release.set()
        leader.join()
        log.flush()
        for path in directory.glob("*.jsonlog"):
            assert (path.stat().st_ino, path.stat().st_size) in synced, path.name

    def test_a_waiter_that_is_interrupted_leaves_the_others_their_syncs(self, open_log: OpenLog) -> None:
        files = GatedFiles()
        log = open_log(fsync="always", files=files)
        log.create("T", "0")
        files.hold()
        leader = threading.Thread(target=log.create, args=("T", "1"))
        leader.start()
        assert files.entered.wait(10)

        def interrupt() -> None:
            until(lambda: len(log._engine._group._waiters) == 1)  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGINT)

        helper = threading.Thread(target=interrupt)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            log.create("T", "2")
        helper.join()
        files.release.set()
        leader.join()
        assert log.create("T", "3") == log.durable_through()

    def test_a_line_written_during_a_failing_sync_is_as_unknown_as_the_others(
        self, open_log: OpenLog
    ) -> None:
        files = GatedFiles()
        log = open_log(fsync="interval", fsync_interval=1000, files=files)
        log.create("T", "1")
        until(lambda: not log._engine.writer.syncer._owner)  # type: ignore[union-attr]
        files.hold()
        refused: list[str] = []

        def flush() -> None:
            try:
                log.flush()
            except SyncFailed as error:
                refused.append(error.reason)

        log.create("T", "2")
        durable = log.durable_through()
        flushes = [threading.Thread(target=flush) for _ in range(2)]
        flushes[0].start()
        assert files.entered.wait(10)
        log.create("T", "3")
        flushes[1].start()
        files.broken.set()
        files.release.set()
        for thread in flushes:
            thread.join()
        assert len(refused) == 2
        assert log.durable_through() == durable

    def test_threads_that_wait_for_a_failing_sync_are_told_so_and_those_behind_them_are_not(
        self, open_log: OpenLog, directory: Path
    ) -> None:
        files = GatedFiles()
        log = open_log(fsync="always", files=files)
        files.hold()
        refused: list[str] = []

        def create(resource_id: str) -> None:
            try:
                log.create("T", resource_id)
            except SyncFailed:
                refused.append(resource_id)

        threads = [threading.Thread(target=create, args=(str(number),)) for number in range(8)]
        threads[0].start()
        assert files.entered.wait(10)
        for thread in threads[1:]:
            thread.start()
        until(lambda: len(log._engine._group._waiters) == 7)  # type: ignore[union-attr]
        files.broken.set()
        files.release.set()
        for thread in threads:
            thread.join()
        assert refused == ["0"]
        assert sorted(Reading(directory).ids) == [str(number) for number in range(8)]
        assert log.durable_through() is None

    def test_a_handler_that_writes_during_its_threads_sync_is_refused(self, open_log: OpenLog) -> None:
        refusals: list[BaseException] = []

        class SignalledFiles(FailingFiles):
            armed = False

            def sync_data(self, fd: int) -> None:
                if self.armed:
                    self.armed = False
                    try:
                        log.create("T", "nested")
                    except ReentrantWrite as error:
                        refusals.append(error)
                super().sync_data(fd)

        files = SignalledFiles()
        log = open_log(fsync="always", files=files)
        files.armed = True
        log.create("T", "1")
        assert len(refusals) == 1
        assert log.create("T", "2") == log.durable_through()

    def test_a_handler_that_writes_during_its_threads_flush_is_refused_before_a_byte_is_written(
        self, open_log: OpenLog, directory: Path
    ) -> None:
        refusals: list[BaseException] = []

        class SignalledFiles(FailingFiles):
            armed = False

            def sync_data(self, fd: int) -> None:
                if self.armed:
                    self.armed = False
                    for call, arguments in ((log.create, ("T", "nested")), (log.close, ())):
                        try:
                            call(*arguments)
                        except ReentrantWrite as error:
                            refusals.append(error)
                super().sync_data(fd)

        files = SignalledFiles()
        log = open_log(fsync="always", files=files)
        log._engine.writer.append((event_of("1"),))  # type: ignore[union-attr] # not synced yet
        files.armed = True
        log.flush()
        assert len(refusals) == 2
        assert Reading(directory).ids == ["1"]

    def test_a_close_that_fails_costs_nobody_the_lead(self, open_log: OpenLog, clock: FixedClock) -> None:
        files = FailingFiles()
        log = open_log(fsync="always", files=files)
        log.create("T", "1")
        files.fail("close", errno.EIO, times=1)
        clock.advance(DAY)
        log.create("T", "2")
        files.heal()
        assert log.create("T", "3") == log.durable_through()

    def test_what_is_acknowledged_while_another_thread_closes_was_synced(self, directory: Path) -> None:
        for number in range(30):
            files = FailingFiles()
            log = AuditLogger(directory / str(number), fsync="always", retention=None, files=files)
            acknowledged: list[Position] = []

            def write_on(log: AuditLogger, acknowledged: list[Position]) -> None:
                with suppress(LoggerClosed):
                    while position := log.create("T"):
                        acknowledged.append(position)

            threads = [threading.Thread(target=write_on, args=(log, acknowledged)) for _ in range(3)]
            for thread in threads:
                thread.start()
            until(lambda acknowledged=acknowledged: len(acknowledged) > 5)  # type: ignore[misc]
            closers = [threading.Thread(target=log.close) for _ in range(2)]
            for thread in closers:
                thread.start()
            for thread in threads + closers:
                thread.join()
            durable = log.durable_through()
            assert durable is not None
            assert max(acknowledged) <= durable


def test_yesterdays_file_never_stops_today(
    directory: Path, open_log: OpenLog, caplog: pytest.LogCaptureFixture
) -> None:
    write_day(directory, "2024-08-11", b"{torn")
    files = FailingFiles()
    log = open_log(files=files)
    files.fail("open_append", errno.EACCES)
    log.create("T", "1")
    assert Reading(directory).ids == ["1"]
    assert "2024-08-11.jsonlog, which ended, was left as it is" in caplog.text


def test_another_zone_is_refused_and_the_first_writers_is_kept(directory: Path, open_log: OpenLog) -> None:
    open_log(timezone="Europe/Berlin")
    with pytest.raises(DirectoryError, match='zone Europe/Berlin, not UTC; pass timezone="Europe/Berlin"'):
        open_log()
    assert (directory / ".auditlog" / "state").read_bytes() == b'{"timezone":"Europe/Berlin"}\n'


def test_a_damaged_state_is_an_error_that_says_what_to_write(directory: Path, open_log: OpenLog) -> None:
    open_log().close()
    (directory / ".auditlog" / "state").write_bytes(b"\0\0\0")
    with pytest.raises(DirectoryError, match=r"state is damaged; make .*timezone"):
        open_log()


@pytest.mark.parametrize("name", [".auditlog", ".auditlog/state"])
def test_a_link_in_the_place_of_our_state_is_refused(
    directory: Path, tmp_path: Path, open_log: OpenLog, name: str
) -> None:
    open_log().close()
    (directory / ".auditlog").rename(tmp_path / "elsewhere")
    if name == ".auditlog":
        (directory / name).symlink_to(tmp_path / "elsewhere")
    else:
        (directory / ".auditlog").mkdir()
        (directory / name).symlink_to(tmp_path / "elsewhere" / "state")
    with pytest.raises(DirectoryError):
        open_log()


def test_a_directory_that_omni_left_is_taken_over(directory: Path, open_log: OpenLog, alice: Session) -> None:
    path = write_day(directory, "2024-08-12", line(1))
    path.chmod(0o640)
    log = open_log()
    with log.session(alice):
        log.create("T", "2")
    assert Reading(directory).ids == ["1", "2"]


def test_the_names_of_all_directories_that_were_made_are_synced_also_after_a_first_attempt_failed(
    tmp_path: Path,
) -> None:
    synced: set[int] = set()

    class Watched(FailingFiles):
        def sync_directory(self, fd: int) -> None:
            super().sync_directory(fd)
            synced.add(os.fstat(fd).st_ino)

    files = Watched()
    directory = tmp_path / "a" / "b" / "audit-log"
    files.fail("sync_directory", errno.EIO, times=1)
    with pytest.raises(DirectoryError):
        AuditLogger(directory, files=files)
    AuditLogger(directory, files=files).close()
    assert directory.parent.stat().st_ino in synced
    other = tmp_path / "c" / "d" / "audit-log"
    AuditLogger(other, files=files).close()
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "c", tmp_path / "c" / "d")} <= synced
