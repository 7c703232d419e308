"""Reading on as entries are written, for threads and for event loops."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Self

from ..errors import PositionExpired
from ..storage.entry import Entry
from ..storage.layout import Position
from ..storage.tail import Tail

if TYPE_CHECKING:
    import asyncio

# A write is seen within the longest pause. A look costs some 20 us: next to nothing, 20 times a second.
SHORTEST_PAUSE = 0.001
LONGEST_PAUSE = 0.05
_BATCH = 256  # entries of a look,
_BATCH_BYTES = 1 << 20  # or so many bytes of them, and then one more

Choose = Callable[[Entry], bool]


class _Following:
    """What both followers do: look for more, and say how far they are."""

    def __init__(self, tail: Tail, choose: Choose) -> None:
        self.position = tail.position
        self._tail = tail
        self._choose = choose
        self._entries = tail.read()
        self._seen: deque[tuple[Position, Entry | None]] = deque()  # and not handed on yet
        self._pause = SHORTEST_PAUSE
        self._closed = self._released = False
        # Held during a look, which may be in a thread that nobody waits for any more (a task was
        # cancelled): no file is closed under it.
        self._looking = threading.Lock()

    @property
    def at_hand(self) -> bool:
        """Was the next entry read already, so that it comes without a wait?"""
        return any(entry is not None for _, entry in self._seen)

    def _next_seen(self) -> Entry | None:
        while self._seen:
            self.position, entry = self._seen.popleft()
            if entry is not None:
                return entry
        return None

    def _look(self) -> float:
        """See what is there by now; return how long to wait before the next look."""
        with self._looking:
            try:
                return 0.0 if self._closed else self._look_again()
            finally:
                if self._closed:  # meanwhile, by a signal handler or by what is told of damage
                    self._release()

    def _look_again(self) -> float:
        room, full = _BATCH_BYTES, False
        try:
            for entry in islice(self._entries, _BATCH):
                self._seen.append((entry.position, entry if self._choose(entry) else None))
                room -= len(entry.line)
                if room < 0:
                    full = True
                    break
        except PositionExpired:
            if not self._seen:
                raise
            self._entries = self._tail.read()  # which raises it again, once what was read is handed on
            return 0.0
        if full or len(self._seen) == _BATCH:
            return 0.0
        self._entries = self._tail.read()
        if self._seen:
            self._pause = SHORTEST_PAUSE
            return 0.0
        self._seen.append((self._tail.position, None))  # damage is passed, too
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause

    def abandon(self) -> None:
        """End the loop, and close all files, as soon as nobody looks at them."""
        self._closed = True
        if self._looking.acquire(blocking=False):  # else whoever looks closes, and nobody waits for it
            try:
                self._release()
            finally:
                self._looking.release()

    def _release(self) -> None:
        if not self._released:
            self._released = True
            self._entries.close()
            self._tail.close()


class Follower(_Following, Iterator[Entry]):
    """The entries of a log behind a position: those that are there, and those that are yet to come.

    `position`: where to resume (`after=`), known before the first entry. It moves with entries
    that the filter passes over, too. The loop ends when `stop` is set or `close` was called; one
    thread at a time.
    """

    def __init__(self, tail: Tail, choose: Choose, stop: threading.Event | None) -> None:
        super().__init__(tail, choose)
        self._stop = stop or threading.Event()

    def __next__(self) -> Entry:
        """The next entry, when there is one. Raises PositionExpired where one was missed."""
        while not (self._closed or self._stop.is_set()):
            if (entry := self._next_seen()) is not None:
                return entry
            if pause := self._look():
                self._stop.wait(pause)
        self.abandon()
        raise StopIteration

    def take(self, timeout: float) -> list[Entry]:
        """All entries that are at hand: up to 256 of them, or 1 MiB and one more.

        Waits up to `timeout` seconds for the first. None come when `stop` is set, or after `close`. The
        follower's `position` is behind them. Raises PositionExpired where one was missed.
        """
        deadline = time.monotonic() + timeout
        while not (self._closed or self._stop.is_set()):
            if self._seen:
                entries = [entry for _, entry in self._seen if entry is not None]
                self.position = self._seen[-1][0]
                self._seen.clear()
                if entries:
                    return entries
            if pause := self._look():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._stop.wait(min(pause, left))
        return []

    def close(self) -> None:
        """End the loop, and close all files. A second call does nothing."""
        self.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.abandon()


class AsyncFollower(_Following, AsyncIterator[Entry]):
    """A Follower for `async for`. Files are read in a thread, and the event loop goes on meanwhile."""

    def __init__(self, tail: Tail, choose: Choose, stop: asyncio.Event | None) -> None:
        super().__init__(tail, choose)
        self._stop = stop

    async def __anext__(self) -> Entry:
        """The next entry, when there is one. Raises PositionExpired where one was missed."""
        import asyncio  # loaded where somebody awaits

        while not (self._closed or (self._stop is not None and self._stop.is_set())):
            if (entry := self._next_seen()) is not None:
                return entry
            if pause := await asyncio.to_thread(self._look):
                await asyncio.sleep(pause)
        self.abandon()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the loop, and close all files. A second call does nothing."""
        self.abandon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.abandon()
