"""What is said of destinations: how far they are, how they fare, and who is at work."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from auditlog import DirectoryError, Position
from auditlog.forward import Destination, Forwarder
from auditlog.forward.status import Lag, lag_behind, prometheus, read_status
from auditlog.query.reader import AuditReader
from auditlog.storage.files import Files
from auditlog.storage.progress import Place, Progress
from auditlog.testing import FixedClock
from tests.forward.sinks import Stream, free_port
from tests.helpers import line, until, write_day

NOON_MS = 1_723_464_000_000  # of the FixedClock's day
DAY = "2024-08-12"


def stored(directory: Path, name: str = "siem", **facts: object) -> None:
    """What a forwarder left behind."""
    files = Files()
    place = Place(str(directory), name, files)
    progress = Progress(endpoint="tcp://siem.example.com:5044/")
    for fact, value in facts.items():
        setattr(progress, fact, value)
    place.write(progress)


def at(text: str) -> Position:
    return Position.parse(text)


def tree(directory: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in directory.rglob("*")}


class TestStatus:
    def test_a_log_that_nobody_forwarded_has_none_and_gets_none(self, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        before = tree(directory)
        assert read_status(directory) == []
        (directory / ".auditlog").mkdir()
        assert read_status(directory) == []
        assert tree(directory).keys() - before.keys() == {str(directory / ".auditlog")}

    def test_a_missing_directory_is_refused(self, directory: Path) -> None:
        with pytest.raises(DirectoryError, match="no such file or directory"):
            read_status(directory)

    def test_it_says_what_the_forwarder_did(self, directory: Path) -> None:
        write_day(directory, DAY, line(1) + b"torn\n" + line(2))
        with Stream() as receiver:
            Forwarder(directory, Destination(endpoint=receiver.endpoint, name="siem")).run(once=True)
            (status,) = read_status(directory)
        assert (status.name, status.endpoint) == ("siem", receiver.endpoint)
        assert status.position == status.sent_through == at(f"{DAY}:{len(line(1) + b'torn.')}")
        assert (status.sent, status.damaged, status.cut, status.rejected, status.lost) == (2, 1, 0, 0, 0)
        assert (status.lag_events, status.lag_seconds, status.reconnects, status.swept) == (0, 0.0, 0, ())
        assert (status.failing, status.last_error, status.last_error_at) == (False, "", None)
        assert (status.active, status.state) == (False, "not running")

    def test_a_failure_is_told_with_its_time(self, directory: Path, clock: FixedClock) -> None:
        write_day(directory, DAY, line(1))
        destination = Destination(endpoint=f"tcp://127.0.0.1:{free_port()}/", name="siem")
        with pytest.raises(Exception, match="refused"):
            Forwarder(directory, destination, clock=clock).run(once=True)
        (status,) = read_status(directory, clock=clock)
        assert (status.failing, status.last_error) == (True, "connection refused")
        assert status.last_error_at == datetime(2024, 8, 12, 12, tzinfo=UTC)
        assert status.lag_events == 1
        assert status.state == "not running, and failed before"

    def test_destinations_come_by_their_names(self, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        for name in ("b", "a", "C"):
            stored(directory, name)
        assert [status.name for status in read_status(directory)] == ["C", "a", "b"]

    def test_damaged_progress_is_an_error_that_names_the_file(self, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        stored(directory)
        (directory / ".auditlog" / "forward" / "siem").write_text("{")
        with pytest.raises(DirectoryError, match=r"forward/siem is damaged"):
            read_status(directory)

    def test_it_can_be_read_by_programs(self, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        stored(directory, last_error="no", last_error_ms=NOON_MS, swept=[("start", f"{DAY}:0")])
        (status,) = read_status(directory)
        told = json.loads(orjson.dumps(status.as_json()))
        assert told["position"] == "start"
        assert told["last_error_at"] == "2024-08-12T12:00:00+00:00"
        assert told["swept"] == [["start", f"{DAY}:0"]]
        assert told["state"] == "not running"


class TestLag:
    def test_it_counts_events_behind_the_last_one_sent(self, directory: Path, clock: FixedClock) -> None:
        write_day(directory, "2024-08-11", line(1) + line(2))
        lines = [line(3), b"torn\n", line(4, event_ts=NOON_MS - 90_000), line(5, event_ts=NOON_MS)]
        write_day(directory, DAY, b"".join(lines) + b'{"event_type":"torn ta')
        for position, events, seconds in (
            ("start", 5, NOON_MS / 1000 - 0.001),
            ("2024-08-11:0", 4, NOON_MS / 1000 - 0.002),
            (f"{DAY}:0", 2, 90.0),
            (f"{DAY}:{len(lines[0]) + 5}", 1, 0.0),
            (f"{DAY}:{len(b''.join(lines[:3]))}", 0, 0.0),
        ):
            stored(directory, sent_through=at(position))
            (status,) = read_status(directory, clock=clock)
            assert status.lag_events == events, position
            assert status.lag_seconds == pytest.approx(seconds), position

    def test_what_is_ahead_of_the_clock_is_not_behind(self, directory: Path, clock: FixedClock) -> None:
        for day in (DAY, "2024-08-13", "2024-08-14"):
            write_day(directory, day, line(1))
        stored(directory, sent_through=at(f"{DAY}:0"))
        assert read_status(directory, clock=clock)[0].lag_events == 1
        clock.advance(timedelta(days=1))
        assert read_status(directory, clock=clock)[0].lag_events == 2
        clock.advance(timedelta(days=-9))
        assert read_status(directory, clock=clock)[0].lag_events == 0

    def test_an_event_of_tomorrow_is_not_older_than_now(self, directory: Path, clock: FixedClock) -> None:
        write_day(directory, DAY, line(1, event_ts=NOON_MS + 60_000))
        stored(directory)
        (status,) = read_status(directory, clock=clock)
        assert (status.lag_events, status.lag_seconds) == (1, 0.0)

    @pytest.mark.parametrize("event_ts", [None, "x", -1, 10**15, True])
    def test_an_event_without_a_time_has_no_age(self, directory: Path, event_ts: object) -> None:
        write_day(directory, DAY, line(1, event_ts=event_ts))
        stored(directory)
        assert read_status(directory)[0].lag_seconds == 0.0

    def test_what_looks_like_an_event_and_is_none_has_no_age(self, directory: Path) -> None:
        write_day(directory, DAY, b"{no json}\n" + line(1))
        stored(directory)
        (status,) = read_status(directory)
        assert (status.lag_events, status.lag_seconds) == (2, 0.0)

    @pytest.mark.parametrize(
        ("position", "events"),
        [
            ("2024-08-01:0", 3),  # swept
            ("2024-08-11:999999", 3),  # truncated
            ("2024-08-11:1", 3),  # edited
            ("2024-08-20:0", 0),  # of another log
        ],
    )
    def test_a_position_that_is_gone_stops_nothing(
        self, directory: Path, clock: FixedClock, position: str, events: int
    ) -> None:
        write_day(directory, "2024-08-11", line(1) + line(2))
        write_day(directory, DAY, line(3))
        stored(directory, position=at(position), sent_through=at(position))
        (status,) = read_status(directory, clock=clock)
        assert status.lag_events == events

    def test_it_need_not_count_all(self, directory: Path, clock: FixedClock) -> None:
        lines = [line(number, event_ts=NOON_MS, text="x" * 1000) for number in range(3000)]
        write_day(directory, DAY, b"".join(lines))
        reader = AuditReader(directory)
        assert lag_behind(reader, Position.START, clock) == Lag(3000, 0.0)
        some = lag_behind(reader, Position.START, clock, 1)
        assert 900 < some.events < 1000
        assert not some.is_exact
        assert lag_behind(reader, Position.START, clock, 9) == Lag(3000, 0.0)


class TestActive:
    def test_it_is_seen_whoever_forwards(self, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        with Stream() as receiver:
            forwarder = Forwarder(directory, Destination(endpoint=receiver.endpoint, name="siem"))
            forwarder.start()
            try:
                until(lambda: receiver.ids == ["1"])
                until(lambda: [status.state for status in read_status(directory)] == ["up to date"])
                assert read_status(directory)[0].active
                code = (
                    f"from auditlog.forward.status import read_status; print(read_status({str(directory)!r}))"
                )
                told = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                ).stdout
                assert "active=True" in told
            finally:
                forwarder.stop()
        assert read_status(directory)[0].state == "not running"

    def test_those_who_ask_do_not_take_each_other_for_one(self, directory: Path) -> None:
        write_day(directory, DAY, line(1))
        stored(directory)
        place = Place(str(directory), "siem", Files())
        assert place.lock()
        place.unlock()
        with (directory / ".auditlog" / "forward" / "siem.lock").open() as asking:
            fcntl.flock(asking, fcntl.LOCK_SH)
            assert not read_status(directory)[0].active
        assert place.lock()
        assert read_status(directory)[0].active
        place.unlock()


class TestPrometheus:
    def test_it_says_the_same_of_each_destination(self, directory: Path, clock: FixedClock) -> None:
        hostile = 'quoted" back\\slash\nof two lines'
        write_day(directory, DAY, line(1) + line(2, event_ts=NOON_MS - 2500))
        counts = {"sent": 5, "cut": 4, "rejected": 3, "lost": 2, "damaged": 1, "reconnects": 7}
        stored(directory, "loki")
        stored(
            directory,
            "siem",
            sent_through=at(f"{DAY}:0"),
            swept=[("start", f"{DAY}:0")],
            last_error="no",
            last_error_ms=NOON_MS,
            failing=True,
            **counts,
        )
        loki, siem = read_status(directory, clock=clock)
        text = prometheus([loki, replace(siem, name=hostile)])
        families = list(text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families) == text.count("# TYPE")
        found = {
            (sample.name.removeprefix("auditlog_forward_"), sample.labels["destination"]): sample.value
            for family in families
            for sample in family.samples
        }
        assert {name for _, name in found} == {"loki", hostile}
        told = {name: value for (name, destination), value in found.items() if destination == hostile}
        assert told == {f"{name}_total": value for name, value in counts.items()} | {
            "active": 0,
            "failing": 1,
            "lag_events": 1,
            "lag_seconds": 2.5,
            "swept_ranges": 1,
            "last_error_timestamp_seconds": NOON_MS / 1000,
        }
        assert found["last_error_timestamp_seconds", "loki"] == 0

    def test_what_perhaps_arrived_is_not_said_to_be_lost_for_certain(self) -> None:
        assert "_lost_total Messages that did not arrive, or perhaps did not.\n" in prometheus([])

    def test_of_no_destination_there_are_no_samples(self) -> None:
        families = list(text_string_to_metric_families(prometheus([])))
        assert families
        assert not any(family.samples for family in families)
