"""What becomes of an action whose event cannot be written."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from auditlog import AuditLogger, DiskFull, Event, InvalidEvent, InvalidSetting, SyncFailed, WriteFailed
from auditlog.testing import FailingFiles, FixedClock, RecordedLog, recorded_log
from tests.helpers import Reading, until


def gaps(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"]["audit"] for record in log.records if record["event_type"] == "gap"]


def ids(log: RecordedLog) -> list[str]:
    return [record["resource_id"] for record in log.records if record["event_type"] != "gap"]


def types(directory: Path) -> list[str]:
    return [entry.record["event_type"] for entry in Reading(directory).entries]


def test_by_default_the_action_must_not_go_on() -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:
        files.fail("write", errno.ENOSPC)
        with pytest.raises(DiskFull, match="free space on the file system"):
            log.audit.create("T", "1")
        assert (log.audit.stats().failed, log.audit.stats().dropped) == (1, 0)
        files.heal()
        log.audit.create("T", "2")
        assert (ids(log), gaps(log)) == (["2"], [])


def test_what_is_dropped_is_told_by_a_gap_event_once_writing_works_again(
    clock: FixedClock, caplog: pytest.LogCaptureFixture
) -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure="drop", clock=clock) as log:
        log.audit.create("T", "1")
        files.fail("write", errno.ENOSPC)
        started = clock.time_ns() // 1_000_000
        for _ in range(3):
            assert log.audit.create("T", "lost") is None
            clock.advance(1)
        assert log.audit.write_many([Event(event_type="create", resource_id="lost")] * 2) == []
        assert log.audit.stats().dropped == 5
        files.heal()
        until(lambda: gaps(log))
        log.audit.create("T", "2")
        assert gaps(log) == [{"lost": 5, "first_ts": started, "last_ts": started + 3000}]
        (gap,) = (entry.event for entry in log.entries if entry.event.event_type == "gap")
        assert gap.event_data.audit is not None
        assert gap.event_data.audit.lost == 5
        assert ids(log) == ["1", "2"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]  # once for all of them
    assert "No space left on device" in caplog.text
    assert "5 events were dropped; the gap event at 2024-08-12:" in caplog.text


def test_a_gap_that_is_still_untold_is_told_by_close(directory: Path) -> None:
    files = FailingFiles()
    with AuditLogger(directory, on_failure="drop", files=files, retention=None, fsync="never") as log:
        log.create("T", "1")
        files.fail("write", errno.ENOSPC, times=1)
        log.create("T", "lost")
    assert types(directory) == ["create", "gap"]


def test_each_event_type_may_have_its_choice() -> None:
    files = FailingFiles()
    choice = {"destroy": "raise", "*": "drop"}
    with recorded_log(files=files, on_failure=choice) as log:
        log.audit.create("T", "1")
        files.fail("write", errno.EROFS)
        assert log.audit.k8s_access(full_method_name="GET /") is None
        with pytest.raises(WriteFailed, match="Read-only file system"):
            log.audit.destroy("T", "1")
        both = [Event(event_type="create"), Event(event_type="destroy")]
        with pytest.raises(WriteFailed):
            log.audit.write_many(both)
        assert (log.audit.stats().failed, log.audit.stats().dropped) == (4, 1)
        files.heal()
    with recorded_log(files=files, on_failure={"k8s_access": "drop"}) as log:
        files.fail("write", errno.EROFS)
        with pytest.raises(WriteFailed):
            log.audit.create("T", "1")
        assert log.audit.k8s_access(full_method_name="GET /") is None


def test_what_is_whole_in_the_file_is_not_counted_as_lost() -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure="drop") as log:
        log.audit.create("T", "0")
        events = [Event(event_type="create", resource_id=str(number)) for number in (1, 2, 3)]
        files.shorten(150)
        files.fail("write", errno.ENOSPC, after=1)
        positions = log.audit.write_many(events)
        files.heal()
        assert positions == [entry.position for entry in log.entries[1:]]
        assert log.audit.stats().dropped == 3 - len(positions)
        assert 0 < len(positions) < 3


def test_an_event_whose_sync_failed_is_dropped_too_though_it_may_be_there() -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure="drop", fsync="always") as log:
        log.audit.create("T", "1")
        files.fail("sync_data", errno.EIO, times=1)
        assert log.audit.create("T", "2") is None
        assert log.audit.create("T", "3") is not None
        until(lambda: gaps(log))
        assert gaps(log)[0]["lost"] == 1
        assert ids(log) == ["1", "2", "3"]


def test_a_gap_begins_when_the_first_event_was_to_be_written(clock: FixedClock) -> None:
    class SlowFiles(FailingFiles):
        def write(self, fd: int, data: bytes) -> int:  # type: ignore[override]
            if self.slow:
                clock.advance(5)
            return os.write(fd, data)

        slow = False

    files = SlowFiles()
    with recorded_log(files=files, on_failure="drop", clock=clock) as log:
        log.audit.create("T", "1")
        began = clock.time_ns() // 1_000_000
        files.slow = True
        files.shorten(1)
        files.fail("write", errno.ENOSPC, after=1)
        assert log.audit.create("T", "2") is None
        files.slow = False
        files.heal()
        until(lambda: gaps(log))
        assert gaps(log) == [{"lost": 1, "first_ts": began, "last_ts": began}]


def test_an_invalid_event_is_raised_whatever_the_choice() -> None:
    with recorded_log(on_failure="drop") as log:
        with pytest.raises(InvalidEvent):
            log.audit.create("T", "1", x=float("nan"))
        assert log.audit.stats().failed == 0


def test_a_forked_child_does_not_tell_its_parents_gap(directory: Path) -> None:
    files = FailingFiles()
    log = AuditLogger(directory, on_failure="drop", files=files, retention=None)
    log.create("T", "1")
    files.fail("write", errno.ENOSPC)
    log.create("T", "lost")
    pid = os.fork()
    if pid == 0:
        files.heal()
        log.create("T", "2")
        log.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert types(directory) == ["create", "create"]
    files.heal()
    log.close()
    assert types(directory) == ["create", "create", "gap"]


@pytest.mark.parametrize(
    "choice", ["ignore", None, 1, {"create": "ignore"}, {"No Type": "drop"}, {1: "drop"}, ["drop"]]
)
def test_a_choice_that_is_none_is_refused(directory: Path, choice: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"^on_failure="):
        AuditLogger(directory, on_failure=choice)
    assert not directory.exists()


class TestAwrite:
    """Tasks that are written together each have an outcome of their own."""

    @staticmethod
    async def write_all(log: AuditLogger, count: int) -> list[Any]:
        assert log._engine is not None
        with log._engine.writer.locked():  # until all of them wait
            writing = [
                asyncio.create_task(log.awrite(Event(event_type="create", resource_id=str(number))))
                for number in range(count)
            ]
            await asyncio.sleep(0)
        return await asyncio.gather(*writing, return_exceptions=True)

    def test_those_whose_lines_are_whole_are_acknowledged_and_the_others_are_not(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files) as log:
            log.audit.create("T", "first")
            files.shorten(150)  # one line, and a part of the next, if there is one
            files.fail("write", errno.ENOSPC, after=1)
            outcomes = asyncio.run(self.write_all(log.audit, 20))
            files.heal()
            log.audit.create("T", "last")
            stored = {entry.position for entry in log.entries[1:-1]}
        failures = [outcome for outcome in outcomes if isinstance(outcome, WriteFailed)]
        assert {outcome for outcome in outcomes if not isinstance(outcome, WriteFailed)} == stored
        assert stored
        assert failures
        assert {type(failure) for failure in failures} == {DiskFull}
        assert all(failure.positions == () for failure in failures)

    def test_a_failed_sync_fails_all_of_them(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files, fsync="always") as log:
            log.audit.create("T", "first")
            files.fail("sync_data", errno.EIO)
            outcomes = asyncio.run(self.write_all(log.audit, 20))
            files.heal()
            assert {type(outcome) for outcome in outcomes} == {SyncFailed}
            assert len({outcome.positions for outcome in outcomes}) == 20
            assert log.audit.create("T", "last") is not None

    def test_those_that_are_cancelled_are_counted_and_told_like_the_others(self) -> None:
        async def cancel_all(log: AuditLogger) -> None:
            assert log._engine is not None
            with log._engine.writer.locked():
                writing = [asyncio.create_task(log.awrite(Event(event_type="create"))) for _ in range(5)]
                await asyncio.sleep(0)
                for task in writing:
                    task.cancel()
            until(lambda: files.calls["write"] > before)
            while log.stats().failed < 5:
                await asyncio.sleep(0.001)

        files = FailingFiles()
        with recorded_log(files=files, on_failure="drop") as log:
            log.audit.create("T", "first")
            before = files.calls["write"]
            files.fail("write", errno.ENOSPC)
            asyncio.run(asyncio.wait_for(cancel_all(log.audit), 10))
            files.heal()
            until(lambda: gaps(log))
            assert gaps(log)[0]["lost"] == 5

    def test_they_may_be_dropped(self) -> None:
        files = FailingFiles()
        with recorded_log(files=files, on_failure="drop") as log:
            files.fail("write", errno.ENOSPC)
            assert asyncio.run(self.write_all(log.audit, 5)) == [None] * 5
            files.heal()
            until(lambda: gaps(log))
            assert gaps(log)[0]["lost"] == 5
