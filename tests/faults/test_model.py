"""Writing, killing, sweeping and clock steps in any order, against a model of what must be there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from itertools import count, islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from auditlog import Position, Retention, RetentionSweeper
from auditlog.storage.days import day_at
from auditlog.storage.layout import parse_day_file_name
from tests.conftest import Start
from tests.helpers import Reading
from tests.programs.shared_clock import SharedClock

DAY = timedelta(days=1)
HOUR_NS = 3600 * 10**9
HALF_PAST_NOON_NS = round(datetime(2024, 8, 12, 12, 30, tzinfo=UTC).timestamp()) * 10**9
STEPS = st.just(0) | st.sampled_from([-96, -48, -25, -24, -12, -1, 1, 12, 13, 24, 25, 48, 96])
LARGE = st.just(500_000)  # long enough to be killed amid the write
LOOK_SECONDS = 0.011  # a writer looks for a newer day every 10 ms


class Process:
    """A process that writes what it is told to, and may be killed amid that."""

    def __init__(self, control: socket.socket, name: str, *options: object) -> None:
        self.name = name
        self.killed = False
        self._orders, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(control, [b"."], [theirs.fileno()])
        self._pid = int(control.recv(20))
        self._numbers = count()
        self._lines = self._orders.makefile("rb")
        self._order("open", *options)

    def _order(self, *command: object) -> None:
        self._orders.sendall(json.dumps(command).encode() + b"\n")

    def order(self, command: str, events: int, size: int) -> list[str]:
        """Have it write some events; returns their ids."""
        ids = [f"{self.name}-{number}" for number in islice(self._numbers, events)]
        self._order(command, ids, size)
        return ids

    def answers(self) -> Iterator[tuple[str, Position]]:
        """The ids and positions of what it acknowledged, until it is done or dead."""
        with suppress(ConnectionResetError):  # it was killed before it took its order
            for line in self._lines:
                done = line == b"\n"
                if done and not self.killed:
                    return
                if line.endswith(b"\n") and not done:
                    name, position = line.decode().split()
                    yield name, Position.parse(position)
        assert self.killed, "a writer died by itself"
        self._close()

    def kill(self) -> None:
        """Kill it as it stands."""
        os.kill(self._pid, signal.SIGKILL)
        self.killed = True

    def close(self) -> None:
        """Let it close its log, and end."""
        self._orders.shutdown(socket.SHUT_WR)
        assert self._lines.read() == b""
        self._close()

    def _close(self) -> None:
        self._lines.close()
        self._orders.close()


class Log(RuleBasedStateMachine):
    """A log with up to three writing processes, and what must be found in it.

    `told`: the positions of acknowledged events by their ids, in the order of their
    acknowledgement. `asked`: the ids of all events; those of a killed writer that were not
    acknowledged may be there or not.
    """

    def __init__(self, path: Path, control: socket.socket) -> None:
        super().__init__()
        self.directory = path / "audit-log"
        self.directory.mkdir(mode=0o700)
        self.control = control
        self.clock_file = path / "clock"
        self.clock = SharedClock(self.clock_file)
        self.offset_ns = HALF_PAST_NOON_NS - time.time_ns()
        self.clock.move(self.offset_ns)
        self.names = count()
        self.processes: dict[int, Process] = {}
        self.told: dict[str, Position] = {}
        self.asked: set[str] = set()
        self.kills = 0

    @property
    def today(self) -> date:
        return day_at(self.clock.time_ns(), UTC)

    def days(self) -> list[date]:
        """The days that have a file."""
        days = (parse_day_file_name(path.name) for path in self.directory.glob("*.jsonlog"))
        return sorted(day for day in days if day is not None)

    def await_growth(self) -> None:
        """Return while something is written, if it is soon: a kill may then tear a line."""
        end = time.monotonic() + 0.005
        size = self.size()
        while self.size() == size and time.monotonic() < end:
            pass

    def size(self) -> int:
        """Of all day files."""
        return sum(path.stat().st_size for path in self.directory.glob("*.jsonlog"))

    def process(self, slot: int, fsync: str) -> Process:
        """The process of a slot, which is started where there is none."""
        if slot not in self.processes:
            options = str(self.directory), str(self.clock_file), fsync
            self.processes[slot] = Process(self.control, f"p{next(self.names)}", *options)
        return self.processes[slot]

    @rule(
        hours=STEPS,
        slots=st.sets(st.integers(0, 2), min_size=1),
        fsync=st.sampled_from(["interval", "never", "always"]),
        command=st.sampled_from(["create", "write_many"]),
        load=st.tuples(st.integers(1, 20), st.sampled_from([0, 1000])) | st.tuples(st.integers(1, 3), LARGE),
        kill_after=st.none() | st.integers(0, 20) | st.just(0),
    )
    def write(
        self,
        hours: int,
        slots: set[int],
        fsync: str,
        command: str,
        load: tuple[int, int],
        kill_after: int | None,
    ) -> None:
        """Several processes write at once; one may be killed after so many acknowledgements."""
        self.set_clock(hours)
        day = max([self.today, *(day for day in self.days() if day <= self.today + DAY)])
        writing = [self.process(slot, fsync) for slot in sorted(slots)]
        for process in writing:
            self.asked.update(process.order(command, *load))
        told: dict[str, Position] = {}
        if kill_after is not None:
            told.update(islice(writing[0].answers(), kill_after))
            self.await_growth()
            self.processes.pop(min(slots)).kill()
            self.kills += 1
        for process in writing:
            told.update(process.answers())
        assert {position.day for position in told.values()} <= {day}
        self.told |= told

    @rule(slot=st.integers(0, 2))
    def end(self, slot: int) -> None:
        """A process closes its log."""
        if slot in self.processes:
            self.processes.pop(slot).close()

    def set_clock(self, hours: int) -> None:
        """The clock steps, for all processes at once."""
        if hours:
            self.offset_ns += hours * HOUR_NS
            self.clock.move(self.offset_ns)
            time.sleep(LOOK_SECONDS)

    @rule(hours=STEPS, days=st.integers(1, 4))
    def sweep(self, hours: int, days: int) -> None:
        """Only days that are over and too old are swept, and all of them."""
        self.set_clock(hours)
        before = self.days()
        newest = max((day for day in before if day <= self.today + DAY), default=self.today)
        due = [day for day in before if day <= self.today - days * DAY and day < newest]
        report = RetentionSweeper(self.directory, Retention(days), clock=self.clock).sweep()
        assert list(report.removed) == due
        assert self.days() == [day for day in before if day not in due]
        self.told = {name: position for name, position in self.told.items() if position.day not in due}

    @rule(share=st.floats(0, 1, exclude_max=True))
    def resume(self, share: float) -> None:
        """A read that resumes anywhere misses nothing, in both directions."""
        if not self.told:
            return
        after = list(self.told.values())[int(share * len(self.told))]
        positions = Reading(self.directory).positions
        place = positions.index(str(after))
        assert Reading(self.directory, after=after).positions == positions[place + 1 :]
        backwards = Reading(self.directory, after=after, newest_first=True)
        assert backwards.positions == positions[:place][::-1]

    @invariant()
    def everything_told_is_there_once_where_it_was_said_and_in_order(self) -> None:
        reading = Reading(self.directory)
        found = {entry.record["resource_id"]: entry.position for entry in reading.entries}
        assert len(found) == len(reading.entries)
        assert found.keys() <= self.asked
        assert found == found | self.told
        newest: dict[tuple[str, date], int] = {}
        for name, (day, offset) in self.told.items():
            writer, _, _ = name.partition("-")
            assert offset > newest.get((writer, day), -1)
            newest[writer, day] = offset
        assert len(reading.damage) <= self.kills

    def teardown(self) -> None:
        for process in self.processes.values():
            process.kill()
            list(process.answers())  # until it is dead
        shutil.rmtree(self.directory.parent)


@pytest.mark.timeout(1200)
def test_the_log_holds_what_it_acknowledged_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, start: Start, long: bool
) -> None:
    control, theirs = socket.socketpair()
    with control:
        with theirs:
            start("obey", theirs.fileno(), pass_fds=[theirs.fileno()])

        class LogHere(Log):
            def __init__(self) -> None:
                super().__init__(tmp_path_factory.mktemp("model"), control)

        run_state_machine_as_test(
            LogHere,
            settings=settings(
                max_examples=300 if long else 30,
                stateful_step_count=50 if long else 25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
