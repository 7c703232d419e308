"""What is promised of delivery, while receivers and forwarders die, stand still and misbehave."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from auditlog import AuditLogger, Position, Retention, RetentionSweeper
from auditlog.forward import Destination, Forwarder, forwarder
from auditlog.storage.files import Files
from auditlog.storage.progress import Place
from auditlog.testing import FixedClock
from tests.conftest import Start
from tests.forward.scene import Protocol, Scene, free_port, kill, next_line
from tests.forward.sinks import Stream
from tests.helpers import line, until, write_day
from tests.programs.forward_log import NAME

ALL: tuple[Protocol, ...] = ("tcp", "tls", "http", "udp")
MODES: dict[Protocol, tuple[str, ...]] = {
    "tcp": ("slow", "one_byte", "one_read", "resets", "hoards"),
    "tls": ("slow", "one_byte", "one_read", "resets", "hoards"),
    "http": ("slow", "one_byte", "resets", "busy", "half"),
    "udp": ("slow",),
}


@pytest.fixture
def scene(request: pytest.FixtureRequest, directory: Path, start: Start) -> Iterator[Scene]:
    """A log, and nobody yet who forwards or receives it."""
    scene = Scene(directory, getattr(request, "param", "tcp"), start)
    yield scene
    scene.log.close()


# ---------------------------------------------------------------------- rounds of faults

Fault = Callable[[Scene, random.Random], None]


def receiver_is_killed(scene: Scene, chance: random.Random) -> None:
    scene.kill_receiver()
    write_some(scene, chance)
    scene.receive()


def receiver_stands_still(scene: Scene, chance: random.Random) -> None:
    assert scene.receiver
    scene.receiver.send_signal(signal.SIGSTOP)
    if scene.protocol != "udp" and chance.random() < 0.3:
        scene.write(300, 20_000)  # more than a kernel takes for it,
        time.sleep(1.5)  # and longer than the forwarder has patience
    else:
        write_some(scene, chance)
    scene.receiver.send_signal(signal.SIGCONT)


def receiver_is_away(scene: Scene, chance: random.Random) -> None:
    scene.kill_receiver()
    write_and_fail(scene, chance)
    scene.receive()


def receiver_misbehaves(mode: str, scene: Scene, chance: random.Random) -> None:
    scene.receive(mode)
    if mode in ("one_byte", "resets", "busy", "half"):
        write_and_fail(scene, chance)
    else:
        kept, written = scene.read_kept(), len(scene.positions)
        write_some(scene, chance)
        until(lambda: scene.hoards(written) if mode == "hoards" else scene.read_kept() > kept)
    scene.receive()


def forwarder_is_killed(scene: Scene, chance: random.Random) -> None:
    scene.kill_forwarder()
    write_some(scene, chance)
    scene.forward()


def forwarder_is_ended(scene: Scene, chance: random.Random) -> None:
    assert scene.forwarder
    scene.forwarder.terminate()
    write_some(scene, chance)
    assert scene.forwarder.wait(20) == 0
    scene.forward()


def write_some(scene: Scene, chance: random.Random) -> None:
    scene.write(chance.randrange(100, 300), chance.choice([20, 200, 2000]))


def write_and_fail(scene: Scene, chance: random.Random) -> None:
    """Write until the forwarder has seen that something is wrong."""
    began_ms = time.time_ns() // 1_000_000
    write_some(scene, chance)

    def fails() -> bool:
        scene.write(1)
        return scene.progress.last_error_ms >= began_ms

    until(fails)


def is_done_with(scene: Scene, number: int) -> bool:
    """Is the forwarder done with that event, as far as is stored?"""
    return scene.progress.position >= scene.positions[number]


def reach(scene: Scene) -> None:
    """Write until something arrives: what was in somebody's buffer before has been read then."""
    first = len(scene.positions)

    def arrives() -> bool:
        scene.write(1)
        return any(map(scene.has, range(first, len(scene.positions))))

    until(arrives)
    until(lambda: scene.has(len(scene.positions) - 1))


FAULTS: tuple[Fault, ...] = (
    receiver_is_killed,
    receiver_stands_still,
    receiver_is_away,
    forwarder_is_killed,
    forwarder_is_killed,
    forwarder_is_ended,
)


def faults(scene: Scene, chance: random.Random) -> Iterator[Fault]:
    """All of a protocol in some order, again and again."""
    while True:
        dealt: list[Fault] = [
            *FAULTS,
            *(partial(receiver_misbehaves, mode) for mode in MODES[scene.protocol]),
        ]
        chance.shuffle(dealt)
        yield from dealt


