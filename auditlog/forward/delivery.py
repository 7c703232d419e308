"""From where a destination goes on when a connection breaks or a process dies: what is promised of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ..storage.entry import Entry
from ..storage.layout import Position
from ..storage.progress import Progress
from .channel import Channel

SENT_AGAIN_BYTES = 8 << 20


class Handover:
    """Hands entries over, and keeps the Progress true to what is promised of them.

    store: puts the Progress on the disk, or raises DirectoryError. reached: what was handed over on this
    connection ends there.
    """

    def __init__(self, channel: Channel, progress: Progress, store: Callable[[], None]) -> None:
        self._channel = channel
        self._progress = progress
        self._store = store
        self.reached = progress.position

    def hand_over(self, entries: Sequence[Entry], behind: Position) -> None:
        """Send entries, of which there may be none, and be at `behind`. Raises what a channel raises."""
        raise NotImplementedError

    def end(self, finished: bool) -> None:
        """The connection was closed, in order or not."""


class AtLeastOnce(Handover):
    """What the receiver has acknowledged is done with, and nothing else."""

    def hand_over(self, entries: Sequence[Entry], behind: Position) -> None:
        """Send entries, and wait for the receiver's word."""
        if entries:
            self._channel.send(entries)
        self._progress.sent += len(entries)
        self._progress.position = self._progress.sent_through = self.reached = behind


class SentAgain(Handover):
    """The last 8 MiB are not done with while the connection lasts: a receiver may die with them unread."""

    def __init__(self, channel: Channel, progress: Progress, store: Callable[[], None]) -> None:
        super().__init__(channel, progress, store)
        self._before: deque[tuple[Position, int]] = deque()  # of each batch: what it goes on from, its bytes
        self._bytes = 0

    def hand_over(self, entries: Sequence[Entry], behind: Position) -> None:
        """Send entries, and be done with those that are more than 8 MiB behind them."""
        size = self._channel.send(entries) if entries else 0
        self._before.append((self.reached, size))
        self._bytes += size
        while self._bytes - self._before[0][1] >= SENT_AGAIN_BYTES:
            self._bytes -= self._before.popleft()[1]
        progress = self._progress
        progress.sent += len(entries)
        progress.position, _ = self._before[0]
        progress.sent_through = max(progress.sent_through, behind)
        self.reached = behind

    def end(self, finished: bool) -> None:
        """Be done with all, where the receiver closed because there was no more."""
        if finished:
            self._progress.position = self.reached


class AtMostOnce(Handover):
    """What is about to be sent is done with before, on the disk: nobody sends it a second time."""

    def hand_over(self, entries: Sequence[Entry], behind: Position) -> None:
        """Say that entries are sent, and send them one by one; where that fails, take back the rest."""
        progress, before = self._progress, self._progress.position
        progress.position, progress.in_flight = behind, len(entries)
        taken = 0
        try:
            self._store()
            for entry in entries:
                self._channel.send((entry,))
                taken += 1
        finally:
            if taken < len(entries):
                progress.position = entries[taken - 1].position if taken else before
            progress.sent += taken
            progress.in_flight = 0
            progress.sent_through = self.reached = progress.position


KINDS: dict[str, type[Handover]] = {
    "at_least_once": AtLeastOnce,
    "sent_again": SentAgain,
    "at_most_once": AtMostOnce,
}
