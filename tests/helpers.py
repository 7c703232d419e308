"""What several tests need: day files by hand, what a directory holds, ports, and waiting."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from auditlog import AuditReader, CorruptLine, Entry


def line(number: int, **fields: Any) -> bytes:
    """A stored line, told apart by its number."""
    record = {"event_type": "create", "resource_id": str(number), "event_ts": number}
    return orjson.dumps(record | fields | {"event_data": {"session": {}}}) + b"\n"


def write_day(directory: Path, day: str, content: bytes) -> Path:
    """A day file as another program may have left it."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{day}.jsonlog"
    path.write_bytes(content)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory, ours below .auditlog left out."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


class Reading:
    """Everything a directory gives: its entries, and the damage met on the way."""

    def __init__(self, directory: Path, **arguments: Any) -> None:
        self.damage: list[CorruptLine] = []
        reader = AuditReader(directory, on_corrupt=self.damage.append)
        self.entries: list[Entry] = list(reader.read(**arguments))

    @property
    def ids(self) -> list[str]:
        return [entry.record.get("resource_id", "") for entry in self.entries]

    @property
    def positions(self) -> list[str]:
        return [str(entry.position) for entry in self.entries]


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for a condition that other threads or processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def free_port() -> int:
    """A port of loopback, below those that the kernel gives away: it stays free while nobody listens."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as packets:
            try:
                stream.bind(("127.0.0.1", port))
                packets.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
