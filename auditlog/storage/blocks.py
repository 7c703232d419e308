"""Runs of whole entries, a block at a time: for readers that look at bytes before they look at lines.

Finding a text in a block, and counting in it, is many times as fast with stringzilla, which uses the
vector instructions of the processor; without it everything works the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import date
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from ..events.limit import MAX_LINE_BYTES
from .entry import RAW_BYTES, Entry
from .layout import Position
from .lines import Damaged, corrupt

_BLOCK_BYTES = 1 << 20


class _Search(Protocol):
    def __call__(self, text: bytearray, wanted: bytes, start: int = ..., end: int = ..., /) -> int: ...


try:
    _search: Any = import_module("stringzilla")
except ImportError:
    _search = bytearray
count: _Search = _search.count
find: _Search = _search.find


class Run(NamedTuple):
    """Entries that follow each other: `buffer[start:end]`, from `offset` in the day file on.

    The buffer is used again for the next run.
    """

    buffer: bytearray
    start: int
    end: int
    day: date
    offset: int

    def length(self) -> int:
        """How many entries it has."""
        return count(self.buffer, b"\n", self.start, self.end)

    def last_position(self) -> Position:
        """Where the last entry starts."""
        start = max(self.buffer.rfind(b"\n", self.start, self.end - 1) + 1, self.start)
        return Position(self.day, self.offset + start - self.start)

    def entry(self, start: int, end: int) -> Entry:
        """The entry at these bounds of the buffer."""
        entry = Entry()
        entry.line = bytes(self.buffer[start:end])
        entry.day = self.day
        entry.offset = self.offset + start - self.start
        return entry


def entry_runs(fd: int, day: date, offset: int, newest: bool, damaged: Damaged) -> Iterator[Run]:
    """The entries of an open day file from the line at `offset` on, in runs. Closes `fd`.

    What is an entry, and what damage, is as in `lines.forwards`.
    """
    try:
        buffer = bytearray(_BLOCK_BYTES)
        kept = 0  # bytes of a line whose end was not read yet
        while True:
            if kept == len(buffer):
                if kept < MAX_LINE_BYTES:
                    buffer = buffer + bytearray(min(kept, MAX_LINE_BYTES - kept))
                else:
                    length, ended = _long_line(fd, offset, kept)
                    if not ended and newest:
                        return
                    damaged(corrupt(bytes(buffer[:RAW_BYTES]), Position(day, offset), length, ended))
                    offset, kept = offset + length, 0
            read = os.preadv(fd, [memoryview(buffer)[kept:]], offset + kept)
            if read == 0:
                if kept and not newest:
                    raw = bytes(buffer[: min(kept, RAW_BYTES)])
                    damaged(corrupt(raw, Position(day, offset), kept, ended=False))
                return
            filled = kept + read
            end = buffer.rfind(b"\n", kept, filled) + 1
            if end:
                yield from _runs(Run(buffer, 0, end, day, offset), damaged)
            kept = filled - end
            buffer[:kept] = buffer[end:filled]
            offset += end
    finally:
        os.close(fd)


def _long_line(fd: int, offset: int, length: int) -> tuple[int, bool]:
    """The length of a line, of which so much has no newline, and whether it has one at all."""
    while block := os.pread(fd, _BLOCK_BYTES, offset + length):
        newline = block.find(b"\n")
        if newline >= 0:
            return length + newline + 1, True
        length += len(block)
    return length, False


def _runs(lines: Run, damaged: Damaged) -> Iterator[Run]:
    """The runs of entries among some lines, which together are `lines`."""
    buffer, _, end, day, offset = lines
    # All are entries if every newline but the last stands between "}" and "{".
    if (
        buffer[0] == 123
        and buffer[end - 2] == 125
        and count(buffer, b"}\n{", 0, end) + 1 == count(buffer, b"\n", 0, end)
    ):
        yield lines
        return
    start = at = 0
    while at < end:
        behind = buffer.find(b"\n", at, end) + 1
        if buffer[at] != 123 or buffer[behind - 2] != 125:
            if at > start:
                yield Run(buffer, start, at, day, offset + start)
            raw = bytes(buffer[at : min(behind, at + RAW_BYTES)])
            damaged(corrupt(raw, Position(day, offset + at), behind - at, ended=True))
            start = behind
        at = behind
    if at > start:
        yield Run(buffer, start, at, day, offset + start)
