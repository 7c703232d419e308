"""Many threads, many processes, one directory: nothing lost, doubled, torn or glued."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from auditlog import AuditLogger, AuditReader, CorruptLine
from tests.conftest import Start
from tests.helpers import until
from tests.programs.shared_clock import SharedClock

PROCESSES, THREADS, EVENTS = 4, 4, 5000
DAY_NS = 86_400 * 10**9


class Acknowledged:
    """The ids that a writing process prints, collected as they come."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._threads: list[threading.Thread] = []

    def listen(self, process: subprocess.Popen[bytes]) -> None:
        self._threads.append(threading.Thread(target=self._collect, args=(process,)))
        self._threads[-1].start()

    def _collect(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            self.ids += [line.decode().rstrip("\n") for line in lines if line.endswith(b"\n")]

    def all(self) -> list[str]:
        for thread in self._threads:
            thread.join()
        return self.ids


def read_ids(directory: Path, damage: list[CorruptLine]) -> list[str]:
    reader = AuditReader(directory, on_corrupt=damage.append)
    return [entry.record["resource_id"] for entry in reader.read()]


def assert_in_order_per_thread(ids: list[str]) -> None:
    newest: dict[str, int] = {}
    for name, _, number in (identity.rpartition("-") for identity in ids):
        assert int(number) > newest.get(name, -1), f"{name} wrote {number} too late"
        newest[name] = int(number)


@pytest.mark.timeout(240)
def test_every_event_of_many_writers_is_there_once_and_in_order_across_a_day_change(
    directory: Path, tmp_path: Path, start: Start
) -> None:
    clock = SharedClock(tmp_path / "clock")
    processes = [
        start(
            "write_events",
            directory,
            tmp_path / "clock",
            f"p{number}",
            THREADS,
            EVENTS,
            stdout=subprocess.DEVNULL,
        )
        for number in range(PROCESSES)
    ]
    until(
        lambda: (
            directory.exists() and sum(path.stat().st_size for path in directory.glob("*.jsonlog")) > 10**8
        ),
        60,
    )
    clock.move(DAY_NS)
    assert [process.wait(200) for process in processes] == [0] * PROCESSES

    damage: list[CorruptLine] = []
    ids = read_ids(directory, damage)
    assert damage == []
    assert len(ids) == PROCESSES * THREADS * EVENTS
    assert max(Counter(ids).values()) == 1
    assert_in_order_per_thread(ids)
    assert all(path.stat().st_size > 0 for path in directory.glob("*.jsonlog"))
    assert len(list(directory.glob("*.jsonlog"))) == 2


@pytest.mark.timeout(240)
def test_a_writer_that_is_killed_again_and_again_costs_nobody_an_acknowledged_event(
    directory: Path, tmp_path: Path, start: Start
) -> None:
    clock = SharedClock(tmp_path / "clock")
    arguments = directory, tmp_path / "clock"
    acknowledged = Acknowledged()
    healthy = [
        start("write_events", *arguments, f"p{number}", THREADS, EVENTS, stdout=subprocess.PIPE)
        for number in range(PROCESSES - 1)
    ]
    for process in healthy:
        acknowledged.listen(process)
    kills = 0
    while any(process.poll() is None for process in healthy):
        victim = start("write_events", *arguments, f"victim{kills}", THREADS, EVENTS, stdout=subprocess.PIPE)
        assert victim.stdout is not None
        first = victim.stdout.readline()  # it writes: now let it be killed in the midst of that
        acknowledged.ids.append(first.decode().rstrip("\n"))
        acknowledged.listen(victim)
        time.sleep(0.1 * random.random())  # at any moment, not at a condition
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        kills += 1
        if kills == 3:
            clock.move(DAY_NS)
    assert [process.wait() for process in healthy] == [0] * (PROCESSES - 1)
    assert kills > 3

    damage: list[CorruptLine] = []
    ids = read_ids(directory, damage)
    counted = Counter(ids)
    assert max(counted.values()) == 1
    lost = [identity for identity in acknowledged.all() if identity and identity not in counted]
    assert lost == []
    assert len([identity for identity in ids if identity.startswith("p")]) == len(healthy) * THREADS * EVENTS
    assert_in_order_per_thread(ids)
    assert len(damage) <= kills


def test_fork_takes_no_lock_and_no_descriptor_along(directory: Path, start: Start) -> None:
    children, events = 20, 50
    process = start("fork_while_writing", directory, children, events, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    damage: list[CorruptLine] = []
    ids = Counter(read_ids(directory, damage))
    assert damage == []
    expected = {f"child-{child}-{number}" for child in range(children) for number in range(events)}
    for thread, count in enumerate(map(int, output.split())):
        expected |= {f"parent-{thread}-{number}" for number in range(count)}
    assert set(ids) == expected
    assert max(ids.values()) == 1


def test_a_forked_child_of_a_closed_logger_leaves_the_parents_descriptors_alone(directory: Path) -> None:
    AuditLogger(directory).close()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"alive")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"alive"
    os.close(read)
    os.close(write)


def test_a_forked_child_that_writes_nothing_can_flush_and_close(directory: Path) -> None:
    log = AuditLogger(directory, fsync="always")
    log.create("T", "1")
    syncer = log._engine.writer.syncer  # type: ignore[union-attr]
    with syncer._mutex, syncer._lock:  # as if a thread of the parent were inside
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            log.flush()
            log.close()
            log.close()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log.create("T", "2")
    log.close()
    assert read_ids(directory, []) == ["1", "2"]


def test_a_child_that_closes_without_a_write_waits_for_nobody_and_has_done_nothing(directory: Path) -> None:
    log = AuditLogger(directory)
    until(lambda: log.stats().last_sweep)
    assert log._engine is not None
    with log._engine._background[0]._stopped._cond:  # type: ignore[attr-defined] # as if its thread were just taking it
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            assert log.stats().last_sweep is None
            log.close()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log.close()
