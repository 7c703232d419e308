"""Writes events until it is told to stop (SIGTERM), whatever happens to the disk.

    python -m tests.programs.write_on DIRECTORY CLOCK_FILE FSYNC NAME

Prints the id and the position of each acknowledged event, and `! KIND` for each failed write, which
is not tried again. Sizes are log-uniform from 20 bytes to 64 KiB.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from auditlog import AuditLogger, WriteFailed
from tests.programs.shared_clock import SharedClock

PAUSE = 0.002  # so that a small disk is filled by the test, not by the log


def main() -> None:
    directory, clock_file, name = sys.argv[1], Path(sys.argv[2]), sys.argv[4]
    fsync: Any = sys.argv[3]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    sizes = random.Random(name)
    number = 0
    with AuditLogger(directory, fsync=fsync, retention=None, clock=SharedClock(clock_file)) as log:
        while not stopped:
            size = round(20 * 3277 ** sizes.random())
            identity = f"{name}-{number}"
            number += 1
            try:
                position = log.create("Load", identity, blob="x" * size)
            except WriteFailed as error:
                say(f"! {type(error).__name__}")
            else:
                say(f"{identity} {position}")
            time.sleep(PAUSE)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write: a kill leaves no half line behind


if __name__ == "__main__":
    main()
