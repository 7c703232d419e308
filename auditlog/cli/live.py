"""Messages on standard error, and on a terminal a status line below them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TextIO

from ..events.visible import visible
from .text import fit


class StatusLine(logging.Handler):
    """Prints log messages, each with its time, and draws a line below them where the stream is a terminal.

    Nothing in a message or in the line speaks to the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self.is_terminal = stream.isatty()
        self._stream = stream
        self._shown = ""

    @property
    def columns(self) -> int:
        """How wide the line may be."""
        with suppress(OSError, ValueError):
            return (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
        return 79

    def show(self, text: str) -> None:
        """Draw the line anew."""
        if self.is_terminal and self.lock:
            with self.lock:
                self._shown = fit(visible(text), self.columns)
                self._print(f"\r{self._shown}")

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message, above the line."""
        lines = self.format(record)
        if self._shown:
            lines = f"\r{' ' * self.columns}\r{lines}\n{self._shown}"
            self._print(lines)
        else:
            self._print(f"{lines}\n")

    def format(self, record: logging.LogRecord) -> str:
        """A line, and the traceback below it where there is one."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines = [f"{time} {record.levelname.lower():7} {visible(record.getMessage())}"]
        if record.exc_info:
            traceback = logging.Formatter().formatException(record.exc_info)
            lines += [f"    {visible(line)}" for line in traceback.splitlines()]
        return "\n".join(lines)

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more
            self._stream.write(text)
            self._stream.flush()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Print what this package logs. At the end, what the line said stays."""
        logger = logging.getLogger("auditlog")
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            if self._shown:
                self._print("\n")
