"""Group commit: one fdatasync for all that wait together.

Whoever needs its lines on the disk becomes the leader, or waits for one. The leader syncs all
that was appended so far, wakes everybody whom that covers, and hands the lead to one of the
others. The append lock is never held meanwhile, so lines go on being written during a sync.
"""

from __future__ import annotations

import sys
import threading
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


class _Waiter:
    __slots__ = ("error", "gate", "goal", "leads")

    def __init__(self, goal: int) -> None:
        self.goal = goal
        self.gate = threading.Lock()
        self.gate.acquire()
        self.error: SyncFailed | None = None
        self.leads = False


class GroupCommit:
    """Brings what was appended to the disk.

    `progress` is asked for what was appended so far: a count of appends and the newest line.
    `add` and `retire` tell which files that went to; a retired file is closed here, after the
    sync that covers its last line. After a failed sync `failed` is called, so that the writer
    goes on with a new descriptor.

    `_mutex` protects the fields below it, is held for moments only, and is the innermost lock:
    nothing is taken while it is held. It is re-entrant for signal handlers that append.
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
        self._mutex = threading.RLock()
        self._inside: set[int] = set()  # the threads that are in `sync`
        self._files: list[OpenFile] = []
        self._waiters: list[_Waiter] = []
        self._leading = False
        self._synced = 0
        self._durable: Position | None = None
        self._unknown = 0  # the appends up to this count may be lost: a sync that had them failed

    @property
    def durable(self) -> Position | None:
        """The newest line that is on the disk with all lines of this process before it."""
        return self._durable

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
        me = threading.get_ident()
        if me in self._inside:
            raise ReentrantWrite(self._path, "a sync was asked for from inside a sync")
        self._inside.add(me)
        try:
            self._sync()
        finally:
            self._inside.discard(me)

    def _sync(self) -> None:
        goal, _ = self._progress()
        with self._mutex:
            if 0 < goal <= self._unknown:
                # The kernel reports a lost page once; a second sync would succeed and tell lies.
                raise SyncFailed(self._path, "an earlier sync failed and nothing came after it")
            if self._synced >= goal and not any(file.retired or not file.named for file in self._files):
                return
        waiter = self._queue(goal)
        if waiter.leads:
            self._lead(waiter)
        if waiter.error is not None:
            raise SyncFailed(*waiter.error.args)

    def _queue(self, goal: int) -> _Waiter:
        """Return when the waiter leads, or somebody's sync has covered its goal."""
        waiter = _Waiter(goal)
        with self._mutex:
            if not self._leading:
                self._leading = waiter.leads = True
                return waiter
            self._waiters.append(waiter)
        try:
            waiter.gate.acquire()
        except BaseException:  # Ctrl-C: whoever is not there must not be given the lead
            with self._mutex:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif waiter.leads:
                    self._hand_over()
            raise
        return waiter

    def _lead(self, leader: _Waiter) -> None:
        done, newest = self._progress()  # before the sync, which therefore covers it
        with self._mutex:
            files = list(self._files)
            # Only those: a file that is retired meanwhile may have got a line after its sync.
            finished = [file for file in files if file.retired]
        error: SyncFailed | None = SyncFailed(self._path, "a sync was interrupted")
        try:
            for file in files:
                self._sync_file(file)
            error = None
        except OSError as cause:
            error = SyncFailed(self._path, f"a sync failed: {cause.strerror}")
        finally:
            if error is not None:
                self._failed()
                # What was written during the sync may be among what was lost.
                done, _ = self._progress()
            leader.error = error
            self._finish(done, newest, error, finished)

    def _sync_file(self, file: OpenFile) -> None:
        self._operations.sync_data(file.fd)
        if not file.named:
            self._operations.sync_directory(self._directory)
            file.named = True

    def _finish(
        self, done: int, newest: Position | None, error: SyncFailed | None, finished: list[OpenFile]
    ) -> None:
        with self._mutex:
            if error is not None:
                self._unknown = done
            else:
                self._synced = max(self._synced, done)
                if self._unknown == 0:
                    self._durable = newest
            finished = [file for file in finished if file in self._files]
            self._files = [file for file in self._files if file not in finished]
            for waiter in [waiter for waiter in self._waiters if waiter.goal <= done]:
                self._waiters.remove(waiter)
                waiter.error = error
                waiter.gate.release()
            self._hand_over()
        self._close(finished)

    def _close(self, files: list[OpenFile]) -> None:
        for file in files:
            with suppress(OSError):  # its lines are synced, or known not to be
                self._operations.close(file.fd)

    def _hand_over(self) -> None:
        """Let the next one lead, or nobody. The caller holds the mutex."""
        if self._waiters:
            successor = self._waiters.pop(0)
            successor.leads = True
            successor.gate.release()
        else:
            self._leading = False

    def close(self) -> None:
        """Close every file that is still open. The caller has synced, and nothing is appended."""
        if threading.get_ident() in self._inside:
            return  # a signal handler inside a sync: the process ends, and its descriptors with it
        self._queue(sys.maxsize)  # until nobody else leads
        with self._mutex:
            files, self._files = self._files, []
            self._hand_over()
        self._close(files)

    def abandon(self) -> None:
        """Close all files in the child of a fork, where locks may be held by nobody who is there."""
        self._close(self._files)
