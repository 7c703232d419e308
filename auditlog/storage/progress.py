"""How far each destination of the log has come: a file for each, and a lock, below `.auditlog/forward`."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from fcntl import LOCK_NB, LOCK_SH, flock
from importlib import import_module
from typing import Self

import orjson

from ..errors import DirectoryError
from .directory import Directory
from .files import Files
from .layout import FORWARD_DIRECTORY, STATE_DIRECTORY, Position, is_destination_name

LOCK_SUFFIX = ".lock"
_BYTES = 1 << 20  # far more than any of these files has
_MOST_SWEPT = 20
_LOOK_SECONDS = 0.01


@dataclass(slots=True)
class Progress:
    """How far a destination has come, as its file has it (one JSON object).

    position: a new run resumes behind it; sha256: the first digits of that line's. sent_through: the last
    line that was handed over; ahead of `position` where a new run would send some again. in_flight: how many
    lines were about to be sent when the file was written, where none is ever sent twice.
    sent, cut, rejected, lost, damaged: messages that were handed over (the repeated ones, too); that were
    cut because they did not fit; that the receiver refused for good; that did not arrive, or perhaps did not;
    stored lines that are no events. reconnects: connections made after the first.
    taken: the last entry that the receiver acknowledged, where it does that.
    begins_with: the oldest entry when forwarding began; a sweep that takes it before anything was sent is
    noticed by that.
    swept: the newest ranges of positions (from, to) that a sweep removed before they were sent.
    last_error, last_error_ms: why the last attempt failed, and when ("" and 0: none did).
    failing: whether nothing was handed over since.
    """

    endpoint: str = ""
    position: Position = Position.START
    sha256: str = ""
    sent_through: Position = Position.START
    in_flight: int = 0
    sent: int = 0
    cut: int = 0
    rejected: int = 0
    lost: int = 0
    damaged: int = 0
    reconnects: int = 0
    taken: Position = Position.START
    begins_with: Position = Position.START
    swept: list[tuple[str, str]] = field(default_factory=list)
    last_error: str = ""
    last_error_ms: int = 0
    failing: bool = False

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read what `encode` wrote. Raises ValueError for anything else."""
        stored = orjson.loads(content)
        if not isinstance(stored, dict):
            raise ValueError("no JSON object")
        progress = cls()
        for each in fields(cls):
            if each.name not in stored:
                continue
            value, default = stored[each.name], getattr(progress, each.name)
            if isinstance(default, Position):
                value = Position.parse(value) if isinstance(value, str) else None
            if type(value) is not type(default):
                raise ValueError(f"{each.name} has a wrong value")
            setattr(progress, each.name, value)
        if not all(isinstance(each, list) and len(each) == 2 for each in progress.swept):
            raise ValueError("swept has a wrong value")
        progress.swept = [(str(first), str(last)) for first, last in progress.swept]
        return progress

    def encode(self) -> bytes:
        """One line of JSON."""
        stored = asdict(self)
        positions = {name: str(value) for name, value in stored.items() if isinstance(value, Position)}
        return orjson.dumps(stored | positions, option=orjson.OPT_APPEND_NEWLINE)

    def take_over(self, stored: Progress) -> None:
        """Go on from what an earlier run has stored."""
        for each in fields(self):
            setattr(self, each.name, getattr(stored, each.name))
        # That run died before it could say what became of these.
        self.lost += self.in_flight
        self.in_flight = 0

    def note_swept(self, first: Position, last: Position) -> bool:
        """Remember a range that was swept before it was sent; False where it is known.

        A destination that stays away loses more from the same position on: that is one range.
        """
        found, known = (str(first), str(last)), self.swept[-1:]
        if found in known:
            return False
        others = self.swept[:-1] if known and known[0][0] == found[0] else self.swept
        self.swept = [*others, found][-_MOST_SWEPT:]
        return True


