"""Forks a writer for each socket that it is given; a writer obeys until it is killed.

    python -m tests.programs.obey CONTROL

CONTROL is the descriptor of a socket, over which other sockets come and the writers' pids go. A
writer reads commands, each a line of JSON, and answers with the id and the position of each event
as soon as it is acknowledged, and at the end with an empty line:

    ["open", DIRECTORY, CLOCK_FILE, FSYNC]
    ["create", IDS, SIZE]       one after the other
    ["write_many", IDS, SIZE]   together

All imports are done before the first fork, so that a process costs a few milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import auditlog.engine  # noqa: F401 - what a logger would load when it is made
from auditlog import AuditLogger, Event, EventData
from tests.programs.shared_clock import SharedClock


def obey(orders: socket.socket) -> None:
    lines = orders.makefile("rb")
    _, directory, clock_file, fsync = json.loads(lines.readline())
    clock = SharedClock(Path(clock_file))
    log = AuditLogger(directory, fsync=fsync, fsync_interval=0.01, retention=None, clock=clock)
    for line in lines:
        command, ids, size = json.loads(line)
        blob = "x" * size
        if command == "create":
            for name in ids:
                position = log.create("T", name, blob=blob)
                orders.sendall(f"{name} {position}\n".encode())
        else:
            data = EventData.model_validate({"blob": blob})
            events = [Event(event_type="create", resource_id=name, event_data=data) for name in ids]
            for name, position in zip(ids, log.write_many(events), strict=True):
                orders.sendall(f"{name} {position}\n".encode())
        orders.sendall(b"\n")
    log.close()


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the writers
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        orders = socket.socket(fileno=descriptors[0])
        pid = os.fork()
        if pid == 0:
            control.close()
            obey(orders)
            return
        orders.close()
        control.sendall(b"%d\n" % pid)


if __name__ == "__main__":
    main()
