"""The day file that takes the next line: choosing it, opening it, closing its torn tail."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress
from datetime import date, tzinfo
from os import SEEK_END
from time import monotonic_ns

from ..errors import WriteFailed
from .days import ONE_DAY, day_at, start_ns
from .directory import Directory
from .files import FILE_MODE, Files
from .layout import day_file_name
from .sync import OpenFile, Syncer

# A directory's mtime is as coarse as a tick before Linux 6.13: one that is younger than this may
# stand still while another name comes or goes.
_MTIME_GRAIN_NS = 20_000_000
# Between two looks at the directory, a file that somebody moves away goes on being written, and a
# day that another writer began before the clock was set back is not seen.
_LOOK_EVERY_NS = 10_000_000
_UNKNOWN = -1


class CurrentFile:
    """The day file of one directory that takes the next line.

    Everything here is called, and its state protected, under the append lock. `syncer` syncs the
    files that were opened and closes those that are let go; with None a file is closed at once.

    `end`: where the file is known to end with a whole line; the writer sets it. `notices`: what
    is to be logged when no lock is held, because a logging handler is code of users.
    """

    def __init__(self, directory: Directory, zone: tzinfo, files: Files, syncer: Syncer | None) -> None:
        self._directory = directory
        self._zone = zone
        self._files = files
        self._syncer = syncer
        self._warned: set[date] = set()
        self._file: OpenFile | None = None
        self._mtime_ns = _UNKNOWN  # of the directory, when the file was chosen
        self._from_ns = self._to_ns = 0  # the times for which the choice holds
        self._look_again_ns = 0
        self._distrusted = False  # did a sync of the file fail?
        self.end = _UNKNOWN
        self.notices: list[str] = []

    def ready(self, now_ns: int) -> tuple[OpenFile, int]:
        """The file that takes a line at `now_ns`, and its end, which is the end of a line.

        Until the writer has set `end`, that is unknown again: its write may tear.
        """
        file = self._file
        if (
            file is None
            or monotonic_ns() > self._look_again_ns
            or not self._from_ns <= now_ns < self._to_ns
            or self._distrusted
        ):
            file = self._look(now_ns)
        end = self._files.seek(file.fd, 0, SEEK_END)
        if end != self.end:
            if end < self.end:
                self.notices.append(
                    f"{day_file_name(file.day)} was truncated from {self.end} to {end} bytes while it was "
                    "written; positions behind that no longer hold"
                )
            end = self._close_torn_tail(file.fd, end)
        self.end = _UNKNOWN
        return file, end

    def _look(self, now_ns: int) -> OpenFile:
        """See whether the choice of the file still holds, and choose anew if it may not."""
        file = self._file
        mtime_ns = self._directory.stat_in_place().st_mtime_ns
        in_window = self._from_ns <= now_ns < self._to_ns
        if file is None or self._distrusted or not in_window or mtime_ns != self._mtime_ns:
            file = self._choose(now_ns, mtime_ns)
        self._look_again_ns = monotonic_ns() + _LOOK_EVERY_NS
        return file

    def _choose(self, now_ns: int, mtime_ns: int) -> OpenFile:
        """Decide the day, and open its file unless it is the one that is open.

        The day is the newest that exists, up to one ahead of the clock: so a clock that steps
        back over midnight never reopens an older file, and all writers agree.
        """
        today = day_at(now_ns, self._zone)
        existing = self._directory.days()
        for day in existing:
            if day > today + ONE_DAY and day not in self._warned:
                self._warned.add(day)
                self.notices.append(
                    f"{day_file_name(day)} is ahead of the clock ({today}): it is neither written "
                    "nor swept before its day; check the clock, or move the file away"
                )
        older = [day for day in existing if day <= today + ONE_DAY]
        day = max([today, *older])
        file = self._file
        stays = file is not None and file.day == day and self._is_at_its_name(file)
        if file is None or self._distrusted or not stays:
            if file is not None and file.day == day and not stays:
                self.notices.append(
                    f"{day_file_name(day)} was removed or replaced while it was written; "
                    "events go on in a new file of that name"
                )
            if day not in existing and older:
                self._finish_day(older[-1])
            if file is not None:
                self._file = None
                self._let_go(file)
            self._distrusted = False  # before: a sync of the new descriptor may fail at once
            file = self._file = self._open_day(day)
            self.end = _UNKNOWN
            mtime_ns = self._files.stat(self._directory.fd).st_mtime_ns
        settled = time.time_ns() - mtime_ns > _MTIME_GRAIN_NS  # the kernel's clock, not ours
        self._mtime_ns = mtime_ns if settled else _UNKNOWN
        self._from_ns = start_ns(today, self._zone)
        # A file further ahead may be the one to write as soon as the next day begins.
        self._to_ns = start_ns((today if len(older) < len(existing) else day) + ONE_DAY, self._zone)
        return file

    def _is_at_its_name(self, file: OpenFile) -> bool:
        found = self._directory.stat_day(file.day)
        return found is not None and found.st_ino == file.inode

    def _open_day(self, day: date) -> OpenFile:
        name = day_file_name(day)
        try:
            fd = self._files.create_append(self._directory.fd, name)
        except FileExistsError:
            return self._open_existing(day)
        return self._opened(day, fd)

    def _open_existing(self, day: date) -> OpenFile:
        name = day_file_name(day)
        try:
            fd = self._files.open_append(self._directory.fd, name)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._not_ours(name, "is no regular file") from None
            raise
        return self._opened(day, fd)

    def _opened(self, day: date, fd: int) -> OpenFile:
        try:
            found = self._files.stat(fd)
            self._check_ours(day_file_name(day), found)
        except BaseException:
            self._close(fd)
            raise
        file = OpenFile(day, fd, found.st_ino)
        if self._syncer is not None:
            self._syncer.add(file)
        return file

    def _check_ours(self, name: str, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise self._not_ours(name, "is no regular file")
        if found.st_uid != os.geteuid():
            raise self._not_ours(name, f"belongs to user {found.st_uid}")
        if found.st_nlink > 1:
            if stat.S_IMODE(found.st_mode) != FILE_MODE:
                raise self._not_ours(name, f"has {found.st_nlink} hard links")
            self.notices.append(f"{name} has {found.st_nlink} hard links: another name shows it too")

    def _not_ours(self, name: str, reason: str) -> WriteFailed:
        path = self._directory.path
        return WriteFailed(path, f"{name} {reason} (move it away: the day's file belongs there)")

    def _finish_day(self, day: date) -> None:
        """Close the torn tail of a day that ends, before the file of the next one exists."""
        file = self._file
        if file is not None and file.day == day and self._is_at_its_name(file):
            self._close_torn_tail(file.fd, self._files.seek(file.fd, 0, SEEK_END))
            return
        try:
            file = self._open_existing(day)
            try:
                self._close_torn_tail(file.fd, self._files.seek(file.fd, 0, SEEK_END))
            finally:
                self._let_go(file)
        except FileNotFoundError:
            return  # swept meanwhile
        except (OSError, WriteFailed) as error:
            # Nothing will be appended there: its tail, if it is torn, is damage with or without a
            # newline. The new day must not wait for it.
            self.notices.append(f"{day_file_name(day)}, which ended, was left as it is: {error}")

    def _close_torn_tail(self, fd: int, end: int) -> int:
        """Make sure that the file ends with a whole line, and return its end.

        A crash or a full disk leaves a line without its end. It stays, as a corrupt line that a
        reader reports; closing it keeps the next line whole.
        """
        if end > 0 and self._files.read(fd, 1, end - 1) != b"\n":
            self._files.write(fd, b"\n")
            return end + 1
        return end

    def _let_go(self, file: OpenFile) -> None:
        if self._syncer is not None:
            self._syncer.retire(file)
        else:
            self._close(file.fd)

    def _close(self, fd: int) -> None:
        with suppress(OSError):  # nothing was promised of the disk
            self._files.close(fd)

    def distrust(self) -> None:
        """After a failed sync: the next line goes through a new descriptor, behind a checked tail."""
        self._distrusted = True

    def close(self) -> None:
        """Close the file, unless the syncer does."""
        if self._file is not None and self._syncer is None:
            self._close(self._file.fd)
