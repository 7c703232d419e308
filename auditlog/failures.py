"""What becomes of events that could not be written: who is told, and the gap that they leave."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Literal, NamedTuple

from .errors import InvalidSetting
from .events.records import is_event_type

Choice = Literal["raise", "drop"]

OTHERS = "*"
_CHOICES = ("raise", "drop")


class OnFailure:
    """Which event types may be lost without stopping the action that they record.

    `choice` is "raise" or "drop", or a mapping of event types to these; its key "*" stands for
    all other types, which otherwise raise. Raises InvalidSetting.
    """

    def __init__(self, choice: Choice | Mapping[str, Choice]) -> None:
        by_type = choice if isinstance(choice, Mapping) else {OTHERS: choice}
        for event_type, what in by_type.items():
            is_type = isinstance(event_type, str) and (event_type == OTHERS or is_event_type(event_type))
            if what not in _CHOICES or not is_type:
                reason = 'must be "raise" or "drop", or a dict of event types to these ("*": all others)'
                raise InvalidSetting("on_failure", choice, reason)
        self._by_type = dict(by_type)
        self._others = self._by_type.get(OTHERS, "raise")

    @property
    def may_drop(self) -> bool:
        """May any event be lost?"""
        return "drop" in self._by_type.values()

    def drops(self, event_type: str) -> bool:
        """May an event of this type be lost?"""
        return self._by_type.get(event_type, self._others) == "drop"


class Gap(NamedTuple):
    """Events that were dropped: how many, and the times of the first and the last."""

    lost: int
    first_ms: int
    last_ms: int

    def joined(self, other: Gap) -> Gap:
        """Both as one."""
        first, last = min(self.first_ms, other.first_ms), max(self.last_ms, other.last_ms)
        return Gap(self.lost + other.lost, first, last)


class Failures:
    """Counts what failed, and keeps the gap that nobody was told of yet.

    `last_error` with its time, and the count of appends at that time: a later append worked.
    `_lock` protects all of it, and nothing is taken inside. It is re-entrant for signal handlers.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.failed = 0
        self.dropped = 0
        self.last_error = ""
        self.last_error_ms = 0
        self.appends_before = 0
        self._gap: Gap | None = None

    def failed_with(self, error: Exception, count: int, now_ms: int, appends: int) -> None:
        """So many events were not acknowledged."""
        with self._lock:
            self.failed += count
            self.last_error, self.last_error_ms, self.appends_before = str(error), now_ms, appends

    def drop(self, count: int, now_ms: int) -> bool:
        """Give so many of them up. Returns whether they are the first of their gap."""
        with self._lock:
            self.dropped += count
            first = self._gap is None
            self._join(Gap(count, now_ms, now_ms))
            return first

    def take_gap(self) -> Gap | None:
        """The gap, to be told; whoever cannot tell it gives it back."""
        with self._lock:
            gap, self._gap = self._gap, None
            return gap

    def give_back(self, gap: Gap) -> None:
        """The gap could not be told."""
        with self._lock:
            self._join(gap)

    def _join(self, gap: Gap) -> None:
        self._gap = gap if self._gap is None else gap.joined(self._gap)
