"""The lines of a day file, forwards and backwards, in constant memory.

A line that starts with `{` and ends with `}` and a newline is an entry; any other is damage and
goes to `damaged`, never to the reader's loop. A file's tail without a newline is not a line yet
in the newest file, and damage in any other.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from datetime import date

from ..events.limit import MAX_LINE_BYTES
from .entry import RAW_BYTES, CorruptLine, Entry
from .layout import Position

_BUFFER_BYTES = 1 << 20  # forwards: one read for many lines
_BLOCK_BYTES = 1 << 16  # backwards: a page of entries mostly needs one block

Damaged = Callable[[CorruptLine], None]


def forwards(fd: int, day: date, offset: int, newest: bool, damaged: Damaged) -> Iterator[Entry]:
    """The entries of an open day file from the line at `offset` on. Closes `fd`."""
    with open(fd, "rb", buffering=_BUFFER_BYTES) as file:
        file.seek(offset)
        readline = file.readline
        while line := readline(MAX_LINE_BYTES):
            # The hot loop of every read: indexing costs less than slicing or startswith.
            if line[-1] == 10 and line[0] == 123 and line[-2] == 125:
                entry = Entry()
                entry.line = line
                entry.day = day
                entry.offset = offset
                yield entry
                offset += len(line)
                continue
            length, ended = len(line), line[-1] == 10
            if length == MAX_LINE_BYTES:
                while not ended and (more := readline(_BUFFER_BYTES)):
                    length, ended = length + len(more), more[-1] == 10
            if not ended and newest:
                return
            damaged(corrupt(line[:RAW_BYTES], Position(day, offset), length, ended))
            offset += length


def backwards(fd: int, day: date, end: int | None, newest: bool, damaged: Damaged) -> Iterator[Entry]:
    """The entries of an open day file before offset `end` (None: all), last first. Closes `fd`."""
    try:
        end = os.lseek(fd, 0, os.SEEK_END) if end is None else end
        size = _BLOCK_BYTES
        while end > 0:
            begin = max(0, end - size)
            block = os.pread(fd, end - begin, begin)
            if len(block) < end - begin:
                end = begin + len(block)  # somebody truncated the file meanwhile
                continue
            # Where the first whole line of the block starts; a newline at its end is no start.
            first = 0 if begin == 0 else block.find(b"\n", 0, len(block) - 1) + 1
            if begin > 0 and first == 0:
                if size <= MAX_LINE_BYTES:
                    size *= 2  # a long line: read it again, and more of it
                    continue
                first = _line_start(fd, begin) - begin
                lines = [os.pread(fd, RAW_BYTES, begin + first)]
                lengths = [end - begin - first]
            else:
                lines = io.BytesIO(block[first:]).readlines()
                lengths = [len(line) for line in lines]
            at = end
            ended = block[-1] == 10
            for line, length in zip(reversed(lines), reversed(lengths), strict=True):
                at -= length
                if line[0] == 123 and line[-2:] == b"}\n" and length <= MAX_LINE_BYTES:
                    entry = Entry()
                    entry.line = line
                    entry.day = day
                    entry.offset = at
                    yield entry
                elif ended or not newest:
                    damaged(corrupt(line[:RAW_BYTES], Position(day, at), length, ended))
                ended = True
            end = begin + first
            size = _BLOCK_BYTES
    finally:
        os.close(fd)


def starts_line(fd: int, offset: int) -> bool:
    """Does a line start at `offset` of an open day file?"""
    if offset >= os.lseek(fd, 0, os.SEEK_END):
        return False
    return offset == 0 or os.pread(fd, 1, offset - 1) == b"\n"


def line_length(fd: int, offset: int) -> int:
    """The length of the line at `offset`, with its newline if it has one."""
    end = offset
    while block := os.pread(fd, _BLOCK_BYTES, end):
        newline = block.find(b"\n")
        if newline >= 0:
            return end + newline + 1 - offset
        end += len(block)
    return end - offset


def last_line(fd: int) -> tuple[int, int] | None:
    """Where the last line of an open day file starts and ends; None where there is none yet."""
    end = _line_start(fd, os.lseek(fd, 0, os.SEEK_END))
    return (_line_start(fd, end - 1), end) if end else None


def _line_start(fd: int, end: int) -> int:
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def corrupt(raw: bytes, position: Position, length: int, ended: bool) -> CorruptLine:
    """The report of a line that is no entry; `raw` are its first bytes."""
    if not ended:
        reason = "it ends without a newline, in a day that is over"
    elif length > MAX_LINE_BYTES:
        reason = f"it is longer than {MAX_LINE_BYTES} bytes"
    elif raw[:1] != b"{":
        reason = "it does not start with {"
    else:
        reason = "it does not end with }"
    return CorruptLine(position, raw, length, reason)
