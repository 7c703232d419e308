"""Every system call that touches the log fails in turn, or is the last one of its process.

The calls of a healthy run are listed first; then each of them meets its fault in a run of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from auditlog import AuditLogger
from auditlog.testing import FixedClock
from tests.conftest import Start
from tests.faults.helpers import assert_once, read_all
from tests.helpers import line, write_day
from tests.programs.write_few import IDS, NOON, ONE_DAY

# What a run finds: nothing, or the day that it goes on with, or the one before, with a torn tail.
BEGINNINGS = (None, "2024-08-12", "2024-08-11")
TORN = line(0) + b'{"event_type":"cre'

FULL = ("ENOSPC", "EDQUOT")
ERRORS = {
    "write": (*FULL, "EIO", "EROFS"),
    "openat": (*FULL, "EIO", "EROFS", "EACCES", "EMFILE"),
    "mkdir": (*FULL, "EROFS"),
    "mkdirat": (*FULL, "EROFS"),
    "renameat": (*FULL, "EIO", "EROFS"),
    "flock": ("EIO", "ENOLCK"),
    "fsync": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "close": (),  # the kernel closes whatever it returns, and an injected error keeps it from that
}
OTHER_ERRORS = ("EIO",)

_call = re.compile(r"^(\d+) +(\w+)\((.*)$", re.MULTILINE)


class Call(NamedTuple):
    """The so-manieth call of its name, in its thread, that touched the log."""

    name: str
    number: int
    shown: str  # its arguments and result

    def meets(self, fault: str) -> str:
        """A fault of this call in the words of strace: `error=EIO`; `signal=KILL` before it is made."""
        return f"{self.name}:{fault}:when={self.number}"

    @property
    def met_fault(self) -> bool:
        return self.shown.endswith(("(INJECTED)", "= ?"))


class Run(NamedTuple):
    """What a run told, how it ended, and the calls by which it touched the log."""

    directory: Path
    fault: str
    told: list[str]
    status: int
    calls: list[Call]

    def __str__(self) -> str:
        shown = next((f"{call.name}({call.shown}" for call in self.calls if call.met_fault), "met no call")
        return f"{self.fault}: told {self.told}, status {self.status}: {shown}"

    @property
    def refused(self) -> bool:
        return self.told == ["refused"]

    @property
    def acknowledged(self) -> list[str]:
        return [] if self.refused else self.told


class Tracer:
    """Runs tests/programs/write_few.py under strace, each time in a directory of its own."""

    def __init__(self, start: Start, parent: Path) -> None:
        program = start("write_few", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert program.stdin is not None
        assert program.stdout is not None
        self._stdin, self._stdout = program.stdin, program.stdout
        self._parent = parent
        self._runs = 0

    def close(self) -> None:
        """End the program."""
        self._stdin.close()

    def run(self, fsync: str, torn_day: str | None, fault: str = "") -> Run:
        """Write a few events, while a call meets a fault."""
        self._runs += 1
        directory = self._parent / f"run-{self._runs}" / "audit-log"
        directory.parent.mkdir()
        if torn_day is not None:
            write_day(directory, torn_day, TORN)
        self._stdin.write(f"{directory} {fsync}\n".encode())
        self._stdin.flush()
        pid = int(self._read())
        trace = directory.parent / "trace"
        only = [f"--trace-path={path}" for path in _paths(directory, pid)]
        inject = [f"--inject={fault}"] if fault else []
        command = ["strace", "-f", "-y", f"--output={trace}", f"--attach={pid}", *only, *inject]
        told = []
        with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            os.kill(pid, signal.SIGCONT)
            while not (output := self._read()).startswith("exit "):
                told.append(output)
        if b"not permitted" in said:
            pytest.skip(f"strace may not trace here: {said.decode()}")
        assert b"attached" in said, said
        return Run(directory, fault, told, int(output.split()[1]), _calls(trace.read_text()))

    def _read(self) -> str:
        output = self._stdout.readline()
        assert output.endswith(b"\n"), "the program has ended"
        return output.decode().rstrip("\n")


def _paths(directory: Path, pid: int) -> Iterator[Path]:
    """All that a run opens or names; calls on anything else are neither counted nor fail."""
    ours = directory / ".auditlog"
    yield from (directory.parent, directory, ours, ours / "state", ours / f"state.{pid}.new")
    yield from (directory / f"2024-08-{number}.jsonlog" for number in (11, 12, 13))


def _calls(trace: str) -> list[Call]:
    numbers: Counter[tuple[str, str]] = Counter()
    calls = []
    for thread, name, shown in _call.findall(trace):
        numbers[thread, name] += 1
        calls.append(Call(name, numbers[thread, name], shown))
    return calls


@pytest.fixture
def tracer(start: Start, tmp_path: Path) -> Iterator[Tracer]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with closing(Tracer(start, tmp_path)) as tracer:
        yield tracer


@pytest.fixture
def step(long: bool) -> int:
    """Every so-manieth fault is tried."""
    return 1 if long else 5


def assert_nothing_lost(run: Run, torn_day: str | None) -> None:
    """What was acknowledged is there once, and still is when the next writer has written."""
    acknowledged = run.acknowledged if torn_day is None else ["0", *run.acknowledged]
    if run.directory.exists():
        assert_once(read_all(run.directory).ids, acknowledged)
    with AuditLogger(run.directory, fsync="always", retention=None, clock=FixedClock(NOON + ONE_DAY)) as log:
        log.create("Few", "healthy")
    assert_once(read_all(run.directory).ids, [*acknowledged, "healthy"])
    assert days(run.directory)[-1].endswith(b"\n")


def days(directory: Path) -> list[bytes]:
    """What is in the day files, oldest first."""
    return [path.read_bytes() for path in sorted(directory.glob("*.jsonlog"))]


def test_a_fault_meets_the_call_that_is_meant_and_no_other(tracer: Tracer) -> None:
    run = tracer.run("always", None, "write:error=ENOSPC:when=3")
    writes = [call for call in run.calls if call.name == "write"]
    assert "/.auditlog/state." in writes[0].shown
    assert [call for call in run.calls if call.met_fault] == [writes[2]]
    assert run.told == [identity for identity in IDS if identity != IDS[1]]


@pytest.mark.parametrize("fsync", ["always", "interval"])
@pytest.mark.parametrize("torn_day", BEGINNINGS)
def test_a_process_may_be_killed_before_any_of_its_calls(
    tracer: Tracer, fsync: str, torn_day: str | None, step: int
) -> None:
    calls = tracer.run(fsync, torn_day).calls[::step]
    killed = 0
    for call in calls:
        run = tracer.run(fsync, torn_day, call.meets("signal=KILL"))
        assert all(day.endswith(b"\n") for day in days(run.directory)[:-1])
        assert_nothing_lost(run, torn_day)
        assert run.status in (0, -signal.SIGKILL)
        killed += run.status != 0
    assert killed > len(calls) / 2


@pytest.mark.parametrize("torn_day", BEGINNINGS)
def test_a_call_that_fails_once_costs_one_event_at_most(
    tracer: Tracer, torn_day: str | None, step: int
) -> None:
    faults = _errors(tracer.run("always", torn_day).calls)[::step]
    costly = []
    met = 0
    for fault in faults:
        run = tracer.run("always", torn_day, fault)
        assert_nothing_lost(run, torn_day)
        if run.status != 0 or not (run.refused or len(run.told) >= len(IDS) - 1):
            costly.append(str(run))
        met += any(call.met_fault for call in run.calls)
    assert not costly, "\n".join(costly)
    assert met > len(faults) / 2


@pytest.mark.parametrize("again", ["+", "+2"])
@pytest.mark.parametrize("torn_day", BEGINNINGS)
def test_a_call_that_fails_again_and_again_costs_nothing_that_was_acknowledged(
    tracer: Tracer, torn_day: str | None, again: str, step: int
) -> None:
    crashed = []
    for fault in _errors(tracer.run("always", torn_day).calls)[::step]:
        run = tracer.run("always", torn_day, fault + again)
        assert_nothing_lost(run, torn_day)
        if run.status != 0:
            crashed.append(str(run))
    assert not crashed, "\n".join(crashed)


@pytest.mark.parametrize("torn_day", BEGINNINGS)
def test_an_event_whose_sync_fails_is_not_acknowledged_and_later_ones_are(
    tracer: Tracer, torn_day: str | None
) -> None:
    written = 0
    for call in tracer.run("always", torn_day).calls:
        written += call.name == "write" and r'"{\"event_type\":' in call.shown
        if call.name not in ("fsync", "fdatasync"):
            continue
        unsynced = IDS[written - 1]
        fault = call.meets("error=EIO")
        once, from_then_on = (
            tracer.run("always", torn_day, fault),
            tracer.run("always", torn_day, fault + "+"),
        )
        if written == 0:
            assert once.refused
            assert from_then_on.refused
        else:
            assert once.told == [identity for identity in IDS if identity != unsynced]
            assert from_then_on.told == IDS[: written - 1]
    assert written == len(IDS)


def _errors(calls: list[Call]) -> list[str]:
    return [call.meets(f"error={error}") for call in calls for error in ERRORS.get(call.name, OTHER_ERRORS)]