class Place:
    """Where one destination's progress is kept, and the lock of whoever forwards to it.

    The lock is a file of its own, as the progress is replaced whole with every change.
    """

    def __init__(self, directory: str, name: str, files: Files) -> None:
        self._path = os.path.abspath(directory)
        self._name = name
        self._files = files
        self._locked = -1
        # Here and not when it is locked, which a thread does: see RetentionSweeper.
        self._filelock = import_module("filelock")

    def read(self) -> Progress | None:
        """What is stored; None where nothing is. Raises DirectoryError where it cannot be read."""
        with self._below() as (directory, below):
            return _read(directory, below, self._name, self._files)

    def write(self, progress: Progress) -> None:
        """Store the progress, durably and as a whole. Raises DirectoryError."""
        with self._below() as (directory, below), directory.refusing(f"{self._name} cannot be written: "):
            self._files.replace(below, self._name, progress.encode())

    def lock(self) -> bool:
        """Be the one who forwards to the destination; False while somebody else is."""
        if self._try_lock():
            return True
        time.sleep(_LOOK_SECONDS)  # it may have been somebody who looked whether it is locked
        return self._try_lock()

    def _try_lock(self) -> bool:
        name = self._name + LOCK_SUFFIX
        with self._below() as (directory, below), directory.refusing(f"{name} cannot be locked: "):
            with suppress(FileExistsError):
                self._files.close(self._files.create_append(below, name))
            fd = self._files.open_append(below, name)
            try:
                if self._filelock.lock_descriptor(fd, blocking=False):
                    # Whoever removed the file meanwhile let somebody else lock a new one.
                    there = os.stat(name, dir_fd=below, follow_symlinks=False)
                    if os.path.samestat(there, self._files.stat(fd)):
                        self._locked, fd = fd, -1
                        self._clear(below)
                        return True
            except FileNotFoundError:
                pass
            finally:
                if fd >= 0:
                    self._files.close(fd)
            return False

    def _clear(self, below: int) -> None:
        """Remove what others left that died while they wrote; there is nobody else who may write."""
        is_left = re.compile(rf"{re.escape(self._name)}\.\d+\.new", re.ASCII)
        for name in self._files.names(below):
            if is_left.fullmatch(name):
                with suppress(FileNotFoundError):
                    self._files.remove(below, name)

    def unlock(self) -> None:
        """Let somebody else forward to it."""
        if self._locked >= 0:
            fd, self._locked = self._locked, -1
            # Not by closing alone: a child that was forked meanwhile may have the descriptor, too.
            self._filelock.unlock_descriptor(fd)
            self._files.close(fd)

    def leave_to_parent(self) -> None:
        """In a forked child: the lock is the parent's, and is gone when the parent is."""
        if self._locked >= 0:
            fd, self._locked = self._locked, -1
            self._files.close(fd)

    @contextmanager
    def _below(self) -> Iterator[tuple[Directory, int]]:
        with (
            Directory(self._path, self._files) as directory,
            directory.refusing(),
            _open_below(directory, self._files, create=True) as below,
        ):
            yield directory, below


@contextmanager
def _open_below(directory: Directory, files: Files, *, create: bool = False) -> Iterator[int]:
    """Open `.auditlog/forward`. Raises FileNotFoundError where it is not there, unless it may be made."""
    open_one = files.open_subdirectory if create else _open_existing(files)
    state = open_one(directory.fd, STATE_DIRECTORY)
    try:
        below = open_one(state, FORWARD_DIRECTORY)
    finally:
        files.close(state)
    try:
        yield below
    finally:
        files.close(below)


def _open_existing(files: Files) -> Callable[[int, str], int]:
    return lambda parent, name: files.open_directory(name, parent)


def read_all(path: str, files: Files) -> dict[str, Progress]:
    """The progress of every destination of a log, by name. Raises DirectoryError."""
    with Directory(path, files) as directory:
        return of_directory(directory, files)


def of_directory(directory: Directory, files: Files) -> dict[str, Progress]:
    """The same of an open directory."""
    found = {}
    with directory.refusing(), suppress(FileNotFoundError), _open_below(directory, files) as below:
        for name in sorted(filter(is_destination_name, files.names(below))):
            progress = _read(directory, below, name, files)
            if progress is not None:
                found[name] = progress
    return found


def is_locked(path: str, name: str, files: Files) -> bool:
    """Does anybody forward to the destination of that name? Raises DirectoryError."""
    name += LOCK_SUFFIX
    with Directory(path, files) as directory, directory.refusing(f"{name} cannot be read: "):
        with suppress(FileNotFoundError), _open_below(directory, files) as below:
            fd = files.open_read(below, name)
            try:
                # Shared, so that two who ask do not take each other for one who forwards.
                flock(fd, LOCK_SH | LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                files.close(fd)
        return False


def _read(directory: Directory, below: int, name: str, files: Files) -> Progress | None:
    path = f"{STATE_DIRECTORY}/{FORWARD_DIRECTORY}/{name}"
    with directory.refusing(f"{path} cannot be read: "):
        try:
            fd = files.open_read(below, name)
        except FileNotFoundError:
            return None
        try:
            content = files.read(fd, _BYTES, 0) if stat.S_ISREG(files.stat(fd).st_mode) else b""
        finally:
            files.close(fd)
    try:
        return Progress.parse(content)
    except ValueError as error:
        remedy = f"correct it, or remove it to forward everything that is retained again: {path}"
        raise DirectoryError(directory.path, f"{path} is damaged ({error})", remedy) from None


def oldest_needed(directory: Directory, files: Files) -> date | None:
    """The oldest day of which some destination was not sent all; None where there is no destination."""
    found = of_directory(directory, files).values()
    return min((max(each.position, each.sent_through).day for each in found), default=None)
