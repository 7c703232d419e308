"""Equal access events as one line: the first at once, its repeats as a count.

A window begins with an event that was written. Equal events within it are counted, and when it
has ended, one line says how many they were, and when the first and the last. A crash costs the
counts of the windows that were open, nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from .events.codec import Encoded, decode, line_at
from .events.model import Event, EventType
from .events.payloads import AuditFacts
from .storage.layout import Position

COALESCED = frozenset({EventType.K8S_ACCESS.value, EventType.TALOS_ACCESS.value})
# What is more, or longer, is written as it comes.
MOST_WINDOWS = 10_000  # open at once
LONGEST_LINE = 4096  # bytes


@dataclass(slots=True)
class Window:
    """An event that was written, and how often it was repeated since."""

    line: bytes
    position: Position
    began_ms: int
    count: int = 0
    first_ms: int = 0
    last_ms: int = 0

    def summary(self) -> Event:
        """The event that stands for the repeats: the first one once more, with their count and times."""
        event = decode(self.line)
        facts = (event.event_data.audit or AuditFacts()).model_copy(
            update={
                "count": self.count,
                "first_ts": self.first_ms,
                "last_ts": self.last_ms,
                "request_id": "",  # each of them had its own
            }
        )
        data = event.event_data.model_copy(update={"audit": facts})
        return event.model_copy(update={"event_data": data, "event_ts": 0})


class Coalescer:
    """Counts the repeats of an access event for `window_ms` (milliseconds).

    `_lock` protects the windows; it is held for moments, and nothing is taken inside. It is
    re-entrant for signal handlers.
    """

    def __init__(self, window_ms: int) -> None:
        self._window_ms = window_ms
        self._lock = threading.RLock()
        self._open: dict[bytes, Window] = {}
        self._ended: list[Window] = []  # with repeats, to be told
        self._closed = False

    @staticmethod
    def key(encoded: Encoded, request_id: str) -> bytes:
        """What equal events have in common: all but time and request. b"" for one that brings its time."""
        head, event_ts, tail = encoded
        if request_id:
            tail = tail.replace(b'"request_id":"%b"' % request_id.encode(), b"")
        return b"" if event_ts else sha256(head + tail).digest()

    def repeat(self, key: bytes, now_ms: int) -> Position | None:
        """Count an event whose like was written in an open window, and return that one's position."""
        with self._lock:
            window = self._open.get(key)
            if window is None:
                return None
            if not self._covers(window, now_ms):
                self._end(key)
                return None
            window.count += 1
            window.first_ms = window.first_ms or now_ms
            window.last_ms = now_ms
            return window.position

    def opened(self, key: bytes, encoded: Encoded, position: Position, now_ms: int) -> None:
        """An event is in the file: its like is counted from now on."""
        line = line_at(encoded, now_ms)
        with self._lock:
            has_room = len(self._open) < MOST_WINDOWS and len(line) <= LONGEST_LINE
            if has_room and key not in self._open and not self._closed:
                self._open[key] = Window(line, position, now_ms)

    def tell(self, now_ms: int, write: Callable[[Event], Position | None]) -> int:
        """Write the sum of each window that has ended; returns how many repeats are still untold.

        What `write` returns no position for is told by the next call.
        """
        with self._lock:
            for key, window in list(self._open.items()):
                if not self._covers(window, now_ms):
                    self._end(key)
            ended, self._ended = self._ended, []
        while ended and write(ended[0].summary()):
            del ended[0]
        with self._lock:
            self._ended += ended
        return sum(window.count for window in ended)

    def close(self) -> None:
        """End all windows, and open no more: nothing is counted any longer."""
        with self._lock:
            self._closed = True
            for key in list(self._open):
                self._end(key)

    def _covers(self, window: Window, now_ms: int) -> bool:
        return 0 <= now_ms - window.began_ms < self._window_ms  # not after a clock that stepped back

    def _end(self, key: bytes) -> None:
        window = self._open.pop(key)
        if window.count:
            self._ended.append(window)
