from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditlog import InvalidSetting
from auditlog.storage.days import ONE_DAY, SystemClock, day_at, load_zone, start_ns

# Midnight that never was (Beirut, Sao Paulo, Havana), midnight that was twice (Havana), a whole
# day that never was (Apia), half-hour and quarter-hour zones, both hemispheres.
ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",
    "America/Havana",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Pacific/Kiritimati",
]


@given(
    st.sampled_from(ZONES),
    st.datetimes(datetime(1990, 1, 1), datetime(2037, 1, 1)),  # noqa: DTZ001
)
def test_every_instant_lies_between_the_starts_of_its_day_and_the_next(name: str, naive: datetime) -> None:
    zone = ZoneInfo(name)
    instant = int(naive.replace(tzinfo=UTC).timestamp()) * 10**9
    day = day_at(instant, zone)
    assert start_ns(day, zone) <= instant < start_ns(day + ONE_DAY, zone)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", date(2024, 3, 31), 23),
        ("Europe/Berlin", date(2024, 10, 27), 25),
        ("Asia/Beirut", date(2024, 3, 31), 23),  # its midnight never was
        ("UTC", date(2024, 2, 29), 24),
    ],
)
def test_a_day_of_a_clock_change_is_one_day(zone: str, day: date, hours: int) -> None:
    length = start_ns(day + ONE_DAY, ZoneInfo(zone)) - start_ns(day, ZoneInfo(zone))
    assert length == timedelta(hours=hours).total_seconds() * 1e9


def test_local_is_recorded_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    assert load_zone("local")[0] == "Europe/Berlin"
    monkeypatch.setenv("TZ", ":Etc/UTC")
    assert load_zone("local") == ("UTC", UTC)


@pytest.mark.parametrize(
    "name", ["Mars/Olympus", "", "../../etc/passwd", "/etc/localtime", "Europe", "UTC+1"]
)
def test_an_unknown_zone_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match="timezone="):
        load_zone(name)


def test_the_system_clock_runs() -> None:
    clock = SystemClock()
    assert abs(clock.time_ns() - datetime.now(UTC).timestamp() * 1e9) < 60e9
    assert clock.boottime_ns() <= clock.boottime_ns()
