"""Retention: which day files go, and their removal."""

from __future__ import annotations

import importlib
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo

from ..errors import DirectoryError, InvalidSetting, SweepBusy
from .days import ONE_DAY, Clock, SystemClock, day_at, start_of
from .directory import Directory
from .files import Files, is_full
from .layout import Position, day_file_name
from .lines import last_line
from .lock import AppendLock
from .progress import oldest_needed

LONGEST_DAYS = 36_525  # a century
log = logging.getLogger("auditlog")

_PAUSE = 0.05  # between two looks whether another sweep is over


@dataclass(frozen=True, slots=True)
class Retention:
    """How long day files are kept.

    `days`: calendar days, today included (default 30). `max_bytes`: the size of all day files
    together; beyond it whole oldest days go, too (default None: no limit). Today's file, the
    newest one and files ahead of the clock are never removed, whatever the limit.

    `hold_for_destinations`: whether a day that some destination was not sent yet is kept for up to
    `days` days more (default False); `max_bytes` holds nevertheless.
    """

    days: int = 30
    max_bytes: int | None = None
    hold_for_destinations: bool = False

    def __post_init__(self) -> None:
        if type(self.days) is not int or not 1 <= self.days <= LONGEST_DAYS:
            reason = f"must be a whole number from 1 (today only) to {LONGEST_DAYS}"
            raise InvalidSetting("days", self.days, reason)
        if self.max_bytes is not None and (type(self.max_bytes) is not int or self.max_bytes < 1):
            raise InvalidSetting("max_bytes", self.max_bytes, "must be a positive number of bytes, or None")
        if not isinstance(self.hold_for_destinations, bool):
            raise InvalidSetting("hold_for_destinations", self.hold_for_destinations, "must be True or False")


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep removed and kept, or would (`dry_run`).

    `at` is when it ran, `next_due` when the oldest kept day falls due; both are aware datetimes.
    `failed` names the days that were due and could not be removed, with the reason: they are
    kept, and tried again by the next sweep. `held` are those that are kept for a destination alone.
    """

    at: datetime
    removed: tuple[date, ...]
    removed_bytes: int
    kept: tuple[date, ...]
    kept_bytes: int
    next_due: datetime | None
    failed: tuple[tuple[date, str], ...] = ()
    held: tuple[date, ...] = ()
    dry_run: bool = False

    @property
    def oldest_kept(self) -> date | None:
        """The oldest day that is still there."""
        return self.kept[0] if self.kept else None


@dataclass(slots=True)
class _Plan:
    today: date
    due: dict[date, int] = field(default_factory=dict)  # day -> bytes, oldest first
    kept: dict[date, int] = field(default_factory=dict)
    held: list[date] = field(default_factory=list)


class RetentionSweeper:
    """Removes day files that are older than the retention allows.

    Only regular files with a strict day-file name are ever removed. A reader that is inside a
    file finishes it. The zone is the one that the directory's first writer recorded, else UTC.
    `lock_timeout` (seconds, default 10) bounds the wait for another sweep or for a writer;
    `allow_shared_directory` as in AuditLogger.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        retention: Retention | None = None,
        *,
        allow_shared_directory: bool = False,
        lock_timeout: float = 10.0,
        clock: Clock | None = None,
        files: Files | None = None,
    ) -> None:
        self.retention = retention or Retention()
        self._path = os.path.abspath(directory)
        self._allow_shared = allow_shared_directory
        self._lock_timeout = lock_timeout
        self._clock = clock or SystemClock()
        self._files = files or Files()
        self._untold: date | None = None  # the newest day that was removed before it was remembered
        self._append_lock = AppendLock(self._path, lock_timeout)
        # Slow, so only for those who sweep; and not in the sweeping thread: a process that forks
        # during an import leaves the child an import lock that nobody will ever release.
        self._filelock = importlib.import_module("filelock")
        Directory(self._path, self._files).close()  # an unusable one is refused now, not at night

    def plan(self) -> SweepReport:
        """Say what `sweep` would do now. Removes nothing."""
        with Directory(self._path, self._files) as directory, directory.refusing():
            zone = directory.zone()
            plan = self._plan(directory, zone)
            return self._report(plan, zone, tuple(plan.due), {}, dry_run=True)

    def sweep(self) -> SweepReport:
        """Remove what is due, and report it.

        Raises SweepBusy while another process sweeps, LockTimeout where a writer is stuck, and
        DirectoryError where the directory cannot be used. A single file that cannot be removed
        is named in the report and stops nothing.
        """
        with (
            Directory(self._path, self._files, create=True, allow_shared=self._allow_shared) as directory,
            directory.refusing(),
            self._alone(directory),
        ):
            return self._sweep(directory)

    @contextmanager
    def _alone(self, directory: Directory) -> Iterator[None]:
        """Hold the sweep lock, on `.auditlog` itself: nothing that anybody could delete or replace."""
        below = directory.open_state_directory()
        try:
            deadline = time.monotonic() + self._lock_timeout
            while not self._filelock.lock_descriptor(below, blocking=False):
                if time.monotonic() > deadline:
                    raise SweepBusy(self._path)
                time.sleep(_PAUSE)
            try:
                yield
            finally:  # not by closing alone: a child forked meanwhile has the descriptor, too
                self._filelock.unlock_descriptor(below)
        finally:
            self._files.close(below)

    def _sweep(self, directory: Directory) -> SweepReport:
        zone = directory.zone()
        plan = self._plan(directory, zone)
        removed: list[date] = []
        failed: dict[date, str] = {}
        due = list(plan.due)
        try:
            if due or self._untold is not None:
                self._remember(directory, max([*due, self._untold or date.min]))
        except DirectoryError as error:
            if not (due and is_full(error.__cause__)):
                raise
            # There is room to remember that as soon as the oldest file is gone.
            self._untold = max(due[0], self._untold or date.min)
            self._remove(directory, due.pop(0), removed, failed)
            self._files.sync_directory(directory.fd)
            self._remember(directory, max([*due, self._untold]))
        self._untold = None
        for day in due:
            self._remove(directory, day, removed, failed)
        if removed:
            self._files.sync_directory(directory.fd)
        return self._report(plan, zone, tuple(removed), failed, dry_run=False)

    def _remove(self, directory: Directory, day: date, removed: list[date], failed: dict[date, str]) -> None:
        try:
            self._files.remove(directory.fd, day_file_name(day))
            removed.append(day)
        except FileNotFoundError:
            pass  # somebody else removed it
        except OSError as error:
            failed[day] = error.strerror or str(error)

    def _remember(self, directory: Directory, day: date) -> None:
        # Before the first file goes: a follower that misses a day must find out why.
        self._append_lock.acquire(directory.fd)
        try:
            swept = directory.read_state().swept_through
            if swept is None or swept < day:
                directory.update_state(swept_through=day, swept_end=self._end_of(directory, day))
        finally:
            self._append_lock.release(directory.fd)

    def _end_of(self, directory: Directory, day: date) -> Position | None:
        """The last line of a day: whoever has read that has missed nothing."""
        fd = directory.open_day(day)
        if fd is None:
            return None
        try:
            found = last_line(fd)
            return None if found is None else Position(day, found[0])
        finally:
            self._files.close(fd)

    def _plan(self, directory: Directory, zone: tzinfo) -> _Plan:
        plan = _Plan(today := day_at(self._clock.time_ns(), zone))
        for day in directory.days():
            found = directory.stat_day(day)
            if found is not None and stat.S_ISREG(found.st_mode):
                plan.kept[day] = found.st_size
        # Writers go on in the newest day up to one ahead of the clock.
        newest = max((day for day in plan.kept if day <= today + ONE_DAY), default=today)
        oldest = today - timedelta(days=self.retention.days - 1)
        total = sum(plan.kept.values())
        held_from = self._held_from(directory, oldest)
        for day in list(plan.kept):
            too_large = self.retention.max_bytes is not None and total > self.retention.max_bytes
            if day < min(newest, today) and (day < oldest or too_large):
                if day >= held_from and not too_large:
                    plan.held.append(day)
                    continue
                plan.due[day] = plan.kept.pop(day)
                total -= plan.due[day]
        return plan

    def _held_from(self, directory: Directory, oldest: date) -> date:
        """The first day that is kept because a destination still needs it."""
        if self.retention.hold_for_destinations:
            try:
                needed = oldest_needed(directory, self._files)
            except DirectoryError as error:  # then whatever may be kept for it is
                log.warning("%s", error)
                needed = date.min
            if needed is not None:
                return max(needed, oldest - timedelta(days=self.retention.days))
        return oldest

    def _report(
        self,
        plan: _Plan,
        zone: tzinfo,
        removed: tuple[date, ...],
        failed: dict[date, str],
        *,
        dry_run: bool,
    ) -> SweepReport:
        kept = plan.kept | {day: plan.due[day] for day in failed}
        days = tuple(sorted(kept))
        next_due = None
        if days and days[0] <= plan.today + ONE_DAY:
            next_due = start_of(days[0] + timedelta(days=self.retention.days), zone)
        return SweepReport(
            at=datetime.fromtimestamp(self._clock.time_ns() / 1e9, UTC),
            removed=removed,
            removed_bytes=sum(plan.due[day] for day in removed),
            kept=days,
            kept_bytes=sum(kept.values()),
            next_due=next_due,
            failed=tuple(failed.items()),
            held=tuple(plan.held),
            dry_run=dry_run,
        )
