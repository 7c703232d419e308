"""A file that says how far a consumer of the log has come."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..storage.files import Files
from ..storage.layout import Position
from .app import POSITION_FILE, Ended

_BYTES = 100  # more than any position


class PositionFile:
    """The position behind which a run of the command begins, and how far it has come.

    It is replaced as a whole, so that a run that is killed leaves the old one or the new one; never
    ahead of what was printed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = Files()
        self._reached: Position | None = None
        self._written: Position | None = None

    def read(self) -> Position | None:
        """The position in the file; None where there is no file yet."""
        try:
            with self._directory() as directory:
                content = self._content(directory)
            if content is not None:
                self._reached = self._written = Position.parse(content.decode("ascii").strip())
        except (OSError, ValueError) as error:
            raise Ended(f"the position file {self._path} cannot be used: {error}", POSITION_FILE) from None
        return self._reached

    @contextmanager
    def _directory(self) -> Iterator[int]:
        directory = self._files.open_directory(str(self._path.parent))
        try:
            yield directory
        finally:
            os.close(directory)

    def _content(self, directory: int) -> bytes | None:
        try:
            fd = self._files.open_read(directory, self._path.name)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("it is no regular file")
            return os.pread(fd, _BYTES, 0)
        finally:
            os.close(fd)

    def reached(self, position: Position, *, written: bool = True) -> None:
        """Everything up to this position was printed (`written`: and flushed)."""
        self._reached = position
        if written:
            self.write()

    def write(self) -> None:
        """Say in the file how far the run has come."""
        if self._reached is None or self._reached == self._written:
            return
        try:
            with self._directory() as directory:
                self._files.replace(directory, self._path.name, f"{self._reached}\n".encode())
        except OSError as error:
            raise Ended(f"the position file {self._path} cannot be written: {error}", POSITION_FILE) from None
        self._written = self._reached
