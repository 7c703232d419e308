"""What is measured of forwarding: a backlog over TCP to another process, and what it costs writers."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from auditlog import AuditLogger
from auditlog.forward import Destination, Forwarder
from auditlog.forward.destination import Format
from benchmarks.cases import DAY, SESSION, Case, Timed, create, timed

# Reads what comes, over one connection after the other, and counts nothing.
_RECEIVER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        while connection.recv(1 << 20):
            pass
"""


@contextmanager
def receiver() -> Iterator[int]:
    """The port of a receiver that is as fast as can be."""
    with subprocess.Popen([sys.executable, "-c", _RECEIVER], stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.kill()


def send_raw(_own: Path, log: Path) -> Timed:
    """The day file's bytes, sent a block at a time and its lines counted: the least that could be done."""
    with receiver() as port, socket.create_connection(("127.0.0.1", port)) as connection:

        def work() -> int:
            count = 0
            with (log / f"{DAY}.jsonlog").open("rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    connection.sendall(block)
                    count += block.count(b"\n")
            return count

        return timed(work)


def forward(form: Format, own: Path, log: Path) -> Timed:
    """The whole backlog of a log."""
    own.mkdir(mode=0o700, parents=True)
    (own / f"{DAY}.jsonlog").hardlink_to(log / f"{DAY}.jsonlog")  # its position is its own
    with receiver() as port:
        forwarder = Forwarder(own, Destination(endpoint=f"tcp://127.0.0.1:{port}/", format=form))

        def work() -> int:
            forwarder.run(once=True)
            return forwarder.progress.sent

        return timed(work)


def create_forwarded(own: Path, _log: Path) -> Timed:
    """`create` while a thread forwards what is written."""
    with receiver() as port:
        log = AuditLogger(own, forward=[Destination(endpoint=f"tcp://127.0.0.1:{port}/")])
        with log.session(SESSION):
            return create(own, log)


CASES = {
    "send raw": Case(send_raw, "send raw"),
    "forward, json_lines": Case(partial(forward, "json_lines"), "send raw"),
    "forward, raw": Case(partial(forward, "raw"), "send raw"),
    "forward, syslog": Case(partial(forward, "syslog"), "send raw"),
    "create, forwarded": Case(create_forwarded, "create, session bound"),
}
