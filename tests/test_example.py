from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import orjson
import uvicorn

from auditlog import AuditLogger
from auditlog.testing import FailingFiles
from examples.control_plane.server import ControlPlane
from tests.conftest import ROOT
from tests.helpers import Reading, until

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


@contextmanager
def served(audit: AuditLogger, directory: Path) -> Iterator[httpx.Client]:
    """The example, served on a port of its own; the client speaks for alice."""
    config = uvicorn.Config(ControlPlane(audit, str(directory)).app, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        headers = {"authorization": "Bearer alice-token"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def test_the_server_changes_nothing_without_a_record_and_says_that_it_is_not_ready(directory: Path) -> None:
    files = FailingFiles()
    with served(AuditLogger(directory, files=files), directory) as client:
        assert client.post("/api/clusters/c", json={}).status_code == 200
        assert client.get("/readyz").text == "ready"
        files.fail("write")
        assert client.post("/api/clusters/d", json={}).status_code == 503
        assert client.post("/k8s/c/api/v1/pods", json={}).status_code == 503
        assert client.get("/readyz").status_code == 503
        assert "do not go on with the action" in client.get("/readyz").text
        assert "auditlog_events_failed_total" in client.get("/metrics").text
        files.heal()
        assert client.patch("/api/clusters/d", json={}).status_code == 404
        assert client.post("/k8s/c/api/v1/pods", json={}).status_code == 200
    assert Reading(directory).ids == ["c", ""]
