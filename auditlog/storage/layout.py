"""Names in an audit log directory, and positions in the log: pure functions, no file touched.

    <dir>/2024-08-12.jsonlog     a day file; nothing else of ours ends in .jsonlog
    <dir>/.auditlog/state        the zone and the newest swept day
    <dir>/.auditlog/forward/     how far each destination has come, a file and a lock for each

Omni ignores subdirectories, so that it can take a directory over, and give it back.
"""

from __future__ import annotations

import re
from datetime import date
from typing import ClassVar, NamedTuple

STATE_DIRECTORY = ".auditlog"
STATE_FILE = "state"
FORWARD_DIRECTORY = "forward"

_day = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_destination = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(?<!\.lock)(?<!\.new)", re.ASCII)
_offset = re.compile(r"0|[1-9]\d*", re.ASCII)


def parse_day(text: str) -> date | None:
    """The day that `YYYY-MM-DD` names, or None: no other form, and no 30th of February."""
    if not _day.fullmatch(text):
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


def day_file_name(day: date) -> str:
    """The name of a day's file. Inverse of `parse_day_file_name`."""
    return f"{day.isoformat()}.jsonlog"


def parse_day_file_name(name: str) -> date | None:
    """The day of a file name, or None for a stray one. Inverse of `day_file_name`."""
    stem, dot, suffix = name.rpartition(".")
    return parse_day(stem) if dot and suffix == "jsonlog" else None


def is_destination_name(name: str) -> bool:
    """May a destination have that name? Its files have it, too."""
    return _destination.fullmatch(name) is not None


class _DayAndOffset(NamedTuple):
    day: date
    offset: int


class Position(_DayAndOffset):
    """Where a line starts: its day and the byte offset in the day's file.

    `str()` gives `2024-08-12:10234`, `parse` reads it, and positions sort in the order of the
    log. `Position.START` precedes every line. A position holds for as long as nobody replaces
    or truncates a day file.
    """

    __slots__ = ()

    START: ClassVar[Position]

    def __str__(self) -> str:
        return "start" if self == Position.START else f"{self.day.isoformat()}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read what `str()` wrote. Raises ValueError for anything else."""
        if text == "start":
            return cls.START
        name, _, offset = text.partition(":")
        day = parse_day(name)
        if day is None or not _offset.fullmatch(offset):
            raise ValueError(f"{text!r} is no position: expected one like 2024-08-12:10234, or start")
        return cls(day, int(offset))


Position.START = Position(date.min, 0)

new_tuple = tuple.__new__
"""`new_tuple(Position, (day, offset))` takes half the time of the constructor, on hot paths."""
