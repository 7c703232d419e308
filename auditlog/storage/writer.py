"""Appending lines to the day: taking the lock, assigning the time, saying what failed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import tzinfo

from ..errors import DirectoryError, DiskFull, ReentrantWrite, WriteFailed
from ..events.codec import Encoded, line_at
from . import forking
from .current import CurrentFile
from .days import Clock
from .directory import Directory
from .files import Files, is_full
from .layout import Position, new_tuple
from .lock import AppendLock
from .sync import Syncer

log = logging.getLogger("auditlog")


class Writer(forking.Forkable):
    """Appends encoded lines to the day files of one directory.

    All state below is protected by the append lock (see AppendLock). `syncer` brings what was
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
        allow_shared: bool,
        lock_timeout: float,
        synced: bool,
        forked: Callable[[], None],
    ) -> None:
        self._path = path
        self._zone = zone
        self._time_ns = clock.time_ns
        self._files = files
        self._allow_shared = allow_shared
        self._lock_timeout = lock_timeout
        self._synced = synced
        self._forked = forked
        self._inherited = False  # by the child of a fork, which has not opened its own yet
        # Let one thread open it, taken before all other locks; re-entrant to refuse a signal handler.
        self._opening = threading.RLock()
        self._is_opening = False
        self._open()
        forking.register(self)

    def _open(self) -> None:
        self.directory = Directory(self._path, self._files, create=True, allow_shared=self._allow_shared)
        self._begin()

    def _begin(self) -> None:
        """The state of a writer that has written nothing yet."""
        self._lock = AppendLock(self._path, self._lock_timeout)
        self.appends = 0
        self.lines = 0  # that are whole in a file
        self.newest: Position | None = None  # the last of them
        self.syncer = Syncer(self._path, self._files, self.directory.fd, self._progress, self._distrust)
        syncer = self.syncer if self._synced else None
        self._current = CurrentFile(self.directory, self._zone, self._files, syncer)

    @contextmanager
    def locked(self, timeout: float | None = None) -> Iterator[Directory]:
        """Hold the append lock, to look at the directory or change what it remembers."""
        if self._inherited:
            self._open_own()
        directory = self.directory.fd
        self._lock.acquire(directory, timeout)
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
        current = self._current
        positions: list[Position] = []
        lines: list[bytes] = []
        start = written = 0
        self._lock.acquire(directory)
        try:
            now_ns = self._time_ns()
            file, start = current.ready(now_ns)
            now_ms = now_ns // 1_000_000
            day, end = file.day, start
            for event in events:
                line = line_at(event, now_ms)
                lines.append(line)
                positions.append(new_tuple(Position, (day, end)))
                end += len(line)
            data = b"".join(lines)
            written = self._files.write(file.fd, data)
            while start + written < end:  # a full disk takes what fits, and says so the next time
                written += self._files.write(file.fd, memoryview(data)[written:])
            current.end = end
            self.newest = positions[-1]
            self.lines += len(positions)
            self.appends += 1
        except OSError as error:
            whole = self._whole(positions, lines, start + written)
            raise self._failure(error, whole) from error
        except DirectoryError as error:
            raise self._refused(error) from error
        finally:
            self._lock.release(directory)
        if current.notices:
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
            self.lines += len(whole)
            self.appends += 1
        return whole

    def _failure(self, error: OSError, positions: tuple[Position, ...]) -> WriteFailed:
        kind = DiskFull if is_full(error) else WriteFailed
        reason = f"writing failed: {error.strerror or error}"
        return kind(self._path, reason, positions)

    def _refused(self, error: DirectoryError) -> WriteFailed:
        return WriteFailed(self._path, f"{error.reason} ({error.remedy})")

    def _progress(self) -> tuple[int, Position | None]:
        return self.appends, self.newest

    def _distrust(self) -> None:
        self._current.distrust()

    def _log_notices(self) -> None:
        notices, self._current.notices = self._current.notices, []
        for notice in notices:
            log.warning("%s: %s", self._path, notice)

    @property
    def closed(self) -> bool:
        """Was `close` called?"""
        return self._lock.closed

    @property
    def waits(self) -> tuple[int, float]:
        """How often an append waited for the append lock, and for how many seconds in all."""
        return self._lock.waits, self._lock.wait_seconds

    def refuse_reentry(self) -> None:
        """Raise ReentrantWrite in a signal handler that interrupted a write of its own thread."""
        if self._opening.acquire(False):
            opening = self._is_opening
            self._opening.release()
            if opening:
                raise self._reentered()
        self._lock.refuse_reentry()
        self.syncer.refuse_reentry()

    def close(self) -> None:
        """Sync what was appended, and close all files; writing afterwards raises LoggerClosed.

        A second call does nothing. Raises SyncFailed, with all files closed, or ReentrantWrite.
        """
        with self._opening:
            if not self._lock.close() or self._inherited:
                return
        forking.forget(self)
        try:
            if self._synced:
                self.syncer.sync()
        finally:
            self.syncer.close()
            self._close_rest()

    def _close_rest(self) -> None:
        self._current.close()
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
            self.syncer.abandon()
            self._close_rest()
        self._begin()
        self._opening = threading.RLock()
        self._is_opening = False
        self._inherited = True

    def _open_own(self) -> None:
        with self._opening:
            if self._is_opening:
                raise self._reentered()
            if not self._inherited or self.closed:
                return
            self._is_opening = True
            try:
                self._open()
                try:
                    self._forked()
                except DirectoryError:
                    self._close_rest()
                    raise
            except DirectoryError as error:
                raise self._refused(error) from error
            finally:
                self._is_opening = False
            self._inherited = False  # last: other threads of the child wait for all of it

    def _reentered(self) -> ReentrantWrite:
        return ReentrantWrite(self._path, "the log was written or closed while it was opened anew")
