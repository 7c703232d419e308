"""The append lock: one writer at a time, of all threads and processes of a directory."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

from ..errors import LockTimeout, LoggerClosed, ReentrantWrite, WriteFailed

FIRST_PAUSE = 50e-6
LONGEST_PAUSE = 2e-3
_TRY = LOCK_EX | LOCK_NB


class AppendLock:
    """Two locks, always taken in this order: a thread lock, then `flock` on the directory.

    Together they protect the end of the newest day file, the choice of the day, and
    `.auditlog/state`. The flock is on the directory's own descriptor: nothing that anybody could
    delete or replace. It belongs to the open descriptor, which all threads share; hence the
    thread lock before it.

    The thread lock is re-entrant only so that re-entry can be refused instead of waited for: a
    signal handler that writes while its own thread is in a write would wait forever.

    `timeout` is in seconds, for both locks together; then LockTimeout is raised.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._thread_lock = threading.RLock()
        self._held = False  # read and written only by the owner of the thread lock
        self.closed = False  # as that
        self.waits = 0  # how often somebody had to wait, and how long in all
        self.wait_seconds = 0.0

    def acquire(self, directory: int, timeout: float | None = None) -> None:
        """Take both locks, within the lock's own timeout unless another is given.

        Raises LockTimeout, ReentrantWrite from inside a write, or LoggerClosed after `close`.
        """
        lock = self._thread_lock
        started = 0.0
        if not lock.acquire(False):
            timeout = self._timeout if timeout is None else timeout
            started = time.monotonic()
            if not lock.acquire(timeout=timeout):
                raise self._timed_out(started, timeout)
        if self._held or self.closed:
            self._thread_lock.release()
            if self.closed:
                raise LoggerClosed(self._path)  # before the descriptor is used: its number is free
            raise ReentrantWrite(self._path, "an event was written from inside a write")
        self._held = True
        try:
            flock(directory, _TRY)
        except BlockingIOError:
            started = started or time.monotonic()
            self._poll(directory, started, self._timeout if timeout is None else timeout)
        except OSError as error:
            self._give_up()
            raise WriteFailed(self._path, f"locking failed: {error.strerror}") from error
        except BaseException:
            self._give_up()
            raise
        if started:
            self._count_wait(started)

    def _poll(self, directory: int, started: float, timeout: float) -> None:
        # A blocking flock could not time out.
        deadline = started + timeout
        pause = FIRST_PAUSE
        try:
            while True:
                time.sleep(pause)
                try:
                    flock(directory, _TRY)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise self._timed_out(started, timeout) from None
                pause = min(2 * pause, LONGEST_PAUSE)
        except BaseException:
            self._give_up()
            raise

    def _count_wait(self, started: float) -> None:
        self.waits += 1
        self.wait_seconds += time.monotonic() - started

    def _give_up(self) -> None:
        self._held = False
        self._thread_lock.release()

    def release(self, directory: int) -> None:
        """Give both locks back."""
        try:
            # The line is written, so its writer must not be told otherwise. If the lock stayed, it
            # is still this descriptor's, and the next release is another attempt.
            with suppress(OSError):
                flock(directory, LOCK_UN)
        finally:
            self._held = False
            self._thread_lock.release()

    def _timed_out(self, started: float, timeout: float) -> LockTimeout:
        self._count_wait(started)
        return LockTimeout(self._path, f"the append lock was not free for {timeout:g} s")

    def refuse_reentry(self) -> None:
        """Raise ReentrantWrite in the thread that holds the locks."""
        if self._thread_lock.acquire(False):
            held = self._held
            self._thread_lock.release()
            if held:
                raise ReentrantWrite(self._path, "the log was closed from inside a write")

    def close(self) -> bool:
        """Let nobody in any more, once the holder has left; False if it was closed before.

        Waits for no other process: only this one's threads use the descriptor. Not to be called
        from inside a write (see `refuse_reentry`).
        """
        with self._thread_lock:
            first, self.closed = not self.closed, True
            return first

    def before_fork(self) -> None:
        """Keep all threads out, so that the child's copy of the log's state is a whole one."""
        self._thread_lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Let the threads in again."""
        self._thread_lock.release()
