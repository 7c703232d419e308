"""Time into days: the clock, the zone of a log, where its days begin, and how long an option says.

A clock is anything with the two methods of `Clock`; it is passed in, never patched.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Protocol
from zoneinfo import ZoneInfo

from ..errors import InvalidSetting

ONE_DAY = timedelta(days=1)

# Other names of UTC that a machine's own zone may have: days begin alike, so they are one zone.
_UTC_NAMES = frozenset({"UTC", "Etc/UTC", "UCT", "Etc/UCT", "Zulu", "Etc/Zulu", "Universal", "Etc/Universal"})


class Clock(Protocol):
    """Where the time comes from, in nanoseconds."""

    def time_ns(self) -> int:
        """Wall clock time since the epoch, as the machine's clock shows it."""

    def boottime_ns(self) -> int:
        """Time that only ever runs forward, suspended or not; its zero means nothing."""


class SystemClock:
    """The machine's clocks."""

    time_ns = staticmethod(time.time_ns)

    @staticmethod
    def boottime_ns() -> int:
        """CLOCK_BOOTTIME, or the nearest thing to it."""
        # macOS has no CLOCK_BOOTTIME; its monotonic clock stands still in sleep, which only
        # makes the sweeper more careful.
        return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def load_zone(name: str) -> tuple[str, tzinfo]:
    """The IANA name and the zone that `name` means; "local" means the machine's own.

    Raises InvalidSetting for a name that is none, and where "local" has no name on this machine.
    """
    if name == "local":
        name = _local_name()
    if name in _UTC_NAMES:
        return "UTC", UTC
    try:
        return name, ZoneInfo(name)
    except (ValueError, TypeError, OSError):  # ZoneInfoNotFoundError is a KeyError
        reason = "is no zone name"
    except KeyError:
        reason = "is not in this machine's time zone data (`pip install tzdata` brings some)"
    raise InvalidSetting("timezone", name, f'{reason}; use an IANA name such as "Europe/Berlin"')


def _local_name() -> str:
    name = os.environ.get("TZ", "").removeprefix(":")
    if name:
        return name
    _, _, name = os.path.realpath("/etc/localtime").partition("/zoneinfo/")
    if name:
        return name.removeprefix("posix/")
    if not os.path.exists("/etc/localtime"):
        return "UTC"  # as the C library does
    raise InvalidSetting("timezone", "local", "this machine's zone has no name; give an IANA name, or set TZ")


def day_at(time_ns: int, zone: tzinfo) -> date:
    """The calendar day of an instant."""
    return datetime.fromtimestamp(time_ns // 1_000_000_000, zone).date()


def start_of(day: date, zone: tzinfo) -> datetime:
    """The instant at which a day begins, also where its midnight does not exist or exists twice."""
    return datetime(day.year, day.month, day.day, tzinfo=zone)


def start_ns(day: date, zone: tzinfo) -> int:
    """`start_of` in nanoseconds since the epoch."""
    return int(start_of(day, zone).timestamp()) * 1_000_000_000


def seconds(setting: str, value: float | timedelta) -> float:
    """A duration in seconds. Raises InvalidSetting where it is none, or not positive."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e6:
        raise InvalidSetting(setting, value, "must be a positive number of seconds, or a timedelta")
    return float(number)
