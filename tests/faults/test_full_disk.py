"""A disk that is full again and again while processes write: they fail, say so, and go on by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from auditlog import AuditLogger, DiskFull, Retention, RetentionSweeper
from auditlog.testing import FixedClock
from tests.conftest import Start
from tests.faults.helpers import DAY_NS, SmallDisk, Told, assert_once, read_all, small_disk
from tests.helpers import line, until, write_day
from tests.programs.shared_clock import SharedClock

PROCESSES, FEW = 4, 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        with small_disk(tmp_path / "disk", "128m") as disk:
            yield disk
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted here: {error}")


class Writers:
    """Processes that write, and what each of them tells."""

    def __init__(self, told: list[Told]) -> None:
        self.told = told

    def look(self) -> list[Told]:
        """Each of them, up to date."""
        for told in self.told:
            told.look()
        return self.told

    def until_each(self, count: Callable[[Told], int]) -> None:
        """Wait until the count of each has grown by a few."""
        before = [count(told) for told in self.look()]
        until(lambda: all(count(told) >= old + FEW for told, old in zip(self.look(), before, strict=True)))


@pytest.mark.parametrize("fsync", ["always", "interval"])
def test_writers_on_a_full_disk_recover_by_themselves_and_lose_nothing_acknowledged(
    disk: SmallDisk, tmp_path: Path, start: Start, fsync: str, long: bool
) -> None:
    directory, clock = disk.path / "audit-log", SharedClock(tmp_path / "clock")
    processes = []
    with ExitStack() as stack:
        for number in range(PROCESSES):
            output = stack.enter_context((tmp_path / f"told-{number}").open("wb"))
            arguments = directory, tmp_path / "clock", fsync, f"writer{number}"
            processes.append(start("write_on", *arguments, stdout=output))
        told = [stack.enter_context(closing(Told(tmp_path / f"told-{n}"))) for n in range(PROCESSES)]
        writers = Writers(told)
        for day in range(40 if long else 6):
            writers.until_each(lambda told: len(told.acknowledged))
            disk.fill()
            if day % 2:
                clock.move(day * DAY_NS)  # the file of a day, too, may have to be begun on a full disk
            writers.until_each(lambda told: told.failures["DiskFull"])
            disk.free()
        writers.until_each(lambda told: len(told.acknowledged))
        for process in processes:
            process.terminate()
        assert [process.wait(30) for process in processes] == [0] * PROCESSES
        writers.look()
    reading = read_all(directory)
    acknowledged = {identity: position for each in told for identity, position in each.acknowledged.items()}
    assert_once(reading.ids, acknowledged)
    found = {entry.record["resource_id"]: entry.position for entry in reading.entries}
    assert acknowledged.items() <= found.items()
    assert {kind for each in told for kind in each.failures} == {"DiskFull"}


def test_a_sweep_makes_room_on_a_full_disk(disk: SmallDisk, clock: FixedClock) -> None:
    directory = disk.path / "audit-log"
    for day in ("2024-06-01", "2024-06-02", "2024-08-11"):
        write_day(directory, day, line(1) * 10_000)
    sweeper = RetentionSweeper(directory, Retention(days=30), clock=clock)
    sweeper.plan()
    with AuditLogger(directory, retention=None, clock=clock) as log:
        disk.fill()
        with pytest.raises(DiskFull):
            until(lambda: not log.create("T", blob="x" * 10_000))
        assert [day.isoformat() for day in sweeper.sweep().removed] == ["2024-06-01", "2024-06-02"]
        log.create("T", blob="x" * 10_000)
    assert b'"swept_through":"2024-06-02"' in (directory / ".auditlog" / "state").read_bytes()
