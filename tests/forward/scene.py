"""A log, a receiver and a forwarder in processes of their own, and what is promised of them together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Literal

import orjson
import trustme

from auditlog import AuditLogger, AuditReader, Position
from auditlog.storage.files import Files
from auditlog.storage.progress import Place, Progress
from tests.conftest import Start
from tests.helpers import free_port as free_port
from tests.programs.forward_log import NAME

Protocol = Literal["tcp", "tls", "http", "udp"]
Key = tuple[str, str, str]


class Scene:
    """A log, a receiver that always has the same port, and a forwarder: each a process, or none."""

    def __init__(self, directory: Path, protocol: Protocol, start: Start) -> None:
        self.directory = directory
        self.protocol = protocol
        self.port = free_port()
        self.log = AuditLogger(directory, fsync="never", retention=None)
        self.positions: list[Position] = []  # of what was written
        self.firsts: dict[Key, bytes] = {}  # of the messages that were kept, without what came again
        self.ids: set[str] = set()
        self._kept = 0
        self.receiver: subprocess.Popen[bytes] | None = None
        self.forwarder: subprocess.Popen[bytes] | None = None
        self._start = start
        self._file = directory.parent / "kept"
        self._hoard = directory.parent / "kept.unkept"
        self._file.touch()
        self._read_bytes = 0
        self._ca_file = ""
        self._certificate: list[str] = []
        if protocol == "tls":
            self._make_certificates()

    # ------------------------------------------------------------------ what runs

    def receive(self, mode: str = "normal") -> None:
        """Kill the receiver, if it runs, and run one that behaves so."""
        self.kill_receiver()
        self._hoard.write_bytes(b"")
        arguments = [self.protocol, self.port, self._file, mode, *self._certificate]
        self.receiver = self._start("receive", *arguments, stdout=subprocess.PIPE)
        next_line(self.receiver)

    def forward(self, *events: int, **options: Any) -> subprocess.Popen[bytes]:
        """Run a forwarder, or a server that writes so many events and forwards them."""
        endpoint = f"{self.protocol}://127.0.0.1:{self.port}/"
        arguments = [self.directory, endpoint, self._ca_file, *events]
        self.forwarder = self._start("forward_log", *arguments, **options)
        return self.forwarder

    def kill_receiver(self) -> None:
        if self.receiver is not None:
            kill(self.receiver)
            self.receiver = None

    def kill_forwarder(self) -> None:
        assert self.forwarder
        kill(self.forwarder)

    def _make_certificates(self) -> None:
        authority = trustme.CA()
        self._ca_file, pem_file = (str(self.directory.parent / name) for name in ("ca.pem", "server.pem"))
        authority.cert_pem.write_to_path(self._ca_file)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem_file)
        self._certificate = [pem_file]

    # ------------------------------------------------------------------ what comes of it

    def write(self, count: int, size: int = 0) -> None:
        for _ in range(count):
            position = self.log.create("Load", str(len(self.positions)), blob="x" * size)
            assert position
            self.positions.append(position)

    @property
    def progress(self) -> Progress:
        """As it is stored: up to a second old, but for failures."""
        return Place(str(self.directory), NAME, Files()).read() or Progress()

    def hoards(self, number: int) -> bool:
        """Does a receiver that hoards have that event?"""
        return b'"resource_id":"%d"' % number in self._hoard.read_bytes()

    def read_kept(self) -> int:
        """How many messages the receiver kept so far. What has the key of another must be the same."""
        with self._file.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(content)
        for line in content.splitlines():
            message = orjson.loads(line)
            key = (message["source"], message["position"], message["sha256"])
            assert self.firsts.setdefault(key, line) == line
            self.ids.add(message["resource_id"])
            self._kept += 1
        return self._kept

    def has(self, number: int) -> bool:
        self.read_kept()
        return str(number) in self.ids

    def has_all(self) -> bool:
        self.read_kept()
        return len(self.ids) == len(self.positions)

    def check(self) -> None:
        """Hold what was kept against the log, and against what is promised of the protocol."""
        kept = self.read_kept()
        events = {str(entry.position): entry.record for entry in AuditReader(self.directory).read()}
        came = [position for _, position, _ in self.firsts]
        expected, arrived = list(events), set(came)
        if self.protocol == "udp":
            assert kept == len(self.firsts), "nothing comes twice"
            expected = [position for position in expected if position in arrived]
        assert sorted(set(expected) - arrived) == [], "nothing is missing"
        assert came == expected, "the order is that of the log"
        for message in map(orjson.loads, self.firsts.values()):
            event = events[message["position"]]
            assert {name: message[name] for name in event} == event, "it is what the log has"


def next_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout
    said = process.stdout.readline().decode()
    assert said, "it ended at once"
    return said


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