@pytest.fixture
def chance() -> random.Random:
    """Decides about faults; SEED in the environment repeats its decisions."""
    seed = int(os.environ.get("SEED") or random.randrange(1 << 32))
    print(f"SEED={seed} repeats these faults")
    return random.Random(seed)


@pytest.mark.parametrize("scene", ALL, indirect=True)
@pytest.mark.timeout(900)
def test_the_promise_of_each_protocol_holds_over_rounds_of_faults(
    scene: Scene, chance: random.Random, long: bool
) -> None:
    scene.receive()
    scene.forward()
    for fault in islice(faults(scene, chance), 110 if long else 11):
        write_some(scene, chance)
        some = chance.randrange(len(scene.positions) - 100, len(scene.positions))
        if scene.protocol == "udp":
            until(partial(is_done_with, scene, some))
        else:
            until(partial(scene.has, some))
        print(fault, "after", len(scene.positions))
        fault(scene, chance)
    if scene.protocol == "udp":
        reach(scene)
        scene.write(50)
        last = range(len(scene.positions) - 50, len(scene.positions))
        until(lambda: scene.has(last[-1]))
        assert all(map(scene.has, last)), "whoever listens gets it"
    else:
        until(scene.has_all, 60)
    scene.check()


# ---------------------------------------------------------------------- one fault after the other


def test_what_a_receiver_dies_with_is_sent_again_up_to_8_mib(scene: Scene) -> None:
    scene.receive()
    scene.write(180, 64 << 10)  # 11 MiB
    scene.forward()
    until(scene.has_all)
    scene.receive("hoards")
    until(partial(scene.hoards, 179))  # which it had before
    scene.write(110, 64 << 10)  # 7 MiB
    until(partial(scene.hoards, 289))
    assert not scene.has(180)
    scene.receive()
    until(scene.has_all)
    scene.check()


def test_a_receiver_that_closes_again_and_again_gets_everything(scene: Scene) -> None:
    scene.receive("one_read")
    scene.forward()
    for number in range(10):
        scene.write(1)
        until(partial(scene.has, number))
    scene.write(100)
    until(scene.has_all)
    scene.check()


@pytest.mark.parametrize("scene", ["udp"], indirect=True)
def test_what_comes_not_by_udp_when_the_forwarder_dies_is_counted(scene: Scene) -> None:
    scene.receive()
    for _ in range(5):
        scene.forward()
        for _ in range(10):
            scene.write(40)
            until(partial(scene.has, len(scene.positions) - 20))
        scene.kill_forwarder()
    scene.forward()
    reach(scene)
    scene.check()
    assert len(scene.positions) - scene.read_kept() <= scene.progress.lost


@pytest.mark.parametrize("scene", ["tcp", "http"], indirect=True)
def test_another_process_takes_over_from_one_that_was_killed(scene: Scene) -> None:
    scene.receive()
    first = scene.forward()
    scene.write(100)
    until(scene.has_all)
    second = scene.forward(stdout=subprocess.PIPE)
    assert "another process forwards; standing by" in next_line(second)
    scene.write(100)
    until(scene.has_all)
    assert scene.read_kept() == 200, "only one of them sends"
    scene.write(200)
    kill(first)
    scene.write(100)
    until(scene.has_all, 10)
    scene.check()


@pytest.mark.parametrize("listens", [True, False], ids=["receiver listens", "receiver is away"])
def test_what_a_server_acknowledged_before_it_was_killed_is_forwarded_by_the_next(
    scene: Scene, listens: bool
) -> None:
    if listens:
        scene.receive()
    server = scene.forward(300, stdout=subprocess.PIPE)
    while next_line(server) != "written\n":
        pass
    kill(server)
    if not listens:
        scene.receive()
    next_server = scene.forward(0, stdout=subprocess.PIPE)
    until(lambda: scene.read_kept() and len(scene.ids) == 300)
    scene.check()
    next_server.terminate()
    assert next_server.wait(10) == 0


@pytest.mark.parametrize("fault", ["nobody listens", "it stands still"])
def test_a_dead_destination_delays_neither_writes_nor_others(scene: Scene, fault: str) -> None:
    if fault == "it stands still":
        scene.receive()
        assert scene.receiver
        scene.receiver.send_signal(signal.SIGSTOP)
    dead = Destination(endpoint=f"tcp://127.0.0.1:{scene.port}/", name=NAME, source="here")
    with Stream() as stream:
        alive = Destination(endpoint=stream.endpoint, name="alive")
        with AuditLogger(scene.directory, retention=None, fsync="never", forward=[dead, alive]) as log:
            scene.log.close()
            scene.log = log
            began = time.monotonic()
            scene.write(400, 20_000)  # more than a kernel takes for it
            assert time.monotonic() - began < 5
            until(lambda: stream.lines and len(stream.ids) == 400)
            assert stream.ids == [str(number) for number in range(400)]
            lag = {each.name: each.lag_events for each in log.forward_status()}
            assert lag["receiver"] > 0
            scene.write(1)
            until(lambda: stream.ids[-1] == "400")
            if scene.receiver:
                scene.receiver.send_signal(signal.SIGCONT)
                until(scene.has_all)
                scene.check()


