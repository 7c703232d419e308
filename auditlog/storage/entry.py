"""What a read gives: an entry, or the report of a damaged line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import TYPE_CHECKING, Any

from orjson import loads

from ..errors import CorruptEntry
from .layout import Position, new_tuple

if TYPE_CHECKING:
    from ..events.model import Event

RAW_BYTES = 1 << 16  # of a damaged line, handed on


class Entry:
    """A line read back, with its position. What it says is decoded when it is asked for.

    `line`: the stored bytes, with the newline. `day` and `offset`: where it starts (`position`).
    """

    # No __init__: storage.lines sets the attributes itself, which is a quarter faster, and a read
    # of a million lines makes a million of these.
    line: bytes
    day: date
    offset: int
    _record: dict[str, Any] | None = None
    _event: Event | None = None

    @property
    def position(self) -> Position:
        """Where the line starts."""
        return new_tuple(Position, (self.day, self.offset))

    @property
    def record(self) -> dict[str, Any]:
        """The line as a plain dict, just as it is stored. Raises CorruptEntry if it is no JSON."""
        record = self._record
        if record is None:
            try:
                record = self._record = loads(self.line)  # a "{" begins it: it is a dict, or no JSON
            except ValueError as error:
                raise CorruptEntry(self.position, str(error)) from None
        return record

    @property
    def event(self) -> Event:
        """The line as a typed event. Raises CorruptEntry if it is none."""
        if self._event is None:
            try:
                self._event = _decode()(self.line)
            except ValueError as error:
                raise CorruptEntry(self.position, str(error)) from None
        return self._event

    def __repr__(self) -> str:
        return f"Entry({str(self.position)!r}, {self.line!r})"


@cache
def _decode() -> Callable[[bytes], Event]:
    from ..events.codec import decode  # its models are slow to load, and many readers need none

    return decode


@dataclass(frozen=True, slots=True)
class CorruptLine:
    """A line that is no entry: where it is, what it holds, and why it is damage.

    `raw` are its first bytes, at most 64 KiB; `length` counts all of them, the newline too.
    """

    position: Position
    raw: bytes
    length: int
    reason: str


def pass_over(line: CorruptLine) -> None:
    """An `on_corrupt` for those who leave it to others to tell of damage."""
