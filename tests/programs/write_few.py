"""Writes a few events across a day change, as often as it is asked to.

    python -m tests.programs.write_few

Each line of stdin, `DIRECTORY FSYNC`, is a run in a process of its own, forked when all is loaded
that it needs. It prints its pid when it has stopped, to be continued by whoever wants to trace it;
then the id of each acknowledged event, or `refused` where the directory was; and in the end the
word `exit` and its status.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from datetime import UTC, datetime, timedelta
from typing import Any

from auditlog import AuditLogger, DirectoryError, SyncFailed, WriteFailed
from auditlog.testing import FixedClock, recorded_log

NOON = datetime(2024, 8, 12, 12, tzinfo=UTC)
ONE_DAY = timedelta(days=1)
SIZES = {"first": 20, "second": 5_000, "third": 300, "next day's": 70_000, "fifth": 20, "last": 300}
IDS = list(SIZES)


def write_few(directory: str, fsync: Any) -> None:
    clock = FixedClock(NOON)
    try:
        log = AuditLogger(directory, fsync=fsync, retention=None, clock=clock)
    except DirectoryError:
        say("refused")
        return
    for identity, size in SIZES.items():
        if identity == "next day's":
            clock.advance(ONE_DAY)
        try:
            log.create("Few", identity, blob="x" * size)
        except WriteFailed:
            continue
        say(identity)
    try:
        log.close()
    except SyncFailed:
        return


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write: a kill leaves no half line behind


def run(directory: str, fsync: str) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            write_few(directory, fsync)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    say(str(pid))
    _, status = os.waitpid(pid, 0)
    say(f"exit {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    with recorded_log() as log:
        log.audit.create("Few", "warm-up")
    for line in sys.stdin:
        run(*line.split())


if __name__ == "__main__":
    main()
