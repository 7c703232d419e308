from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson

from tests.conftest import ROOT
from tests.helpers import Reading

DEMO = ROOT / "examples" / "control_plane" / "demo.py"


def test_the_demo_tells_the_truth_about_what_its_users_did(directory: Path) -> None:
    output = subprocess.check_output([sys.executable, DEMO, "--audit-log-dir", directory], text=True)
    reading = Reading(directory)
    story = [
        (entry.record["event_type"], entry.record["event_data"]["session"]["email"].partition("@")[0])
        for entry in reading.entries
    ]
    assert story == [
        ("create", "alice"),
        ("create", "alice"),
        ("update", "oscar"),
        ("update_with_conflicts", "oscar"),
        ("access_denied", "rita"),
        ("k8s_access", "oscar"),
        ("talos_access", "oscar"),
        ("access_denied", "rita"),
        ("access_denied", "oscar"),
        ("teardown", "alice"),
        ("destroy", "alice"),
        ("access_denied", "rita"),
        ("audit_log_access", "alice"),
    ]
    for entry in reading.entries:
        session = entry.record["event_data"]["session"]
        assert session["ip_address"] == "127.0.0.1"
        assert session["user_agent"] == session["email"].partition("@")[0] + "-laptop/1.0"
    for event_type, _ in story:
        assert event_type in output
    update = orjson.loads(reading.entries[3].line)
    assert update["event_data"]["cluster"] == {"id": "talos-default", "kubernetes_version": "1.31.0"}
