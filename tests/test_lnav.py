"""The format file for lnav, with the real lnav."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from auditlog import AuditLogger, Session
from auditlog.testing import FixedClock
from tests.conftest import ROOT


def test_lnav_reads_time_type_actor_and_level(
    directory: Path, tmp_path: Path, clock: FixedClock, alice: Session
) -> None:
    if shutil.which("lnav") is None:
        pytest.skip("lnav is not installed")
    with AuditLogger(directory, clock=clock, retention=None) as log, log.session(alice):
        log.create("Clusters.omni.sidero.dev", "talos-default", cluster={"id": "talos-default"})
        clock.advance(1.5)
        log.destroy("Machines.omni.sidero.dev", "m")
    formats = tmp_path / "config" / "formats" / "auditlog"
    formats.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "auditlog.lnav.json", formats)
    fields = 'log_time, log_level, event_type, resource_id, "event_data/session/email" AS actor'
    query = ["-c", f";SELECT {fields} FROM auditlog", "-c", ":write-csv-to -"]
    done = subprocess.run(
        ["lnav", "-n", "-I", str(tmp_path / "config"), *query, str(directory / "2024-08-12.jsonlog")],
        env=os.environ | {"HOME": str(tmp_path), "TZ": "UTC"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(csv.reader(io.StringIO(done.stdout))) == [
        ["log_time", "log_level", "event_type", "resource_id", "actor"],
        ["2024-08-12 12:00:00.000", "info", "create", "talos-default", "alice@example.com"],
        ["2024-08-12 12:00:01.500", "warning", "destroy", "m", "alice@example.com"],
    ]
