"""What is measured: each case does its work once, in a process of its own, and counts events.

A case gets a directory for itself and the directory of the day files to read. The raw cases are
what the others are compared with: the least that could be done at all.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import orjson

from auditlog import AuditLogger, AuditReader, Event, EventData, Session
from auditlog.capture import bind
from auditlog.capture.asgi import App, AuditMiddleware, Message, Receive, Scope, Send
from auditlog.events.codec import encode, encode_session
from auditlog.storage.current import CurrentFile
from auditlog.storage.sync import OpenFile

WRITES = 50_000
IMPORTS = 10
DAY = date(2024, 8, 12)

# The event that Omni's documentation shows, of a cluster with a longer name: 603 bytes.
NAME = "talos-production-eu-central-1-blue-02"
SESSION = Session(
    user_agent="Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/127.0.0.0 Safari/537.36",
    ip_address="10.1.2.3",
    user_id="fa02ea7c-6eb1-491e-b053-b5db63a4384f",
    role="Admin",
    email="user@example.com",
    fingerprint="0263efb13f3b5016507ec11ba71a96f5fced3a4d",
)
CLUSTER = {
    "id": NAME,
    "features": {},
    "kubernetes_version": "1.30.1",
    "talos_version": "1.7.4",
}
EVENT = Event(
    event_type="create",
    resource_type="Clusters.omni.sidero.dev",
    resource_id=NAME,
    event_data=EventData.model_validate({"cluster": CLUSTER}),
)
RECORD = {
    "event_type": "create",
    "resource_type": "Clusters.omni.sidero.dev",
    "resource_id": NAME,
    "event_ts": 1723466435280,
    "event_data": {"cluster": CLUSTER, "session": SESSION.model_dump(exclude_defaults=True)},
}


class Timed(NamedTuple):
    """How long it took, in seconds, and how many events that were."""

    seconds: float
    events: int


def make_day(directory: Path, events: int) -> None:
    """A day file with so many events, each a little different."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / f"{DAY}.jsonlog").open("wb", buffering=1 << 20) as file:
        for number in range(events):
            file.write(orjson.dumps(RECORD | {"resource_id": f"{NAME[:-4]}{number % 5000:04}"}) + b"\n")


def timed(work: Callable[[], int]) -> Timed:
    start = time.perf_counter()
    events = work()
    return Timed(time.perf_counter() - start, events)


# ---------------------------------------------------------------------- writing


