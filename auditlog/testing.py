"""For tests, yours and ours: a clock that stands still, files that fail, a log to look at."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from .errors import InvalidSetting
from .logger import AuditLogger
from .query.reader import AuditReader
from .storage.entry import Entry
from .storage.files import Files


class FixedClock:
    """A clock that moves only when it is told to.

    `start`: an aware datetime. `advance` moves time on, as waiting would; `step` moves the wall
    clock alone, as an administrator or NTP would. Both take seconds or a timedelta.
    """

    def __init__(self, start: datetime) -> None:
        if start.utcoffset() is None:
            raise InvalidSetting("start", start, "needs a time zone")
        self._wall_ns = round(start.timestamp() * 1000) * 1_000_000
        self._boot_ns = 0

    def time_ns(self) -> int:
        """The wall clock."""
        return self._wall_ns

    def boottime_ns(self) -> int:
        """The time that was advanced so far."""
        return self._boot_ns

    def advance(self, by: float | timedelta) -> None:
        """Let time pass."""
        self.step(by)
        self._boot_ns += _nanoseconds(by)

    def step(self, by: float | timedelta) -> None:
        """Set the wall clock forward or back."""
        self._wall_ns += _nanoseconds(by)


def _nanoseconds(by: float | timedelta) -> int:
    seconds = by.total_seconds() if isinstance(by, timedelta) else by
    return round(seconds * 1e9)


class FailingFiles(Files):
    """File operations that fail on demand: a full disk, a broken one, a short write.

    `fail(operation, error)` makes calls of that operation (a method name of `Files`, such as
    "write" or "sync_data") raise OSError(error) until `heal`; `after` lets that many calls pass
    first, `times` fails that many only. `shorten(count)` makes the next write take only `count`
    bytes. `calls` counts the calls by operation.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self._failures: dict[str, list[int]] = {}
        self._short: int | None = None

    def fail(self, operation: str, error: int = errno.EIO, *, after: int = 0, times: int = 1 << 62) -> None:
        """Fail an operation from now on; see the class."""
        if not hasattr(Files, operation):
            raise InvalidSetting("operation", operation, "is no operation of Files")
        self._failures[operation] = [error, after, times]

    def shorten(self, count: int) -> None:
        """Let the next write take only its first `count` bytes."""
        self._short = count

    def heal(self) -> None:
        """Let everything work again."""
        self._failures.clear()
        self._short = None

    def __getattribute__(self, name: str) -> Any:
        operation = super().__getattribute__(name)
        if name.startswith("_") or name not in Files.__dict__:
            return operation
        return lambda *args: self._call(name, operation, args)

    def _call(self, name: str, operation: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        failure = self._failures.get(name)
        if failure is not None:
            error, after, times = failure
            if after > 0:
                failure[1] -= 1
            elif times > 0:
                failure[2] -= 1
                raise OSError(error, os.strerror(error))
        if name == "write" and self._short is not None:
            (fd, data), self._short = (args[0], args[1][: self._short]), None
            return operation(fd, data)
        return operation(*args)


class RecordedLog:
    """A logger in a directory of its own, and what was written to it.

    `audit` is the AuditLogger to hand to the code under test.
    """

    def __init__(self, directory: str, **options: Any) -> None:
        self.directory = directory
        self.audit = AuditLogger(directory, **({"fsync": "never", "retention": None} | options))

    @property
    def entries(self) -> list[Entry]:
        """The entries so far, oldest first."""
        return list(AuditReader(self.directory).read())

    @property
    def records(self) -> list[dict[str, Any]]:
        """The same as plain dicts."""
        return [entry.record for entry in self.entries]


@contextmanager
def recorded_log(**options: Any) -> Iterator[RecordedLog]:
    """A log in a temporary directory, for one test; `options` go to its AuditLogger.

    A real directory and a real logger, with `fsync="never"` and no sweeper unless asked for:

        with recorded_log() as log:
            server = Server(audit=log.audit)
            ...
            assert log.records[0]["event_type"] == "create"
    """
    with tempfile.TemporaryDirectory(prefix="auditlog-") as parent:
        log = RecordedLog(os.path.join(parent, "audit-log"), **options)
        try:
            yield log
        finally:
            log.audit.close()
