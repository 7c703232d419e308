"""Three users at work with the example control plane, and what its audit log says afterwards."""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import httpx

from auditlog import AuditReader, Entry

ROOT = Path(__file__).parent.parent.parent

# user, method, path, body, expected status
STORY: list[tuple[str, str, str, dict[str, object] | None, object]] = [
    ("alice", "POST", "/api/clusters/talos-default", {"kubernetes_version": "1.30.1"}, 200),
    ("alice", "POST", "/api/machines/m-1", {"management_address": "10.5.0.2"}, 200),
    ("oscar", "PATCH", "/api/machines/m-1", {"labels": {"rack": "07"}}, 200),
    ("oscar", "PATCH", "/api/clusters/talos-default?force=true", {"kubernetes_version": "1.31.0"}, 200),
    ("rita", "PATCH", "/api/clusters/talos-default", {"kubernetes_version": "1.29.0"}, 403),
    ("rita", "GET", "/k8s/talos-default/api/v1/pods", None, 200),
    ("oscar", "POST", "/k8s/talos-default/api/v1/namespaces", {"metadata": {"name": "x"}}, 200),
    ("oscar", "CALL", "/machine.MachineService/Reboot", None, grpc.StatusCode.OK),
    ("oscar", "DELETE", "/api/clusters/talos-default", None, 403),
    ("alice", "POST", "/api/clusters/talos-default/teardown", None, 200),
    ("alice", "DELETE", "/api/clusters/talos-default", None, 200),
    ("rita", "GET", "/audit-log", None, 403),
    ("alice", "GET", "/audit-log", None, 200),
    ("mallory", "GET", "/audit-log", None, 401),
    ("rita", "CALL", "/machine.MachineService/Reboot", None, grpc.StatusCode.PERMISSION_DENIED),
]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(directory: Path) -> Iterator[tuple[str, str]]:
    """Start the server as an operator would, and give its addresses (HTTP, gRPC) once it answers."""
    port, talos_port = free_port(), free_port()
    command = [sys.executable, "-m", "examples.control_plane.server", "--audit-log-dir", str(directory)]
    command += ["--port", str(port), "--talos-port", str(talos_port)]
    with subprocess.Popen(command, cwd=ROOT) as server:
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the example control plane did not start")
                time.sleep(0.02)
            yield f"http://127.0.0.1:{port}", f"127.0.0.1:{talos_port}"
        finally:
            server.terminate()


def call(channel: grpc.Channel, method: str, user: str) -> grpc.StatusCode:
    """Call a method of the Talos API, as talosctl does."""
    metadata = (
        ("authorization", f"Bearer {user}-token"),
        ("cluster", "talos-default"),
        ("nodes", "10.5.0.2"),
    )
    try:
        channel.unary_unary(method, bytes, bytes)(b"", metadata=metadata)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def tell(address: str, talos_address: str) -> None:
    """Send the requests of the story and show each answer."""
    with httpx.Client(base_url=address) as client, grpc.insecure_channel(talos_address) as channel:
        for user, method, path, body, expected in STORY:
            headers = {"Authorization": f"Bearer {user}-token", "User-Agent": f"{user}-laptop/1.0"}
            if path.startswith("/k8s/"):
                headers |= {"Kubectl-Command": "kubectl create ns x", "Kubectl-Session": "s-1"}
            answer: object
            if method == "CALL":
                answer = call(channel, path, user)
            else:
                answer = client.request(method, path, json=body, headers=headers).status_code
            print(f"  {user:8} {method:6} {path:60} {answer}")
            if answer != expected:
                raise SystemExit(f"expected {expected}")


def row(entry: Entry) -> str:
    """One entry as a row of the table."""
    event = entry.event
    data, session = event.event_data, event.event_data.session
    about = event.resource_id
    if data.k8s_access:
        about = f"{data.k8s_access.cluster_name}: {data.k8s_access.full_method_name}"
    elif data.talos_access:
        about = f"{data.talos_access.machine_ip}: {data.talos_access.full_method_name}"
    if data.audit and data.audit.action:
        about = " ".join(filter(None, (data.audit.action, data.audit.outcome, about)))
    when = datetime.fromtimestamp(event.event_ts / 1000, UTC)
    actor = session.email if session else ""
    return f"  {when:%H:%M:%S.%f}"[:-3] + f"  {event.event_type:22} {actor:20} {about}"


def main() -> None:
    """Run the story."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audit-log-dir", type=Path, required=True)
    directory = parser.parse_args().audit_log_dir.absolute()
    before = datetime.now(UTC)
    with running_server(directory) as addresses:
        print("\nThree users at work, and one whom nobody knows:\n")
        tell(*addresses)
    print("\nWhat the audit log says (times in UTC):\n")
    for entry in AuditReader(directory).read(before):
        print(row(entry))
    print(f"\nThe log is plain files; have a look:\n\n  ls -l {directory}")
    print(f"  jq -c '[.event_type, .event_data.session.email]' {directory}/*.jsonlog")


if __name__ == "__main__":
    main()
