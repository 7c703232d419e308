"""Writes an event every 0.2 s.

python -m tests.programs.write_now_and_then DIRECTORY COUNT
"""

from __future__ import annotations

import sys
import time

from auditlog import AuditLogger


def main() -> None:
    with AuditLogger(sys.argv[1]) as log:
        for number in range(int(sys.argv[2])):
            log.create("T", str(number))
            time.sleep(0.2)


if __name__ == "__main__":
    main()
