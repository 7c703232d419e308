"""Forks children while threads write; parent and children all go on writing.

python -m tests.programs.fork_while_writing DIRECTORY CHILDREN EVENTS
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

from auditlog import AuditLogger, Session


def main() -> None:
    directory, children, events = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    log = AuditLogger(directory, fsync="interval", fsync_interval=0.01)
    stop = threading.Event()
    written = [0, 0, 0]

    def write_on(thread: int) -> None:
        while not stop.is_set():
            log.create("Load", f"parent-{thread}-{written[thread]}", blob="x" * 300)
            written[thread] += 1

    threads = [threading.Thread(target=write_on, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    pids = []
    for child in range(children):
        pid = os.fork()
        if pid == 0:
            try:
                with log.session(Session(email=f"child-{child}@example.com")):
                    for number in range(events):
                        log.create("Load", f"child-{child}-{number}")
                names = {thread.name for thread in threading.enumerate()}
                assert {"auditlog-sync", "auditlog-sweep"} <= names, names
                log.close()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    failed = [status for pid in pids if (status := os.waitpid(pid, 0)[1])]
    stop.set()
    for thread in threads:
        thread.join()
    log.close()
    print(*written)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
