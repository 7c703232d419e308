"""Reading a range of the log, in order, in constant memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import date, tzinfo
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CorruptEntry, InvalidRange, InvalidSetting, PositionExpired, PositionInvalid
from ..storage.blocks import Run, entry_runs
from ..storage.days import Clock, SystemClock
from ..storage.directory import Directory
from ..storage.entry import RAW_BYTES, CorruptLine, Entry
from ..storage.files import Files
from ..storage.layout import Position
from ..storage.lines import backwards, forwards, line_length, starts_line
from ..storage.tail import Tail
from .filters import Filter
from .follower import AsyncFollower, Follower
from .search import Needle
from .timespec import Bound, Range, parse_range

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("auditlog")


class _DayFile(NamedTuple):
    """An open day file: where to begin in it (or, newest first, to end), and whether it is the newest."""

    fd: int
    day: date
    offset: int | None
    newest: bool


class AuditReader:
    """Reads the entries of an audit log directory, whoever wrote it, Omni too.

    `on_corrupt` is called with a CorruptLine for each damaged line that a read meets; the
    default logs a warning. Damage never stops a read and never shows as an entry. Reading needs
    no lock and no right to write, and never waits for a writer.

    Raises DirectoryError where there is no directory to read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        on_corrupt: Callable[[CorruptLine], None] | None = None,
        clock: Clock | None = None,
        files: Files | None = None,
    ) -> None:
        self._path = os.path.abspath(directory)
        self._clock = clock or SystemClock()
        self._files = files or Files()
        self._on_corrupt = on_corrupt or self._warn
        self._directory().close()

    def _directory(self) -> Directory:
        return Directory(self._path, self._files)

    def read(
        self,
        start: Bound = None,
        end: Bound = None,
        *,
        where: Filter | None = None,
        newest_first: bool = False,
        limit: int | None = None,
        after: Position | None = None,
        strict: bool = False,
    ) -> Iterator[Entry]:
        """Give the entries from `start` to `end` in the order of the log.

        `start` and `end`: a `date` or `"YYYY-MM-DD"` means the whole day, and both days are
        included; an aware `datetime` means an instant, decided by `event_ts`, the start included
        and the end not. The default is all that is retained. `where` chooses entries, `limit`
        ends the read after so many. `after` resumes right behind the entry at that position
        (with `newest_first`: right before it). `strict` decodes every entry and reports those
        that are no events, instead of leaving that to `entry.event`.

        What is wrong with the arguments is raised by the call itself, before the first entry:
        InvalidRange, InvalidSetting, PositionExpired, PositionInvalid or DirectoryError.
        """
        if limit is not None and (type(limit) is not int or limit < 0):
            raise InvalidSetting("limit", limit, "must be a number of entries, or None")
        _check_filter(where)
        with self._directory() as directory:
            span = parse_range(start, end, directory.zone())
            days = directory.days()
            offset = None if after is None else self._resume(directory, days, after, newest_first)
        needle = None if where is None or newest_first or strict else Needle.of(where)
        entries: Iterator[Entry] = chain.from_iterable(
            self._of_day(file, newest_first, needle)
            for file in self._files_of(days, span, after, offset, newest_first)
        )
        if span.by_time or where is not None or strict:
            entries = (entry for entry in entries if self._is_chosen(entry, span, where, strict))
        return entries if limit is None else islice(entries, limit)

    def follow(
        self,
        start: Bound = None,
        *,
        after: Position | None = None,
        where: Filter | None = None,
        stop: threading.Event | None = None,
        on_missed: Callable[[Position, date], None] | None = None,
    ) -> Follower:
        """Give the entries from `start` on, or behind `after`, and go on as more are written.

        Without either, only what is written from now on. `start` and `where` as in `read`. An
        entry comes within 0.1 s of its write, by whatever process. The loop ends when `stop` is
        set. The follower's `position` says where to resume, even before the first entry.

        Raises what `read` raises; the loop raises PositionExpired where days were swept before
        they could be read. With `on_missed` it does not, nor where the day of `after` is gone: it is
        called with the position behind which entries are missing, and the day that is read next.
        """
        return Follower(*self._tail(start, after, where, on_missed), stop)

    def afollow(
        self,
        start: Bound = None,
        *,
        after: Position | None = None,
        where: Filter | None = None,
        stop: asyncio.Event | None = None,
    ) -> AsyncFollower:
        """`follow` for `async for`, which does not block the event loop."""
        return AsyncFollower(*self._tail(start, after, where), stop)

    def _tail(
        self,
        start: Bound,
        after: Position | None,
        where: Filter | None,
        missed: Callable[[Position, date], None] | None = None,
    ) -> tuple[Tail, Callable[[Entry], bool]]:
        _check_filter(where)
        if start is not None and after is not None:
            raise InvalidRange(start, after, "give a start or a position, not both")
        with self._directory() as directory:
            zone = directory.zone()
            span = parse_range(start, None, zone)
            tail = Tail(self._path, self._files, self._clock, zone, self._on_corrupt, missed)
            try:
                if after is not None:
                    offset = self._resume(directory, directory.days(), after, newest_first=False)
                    tail.begin_behind(after, offset)
                else:
                    tail.begin_behind_last(span.first if start is not None else date.max)
            except PositionExpired:
                if after is None or missed is None:
                    tail.close()
                    raise
                tail.begin_behind_gone(after)
            except BaseException:
                tail.close()
                raise
        return tail, lambda entry: self._is_chosen(entry, span, where, strict=False)

    def _resume(
        self, directory: Directory, days: list[date], after: Position, newest_first: bool
    ) -> int | None:
        """The offset in the position's day at which the read goes on, once that is checked."""
        if not isinstance(after, Position):
            raise InvalidSetting("after", after, "must be a Position; Position.parse reads its text")
        if after.offset < 0:
            raise PositionInvalid(after, "no line starts there")
        if after == Position.START:
            return None
        fd = directory.open_day(after.day)
        if fd is None:
            if days and after.day > days[-1]:
                raise PositionInvalid(after, "the log does not reach that far")
            raise PositionExpired(after, "its day is gone")
        try:
            if not starts_line(fd, after.offset):
                raise PositionInvalid(after, "no line starts there")
            return after.offset if newest_first else after.offset + line_length(fd, after.offset)
        finally:
            self._files.close(fd)

    def at(self, position: Position) -> Entry | CorruptLine:
        """The line that starts at a position: an entry, or damage.

        Raises PositionExpired, PositionInvalid, InvalidSetting or DirectoryError.
        """
        with self._directory() as directory:
            days = directory.days()
            if self._resume(directory, days, position, newest_first=True) is None:
                raise PositionInvalid(position, "it precedes every line")
            fd = directory.open_day(position.day)
        found: list[CorruptLine] = []
        if fd is not None:
            newest = position.day == days[-1]
            entry = next(forwards(fd, position.day, position.offset, newest, found.append), None)
            if found:
                return found[0]
            if entry is not None:
                return entry
        raise PositionInvalid(position, "no whole line starts there yet")

    def read_runs(self, start: date | None, end: date | None, *, after: Position | None) -> Iterator[Run]:
        """`read` of whole days, in runs of about 1 MiB: for those who want the stored bytes alone."""
        with self._directory() as directory:
            span = parse_range(start, end, directory.zone())
            days = directory.days()
            offset = None if after is None else self._resume(directory, days, after, newest_first=False)
        for file in self._files_of(days, span, after, offset, newest_first=False):
            yield from entry_runs(file.fd, file.day, file.offset or 0, file.newest, self._on_corrupt)

    def size(self, start: Bound = None, end: Bound = None) -> int:
        """How many bytes the day files have that a read between these bounds looks into."""
        with self._directory() as directory:
            span = parse_range(start, end, directory.zone())
            found = (directory.stat_day(day) for day in directory.days() if span.first <= day <= span.last)
            return sum(each.st_size for each in found if each is not None)

    @property
    def zone(self) -> tzinfo:
        """The zone in which the log's days begin and end."""
        with self._directory() as directory:
            return directory.zone()

    def _files_of(
        self, days: list[date], span: Range, after: Position | None, offset: int | None, newest_first: bool
    ) -> Iterator[_DayFile]:
        """The day files to read, each opened when its turn comes."""
        with self._directory() as directory:
            newest = next((day for day in reversed(days) if directory.has_file(day)), None)
            for day in reversed(days) if newest_first else days:
                if not span.first <= day <= span.last:
                    continue
                if after is not None and (day > after.day if newest_first else day < after.day):
                    continue
                fd = directory.open_day(day)
                if fd is None:
                    continue  # swept since, or no file of ours
                here = offset if after is not None and day == after.day else None
                yield _DayFile(fd, day, here, day == newest)

    def _of_day(self, file: _DayFile, newest_first: bool, needle: Needle | None) -> Iterator[Entry]:
        fd, day, offset, newest = file
        if newest_first:
            return backwards(fd, day, offset, newest, self._on_corrupt)
        if needle is None:
            return forwards(fd, day, offset or 0, newest, self._on_corrupt)
        runs = entry_runs(fd, day, offset or 0, newest, self._on_corrupt)
        return chain.from_iterable(map(needle.entries, runs))

    def _is_chosen(self, entry: Entry, span: Range, where: Filter | None, strict: bool) -> bool:
        if not (span.by_time or where is not None or strict):
            return True
        try:
            record = entry.record
            if strict:
                entry.event  # noqa: B018 - decoded, to see whether it can be
        except CorruptEntry as error:
            line = entry.line
            self._on_corrupt(CorruptLine(entry.position, line[:RAW_BYTES], len(line), error.reason))
            return False
        if span.by_time and not span.covers(record.get("event_ts", 0)):
            return False
        return where is None or where.matches(record)

    def _warn(self, line: CorruptLine) -> None:
        log.warning(
            "%s: the line at %s (%d bytes) is damaged and was left out: %s",
            self._path,
            line.position,
            line.length,
            line.reason,
        )


def _check_filter(where: object) -> None:
    if not isinstance(where, Filter | None):
        raise InvalidSetting("where", where, "must be a Filter, or None")
