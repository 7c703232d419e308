from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import orjson

from auditlog import AuditLogger
from auditlog.testing import FailingFiles
from examples.control_plane.server import ControlPlane
from tests.capture.helpers import serve_asgi
from tests.conftest import ROOT
from tests.helpers import Reading


def test_the_demo_tells_the_truth_about_what_its_users_did(directory: Path) -> None:
    command = [sys.executable, "-m", "examples.control_plane.demo", "--audit-log-dir", str(directory)]
    output = subprocess.check_output(command, cwd=ROOT, text=True)
    reading = Reading(directory)
    story = [
        (entry.record["event_type"], entry.record["event_data"]["session"].get("email", "").partition("@")[0])
        for entry in reading.entries
    ]
    assert story == [
        ("intent", "alice"),
        ("create", "alice"),
        ("intent", "alice"),
        ("create", "alice"),
        ("intent", "oscar"),
        ("update", "oscar"),
        ("intent", "oscar"),
        ("update_with_conflicts", "oscar"),
        ("access_denied", "rita"),
        ("k8s_access", "oscar"),
        ("talos_access", "oscar"),
        ("access_denied", "oscar"),
        ("intent", "alice"),
        ("teardown", "alice"),
        ("intent", "alice"),
        ("destroy", "alice"),
        ("access_denied", "rita"),
        ("audit_log_access", "alice"),
        ("access_denied", ""),
        ("talos_access", "rita"),
        ("access_denied", "rita"),
    ]
    for entry in reading.entries:
        session = entry.record["event_data"]["session"]
        assert session["ip_address"] == "127.0.0.1"
        agent = session["user_agent"]
        assert agent.startswith("grpc-python") or agent.endswith("-laptop/1.0")
    for event_type, _ in story:
        assert event_type in output
    update = orjson.loads(reading.entries[7].line)["event_data"]
    assert update["cluster"] == {"id": "talos-default", "kubernetes_version": "1.31.0"}
    assert update["changes"] == [{"path": "cluster.kubernetes_version", "old": "1.30.1", "new": "1.31.0"}]
    assert update["audit"] == {"intent": str(reading.entries[6].position)}


@contextmanager
def served(audit: AuditLogger) -> Iterator[httpx.Client]:
    """The example, served on a port of its own; the client speaks for alice."""
    headers = {"authorization": "Bearer alice-token"}
    with (
        serve_asgi(ControlPlane(audit).app, lifespan="on") as address,
        httpx.Client(base_url=address, headers=headers) as client,
    ):
        yield client


def test_the_server_changes_nothing_without_a_record_and_says_that_it_is_not_ready(directory: Path) -> None:
    files = FailingFiles()
    with served(AuditLogger(directory, files=files)) as client:
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
    assert Reading(directory).ids == ["c", "c", ""]
