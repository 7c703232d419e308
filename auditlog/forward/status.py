"""How far each destination of a log is, for people and for metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

from ..errors import CorruptEntry, PositionError
from ..health import epoch, metric
from ..query.reader import AuditReader
from ..storage.blocks import Run
from ..storage.days import ONE_DAY, Clock, SystemClock, day_at
from ..storage.entry import pass_over
from ..storage.files import Files
from ..storage.layout import Position
from ..storage.progress import Progress, is_locked, read_all
from .message import time_ns_of


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """How far a destination is, and how it fared since its first run.

    position: a new run resumes behind it; sent_through: of the last entry that was handed over.
    lag_events: how many entries are behind that one. lag_seconds: the age of the oldest of these; 0.0
        where there is none.
    active: whether a process forwards to it just now. failing: whether what that one, or the last one,
        tried last went wrong; last_error, last_error_at: the newest failure ("" and None: there was none).
    sent, cut, rejected, lost, damaged: messages that were handed over (those that were repeated, too);
        that did not fit and were cut; that it refused for good; that did not arrive, or perhaps did not;
        stored lines that are no events. reconnects: connections after the first.
    swept: the newest ranges (from, to) of what was swept before it was sent.
    """

    name: str
    endpoint: str
    position: Position
    sent_through: Position
    lag_events: int
    lag_seconds: float
    active: bool
    failing: bool
    sent: int
    cut: int
    rejected: int
    lost: int
    damaged: int
    reconnects: int
    swept: tuple[tuple[str, str], ...]
    last_error: str
    last_error_at: datetime | None

    @property
    def state(self) -> str:
        """The same in a few words: is it reached, and is anybody at work?"""
        if self.failing:
            return "failing" if self.active else "not running, and failed before"
        if not self.active:
            return "not running"
        return "forwarding" if self.lag_events else "up to date"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs. Times are in RFC 3339."""
        return asdict(self) | {
            "position": str(self.position),
            "sent_through": str(self.sent_through),
            "state": self.state,
        }


def read_status(directory: str | os.PathLike[str], *, clock: Clock | None = None) -> list[DestinationStatus]:
    """How far each destination is to which anybody ever forwarded the log, by name.

    Counts the entries that are still to be sent, which takes about a second for ten million. Raises
    DirectoryError.
    """
    path, clock, files = os.path.abspath(directory), clock or SystemClock(), Files()
    reader = AuditReader(path, on_corrupt=pass_over)
    return [
        _status_of(name, progress, lag_behind(reader, progress.sent_through, clock), path, files)
        for name, progress in read_all(path, files).items()
    ]


def _status_of(name: str, progress: Progress, lag: Lag, path: str, files: Files) -> DestinationStatus:
    return DestinationStatus(
        name=name,
        endpoint=progress.endpoint,
        position=progress.position,
        sent_through=progress.sent_through,
        lag_events=lag.events,
        lag_seconds=lag.seconds,
        active=is_locked(path, name, files),
        failing=progress.failing,
        sent=progress.sent,
        cut=progress.cut,
        rejected=progress.rejected,
        lost=progress.lost,
        damaged=progress.damaged,
        reconnects=progress.reconnects,
        swept=tuple(progress.swept),
        last_error=progress.last_error,
        last_error_at=_time(progress.last_error_ms),
    )


class Lag(NamedTuple):
    """How many entries are still to be sent (at least), and the age of the oldest one."""

    events: int
    seconds: float
    is_exact: bool = True


def lag_behind(reader: AuditReader, position: Position, clock: Clock, most_mib: int | None = None) -> Lag:
    """What is to be sent behind a position, even where its day was swept.

    most_mib: how much of the log is looked at, in MiB (default: all of it).
    """
    now_ns = clock.time_ns()
    # What is further ahead of the clock is not forwarded before its day.
    last = max(day_at(now_ns, reader.zone) + ONE_DAY, position.day)
    events, oldest_ns = 0, 0
    for number, run in enumerate(_runs_behind(reader, position, last)):
        if number == most_mib:
            return Lag(events, _age(oldest_ns, now_ns), is_exact=False)
        oldest_ns = oldest_ns or _time_ns_of_first(run)
        events += run.length()
    return Lag(events, _age(oldest_ns, now_ns))


def _runs_behind(reader: AuditReader, position: Position, last: date) -> Iterator[Run]:
    try:
        yield from reader.read_runs(None, last, after=position)
    except PositionError:  # which is raised before the first run
        yield from reader.read_runs(position.day, last, after=None)


def _time_ns_of_first(run: Run) -> int:
    end = run.buffer.find(b"\n", run.start, run.end) + 1
    try:
        return time_ns_of(run.entry(run.start, end).record)
    except CorruptEntry:
        return 0


def _age(time_ns: int, now_ns: int) -> float:
    return max(0.0, (now_ns - time_ns) / 1e9) if time_ns else 0.0


def _time(ms: int) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, UTC) if ms else None


_FIGURES = (  # of a DestinationStatus, which has them by these names
    ("active", "gauge", "Does a process forward to it?"),
    ("failing", "gauge", "Did the last attempt fail?"),
    ("lag_events", "gauge", "Entries that are still to be sent."),
    ("lag_seconds", "gauge", "Age of the oldest of them."),
    ("sent", "counter", "Messages that were handed over."),
    ("cut", "counter", "Messages that were cut to fit."),
    ("rejected", "counter", "Messages that it refused."),
    ("lost", "counter", "Messages that did not arrive, or perhaps did not."),
    ("damaged", "counter", "Stored lines that are no events."),
    ("reconnects", "counter", "Connections after the first."),
)


def prometheus(statuses: Iterable[DestinationStatus]) -> str:
    """The same in the Prometheus text format (version 0.0.4), with the label `destination`.

    Times are in seconds since the epoch, 0 where there was none.
    """
    found = list(statuses)

    def told(name: str, kind: str, text: str, values: Iterable[float]) -> str:
        samples = zip((each.name for each in found), values, strict=True)
        return metric(f"forward_{name}", kind, text, "destination", samples)

    figures = [
        told(
            name if kind == "gauge" else f"{name}_total", kind, text, [+getattr(each, name) for each in found]
        )
        for name, kind, text in _FIGURES
    ]
    swept = told(
        "swept_ranges", "gauge", "Ranges swept before they were sent.", [len(each.swept) for each in found]
    )
    failed = told(
        "last_error_timestamp_seconds",
        "gauge",
        "Last failure.",
        [epoch(each.last_error_at) for each in found],
    )
    return "".join([*figures, swept, failed])