def write_raw(own: Path, _log: Path) -> Timed:
    """One ready dict, orjson.dumps, os.write to an O_APPEND descriptor."""
    own.mkdir()
    fd = os.open(own / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def work() -> int:
        for _ in range(WRITES):
            os.write(fd, orjson.dumps(RECORD) + b"\n")
        return WRITES

    return timed(work)


def create(own: Path, log: AuditLogger) -> Timed:
    """`create` one event after the other."""

    def work() -> int:
        for _ in range(WRITES):
            log.create("Clusters.omni.sidero.dev", NAME, cluster=CLUSTER)
        return WRITES

    with log:
        log.create("Clusters.omni.sidero.dev", NAME, cluster=CLUSTER)
        return timed(work)


def write_create(own: Path, _log: Path) -> Timed:
    """With a bound session, fsync="interval"."""
    log = AuditLogger(own)
    with log.session(SESSION):
        return create(own, log)


def write_create_unbound(own: Path, _log: Path) -> Timed:
    """The same by the internal agent."""
    return create(own, AuditLogger(own))


def write_create_never(own: Path, _log: Path) -> Timed:
    """With a bound session, fsync="never"."""
    log = AuditLogger(own, fsync="never")
    with log.session(SESSION):
        return create(own, log)


def write_many(own: Path, _log: Path) -> Timed:
    """`write_many` of 64 typed events at a time, fsync="interval"."""
    events = [EVENT] * 64

    def work() -> int:
        for _ in range(WRITES // 64):
            log.write_many(events)
        return WRITES // 64 * 64

    with AuditLogger(own) as log, log.session(SESSION):
        log.write_many(events)
        return timed(work)


def write_create_unredacted(own: Path, _log: Path) -> Timed:
    """With a bound session, without looking for secrets."""
    log = AuditLogger(own, redact_defaults=False)
    with log.session(SESSION):
        return create(own, log)


def append(own: Path, kind: type[CurrentFile]) -> Timed:
    """Appending a ready line, without encoding it, with this way to see that the file is right."""
    with AuditLogger(own, fsync="never", retention=None) as log:
        log.create("Clusters.omni.sidero.dev", NAME, cluster=CLUSTER)
        assert log._engine is not None
        writer = log._engine.writer
        line = encode(
            "create", "Clusters.omni.sidero.dev", NAME, {"cluster": CLUSTER}, encode_session(SESSION)
        )
        writer._current.__class__ = kind

        def work() -> int:
            for _ in range(WRITES):
                writer.append((line,))
            return WRITES

        return timed(work)


class TrustedFile(CurrentFile):
    """A day file that nobody else touches, on a day that does not end."""

    def ready(self, now_ns: int) -> tuple[OpenFile, int]:
        assert self._file is not None
        return self._file, self.end


def append_unchecked(own: Path, _log: Path) -> Timed:
    """An append that takes the lock, and looks at neither the directory, nor the day, nor the file."""
    return append(own, TrustedFile)


def append_checked(own: Path, _log: Path) -> Timed:
    """An append as it is."""
    return append(own, CurrentFile)


# ---------------------------------------------------------------------- syncing


def in_threads(count: int, events: int, act: Callable[[int], object]) -> Timed:
    """`act`, called with the number of its thread, `events` times in each of `count` threads."""

    def act_often(number: int) -> None:
        with bind(SESSION):
            for _ in range(events):
                act(number)

    def work() -> int:
        threads = [threading.Thread(target=act_often, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count * events

    return timed(work)


def sync_raw(own: Path, threads: int, events: int) -> Timed:
    """Each thread writes and syncs for itself, to a descriptor of its own."""
    own.mkdir()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = [os.open(own / "raw", flags, 0o600) for _ in range(threads)]

    def act(number: int) -> None:
        os.write(files[number], orjson.dumps(RECORD) + b"\n")
        os.fdatasync(files[number])

    return in_threads(threads, events, act)


def sync_create(own: Path, threads: int, events: int) -> Timed:
    """Each thread calls `create`, fsync="always"."""

    def act(_number: int) -> None:
        log.create("Clusters.omni.sidero.dev", NAME, cluster=CLUSTER)

    with AuditLogger(own, fsync="always", retention=None) as log:
        act(0)
        return in_threads(threads, events, act)


def sync_raw_1(own: Path, _log: Path) -> Timed:
    """One thread that writes and syncs."""
    return sync_raw(own, 1, 4000)


def sync_create_1(own: Path, _log: Path) -> Timed:
    """`create` in one thread, fsync="always"."""
    return sync_create(own, 1, 4000)


def sync_raw_64(own: Path, _log: Path) -> Timed:
    """64 threads that each write and sync for themselves."""
    return sync_raw(own, 64, 200)


def sync_create_64(own: Path, _log: Path) -> Timed:
    """`create` in 64 threads, fsync="always"."""
    return sync_create(own, 64, 200)


def sync_awrite_64(own: Path, _log: Path) -> Timed:
    """`awrite` in 64 tasks, fsync="always"."""

    async def act(log: AuditLogger) -> None:
        with log.session(SESSION):
            for _ in range(1000):
                await log.awrite(EVENT)

    async def act_all(log: AuditLogger) -> int:
        await asyncio.gather(*(act(log) for _ in range(64)))
        return 64 * 1000

    with AuditLogger(own, fsync="always", retention=None) as log:
        log.write(EVENT)
        return timed(lambda: asyncio.run(act_all(log)))


# ---------------------------------------------------------------------- reading


def read_raw_lines(_own: Path, log: Path) -> Timed:
    """`for line in open(file, "rb", 256 KiB)`."""

    def work() -> int:
        count = 0
        with (log / f"{DAY}.jsonlog").open("rb", buffering=256 * 1024) as file:
            for _line in file:
                count += 1
        return count

    return timed(work)


def read_lines(_own: Path, log: Path) -> Timed:
    """`entry.line` and `entry.position` of each."""

    def work() -> int:
        count = 0
        for entry in AuditReader(log).read():
            entry.line, entry.position  # noqa: B018
            count += 1
        return count

    return timed(work)


def read_raw_records(_own: Path, log: Path) -> Timed:
    """The raw loop with `orjson.loads` of each line."""

    def work() -> int:
        count = 0
        loads = orjson.loads
        with (log / f"{DAY}.jsonlog").open("rb", buffering=256 * 1024) as file:
            for line in file:
                loads(line)
                count += 1
        return count

    return timed(work)


def read_records(_own: Path, log: Path) -> Timed:
    """`entry.record` of each."""

    def work() -> int:
        count = 0
        for entry in AuditReader(log).read():
            entry.record  # noqa: B018
            count += 1
        return count

    return timed(work)


def read_events(_own: Path, log: Path) -> Timed:
    """`entry.event` of each."""

    def work() -> int:
        count = 0
        for entry in AuditReader(log).read():
            entry.event  # noqa: B018
            count += 1
        return count

    return timed(work)


def read_last_20(_own: Path, log: Path) -> Timed:
    """The newest 20 entries."""
    return timed(lambda: sum(1 for _ in AuditReader(log).read(newest_first=True, limit=20)))


# ---------------------------------------------------------------------- importing


def imports(statement: str) -> Timed:
    """Starting an interpreter that imports, less starting one that does not."""

    def work(code: str) -> int:
        for _ in range(IMPORTS):
            subprocess.run([sys.executable, "-c", code], check=True)
        return IMPORTS

    work(statement)
    bare = timed(lambda: work("pass"))
    loaded = timed(lambda: work(statement))
    return Timed(loaded.seconds - bare.seconds, IMPORTS)


def import_raw(_own: Path, _log: Path) -> Timed:
    """`import pydantic, orjson`."""
    return imports("import pydantic, orjson")


def import_package(_own: Path, _log: Path) -> Timed:
    """`import auditlog`."""
    return imports("import auditlog")


async def bare_app(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An ASGI app that answers at once."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def requests(app: App) -> Timed:
    """Requests to an ASGI app, as a server hands them over, without any event."""
    headers = [(b"host", b"example.com"), (b"user-agent", SESSION.user_agent.encode())]
    headers += [(b"x-request-id", b"r-1"), (b"authorization", b"Bearer x"), (b"x-forwarded-for", b"10.1.2.3")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("10.0.0.1", 4711)}

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(_message: Message) -> None:
        pass

    async def work() -> int:
        for _ in range(WRITES):
            await app(scope, receive, send)
        return WRITES

    return timed(lambda: asyncio.run(work()))


def request_bare(_own: Path, _log: Path) -> Timed:
    """A bare ASGI app."""
    return requests(bare_app)


def request_captured(_own: Path, _log: Path) -> Timed:
    """The same with a session to capture."""
    return requests(AuditMiddleware(bare_app, session_from=lambda _: SESSION, trusted_proxies=["10.0.0.0/8"]))


def import_logger(_own: Path, _log: Path) -> Timed:
    """`from auditlog import AuditLogger`."""
    return imports("from auditlog import AuditLogger")


class Case(NamedTuple):
    """A thing that is measured, and the raw case that it is compared with."""

    run: Callable[[Path, Path], Timed]
    baseline: str


CASES = {
    "write raw": Case(write_raw, "write raw"),
    "create, session bound": Case(write_create, "write raw"),
    "create, no session": Case(write_create_unbound, "write raw"),
    'create, fsync="never"': Case(write_create_never, "write raw"),
    "create, no redaction": Case(write_create_unredacted, "write raw"),
    "write_many of 64": Case(write_many, "write raw"),
    "append, unchecked": Case(append_unchecked, "append, unchecked"),
    "append": Case(append_checked, "append, unchecked"),
    "sync raw, 1 thread": Case(sync_raw_1, "sync raw, 1 thread"),
    "create + sync, 1 thread": Case(sync_create_1, "sync raw, 1 thread"),
    "sync raw, 64 threads": Case(sync_raw_64, "sync raw, 64 threads"),
    "create + sync, 64 threads": Case(sync_create_64, "sync raw, 64 threads"),
    "awrite + sync, 64 tasks": Case(sync_awrite_64, "sync raw, 64 threads"),
    "read raw lines": Case(read_raw_lines, "read raw lines"),
    "entry.line, .position": Case(read_lines, "read raw lines"),
    "read raw records": Case(read_raw_records, "read raw records"),
    "entry.record": Case(read_records, "read raw records"),
    "entry.event": Case(read_events, "read raw records"),
    "last 20 entries": Case(read_last_20, "last 20 entries"),
    "request, bare ASGI app": Case(request_bare, "request, bare ASGI app"),
    "request, captured": Case(request_captured, "request, bare ASGI app"),
    "import pydantic, orjson": Case(import_raw, "import pydantic, orjson"),
    "import auditlog": Case(import_package, "import pydantic, orjson"),
    "import AuditLogger": Case(import_logger, "import pydantic, orjson"),
}
