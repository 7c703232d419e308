"""Every error that auditlog raises.

    AuditLogError
    ├── InvalidSetting      an option of a constructor makes no sense (also a ValueError)
    ├── InvalidEvent        an event cannot be written as it is (also a ValueError)
    ├── InvalidRange        the bounds of a read make no sense (also a ValueError)
    ├── DirectoryError      the audit log directory cannot be used
    ├── LoggerClosed        a write came after close()
    ├── WriteFailed         an event was not acknowledged
    │   ├── DiskFull        no space or no quota is left
    │   ├── SyncFailed      the kernel could not bring the lines to the disk
    │   ├── LockTimeout     another writer kept the append lock for too long
    │   └── ReentrantWrite  a write was attempted from inside a write
    ├── SweepBusy           another process is sweeping the directory
    ├── PositionError       a position cannot be resumed from
    │   ├── PositionExpired its day was swept: entries were missed
    │   └── PositionInvalid it is not the start of a line of this log
    ├── CorruptEntry        a stored line cannot be decoded
    ├── DestinationError    a destination did not take what is to be forwarded
    │   └── DestinationBusy another process forwards to it
    └── AccessDenied        a session may not read the audit log (also a PermissionError)

The constructor's arguments are the facts; each is an attribute, and the message is made from
them. So an error survives pickling, and a program never has to parse a message.
"""

from __future__ import annotations

from typing import Any


class AuditLogError(Exception):
    """The root: `except AuditLogError` catches everything that this package raises on purpose."""


class InvalidSetting(AuditLogError, ValueError):
    """An option was given a value that it cannot have. Correct the call."""

    def __init__(self, setting: str, value: object, reason: str) -> None:
        super().__init__(setting, value, reason)
        self.setting, self.value, self.reason = setting, value, reason

    def __str__(self) -> str:
        return f"{self.setting}={self.value!r}: {self.reason}"


class InvalidEvent(AuditLogError, ValueError):
    """The event was refused before a byte was written. Correct the field that `path` names.

    The message never holds the refused value, which may be a secret.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class InvalidRange(AuditLogError, ValueError):
    """The bounds of a read are no days or instants, or the end is before the start."""

    def __init__(self, start: object, end: object, reason: str) -> None:
        super().__init__(start, end, reason)
        self.start, self.end, self.reason = start, end, reason

    def __str__(self) -> str:
        return f"cannot read from {self.start!r} to {self.end!r}: {self.reason}"


class DirectoryError(AuditLogError):
    """The directory cannot hold or give an audit log. `remedy` says what to do about it."""

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"audit log directory {self.path}: {self.reason}; {self.remedy}"


class LoggerClosed(AuditLogError):
    """The logger was closed before this write. Close it only after the last event."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"the audit logger for {self.path} is closed; make a new one to write again"


class WriteFailed(AuditLogError):
    """The event is not acknowledged: the action that it records must not go on.

    A failed write leaves no line that could swallow a neighbour, and the next write works again
    as soon as the cause is gone. `positions` names the events of a `write_many` that are whole
    in the file all the same (a tuple of `Position`, in the order given).
    """

    remedy = "do not go on with the action; try again when the cause is gone"

    def __init__(self, path: str, reason: str, positions: tuple[Any, ...] = ()) -> None:
        super().__init__(path, reason, positions)
        self.path, self.reason, self.positions = path, reason, positions

    def __str__(self) -> str:
        written = f" ({len(self.positions)} of its events were written)" if self.positions else ""
        return f"audit log {self.path}: {self.reason}{written}; {self.remedy}"


class DiskFull(WriteFailed):
    """The file system or the quota is full."""

    remedy = "free space on the file system or shorten the retention, then try again"


class SyncFailed(WriteFailed):
    """The lines are in the file, but may not survive a power loss."""

    remedy = "check the disk (kernel log, SMART); whether the events survive a crash is unknown"


class LockTimeout(WriteFailed):
    """The append lock was not free within `lock_timeout`: a writer is stuck or stopped."""

    remedy = "look for a stopped process that has the directory open (fuser -v DIR)"


class ReentrantWrite(WriteFailed):
    """A signal or logging handler wrote an event while its thread was inside a write."""

    remedy = "write from the handler later, for example through a queue"


class SweepBusy(AuditLogError):
    """Another process holds the sweep lock. It does the same work; try again later."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"another process is sweeping {self.path}; try again when it is done"


class PositionError(AuditLogError):
    """A read cannot resume from `position`."""

    remedy = ""

    def __init__(self, position: Any, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason

    def __str__(self) -> str:
        return f"cannot resume at {self.position}: {self.reason}; {self.remedy}"


class PositionExpired(PositionError):
    """The position's day is gone: what followed it there can no longer be read."""

    remedy = "start again from Position.START and expect a gap"


class PositionInvalid(PositionError):
    """No line of this log starts at the position."""

    remedy = "check that it was taken from this directory and that no file was edited"


class CorruptEntry(AuditLogError):
    """The line at `position` is no event: damage, or something else wrote it."""

    def __init__(self, position: Any, reason: str) -> None:
        super().__init__(position, reason)
        self.position, self.reason = position, reason

    def __str__(self) -> str:
        return f"the line at {self.position} is no event: {self.reason}; entry.line has its bytes"


class DestinationError(AuditLogError):
    """A destination cannot be reached, or does not take what it is sent. Nothing is lost by that.

    `name` is the destination's. `retry_after`: how long it asked to be left alone, in seconds, or
    None. Look at the receiver; what it did not take is sent again.
    """

    remedy = "what it did not take is sent again"

    def __init__(self, name: str, reason: str, retry_after: float | None = None) -> None:
        super().__init__(name, reason, retry_after)
        self.name, self.reason, self.retry_after = name, reason, retry_after

    def __str__(self) -> str:
        return f"destination {self.name}: {self.reason}; {self.remedy}"


class DestinationBusy(DestinationError):
    """Another process forwards to the destination, and goes on from the position that this one would.

    Stop that one, or leave it the work.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "another process forwards to it")
        self.args = (name,)
        self.remedy = (
            f"stop that one, which `fuser` finds by .auditlog/forward/{name}.lock, or leave it the work"
        )


class AccessDenied(AuditLogError, PermissionError):
    """The session's role may not read the audit log; that it was tried is recorded.

    Answer with 403, or give the user one of `roles`.
    """

    def __init__(self, role: str, roles: tuple[str, ...]) -> None:
        super().__init__(role, roles)
        self.role, self.roles = role, roles

    def __str__(self) -> str:
        who = f"the role {self.role}" if self.role else "a session without a role"
        return f"{who} may not read the audit log; it takes {' or '.join(self.roles)}"
