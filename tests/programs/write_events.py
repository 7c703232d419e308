"""Writes events from several threads, and prints the id of each once it is acknowledged.

    python -m tests.programs.write_events DIRECTORY CLOCK_FILE NAME THREADS COUNT

Sizes are log-uniform from 20 bytes to 200 KiB.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from auditlog import AuditLogger
from tests.programs.shared_clock import SharedClock


def write_all(log: AuditLogger, name: str, count: int) -> None:
    sizes = random.Random(name)
    for number in range(count):
        size = round(20 * 10_000 ** sizes.random())
        log.create("Load", f"{name}-{number}", blob="x" * size)
        os.write(1, f"{name}-{number}\n".encode())  # one write: a kill leaves no half id behind


def main() -> None:
    directory, clock_file, name, threads, count = sys.argv[1:]
    log = AuditLogger(directory, retention=None, clock=SharedClock(Path(clock_file)), lock_timeout=60.0)
    workers = [
        threading.Thread(target=write_all, args=(log, f"{name}-{thread}", int(count)))
        for thread in range(int(threads))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    log.close()


if __name__ == "__main__":
    main()
