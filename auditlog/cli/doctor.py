"""`auditlog doctor`: all that may be wrong with a log, and what to do about it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import click

from ..errors import AuditLogError
from ..events.visible import visible
from ..forward.status import DestinationStatus, Lag, read_status
from ..health import disk_problem
from ..query.reader import AuditReader
from ..storage.blocks import entry_runs
from ..storage.days import ONE_DAY, load_zone
from ..storage.directory import Directory
from ..storage.entry import CorruptLine
from ..storage.files import Files
from ..storage.layout import STATE_DIRECTORY, day_file_name, parse_day_file_name
from ..storage.retention import Retention, RetentionSweeper
from .app import DAMAGE, directory_option
from .forward_status import in_words

MOST_NAMED = 10
NEEDED_BYTES = 1 << 20  # of free space: the longest line of a log that is not configured otherwise

Grade = Literal["ok", "note", "wrong", "damage"]
_COLOURS = {"ok": "green", "note": "yellow", "wrong": "red", "damage": "red"}


class Finding(NamedTuple):
    """What was found, how bad it is, and what to do about it."""

    grade: Grade
    what: str
    remedy: str = ""


@click.command()
@directory_option
@click.option(
    "--days",
    type=int,
    default=30,
    show_default=True,
    metavar="N",
    help="The retention, for what the next sweep removes.",
)
@click.option("--strict", is_flag=True, help="Decode every entry, too.")
def command(directory: str, days: int, strict: bool) -> int:
    """Look at a log for all that may be wrong with it, and say what to do.

    Permissions, stray names, damaged lines with their positions, missing days, the clock, size and
    free space, what the next sweep removes, how far destinations are. Changes nothing. Ends with
    status 4 where lines are damaged, 1 where something else is wrong.
    """
    worst = 0
    for finding in Checkup(Path(directory).absolute(), Retention(days=days), strict=strict).findings():
        mark = click.style(f"{finding.grade:6}", fg=_COLOURS[finding.grade])
        click.echo(
            f"{mark}  {visible(finding.what)}" + (f"\n        {finding.remedy}" if finding.remedy else "")
        )
        worst = max(worst, {"damage": DAMAGE, "wrong": 1}.get(finding.grade, 0))
    return worst


class Checkup:
    """Everything that is looked at, in the order in which it is told."""

    def __init__(self, path: Path, retention: Retention, *, strict: bool) -> None:
        self._path = path
        self._retention = retention
        self._strict = strict
        self._has_state = True

    def findings(self) -> Iterator[Finding]:
        """What there is to say, one thing after the other."""
        with Directory(self._path, Files()) as directory:
            days = directory.days()
            yield from self._directory(directory)
            yield from self._state(directory)
            yield from self._names(directory, days)
            yield from self._days(days)
            yield from self._lines(directory, days)
            yield from self._space(directory)
        if self._has_state:
            yield from self._sweep()
            yield from self._destinations()

    def _directory(self, directory: Directory) -> Iterator[Finding]:
        found = os.fstat(directory.fd)
        yield Finding("ok", f"{self._path} belongs to user {found.st_uid}, mode {_mode(found)}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield Finding("wrong", "others than its owner may write there", f"chmod go-w {self._path}")
        if found.st_mode & (stat.S_IRGRP | stat.S_IROTH):
            yield Finding("note", "others than its owner may list it", f"chmod go-rx {self._path}")

    def _state(self, directory: Directory) -> Iterator[Finding]:
        try:
            state = directory.read_state()
            load_zone(state.timezone or "UTC")
        except AuditLogError as error:
            self._has_state = False
            yield Finding("wrong", str(error))
            return
        swept = f", swept through {state.swept_through}" if state.swept_through else ""
        yield Finding("ok", f"days are those of the zone {state.timezone or 'UTC (not recorded)'}{swept}")

    def _names(self, directory: Directory, days: list[date]) -> Iterator[Finding]:
        owner = os.fstat(directory.fd).st_uid
        for day in days:
            found = directory.stat_day(day)
            name = day_file_name(day)
            if found is None:
                continue
            if not stat.S_ISREG(found.st_mode):
                yield Finding(
                    "wrong", f"{name} is no regular file", "move it away: the day's file belongs there"
                )
            elif found.st_uid != owner:
                yield Finding("wrong", f"{name} belongs to user {found.st_uid}", f"chown it to user {owner}")
            elif found.st_mode & 0o077:
                yield Finding("note", f"{name} has mode {_mode(found)}", f"chmod 600 {self._path / name}")
            elif found.st_nlink > 1:
                yield Finding("note", f"{name} has {found.st_nlink} hard links", "another name shows it, too")
        for name in sorted(os.listdir(directory.fd)):
            if parse_day_file_name(name) is None and name != STATE_DIRECTORY:
                yield Finding("note", f"{name} is no day file, and is left alone")

    def _days(self, days: list[date]) -> Iterator[Finding]:
        if not days:
            yield Finding("note", "there is no day file yet")
            return
        yield Finding("ok", f"{len(days)} day files, from {days[0]} to {days[-1]}")
        missing = [str(day + ONE_DAY) for day, following in pairwise(days) if following > day + ONE_DAY]
        if missing:
            first = ", ".join(missing[:MOST_NAMED])
            yield Finding(
                "note",
                f"days without a file begin at {first}",
                "nothing was written there, or the files were removed",
            )
        today = datetime.now(UTC).date()
        for day in days:
            if day > today + ONE_DAY:
                yield Finding(
                    "wrong",
                    f"{day_file_name(day)} is ahead of the clock",
                    "check the clock, or move the file away",
                )

    def _lines(self, directory: Directory, days: list[date]) -> Iterator[Finding]:
        named: list[CorruptLine] = []
        damaged = 0

        def note(line: CorruptLine) -> None:
            nonlocal damaged
            damaged += 1
            if len(named) < MOST_NAMED:
                named.append(line)

        if self._strict and self._has_state:
            count = sum(1 for _ in AuditReader(self._path, on_corrupt=note).read(strict=True))
        else:
            count = 0
            for day in days:
                if (fd := directory.open_day(day)) is not None:
                    count += sum(run.length() for run in entry_runs(fd, day, 0, day == days[-1], note))
        for line in named:
            what = f"the line at {line.position} ({line.length:,} bytes) is damaged: {line.reason}"
            yield Finding("damage", what, f"auditlog show {line.position} -C 1")
        if damaged > len(named):
            yield Finding("damage", f"and {damaged - len(named):,} more damaged lines")
        yield Finding("ok", f"{count:,} entries, {damaged:,} damaged lines")

    def _space(self, directory: Directory) -> Iterator[Finding]:
        if problem := disk_problem(directory.fd, NEEDED_BYTES):
            yield Finding("wrong", problem)
        else:
            found = os.fstatvfs(directory.fd)
            yield Finding("ok", f"{found.f_bavail * found.f_frsize:,} bytes are free")

    def _sweep(self) -> Iterator[Finding]:
        plan = RetentionSweeper(self._path, self._retention).plan()
        yield Finding("ok", f"{plan.kept_bytes + plan.removed_bytes:,} bytes in all")
        if plan.removed:
            what = (
                f"{len(plan.removed)} days ({plan.removed_bytes:,} bytes), from {plan.removed[0]} on, are due"
            )
            yield Finding(
                "note", what, "a server with the log open sweeps them by itself; or run auditlog sweep"
            )

    def _destinations(self) -> Iterator[Finding]:
        try:
            statuses = read_status(self._path)
        except AuditLogError as error:
            yield Finding("wrong", str(error))
            return
        for status in statuses:
            yield from _of_destination(status)


def _of_destination(status: DestinationStatus) -> Iterator[Finding]:
    name = f"destination {status.name} ({status.endpoint})"
    lag = Lag(status.lag_events, status.lag_seconds)
    behind = f"{in_words(lag)} behind" if lag.events else "up to date"
    for first, last in status.swept:
        what = f"{name} never got what was written from {first} up to {last}: it was swept before"
        yield Finding("note", what, "Retention(hold_for_destinations=True) keeps such days for a while")
    if status.failing:
        what = f"{name} fails, and is {behind}: {status.last_error}"
        yield Finding("wrong", what, "look at the receiver; nothing is lost until its days are swept")
    elif lag.events and not status.active:
        remedy = f"forward to it, or remove .auditlog/forward/{status.name} where it is of no use any more"
        yield Finding("note", f"{name} is {behind}, and nobody forwards to it", remedy)
    else:
        yield Finding("ok", f"{name} is {behind}")


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"
