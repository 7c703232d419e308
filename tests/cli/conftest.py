from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from auditlog import AuditLogger, Session
from auditlog.testing import FixedClock
from tests.conftest import ROOT

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SESSION = Session(email="alice@example.com", role="Admin", ip_address="10.1.2.3")


@pytest.fixture
def run(directory: Path) -> Run:
    """Runs the command as in a pipe, on the test's log, in UTC."""

    def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "auditlog", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"AUDITLOG_DIR": str(directory), "TZ": "UTC"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run_command


@pytest.fixture
def log(directory: Path) -> Iterator[AuditLogger]:
    """A log with three days of events by alice, one of them in each of two clusters, and by nobody."""
    clock = FixedClock(datetime(2024, 8, 11, 12, tzinfo=UTC))
    with AuditLogger(directory, fsync="never", retention=None, clock=clock) as log:
        for day in (11, 12, 13):
            with log.session(SESSION):
                log.create("Clusters.omni.sidero.dev", f"cluster-{day}", cluster={"id": f"cluster-{day}"})
            log.destroy("Machines.omni.sidero.dev", f"machine-{day}")
            clock.advance(86_400)
        yield log
