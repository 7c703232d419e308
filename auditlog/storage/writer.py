"""Appending lines to the day: choosing the file, closing torn tails, assigning the time."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, tzinfo
from os import SEEK_END
from time import monotonic_ns

from ..errors import DiskFull, WriteFailed
from ..events.codec import Encoded, line_at
from . import forking
from .days import ONE_DAY, Clock, day_at, start_ns
from .directory import Directory
from .files import FILE_MODE, Files
from .layout import Position, day_file_name, new_tuple
from .lock import AppendLock
from .sync import GroupCommit, OpenFile

log = logging.getLogger("auditlog")

# A directory's mtime is as coarse as a tick before Linux 6.13: one that is younger than this may
# stand still while another name comes or goes.
_MTIME_GRAIN_NS = 20_000_000
# Between two looks at the directory, a file that somebody moves away goes on being written, and a
# day that another writer began before the clock was set back is not seen.
_LOOK_EVERY_NS = 10_000_000
_UNKNOWN = -1


class Writer:
    """Appends encoded lines to the day files of one directory.

    All state below is protected by the append lock (see AppendLock). `group` brings what was
    appended to the disk; with `synced=False` nobody will ask it to, and a file is closed as soon
    as its day is over. `forked` is called before the first append of a forked child.
    """

    def __init__(
        self,
        path: str,
        zone: tzinfo,
        clock: Clock,
        files: Files,
        *,
        lock_timeout: float,
        synced: bool,
        forked: Callable[[], None],
    ) -> None:
        self._path = path
        self._zone = zone
        self._time_ns = clock.time_ns
        self._files = files
        self._lock_timeout = lock_timeout
        self._synced = synced
        self._forked = forked
        self._warned: set[date] = set()
        self._inherited = False  # by the child of a fork, which has not opened its own yet
        self._open()
        forking.register(self)

    def _open(self) -> None:
        self.directory = Directory(self._path, self._files, create=True)
        self._begin()

    def _begin(self) -> None:
        """The state of a writer that has written nothing yet."""
        self._lock = AppendLock(self._path, self._lock_timeout)
        self.appends = 0
        self.newest: Position | None = None  # the last line that was appended here
        self._file: OpenFile | None = None
        self._end = _UNKNOWN  # of the file, where it is known to end with a whole line
        self._mtime_ns = _UNKNOWN  # of the directory, when the file was chosen
        self._from_ns = self._to_ns = 0  # the times for which the choice holds
        self._look_again_ns = 0
        self._distrusted = False  # did a sync of the file fail?
        self._notices: list[str] = []  # logged when no lock is held: a handler is user code
        self.group = GroupCommit(self._path, self._files, self.directory.fd, self._progress, self._distrust)

    @contextmanager
    def locked(self) -> Iterator[Directory]:
        """Hold the append lock, to change what the directory remembers."""
        directory = self.directory.fd
        self._lock.acquire(directory)
        try:
            yield self.directory
        finally:
            self._lock.release(directory)

    def append(self, events: Sequence[Encoded]) -> list[Position]:
        """Append the lines of `events`, all to one day, and return their positions.

        When it returns, the whole lines are with the kernel. Raises WriteFailed (DiskFull,
        LockTimeout, ReentrantWrite) or LoggerClosed.
        """
        if self._inherited:
            self._open_own()
        directory = self.directory.fd
        positions: list[Position] = []
        lines: list[bytes] = []
        start = written = 0
        self._lock.acquire(directory)
        try:
            now_ns = self._time_ns()
            file, start = self._ready(now_ns)
            now_ms = now_ns // 1_000_000
            day, end = file.day, start
            for event in events:
                line = line_at(event, now_ms)
                lines.append(line)
                positions.append(new_tuple(Position, (day, end)))
                end += len(line)
            data = b"".join(lines)
            self._end = _UNKNOWN
            written = self._files.write(file.fd, data)
            while start + written < end:  # a full disk takes what fits, and says so the next time
                written += self._files.write(file.fd, memoryview(data)[written:])
            self._end = end
            self.newest = positions[-1]
            self.appends += 1
        except OSError as error:
            whole = self._whole(positions, lines, start + written)
            raise self._failure(error, whole) from error
        finally:
            self._lock.release(directory)
        if self._notices:
            self._log_notices()
        return positions

    def _whole(self, positions: list[Position], lines: list[bytes], end: int) -> tuple[Position, ...]:
        """The positions of the lines that a failed append left whole in the file."""
        whole = tuple(
            position
            for position, line in zip(positions, lines, strict=True)
            if position.offset + len(line) <= end
        )
        if whole:
            self.newest = whole[-1]
            self.appends += 1
        return whole

    def _failure(self, error: OSError, positions: tuple[Position, ...]) -> WriteFailed:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else WriteFailed
        reason = f"writing failed: {error.strerror or error}"
        return kind(self._path, reason, positions)

    def _ready(self, now_ns: int) -> tuple[OpenFile, int]:
        """The file that takes a line at `now_ns`, and its end, which is the end of a line."""
        file = self._file
        if (
            file is None
            or monotonic_ns() > self._look_again_ns
            or not self._from_ns <= now_ns < self._to_ns
            or self._distrusted
        ):
            file = self._look(now_ns)
        end = self._files.seek(file.fd, 0, SEEK_END)
        if end != self._end:
            end = self._close_torn_tail(file.fd, end)
        return file, end

    def _look(self, now_ns: int) -> OpenFile:
        """See whether the choice of the file still holds, and choose anew if it may not."""
        self._look_again_ns = monotonic_ns() + _LOOK_EVERY_NS
        file = self._file
        mtime_ns = self._files.stat(self.directory.fd).st_mtime_ns
        in_window = self._from_ns <= now_ns < self._to_ns
        if file is None or self._distrusted or not in_window or mtime_ns != self._mtime_ns:
            return self._choose(now_ns, mtime_ns)
        return file

    def _choose(self, now_ns: int, mtime_ns: int) -> OpenFile:
        """Decide the day, and open its file unless it is the one that is open.

        The day is the newest that exists, up to one ahead of the clock: so a clock that steps
        back over midnight never reopens an older file, and all writers agree.
        """
        today = day_at(now_ns, self._zone)
        existing = self.directory.days()
        for day in existing:
            if day > today + ONE_DAY and day not in self._warned:
                self._warned.add(day)
                self._notices.append(
                    f"{day_file_name(day)} is ahead of the clock ({today}): it is neither written "
                    "nor swept before its day; check the clock, or move the file away"
                )
        older = [day for day in existing if day <= today + ONE_DAY]
        day = max([today, *older])
        file = self._file
        stays = file is not None and file.day == day and self._is_at_its_name(file)
        if file is None or self._distrusted or not stays:
            if file is not None and file.day == day and not stays:
                self._notices.append(
                    f"{day_file_name(day)} was removed or replaced while it was written; "
                    "events go on in a new file of that name"
                )
            if day not in existing and older:
                self._finish_day(older[-1])
            if file is not None:
                self._file = None
                self._let_go(file)
            file = self._file = self._open_day(day)
            self._distrusted = False
            self._end = _UNKNOWN
            mtime_ns = self._files.stat(self.directory.fd).st_mtime_ns
        settled = time.time_ns() - mtime_ns > _MTIME_GRAIN_NS  # the kernel's clock, not ours
        self._mtime_ns = mtime_ns if settled else _UNKNOWN
        self._from_ns = start_ns(today, self._zone)
        self._to_ns = start_ns(day + ONE_DAY, self._zone)
        return file

    def _is_at_its_name(self, file: OpenFile) -> bool:
        found = self.directory.stat_day(file.day)
        return found is not None and found.st_ino == file.inode

    def _open_day(self, day: date) -> OpenFile:
        name = day_file_name(day)
        try:
            fd = self._files.create_append(self.directory.fd, name)
        except FileExistsError:
            return self._open_existing(day)
        return self._opened(day, fd)

    def _open_existing(self, day: date) -> OpenFile:
        name = day_file_name(day)
        try:
            fd = self._files.open_append(self.directory.fd, name)
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
            self._files.close(fd)
            raise
        file = OpenFile(day, fd, found.st_ino)
        if self._synced:
            self.group.add(file)
        return file

    def _check_ours(self, name: str, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise self._not_ours(name, "is no regular file")
        if found.st_uid != os.geteuid():
            raise self._not_ours(name, f"belongs to user {found.st_uid}")
        if found.st_nlink > 1:
            if stat.S_IMODE(found.st_mode) != FILE_MODE:
                raise self._not_ours(name, f"has {found.st_nlink} hard links")
            self._notices.append(f"{name} has {found.st_nlink} hard links: another name shows it too")

    def _not_ours(self, name: str, reason: str) -> WriteFailed:
        return WriteFailed(self._path, f"{name} {reason} (move it away: the day's file belongs there)")

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
            self._notices.append(f"{day_file_name(day)}, which ended, was left as it is: {error}")

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
        if self._synced:
            self.group.retire(file)
        else:
            self._files.close(file.fd)

    def _progress(self) -> tuple[int, Position | None]:
        return self.appends, self.newest

    def _distrust(self) -> None:
        """After a failed sync: the next append opens the file anew and looks at its tail."""
        self._distrusted = True

    def _log_notices(self) -> None:
        notices, self._notices = self._notices, []
        for notice in notices:
            log.warning("%s: %s", self._path, notice)

    @property
    def closed(self) -> bool:
        """Was `close` called?"""
        return self._lock.closed

    def close(self) -> None:
        """Sync what was appended, and close all files; writing afterwards raises LoggerClosed.

        A second call does nothing. Raises SyncFailed, with all files closed.
        """
        if not self._lock.close() or self._inherited:
            return
        forking.forget(self)
        try:
            if self._synced:
                self.group.sync()
        finally:
            self.group.close()
            self._close_rest()

    def _close_rest(self) -> None:
        if self._file is not None and not self._synced:
            self._files.close(self._file.fd)
        self.directory.close()

    def before_fork(self) -> None:
        """Keep the other threads out, so that the child gets a whole state."""
        self._lock.before_fork()

    def after_fork_in_parent(self) -> None:
        """Let the other threads in again."""
        self._lock.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Leave the parent's descriptors, and wait with the rest for the first append here."""
        # They are closed and never unlocked: a flock on one of them is a lock of both processes.
        if not self._inherited:
            self.group.abandon()
            self._close_rest()
        self._begin()
        self._opening = threading.Lock()
        self._inherited = True

    def _open_own(self) -> None:
        with self._opening:
            if self._inherited and not self.closed:
                self._open()
                self._forked()
                self._inherited = False  # last: other threads of the child wait for all of it
