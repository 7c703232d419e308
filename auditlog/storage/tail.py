"""Reading on behind a position, whatever happens to the files meanwhile."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from datetime import date, tzinfo

from ..errors import PositionExpired
from .days import ONE_DAY, Clock, day_at
from .directory import Directory
from .entry import CorruptLine, Entry
from .files import Files
from .layout import Position, day_file_name
from .lines import Damaged, forwards, last_line

log = logging.getLogger("auditlog")

Missed = Callable[[Position, date], None]


class Tail:
    """What is behind `position` in the log, now and later.

    `read` gives what there is, and can be called again when there may be more. A day is left when
    a newer one has a file that a writer would choose (up to one ahead of the clock), and when all
    of it was read; a file that was replaced, when the new one is there. `position` is that of the
    last line that was read, damaged ones too; `offset` is where the next one starts.

    `missed` is told where days were swept before they could be read: behind which position, and the day
    that is read next. Without it PositionExpired is raised. One thread at a time.
    """

    def __init__(
        self,
        path: str,
        files: Files,
        clock: Clock,
        zone: tzinfo,
        damaged: Damaged,
        missed: Missed | None = None,
    ) -> None:
        self.position = Position.START
        self._files = files
        self._clock = clock
        self._zone = zone
        self._damaged = damaged
        self._missed = missed
        self._expired = False
        self._day: date | None = None
        self._offset = 0
        self._fd = -1
        self._directory = Directory(path, files)

    def begin_behind(self, position: Position, offset: int | None) -> None:
        """Read on behind a line that ends at `offset`; START has none."""
        self.position = position
        if offset is None:
            return
        if not self._open(position.day):
            raise PositionExpired(position, "its day is gone")  # swept just now
        self._offset = offset

    def begin_behind_gone(self, position: Position) -> None:
        """Read on behind a line that is gone, with the day that is still there."""
        self.position = position
        self._expired = True

    def begin_behind_last(self, before: date) -> None:
        """Read on behind the last line of the days before that one."""
        for day in reversed(self._eligible(date.min)):
            if day >= before or not self._open(day):
                continue
            found = last_line(self._fd)
            if found is not None:
                start, self._offset = found
                self.position = Position(day, start)
                return

    def read(self) -> Generator[Entry, None, None]:
        """The entries that are there by now.

        Raises PositionExpired where days were swept before they could be read.
        """
        while True:
            if self._fd >= 0:
                yield from self._read_on(newest=True)
            following = self._day if self._replaced() else self._following()
            if following is None:
                return
            if self._fd >= 0:
                # What was written until the following file was there; nothing is written behind it.
                yield from self._read_on(newest=False)
            if not self._open(following):
                return

    def _read_on(self, *, newest: bool) -> Iterator[Entry]:
        assert self._day is not None
        size = self._files.seek(self._fd, 0, os.SEEK_END)
        if size < self._offset:
            log.warning(
                "%s: %s was truncated while it was followed; what was cut off before it was read is lost",
                self._directory.path,
                day_file_name(self._day),
            )
            self._offset = size
        if size == self._offset:
            return
        for entry in forwards(os.dup(self._fd), self._day, self._offset, newest, self._pass_over):
            self._offset = entry.offset + len(entry.line)
            self.position = entry.position
            yield entry

    def _pass_over(self, line: CorruptLine) -> None:
        self.position = line.position
        self._offset = line.position.offset + line.length
        self._damaged(line)

    def _following(self) -> date | None:
        """The day to go on with, if there is one by now."""
        newer = self._eligible(self._day or self.position.day)
        if not newer:
            return None
        swept = self._directory.read_state().swept_through
        # A sweep says what it will remove before it removes the first file.
        if self._expired or (
            self._day is not None
            and swept is not None
            and swept > self._day
            and newer[0] > self._day + ONE_DAY
        ):
            if self._missed is None:
                raise PositionExpired(self.position, f"days up to {swept} were swept before they were read")
            self._expired = False
            self._missed(self.position, newer[0])
        return newer[0]

    def _eligible(self, behind: date) -> list[date]:
        """The days behind that one which writers have begun, oldest first."""
        latest = day_at(self._clock.time_ns(), self._zone) + ONE_DAY
        newer = (day for day in self._directory.days() if behind < day <= latest)
        return [day for day in newer if self._directory.has_file(day)]

    def _replaced(self) -> bool:
        """Is another file in the place of the one that is read?"""
        if self._day is None or self._fd < 0:
            return False
        found = self._directory.stat_day(self._day)
        return found is not None and found.st_ino != self._files.stat(self._fd).st_ino

    def _open(self, day: date) -> bool:
        fd = self._directory.open_day(day)
        if fd is None:
            return False
        self._close_file()
        self._fd, self._day, self._offset = fd, day, 0
        return True

    def _close_file(self) -> None:
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Close all files."""
        self._close_file()
        self._directory.close()
