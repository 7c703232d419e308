from __future__ import annotations

import logging
import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    AuditReader,
    CorruptEntry,
    DirectoryError,
    Event,
    Filter,
    InvalidRange,
    InvalidSetting,
    Position,
    PositionExpired,
    PositionInvalid,
    Retention,
    RetentionSweeper,
)
from auditlog.testing import FixedClock
from tests.helpers import Reading, line, write_day


@pytest.fixture
def week(directory: Path, clock: FixedClock) -> Path:
    """Seven days from 1 to 7 August 2024, three entries a day at 00:00, 12:00 and 23:59:59.999."""
    for day in range(1, 8):
        midnight = datetime(2024, 8, day, tzinfo=UTC)
        content = b""
        for number, offset in enumerate((0, 43_200_000, 86_399_999)):
            content += line(
                0, resource_id=f"{day}.{number}", event_ts=int(midnight.timestamp()) * 1000 + offset
            )
        write_day(directory, f"2024-08-0{day}", content)
    return directory


def ids(*days: int) -> list[str]:
    return [f"{day}.{number}" for day in days for number in range(3)]


def utc(day: int, hour: int = 0, minute: int = 0, microsecond: int = 0) -> datetime:
    return datetime(2024, 8, day, hour, minute, 0, microsecond, tzinfo=UTC)


class TestRanges:
    @pytest.mark.parametrize(
        ("start", "end", "days"),
        [
            (None, None, [1, 2, 3, 4, 5, 6, 7]),
            ("2024-08-02", "2024-08-04", [2, 3, 4]),
            (date(2024, 8, 6), None, [6, 7]),
            (None, date(2024, 8, 2), [1, 2]),
            ("2024-08-07", "2024-08-07", [7]),
            ("2024-07-01", "2024-07-31", []),
            ("2023-01-01", "2030-01-01", [1, 2, 3, 4, 5, 6, 7]),
            (date.min, date.max, [1, 2, 3, 4, 5, 6, 7]),
            (date.max, date.max, []),
        ],
    )
    def test_days_are_whole_and_both_are_included(
        self, week: Path, start: Any, end: Any, days: list[int]
    ) -> None:
        assert Reading(week, start=start, end=end).ids == ids(*days)
        assert Reading(week, start=start, end=end, newest_first=True).ids == ids(*days)[::-1]

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (utc(2), utc(3), ids(2)),
            (utc(2, 12), utc(3, 12), ["2.1", "2.2", "3.0"]),
            (utc(2, 12, 0, 1), utc(2, 23, 59), []),  # a microsecond after noon
            (utc(2, 12), utc(2, 12), []),
            (utc(7, 12), None, ["7.1", "7.2"]),
            (None, utc(1, 12), ["1.0"]),
            ("2024-08-07", utc(7, 13), ["7.0", "7.1"]),
            (utc(6, 12), "2024-08-06", ["6.1", "6.2"]),
            (datetime(2024, 8, 2, 2, tzinfo=timezone(timedelta(hours=2))), utc(2, 1), ["2.0"]),
            (datetime.min.replace(tzinfo=UTC), utc(1, 1), ["1.0"]),
            (datetime.max.replace(tzinfo=UTC), None, []),
        ],
    )
    def test_an_instant_is_decided_by_event_ts_the_start_included_the_end_not(
        self, week: Path, start: Any, end: Any, expected: list[str]
    ) -> None:
        assert Reading(week, start=start, end=end).ids == expected

    def test_an_import_is_found_by_its_own_time(self, directory: Path, clock: FixedClock) -> None:
        with AuditLogger(directory, retention=None, clock=clock) as log:
            old = int(datetime(2020, 1, 1, 12, tzinfo=UTC).timestamp()) * 1000
            log.write(Event(event_type="create", resource_id="import", event_ts=old))
            log.create("T", "now")
        year = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
        assert Reading(directory, start=year[0], end=year[1]).ids == ["import"]

    @pytest.mark.parametrize(
        ("start", "end"),
        [
            ("2024-08-02", "2024-08-01"),
            (date(2024, 8, 2), date(2024, 8, 1)),
            (utc(2, 1), utc(2)),
            (utc(3), "2024-08-02"),
            ("2024-08-03", utc(2)),
            ("2024-02-30", None),
            ("yesterday", None),
            ("2024-8-1", None),
            ("", None),
            (20240801, None),
            (datetime(2024, 8, 1), None),  # noqa: DTZ001
            (None, 1.5),
        ],
        ids=str,
    )
    def test_bounds_that_make_no_sense_are_refused_at_the_call(
        self, week: Path, start: Any, end: Any
    ) -> None:
        with pytest.raises(InvalidRange, match="cannot read from"):
            AuditReader(week).read(start, end)