# ---------------------------------------------------------------------- days that are swept

DAYS = [f"2024-08-{day:02}" for day in range(1, 13)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other fast."""
    monkeypatch.setattr(forwarder, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(forwarder, "LONGEST_PAUSE", 0.2)


@contextmanager
def forwarding_to_nobody(directory: Path, clock: FixedClock) -> Iterator[Forwarder]:
    destination = Destination(endpoint=f"tcp://127.0.0.1:{free_port()}/", name="siem")
    forwarder = Forwarder(directory, destination, clock=clock)
    forwarder.start()
    try:
        until(lambda: forwarder.progress.failing)
        yield forwarder
    finally:
        forwarder.stop()


def write_days(directory: Path, days: list[str]) -> None:
    for day in days:
        number = 10 * int(day[-2:])
        write_day(directory, day, line(number) + line(number + 1))


def ids_of(days: list[str]) -> list[str]:
    return [str(10 * int(day[-2:]) + each) for day in days for each in (0, 1)]


def sweep(directory: Path, clock: FixedClock, **options: Any) -> tuple[list[str], list[str]]:
    """The days that a sweep removed, and those that it held."""
    report = RetentionSweeper(directory, Retention(**options), clock=clock).sweep()
    return [str(day) for day in report.removed], [str(day) for day in report.held]


def port_of(forwarder: Forwarder) -> int:
    return forwarder.destination.url.port


@pytest.mark.usefixtures("quick")
class TestSweeps:
    def test_what_was_swept_before_anything_was_sent_is_told(
        self, directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_days(directory, DAYS)
        with forwarding_to_nobody(directory, clock) as forwarder:
            assert sweep(directory, clock, days=5) == (DAYS[:7], [])
            with Stream(port=port_of(forwarder)) as stream:
                until(lambda: stream.ids == ids_of(DAYS[7:]))
                forwarder.stop()
        place = Place(str(directory), "siem", Files())
        assert place.read() == forwarder.progress
        assert forwarder.progress.swept == [("2024-08-01:0", "2024-08-08:0")]
        told = "what was written from 2024-08-01:0 to 2024-08-08:0 was swept before it was sent"
        assert caplog.messages.count(f"destination siem: {told}") == 1

    def test_what_was_swept_behind_the_last_line_that_was_sent_is_told(
        self, directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_days(directory, DAYS[:3])
        port = free_port()
        destination = Destination(endpoint=f"tcp://127.0.0.1:{port}/", name="siem")
        with Stream(port=port) as stream:
            Forwarder(directory, destination, clock=clock).run(once=True)
            until(lambda: stream.ids == ids_of(DAYS[:3]))
        sent = Position(date(2024, 8, 3), len(line(30)))
        write_days(directory, DAYS[3:])
        sweep(directory, clock, days=5)
        with Stream(port=port) as stream:
            late = Forwarder(directory, destination, clock=clock)
            late.run(once=True)
            until(lambda: stream.ids == ids_of(DAYS[7:]))
        assert late.progress.swept == [(str(sent), "2024-08-08:0")]
        assert f"from {sent} to 2024-08-08:0 was swept before it was sent" in caplog.text

    def test_days_are_held_for_a_destination_but_not_for_ever(
        self, directory: Path, clock: FixedClock
    ) -> None:
        write_days(directory, DAYS)
        with forwarding_to_nobody(directory, clock) as forwarder:
            assert sweep(directory, clock, days=5, hold_for_destinations=True) == (DAYS[:2], DAYS[2:7])
            with Stream(port=port_of(forwarder)) as stream:
                until(lambda: stream.ids == ids_of(DAYS[2:]))
                forwarder.stop()
        assert forwarder.progress.swept == [("2024-08-01:0", "2024-08-03:0")]
        assert sweep(directory, clock, days=5, hold_for_destinations=True) == (DAYS[2:7], [])

    def test_a_full_log_holds_nothing_for_a_destination(self, directory: Path, clock: FixedClock) -> None:
        write_days(directory, DAYS)
        most = sum((directory / f"{day}.jsonlog").stat().st_size for day in DAYS[6:])
        with forwarding_to_nobody(directory, clock):
            removed, held = sweep(directory, clock, days=5, hold_for_destinations=True, max_bytes=most)
        assert (removed, held) == (DAYS[:6], DAYS[6:7])
