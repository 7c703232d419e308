"""Bringing what was appended to the disk, one sync at a time, and remembering which failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date

from ..errors import ReentrantWrite, SyncFailed
from .files import Files
from .layout import Position


class OpenFile:
    """A day file that this process has open for appending."""

    __slots__ = ("day", "fd", "inode", "named", "retired")

    def __init__(self, day: date, fd: int, inode: int) -> None:
        self.day = day
        self.fd = fd
        self.inode = inode
        self.named = False  # is its name known to be on the disk?
        self.retired = False  # closed after its next sync


class Syncer:
    """Brings what was appended to the disk. The append lock is not held meanwhile.

    `progress` is asked for what was appended so far: a count of appends and the newest line.
    `add` and `retire` tell which files that went to; a retired file is closed here, after the
    sync that covers its last line. After a failed sync `failed` is called, so that the writer
    goes on with a new descriptor.

    `_lock` lets one thread sync at a time; it protects the fields below it. Inside it, `_mutex`
    protects the list of files, for moments only. Both are re-entrant for signal handlers: one
    that asks for a sync during a sync is refused, one that appends is not.
    """

    def __init__(
        self,
        path: str,
        files: Files,
        directory: int,
        progress: Callable[[], tuple[int, Position | None]],
        failed: Callable[[], None],
    ) -> None:
        self._path = path
        self._operations = files
        self._directory = directory
        self._progress = progress
        self._failed = failed
        self._lock = threading.RLock()
        self._owner = 0  # the thread that syncs just now, if any
        self._busy_since = 0.0
        self._synced = 0
        self._durable: Position | None = None
        self._unknown = 0  # the appends up to this count may be lost: a sync that had them failed
        self._reason = ""  # why it failed
        self.syncs = self.failures = 0
        self.seconds = self.longest_seconds = 0.0
        self._mutex = threading.RLock()
        self._files: list[OpenFile] = []

    @property
    def durable(self) -> Position | None:
        """The newest line that is on the disk with all lines of this process before it."""
        return self._durable

    @property
    def busy_seconds(self) -> float:
        """How long the sync has taken so far that goes on just now; 0 where there is none."""
        return time.monotonic() - self._busy_since if self._owner else 0.0

    def add(self, file: OpenFile) -> None:
        """A file was opened; it may hold lines of a writer that died before its sync."""
        with self._mutex:
            self._files.append(file)

    def retire(self, file: OpenFile) -> None:
        """Nothing more will be appended to `file`: close it after its next sync."""
        with self._mutex:
            file.retired = True

    def sync(self) -> None:
        """Return when all that was appended before the call is on the disk.

        Raises SyncFailed if that is not certain, and ReentrantWrite from a signal handler that
        interrupted a sync of its own thread.
        """
        goal, _ = self._progress()
        with self._lock:
            self.refuse_reentry()
            if 0 < goal <= self._unknown:
                # The kernel reports a lost page once; a second sync would succeed and tell lies.
                reason = f"an earlier sync failed ({self._reason}) and nothing came after it"
                raise SyncFailed(self._path, reason)
            if goal <= self._synced and all(file.named and not file.retired for file in self._files):
                return
            self._busy_since = time.monotonic()
            self._owner = threading.get_ident()
            try:
                self._sync()
            finally:
                self._owner = 0

    def _sync(self) -> None:
        done, newest = self._progress()  # before the sync, which therefore covers it
        with self._mutex:
            files = list(self._files)
            # Only those: a file that is retired meanwhile may have got a line after its sync.
            finished = [file for file in files if file.retired]
        reason = "it was interrupted"
        try:
            for file in files:
                self._sync_file(file)
            reason = ""
        except OSError as error:
            reason = error.strerror or str(error)
            raise SyncFailed(self._path, f"a sync failed: {reason}") from error
        finally:
            if reason:
                self._failed()
                # What was written during the sync may be among what was lost.
                self._unknown, _ = self._progress()
                self._reason = reason
            else:
                self._synced = done
                if self._unknown == 0:
                    self._durable = newest
            self._count(self.busy_seconds, bool(reason))
            self._close(finished)

    def _sync_file(self, file: OpenFile) -> None:
        self._operations.sync_data(file.fd)
        if not file.named:
            self._operations.sync_directory(self._directory)
            file.named = True

    def _count(self, seconds: float, failed: bool) -> None:
        self.syncs += 1
        self.failures += failed
        self.seconds += seconds
        self.longest_seconds = max(seconds, self.longest_seconds)

    def _close(self, files: list[OpenFile]) -> None:
        if not files:
            return
        with self._mutex:
            self._files = [file for file in self._files if file not in files]
        for file in files:
            with suppress(OSError):  # its lines are synced, or known not to be
                self._operations.close(file.fd)

    def refuse_reentry(self) -> None:
        """Raise ReentrantWrite in a signal handler that interrupted a sync of its own thread."""
        if self._owner == threading.get_ident():
            raise ReentrantWrite(self._path, "the log was used from inside a sync")

    def close(self) -> None:
        """Close every file that is still open. The caller has synced, and nothing is appended."""
        with self._lock:
            self._close(list(self._files))

    def abandon(self) -> None:
        """Close all files in the child of a fork, where locks may be held by nobody who is there."""
        for file in self._files:
            with suppress(OSError):
                self._operations.close(file.fd)
