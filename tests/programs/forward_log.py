"""Forwards a log to an endpoint, until SIGTERM.

    python -m tests.programs.forward_log DIRECTORY ENDPOINT CA_FILE [EVENTS]

CA_FILE may be empty. Where EVENTS is given, it is a server that writes so many of them, and prints a
line when the last one was acknowledged. What is logged is printed, too. Waits are short, so that many
faults fit into a test.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from auditlog import AuditLogger
from auditlog.forward import Destination, Forwarder, forwarder

NAME, SOURCE = "receiver", "here"


def main() -> None:
    directory, endpoint, ca_file, *events = sys.argv[1:]
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("auditlog").setLevel(logging.INFO)
    forwarder.FIRST_PAUSE, forwarder.LONGEST_PAUSE = 0.02, 0.2
    destination = Destination(
        endpoint=endpoint, ca_file=ca_file, name=NAME, source=SOURCE, connect_timeout=1, send_timeout=1
    )
    stop = [signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # in the threads, too
    if events:
        with AuditLogger(directory, retention=None, forward=[destination]) as log:
            for number in range(int(events[0])):
                log.create("Served", str(number))
            os.write(1, b"written\n")  # one write, as a thread may log meanwhile
            signal.sigwait(stop)
    else:
        alone = Forwarder(directory, destination)
        alone.start()
        signal.sigwait(stop)
        alone.stop()


if __name__ == "__main__":
    main()
