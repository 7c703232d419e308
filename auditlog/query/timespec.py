"""The bounds of a read: whole days or instants."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo

from ..errors import InvalidRange
from ..storage.days import ONE_DAY, start_of
from ..storage.layout import parse_day

Bound = date | datetime | str | None

# A line stands in the day on which it was written; its time may be older (an import) or, by a
# clock that stepped, a little newer.
_SLACK = timedelta(days=2)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Range:
    """Which days to look into, both included, and which times (ms) to give: `from` to before `to`."""

    first: date = date.min
    last: date = date.max
    from_ms: int | None = None
    to_ms: int | None = None

    @property
    def by_time(self) -> bool:
        """Does an entry's own time decide?"""
        return self.from_ms is not None or self.to_ms is not None

    def covers(self, event_ts: object) -> bool:
        """Is a stored `event_ts` within the times?"""
        if not isinstance(event_ts, int):
            return False
        return (self.from_ms is None or event_ts >= self.from_ms) and (
            self.to_ms is None or event_ts < self.to_ms
        )


def parse_range(start: Bound, end: Bound, zone: tzinfo) -> Range:
    """Resolve the bounds of a read.

    A `date` or `"YYYY-MM-DD"` is a whole day, and both days are included; an aware `datetime` is
    an instant, the start included and the end not; None is no bound. Raises InvalidRange.
    """
    try:
        first, last = _bound(start), _bound(end)
    except ValueError as error:
        raise InvalidRange(start, end, str(error)) from None
    if first is not None and last is not None and _is_before(last, first, zone):
        raise InvalidRange(start, end, "the end is before the start")
    return Range(
        first=_first_day(first, zone),
        last=date.max if last is None or isinstance(last, datetime) else last,
        from_ms=_milliseconds(first) if isinstance(first, datetime) else None,
        to_ms=_milliseconds(last) if isinstance(last, datetime) else None,
    )


def _bound(bound: Bound) -> date | datetime | None:
    if isinstance(bound, datetime):
        if bound.utcoffset() is None:
            raise ValueError(f"{bound.isoformat()} needs a time zone to be an instant")
        return bound
    if bound is None or isinstance(bound, date):
        return bound
    day = parse_day(bound) if isinstance(bound, str) else None
    if day is None:
        raise ValueError(f"{bound!r} is no date like 2024-08-12 and no aware datetime")
    return day


def _first_day(first: date | datetime | None, zone: tzinfo) -> date:
    if first is None:
        return date.min
    if not isinstance(first, datetime):
        return first
    try:
        return first.astimezone(zone).date() - _SLACK
    except OverflowError:  # in the first days of year 1
        return date.min


def _is_before(last: date | datetime, first: date | datetime, zone: tzinfo) -> bool:
    if isinstance(last, datetime):
        return last < (first if isinstance(first, datetime) else start_of(first, zone))
    if isinstance(first, datetime):
        return start_of(min(last, date.max - ONE_DAY) + ONE_DAY, zone) <= first
    return last < first


def _milliseconds(instant: datetime) -> int:
    """The first whole millisecond that is not before `instant`."""
    return -((_EPOCH - instant) // _MILLISECOND)
