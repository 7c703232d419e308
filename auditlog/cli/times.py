"""The times that a command line understands: few forms, each of them unmistakable.

2024-08-12                  a whole day of the log
today, yesterday            likewise
2h, -2h, "2 hours ago"      an instant: so many s, m, h, d or w before now, also written out
2024-08-12T10:30:00Z        an instant, as in RFC 3339, with its zone
"""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta, tzinfo

from ..storage.days import ONE_DAY
from ..storage.layout import parse_day

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_ago = re.compile(
    r"-?(\d{1,6})\s*(s|m|h|d|w|seconds?|minutes?|mins?|hours?|days?|weeks?)(?:\s+ago)?",
    re.ASCII | re.IGNORECASE,
).fullmatch
_instant = re.compile(
    r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(?:\.\d+)?(?:[Zz]|[+-]\d{2}:\d{2})", re.ASCII
).fullmatch

FORMS = "use 2024-08-12, today, yesterday, 2h, '2 hours ago', or 2024-08-12T10:30:00Z"


Time = date | datetime


def parse_time(text: str, now: datetime, zone: tzinfo) -> Time:
    """The day or the instant that `text` means. Raises ValueError for what is none of the forms.

    `now` is an aware datetime; `zone` is that of the log, in which its days begin.
    """
    word = text.strip().lower()
    today = now.astimezone(zone).date()
    if word in ("today", "yesterday"):
        return today if word == "today" else today - ONE_DAY
    if word == "now":
        return now
    day = parse_day(word)
    if day is not None:
        return day
    if match := _ago(word):
        try:
            return now - timedelta(**{_UNITS[match[2][0]]: int(match[1])})
        except OverflowError:
            raise ValueError(f"{text!r} is before all time") from None
    if _instant(word):
        from dateutil.parser import isoparse  # slow to load, and few ask for instants

        return isoparse(word.replace(" ", "t").upper())
    raise ValueError(f"{text!r} is no time: {FORMS}")
