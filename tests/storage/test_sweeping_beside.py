"""Sweeps beside readers and writers: a read finishes what it began, and a kept day is whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from itertools import chain, count
from pathlib import Path

import pytest

from auditlog import AuditLogger, AuditReader, Entry, Retention, RetentionSweeper
from auditlog.testing import FixedClock
from tests.helpers import until

ROUNDS = 3_000  # 10,000 with --long: each takes a sync or two, and a disk may be slow
DAYS = 2
BLOB = "x" * 80_000  # a day is longer than what a reader has buffered of it
NAMES = ("a", "b")

# The first and the last number of a writer in a day.
Numbers = dict[tuple[str, date], tuple[int, int]]


def numbers_of(entries: Iterable[Entry]) -> Numbers:
    """What stands in each day; a number that is missing in the middle is an error."""
    found: Numbers = {}
    for entry in entries:
        name, _, number = entry.record["resource_id"].partition(" ")
        first, last = found.get((name, entry.day), (int(number), int(number) - 1))
        assert int(number) == last + 1
        found[name, entry.day] = first, last + 1
    return found


class Beside:
    """What goes on in other threads while the log is swept, until `stop` is set.

    `written`: what each writer wrote. `read`: what was found in days that were over. `outlived`:
    how many reads were inside a file when it was swept.
    """

    def __init__(self, directory: Path, log: AuditLogger) -> None:
        self._directory, self._log = directory, log
        self.stop = threading.Event()
        self.written: Numbers = {}
        self.read: set[tuple[tuple[str, date], tuple[int, int]]] = set()
        self.outlived = 0

    def write(self, name: str) -> None:
        """Write numbered events."""
        for number in count():
            if self.stop.is_set():
                return
            position = self._log.create("T", f"{name} {number}", blob=BLOB)
            assert position is not None
            first, _ = self.written.get((name, position.day), (number, number))
            self.written[name, position.day] = first, number

    def read_on(self, linger: Callable[[Entry], None] = lambda entry: None) -> None:
        """Read everything, again and again; `linger` at the first entry of each time."""
        while not self.stop.is_set():
            entries = AuditReader(self._directory).read()
            oldest = next(entries, None)
            if oldest is None:
                continue  # all that was there was swept before it was opened
            linger(oldest)
            found = numbers_of(chain([oldest], entries))
            newest = max(day for _, day in found)
            self.read |= {item for item in found.items() if item[0][1] < newest}

    def read_what_is_swept(self) -> None:
        """Read, and stay inside the oldest file until it is gone."""
        self.read_on(self._await_sweep)

    def _await_sweep(self, entry: Entry) -> None:
        path = self._directory / f"{entry.day}.jsonlog"
        until(lambda: self.stop.is_set() or not path.exists())
        self.outlived += not path.exists()


@pytest.mark.timeout(240)
def test_readers_and_writers_notice_nothing_of_a_sweep_but_the_days_that_are_gone(
    directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture, long: bool
) -> None:
    rounds = 10_000 if long else ROUNDS
    removed: set[date] = set()
    with (
        AuditLogger(directory, fsync="never", retention=None, clock=clock) as log,
        ThreadPoolExecutor(len(NAMES) + 2) as pool,
    ):
        beside = Beside(directory, log)
        threads = [pool.submit(beside.write, name) for name in NAMES]
        until(lambda: len(beside.written) == len(NAMES))
        threads += [pool.submit(beside.read_on), pool.submit(beside.read_what_is_swept)]
        sweeper = RetentionSweeper(directory, Retention(DAYS), clock=clock)
        try:
            for number in range(rounds):
                clock.advance(timedelta(hours=2 if number % 50 else 100))  # a weekend, now and then
                report = sweeper.sweep()
                removed.update(report.removed)
                assert report.failed == ()
                assert report.kept != ()  # the newest file stays, however old it is
                assert [thread.exception() for thread in threads if thread.done()] == []
        finally:
            beside.stop.set()
        for thread in threads:
            thread.result()

    written, days = beside.written, {day for _, day in beside.written}
    assert beside.outlived > 0
    assert [item for item in beside.read if written[item[0]] != item[1]] == []
    assert max(days) not in removed
    kept = {key: numbers for key, numbers in written.items() if key[1] not in removed}
    assert numbers_of(AuditReader(directory).read()) == kept
    assert caplog.text == ""  # no writer missed its file