class TestOrderAndLimit:
    def test_a_limit_ends_the_read(self, week: Path) -> None:
        assert Reading(week, limit=4).ids == ["1.0", "1.1", "1.2", "2.0"]
        assert Reading(week, limit=4, newest_first=True).ids == ["7.2", "7.1", "7.0", "6.2"]
        assert Reading(week, limit=0).ids == []

    @pytest.mark.parametrize("limit", [-1, 1.5, "3", True])
    def test_a_limit_that_is_none_is_refused(self, week: Path, limit: Any) -> None:
        with pytest.raises(InvalidSetting, match="limit="):
            AuditReader(week).read(limit=limit)

    def test_a_filter_that_is_none_is_refused(self, week: Path) -> None:
        with pytest.raises(InvalidSetting, match="where="):
            AuditReader(week).read(where={"actor": "a"})  # type: ignore[arg-type]

    def test_a_read_can_be_cut_into_pages_in_either_direction(self, week: Path) -> None:
        for newest_first in (False, True):
            pages: list[str] = []
            after = None
            while page := list(AuditReader(week).read(newest_first=newest_first, limit=4, after=after)):
                pages += [entry.record["resource_id"] for entry in page]
                after = page[-1].position
            assert pages == ids(1, 2, 3, 4, 5, 6, 7)[:: -1 if newest_first else 1]


class TestAfter:
    def test_start_precedes_everything(self, week: Path) -> None:
        assert Reading(week, after=Position.START).ids == ids(1, 2, 3, 4, 5, 6, 7)
        assert Reading(week, after=Position.START, newest_first=True).ids == []

    def test_it_goes_together_with_a_range(self, week: Path) -> None:
        position = Reading(week).entries[4].position  # 2.1
        assert Reading(week, after=position, end="2024-08-02").ids == ["2.2"]
        assert Reading(week, after=position, start="2024-08-04", end="2024-08-04").ids == ids(4)
        assert Reading(week, after=position, newest_first=True).ids == ["2.0", "1.2", "1.1", "1.0"]

    def test_a_position_whose_day_was_swept_has_expired(self, week: Path, clock: FixedClock) -> None:
        position = Reading(week).entries[0].position
        RetentionSweeper(week, Retention(days=8), clock=clock).sweep()
        with pytest.raises(PositionExpired, match="its day is gone; start again"):
            AuditReader(week).read(after=position)

    @pytest.mark.parametrize("offset", [-5, 1, 10_000_000])
    def test_a_position_that_is_no_lines_start_is_invalid(self, week: Path, offset: int) -> None:
        with pytest.raises(PositionInvalid, match="no line starts there"):
            AuditReader(week).read(after=Position(date(2024, 8, 3), offset))

    def test_the_end_of_a_file_and_days_to_come_are_no_positions(self, week: Path) -> None:
        size = (week / "2024-08-07.jsonlog").stat().st_size
        with pytest.raises(PositionInvalid):
            AuditReader(week).read(after=Position(date(2024, 8, 7), size))
        with pytest.raises(PositionInvalid, match="does not reach that far"):
            AuditReader(week).read(after=Position(date(2024, 8, 8), 0))

    def test_a_text_is_no_position(self, week: Path) -> None:
        with pytest.raises(InvalidSetting, match=r"Position\.parse"):
            AuditReader(week).read(after="2024-08-01:0")  # type: ignore[arg-type]


