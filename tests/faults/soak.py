"""Eight processes write while everything happens to them, for as long as one likes.

    python -m tests.faults.soak --minutes 60

They are killed and started again, the disk is full now and then, days change, a sweeper removes the
old ones, and a follower follows. In the end stands one line of counts, and status 1 if an acknowledged
event was lost, or any event is there twice.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, date
from itertools import count
from pathlib import Path
from threading import Event

from auditlog import (
    AuditLogger,
    AuditReader,
    CorruptLine,
    DirectoryError,
    Entry,
    Position,
    Retention,
    RetentionSweeper,
)
from auditlog.storage.days import day_at
from tests.faults.helpers import DAY_NS, SmallDisk, Told, read_all, small_disk
from tests.programs.shared_clock import SharedClock

ROOT = Path(__file__).parents[2]
PROCESSES = 8
DISK = "512m"
KEPT = Retention(days=3)
TICK = 0.05  # seconds, as all that follow
BETWEEN_KILLS, BETWEEN_DISK_CHANGES, BETWEEN_DAYS = 0.5, 1.0, 1.0  # or longer; on average
BETWEEN_REPORTS = 5.0

Ids = dict[str, Position]


@dataclass
class Counts:
    """What became of the events of days that are settled.

    `found` and `lost` add up to `acknowledged`; `corrupt` are lines that nobody acknowledged.
    """

    acknowledged: int = 0
    found: int = 0
    lost: int = 0
    doubled: int = 0
    corrupt: int = 0
    kills: int = 0

    def __str__(self) -> str:
        return "  ".join(f"{name} {number}" for name, number in vars(self).items())


class Writer:
    """A process that writes, and what it tells."""

    def __init__(self, directory: Path, clock_file: Path, output: Path) -> None:
        program = [sys.executable, "-m", "tests.programs.write_on"]
        arguments = [str(directory), str(clock_file), "interval", output.name]
        with output.open("wb") as file:
            self.process = subprocess.Popen([*program, *arguments], cwd=ROOT, stdout=file)
        self._told = Told(output)
        self._output = output
        self.day: date | None = None  # of the newest event that it told

    def take(self) -> Ids:
        """What it acknowledged since the last call."""
        self._told.look()
        acknowledged, self._told.acknowledged = self._told.acknowledged, {}
        self.day = max((position.day for position in acknowledged.values()), default=self.day)
        return acknowledged

    def close(self) -> None:
        """Kill it, if it still runs, and leave nothing behind."""
        self.process.kill()
        self.process.wait()
        self._told.close()
        self._output.unlink()


class Follower:
    """Follows the log, and keeps the positions of each day until it is settled."""

    def __init__(self, directory: Path, clock: SharedClock) -> None:
        self._reader = AuditReader(directory, on_corrupt=self._note, clock=clock)
        self.position = Position.START
        self.seen: defaultdict[date, Ids] = defaultdict(dict)
        self.doubled = 0
        self.damage: set[Position] = set()

    def _note(self, line: CorruptLine) -> None:
        self.damage.add(line.position)  # a set: the last read meets it again

    def follow(self, stop: Event) -> None:
        """Until it is stopped, and has seen everything."""
        for entry in self._entries(stop):
            identity, position = entry.record["resource_id"], entry.position
            self.doubled += any(identity in ids for ids in tuple(self.seen.values()))
            self.seen[position.day][identity] = self.position = position

    def _entries(self, stop: Event) -> Iterator[Entry]:
        with self._reader.follow(after=self.position, stop=stop) as follower:
            yield from follower
        yield from self._reader.read(after=self.position, strict=True)


class Soak:
    """A log, below `parent` or on `disk`, and all that happens to it."""

    def __init__(self, parent: Path, disk: SmallDisk | None) -> None:
        self.directory = (parent if disk is None else disk.path) / "audit-log"
        self.counts = Counts()
        self._parent = parent
        self._disk = disk
        self._full = False
        self._clock = SharedClock(parent / "clock")
        self._day_changes = 0
        AuditLogger(self.directory, retention=None, clock=self._clock).close()
        self._sweeper = RetentionSweeper(self.directory, KEPT, clock=self._clock)
        self._follower = Follower(self.directory, self._clock)
        self._names = (f"writer{number}" for number in count())
        self._writers: list[Writer] = []
        self._acknowledged: defaultdict[date, Ids] = defaultdict(dict)  # not settled yet

    def run(self, seconds: float) -> None:
        """Let it all happen for so long, and count."""
        stop = Event()
        with ThreadPoolExecutor() as threads:
            jobs = [threads.submit(self._follower.follow, stop), threads.submit(self._sweep, stop)]
            try:
                self._writers += [self._start() for _ in range(PROCESSES)]
                reported = started = time.monotonic()
                while (now := time.monotonic()) < started + seconds and not any(job.done() for job in jobs):
                    time.sleep(TICK)
                    self._happen()
                    if now > reported + BETWEEN_REPORTS:
                        reported = now
                        print(f"{now - started:.0f} s: {self.counts}", file=sys.stderr)
                self._end_writers()
            finally:
                for writer in self._writers:
                    writer.close()
                stop.set()
        for job in jobs:
            job.result()
        self._compare_with_one_read()
        self._settle(date.max)

    def _happen(self) -> None:
        if self._chance(BETWEEN_KILLS):
            self._kill(random.choice(self._writers))
        if self._chance(BETWEEN_DISK_CHANGES) and self._disk is not None:
            self._full = not self._full
            self._disk.fill() if self._full else self._disk.free()
        self._take()
        if self._chance(BETWEEN_DAYS):
            self._change_day()

    @staticmethod
    def _chance(seconds: float) -> bool:
        return random.random() < TICK / seconds

    def _start(self) -> Writer:
        return Writer(self.directory, self._parent / "clock", self._parent / next(self._names))

    def _kill(self, writer: Writer) -> None:
        assert writer.process.poll() is None, f"a writer ended by itself: {writer.process.returncode}"
        writer.process.kill()
        writer.process.wait()
        self._take()
        writer.close()
        self._writers[self._writers.index(writer)] = self._start()
        self.counts.kills += 1

    def _take(self) -> None:
        for writer in self._writers:
            for identity, position in writer.take().items():
                self._acknowledged[position.day][identity] = position

    def _change_day(self) -> None:
        """Once everybody is in today's: so nothing of the days before is still to come."""
        today = day_at(self._clock.time_ns(), UTC)
        if {self._follower.position.day, *(writer.day for writer in self._writers)} == {today}:
            self._settle(min(date.fromisoformat(path.stem) for path in self.directory.glob("*.jsonlog")))
            self._day_changes += 1
            self._clock.move(self._day_changes * DAY_NS)

    def _sweep(self, stop: Event) -> None:
        while not stop.wait(TICK):
            with suppress(DirectoryError):  # while the disk is full
                self._sweeper.sweep()

    def _end_writers(self) -> None:
        if self._disk is not None:
            self._disk.free()
        for writer in self._writers:
            writer.process.terminate()
        ends = {writer.process.wait(60) for writer in self._writers}
        assert ends <= {0, -signal.SIGTERM}, ends  # the signal ends one that has only just been started
        self._take()

    def _settle(self, before: date) -> None:
        """Count what became of the events of earlier days, and forget them."""
        for day in sorted(self._acknowledged.keys() | self._follower.seen.keys()):
            if day < before:
                acknowledged, seen = self._acknowledged.pop(day, {}), self._follower.seen.pop(day, {})
                found = len(acknowledged.items() & seen.items())
                self.counts.acknowledged += len(acknowledged)
                self.counts.found += found
                self.counts.lost += len(acknowledged) - found
        self.counts.doubled = self._follower.doubled
        self.counts.corrupt = len(self._follower.damage)

    def _compare_with_one_read(self) -> None:
        """What is still there, read at once, must be what the follower has seen of it."""
        reading = read_all(self.directory)
        self._follower.damage |= {line.position for line in reading.damage}
        there: defaultdict[date, Ids] = defaultdict(dict)
        for entry in reading.entries:
            there[entry.day][entry.record["resource_id"]] = entry.position
        for day, ids in there.items():
            assert ids == self._follower.seen[day], f"the follower has seen something else of {day}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument("--directory", type=Path, help="where, for the time being (default: as mktemp)")
    options = parser.parse_args(arguments)
    parent = Path(tempfile.mkdtemp(prefix="auditlog-soak-", dir=options.directory))
    with ExitStack() as stack:
        disk = None
        try:
            disk = stack.enter_context(small_disk(parent / "disk", DISK))
        except PermissionError as error:
            print(f"the disk is never full: none can be mounted ({error})", file=sys.stderr)
        soak = Soak(parent, disk)
        soak.run(60 * options.minutes)
        counts = soak.counts
        print(counts)
        if counts.lost or counts.doubled:
            kept = shutil.copytree(soak.directory, parent / "kept")
            print(f"the log is kept in {kept}", file=sys.stderr)
            return 1
    shutil.rmtree(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
