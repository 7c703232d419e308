"""A clock that several processes share: the machine's, moved by what a file says."""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path


class SharedClock:
    """Real time plus an offset in a memory-mapped file, so that a test can force a day change."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(struct.pack("q", 0))
        with path.open("r+b") as file:
            self._offset = mmap.mmap(file.fileno(), 8)

    def time_ns(self) -> int:
        offset: int = struct.unpack("q", self._offset[:8])[0]
        return time.time_ns() + offset

    def boottime_ns(self) -> int:
        return time.monotonic_ns()

    def move(self, nanoseconds: int) -> None:
        """Move the clock of all processes."""
        self._offset[:8] = struct.pack("q", nanoseconds)