class TestEntries:
    def test_an_entry_gives_line_record_event_and_position(self, directory: Path) -> None:
        write_day(directory, "2024-08-12", line(7))
        (entry,) = Reading(directory).entries
        assert entry.line == line(7)
        assert entry.record["resource_id"] == "7"
        assert entry.record is entry.record
        assert entry.event.resource_id == "7"
        assert entry.event is entry.event
        assert str(entry.position) == "2024-08-12:0"
        assert "2024-08-12:0" in repr(entry)

    BROKEN = b'{"event_type":"create"]}\n'
    NO_EVENT = b'{"event_type":5}\n'

    def test_a_line_that_cannot_be_parsed_is_an_entry_until_it_is_parsed(self, directory: Path) -> None:
        write_day(directory, "2024-08-12", self.BROKEN + line(1))
        reading = Reading(directory)
        assert len(reading.entries) == 2
        assert reading.damage == []
        for what in ("event", "record"):
            with pytest.raises(CorruptEntry, match="the line at 2024-08-12:0 is no event"):
                getattr(reading.entries[0], what)

    def test_where_a_filter_parses_it_is_reported_and_left_out(self, directory: Path) -> None:
        write_day(directory, "2024-08-12", self.BROKEN + line(1))
        reading = Reading(directory, where=Filter(event_type="create"))
        assert reading.ids == ["1"]
        assert [(str(damage.position), damage.raw) for damage in reading.damage] == [
            ("2024-08-12:0", self.BROKEN)
        ]

    def test_a_deeply_nested_line_stops_no_search(self, directory: Path) -> None:
        deep = b'{"event_type":"a","event_data":' + b"[" * 900 + b"]" * 900 + b"}\n"
        write_day(directory, "2024-08-12", deep + line(1))
        assert Reading(directory, where=Filter(search="1")).ids == ["1"]

    def test_a_flat_session_goes_together_with_any_other_keys(self, directory: Path) -> None:
        old = b'{"event_type":"a","event_data":{"email":"e","cls":[1],"_fields_set":2}}\n'
        write_day(directory, "2024-08-12", old)
        data = Reading(directory).entries[0].event.event_data
        assert data.session is not None
        assert data.session.email == "e"
        assert data.model_extra == {"cls": [1], "_fields_set": 2}

    def test_strict_reports_what_is_json_but_no_event(self, directory: Path) -> None:
        write_day(directory, "2024-08-12", self.NO_EVENT + line(1))
        assert Reading(directory).ids == ["", "1"]
        reading = Reading(directory, strict=True)
        assert reading.ids == ["1"]
        assert reading.damage[0].reason == "event.event_type: Input should be a valid string"

    def test_damage_is_a_warning_by_default(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_day(directory, "2024-08-12", b"rubbish\n" + line(1))
        with caplog.at_level(logging.WARNING, "auditlog"):
            assert len(list(AuditReader(directory).read())) == 1
        assert caplog.messages == [
            f"{directory}: the line at 2024-08-12:0 (8 bytes) is damaged and was left out: "
            "it does not start with {"
        ]


class TestDirectories:
    def test_an_empty_directory_has_no_entries(self, directory: Path) -> None:
        directory.mkdir()
        assert Reading(directory).ids == []

    def test_a_missing_directory_and_a_file_are_refused(self, directory: Path) -> None:
        with pytest.raises(DirectoryError, match="no such file or directory; create it"):
            AuditReader(directory)
        directory.write_bytes(b"")
        with pytest.raises(DirectoryError, match="not a directory; name a directory"):
            AuditReader(directory)

    def test_reading_leaves_no_trace(self, week: Path) -> None:
        before = sorted(week.rglob("*"))
        Reading(week)
        assert sorted(week.rglob("*")) == before

    def test_a_read_that_is_never_begun_or_not_ended_holds_no_descriptor(self, week: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        never = AuditReader(week).read()
        begun = AuditReader(week).read(newest_first=True, limit=10)
        next(begun)
        del never, begun
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_directory_ahead_does_not_make_the_newest_tail_damage(self, directory: Path) -> None:
        write_day(directory, "2024-08-12", line(1) + b'{"half')
        (directory / "2030-01-01.jsonlog").mkdir()
        for newest_first in (False, True):
            reading = Reading(directory, newest_first=newest_first)
            assert (reading.ids, reading.damage) == (["1"], [])

    def test_what_is_no_regular_file_never_stops_a_read_and_never_blocks_it(self, week: Path) -> None:
        (week / "2024-08-10.jsonlog").mkdir()
        os.mkfifo(week / "2024-08-11.jsonlog")
        (week / "2024-08-12.jsonlog").symlink_to(week / "2024-08-01.jsonlog")
        (week / "2024-08-13.jsonlog.bak").write_bytes(line(1))
        assert Reading(week).ids == ids(1, 2, 3, 4, 5, 6, 7)


READ = """
import re, sys
from pathlib import Path
from auditlog import AuditReader, Filter
print(sum(1 for entry in AuditReader(sys.argv[1]).read(**eval(sys.argv[2]))))
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak memory")
@pytest.mark.parametrize("arguments", ["{}", "{'newest_first': True}", "{'where': Filter(actor='')}"])
def test_memory_does_not_grow_with_the_log(directory: Path, arguments: str) -> None:
    block = b"".join(line(number, padding="x" * 500) for number in range(1000))
    write_day(directory, "2024-08-11", block * 100)
    write_day(directory, "2024-08-12", block * 100)
    output = subprocess.check_output([sys.executable, "-c", READ, str(directory), arguments])
    count, kilobytes = map(int, output.split())
    assert count == 200_000
    assert kilobytes * 1024 < 60e6
