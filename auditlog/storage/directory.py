"""An audit log directory: opening it safely, its day files, and what it remembers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date, tzinfo
from typing import Any, Self

import orjson

from ..errors import DirectoryError
from .days import load_zone
from .files import Files, is_full
from .layout import (
    STATE_DIRECTORY,
    STATE_FILE,
    Position,
    day_file_name,
    parse_day,
    parse_day_file_name,
)

_STATE = f"{STATE_DIRECTORY}/{STATE_FILE}"
_STATE_BYTES = 1 << 16  # far more than we ever write there
_ALLOW = "accept with allow_shared_directory=True what docs/security.md says of it"


@dataclass(frozen=True, slots=True)
class State:
    """What a directory remembers beside its day files (`.auditlog/state`, a JSON object).

    `timezone`: the zone in which its first writer began days. `swept_through`: the newest day
    that a sweep has removed, `swept_end`: its last line. `other`: what a later version remembers,
    kept as it is.
    """

    timezone: str | None = None
    swept_through: date | None = None
    swept_end: Position | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read what `encode` wrote. Raises ValueError for anything else."""
        other = orjson.loads(content)
        if not isinstance(other, dict):
            raise ValueError("no JSON object")
        timezone, swept, end = (other.pop(name, None) for name in ("timezone", "swept_through", "swept_end"))
        swept_through = parse_day(swept) if isinstance(swept, str) else None
        swept_end = Position.parse(end) if isinstance(end, str) else None
        if not isinstance(timezone, str | None) or (swept is not None and swept_through is None):
            raise ValueError("a field has a wrong value")
        return cls(timezone, swept_through, swept_end, other)

    def encode(self) -> bytes:
        """One line of JSON, without what is None."""
        end = None if self.swept_end is None else str(self.swept_end)
        known = {"timezone": self.timezone, "swept_through": self.swept_through, "swept_end": end}
        fields = {name: value for name, value in known.items() if value is not None}
        return orjson.dumps(fields | self.other, option=orjson.OPT_APPEND_NEWLINE)


class Directory:
    """An open audit log directory. Names are looked up below its descriptor, never by path.

    `create` makes a missing directory (mode 0700) and checks that we, and with `allow_shared` not
    only we, may write into it; a reader needs no more than read permission. Raises
    DirectoryError, which names path and remedy.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        files: Files,
        *,
        create: bool = False,
        allow_shared: bool = False,
    ) -> None:
        self.path = os.path.abspath(path)
        self._files = files
        with self.refusing():
            if create:
                files.make_directory(self.path)
            self.fd = files.open_directory(self.path)
        if not create:
            return
        try:
            if not allow_shared:
                self._check_ours(self.fd, self.path)
            below = self.open_state_directory()
            try:
                self._check_ours(below, os.path.join(self.path, STATE_DIRECTORY), allow_shared)
            finally:
                self._close(below)
        except DirectoryError:
            self.close()
            raise

    def _check_ours(self, fd: int, path: str, shared: bool = False) -> None:
        """Whoever else may write here could put a file of his in the next day's place."""
        with self.refusing():
            found = self._files.stat(fd)
        if found.st_uid != os.geteuid():
            raise DirectoryError(
                path,
                f"it belongs to user {found.st_uid}, not to user {os.geteuid()} that wants to write",
                f"give it to the writing user (chown), run as its owner, or {_ALLOW}",
            )
        if not shared and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise DirectoryError(
                path,
                f"others than its owner may write there (mode {stat.S_IMODE(found.st_mode):04o})",
                f"take that right from them (chmod go-w), or {_ALLOW}",
            )

    def stat_in_place(self) -> os.stat_result:
        """The stat of the directory. Raises DirectoryError where its path leads elsewhere by now."""
        found = self._files.stat(self.fd)
        try:
            there = os.stat(self.path)
        except PermissionError:  # the server gave up rights after it opened the log
            return found
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if there is None or not os.path.samestat(found, there):
            raise DirectoryError(
                self.path,
                "the directory was moved away or replaced while it was written",
                "move it back, or restart the server to begin a new one",
            )
        return found

    @contextmanager
    def refusing(self, what: str = "") -> Iterator[None]:
        """Raise DirectoryError instead of OSError; `what` could not be done, where that is not plain."""
        try:
            yield
        except OSError as error:
            reason = what + (error.strerror or str(error)).lower()
            remedies: dict[type[OSError], str] = {
                FileNotFoundError: "create it, or correct the path",
                NotADirectoryError: "name a directory, not a file",
                PermissionError: "give this user the right to read and write there",
            }
            remedy = remedies.get(type(error), "check the path and the file system")
            if is_full(error):
                remedy = "free space on the file system"
            raise DirectoryError(self.path, reason, remedy) from error

    def close(self) -> None:
        """Close the descriptor."""
        self._close(self.fd)

    def _close(self, fd: int) -> None:
        with suppress(OSError):  # nothing was written through it
            self._files.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def days(self) -> list[date]:
        """The days that have a file, oldest first. Stray names are passed over."""
        with self.refusing():
            days = (parse_day_file_name(name) for name in self._files.names(self.fd))
            return sorted(day for day in days if day is not None)

    def has_file(self, day: date) -> bool:
        """Does a regular file stand in the day's place?"""
        found = self.stat_day(day)
        return found is not None and stat.S_ISREG(found.st_mode)

    def stat_day(self, day: date) -> os.stat_result | None:
        """The stat of what stands in a day file's place, links not followed; None if nothing."""
        try:
            return os.stat(day_file_name(day), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_day(self, day: date) -> int | None:
        """Open a day file for reading. None where it is gone, or is no regular file."""
        try:
            fd = self._files.open_read(self.fd, day_file_name(day))
        except FileNotFoundError:
            return None
        except OSError:
            found = self.stat_day(day)
            if found is not None and not stat.S_ISREG(found.st_mode):
                return None  # a link (ELOOP) or a socket (ENXIO)
            raise
        if stat.S_ISREG(self._files.stat(fd).st_mode):
            return fd
        self._files.close(fd)
        return None

    def read_state(self) -> State:
        """What the directory remembers; nothing, where no writer was here yet."""
        with self.refusing(f"{_STATE} cannot be read: "):
            try:
                content = self._read_state_file()
            except FileNotFoundError:
                return State()
        try:
            return State.parse(content)
        except ValueError:
            remedy = f'make {_STATE} a plain file with {{"timezone":"UTC"}} in it, or the zone of the log'
            raise DirectoryError(self.path, f"{_STATE} is damaged", remedy) from None

    def zone(self) -> tzinfo:
        """The zone of the log's days: the one that its first writer recorded, else UTC."""
        return load_zone(self.read_state().timezone or "UTC")[1]

    def open_state_directory(self) -> int:
        """Open `.auditlog`, and create it where it is missing."""
        with self.refusing():
            return self._files.open_subdirectory(self.fd, STATE_DIRECTORY)

    def _read_state_file(self) -> bytes:
        below = self._files.open_directory(STATE_DIRECTORY, self.fd)
        try:
            fd = self._files.open_read(below, STATE_FILE)
        finally:
            self._close(below)
        try:
            return self._files.read(fd, _STATE_BYTES, 0)
        finally:
            self._close(fd)

    def update_state(self, **changes: Any) -> None:
        """Change what the directory remembers, durably. The caller holds the append lock."""
        content = replace(self.read_state(), **changes).encode()
        with self.refusing(f"{_STATE} cannot be written: "):
            below = self.open_state_directory()
            try:
                self._files.replace(below, STATE_FILE, content)
            finally:
                self._close(below)
