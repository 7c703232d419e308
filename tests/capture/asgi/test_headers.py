from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from auditlog import Event, EventData
from auditlog.capture.asgi import (
    App,
    AuditMiddleware,
    Receive,
    Scope,
    Send,
)
from auditlog.testing import RecordedLog
from tests.capture.asgi.helpers import (
    Serve,
    answer,
    client,
    recorder,
    request_ids,
    sessions,
)
from tests.helpers import until


@pytest.mark.parametrize(
    ("trusted", "address"), [([], "127.0.0.7"), (["127.0.0.7"], "192.0.2.1"), (["10.0.0.0/8"], "127.0.0.7")]
)
def test_the_address_is_that_of_the_client_as_trusted_proxies_tell_it(
    log: RecordedLog, trusted: list[str], address: str, serve: Serve
) -> None:
    app = AuditMiddleware(recorder(log), trusted_proxies=trusted)
    with serve(app) as site, client(site, local="127.0.0.7") as http:
        http.get("/", headers=[("X-Forwarded-For", "203.0.113.66"), ("x-forwarded-for", "192.0.2.1")])
    assert sessions(log)[0]["ip_address"] == address


def test_the_header_that_counts_may_be_fixed(log: RecordedLog, serve: Serve) -> None:
    headers = {"X-Forwarded-For": "192.0.2.1", "Forwarded": 'for="[2001:db8::1]:80"'}
    for fixed in ("x-forwarded-for", "forwarded", None):
        header: Any = fixed
        app = AuditMiddleware(recorder(log), trusted_proxies=["127.0.0.1"], forwarded_header=header)
        with serve(app) as site, client(site) as http:
            http.get("/", headers=headers)
    assert [session["ip_address"] for session in sessions(log)] == ["192.0.2.1", "2001:db8::1", "127.0.0.1"]


@pytest.mark.parametrize(("trusted", "address"), [(["unix"], "192.0.2.1"), (["127.0.0.1"], "")])
def test_a_proxy_at_a_unix_socket_is_believed_only_where_that_is_trusted(
    log: RecordedLog, tmp_path: Path, trusted: list[str], address: str
) -> None:
    path = str(tmp_path / "site")
    app = AuditMiddleware(recorder(log), trusted_proxies=trusted)
    with serve_unix(app, path), httpx.Client(transport=httpx.HTTPTransport(uds=path)) as http:
        http.get("http://site/", headers={"X-Forwarded-For": "203.0.113.66, 192.0.2.1"})
    assert sessions(log)[0].get("ip_address", "") == address


@contextmanager
def serve_unix(app: App, path: str) -> Iterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    with serve_sockets(app, listener):
        yield


@contextmanager
def serve_sockets(app: App, listener: socket.socket) -> Iterator[None]:
    """A real uvicorn at a socket that is already there."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", proxy_headers=False, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join()


def test_a_client_that_is_gone_at_once_does_not_pass_for_a_unix_socket(log: RecordedLog) -> None:
    app = AuditMiddleware(recorder(log), trusted_proxies=["unix"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
            sender.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.66\r\n\r\n")
        with serve_sockets(app, listener):
            until(lambda: log.records)
    assert sessions(log)[0].get("ip_address", "") in ("", "127.0.0.1")


USER_AGENTS: list[tuple[bytes, str]] = [
    (b"kubectl/1.30", "kubectl/1.30"),
    (b"", ""),
    (b"a\x1b[31mred\x07\x7fb", "a\ufffd[31mred\ufffd\ufffdb"),
    ("a\x85\u2028\u2029b".encode(), "a\ufffd\ufffd\ufffdb"),
    ("Größe 日本 🔑".encode(), "Größe 日本 🔑"),
    ("Größe".encode("latin-1"), "Größe"),
    (b"a\xff\x9b31m", "aÿ\ufffd31m"),
    (b"x" * 512, "x" * 512),
    (b"x" * 513, "x" * 511 + "…"),
    (b"x" * 102_400, "x" * 511 + "…"),
    ("ß".encode() * 51_200, "ß" * 511 + "…"),
]


def test_what_a_header_says_is_cleaned_and_bounded(log: RecordedLog, serve: Serve) -> None:
    app = AuditMiddleware(recorder(log))
    with serve(app) as site, client(site) as http:
        for sent, _ in USER_AGENTS:
            headers: Any = [(b"User-Agent", sent)]
            assert http.get("/", headers=headers).is_success
    assert [session.get("user_agent", "") for session in sessions(log)] == [kept for _, kept in USER_AGENTS]


REQUEST_IDS: list[tuple[list[str], str]] = [
    ([], ""),
    ([""], ""),
    (["0f8fad5b-d9cb-469f-a165-70867728950e"], "0f8fad5b-d9cb-469f-a165-70867728950e"),
    (["Root=1-67891233-abcdef012345678912345678"], "Root=1-67891233-abcdef012345678912345678"),
    (["r" * 128], "r" * 128),
    (["r" * 129], ""),
    (["r" * 60_000], ""),
    (["two words"], ""),
    (['quo"te'], ""),
    (["<script>"], ""),
    (["a\x1b[31m"], ""),
    (["é"], ""),
    (["first", "second"], "first"),
    (["not good", "second"], ""),
]


def test_a_request_id_is_kept_where_it_is_well_formed(log: RecordedLog, serve: Serve) -> None:
    with serve(AuditMiddleware(recorder(log))) as site, client(site) as http:
        for sent, _ in REQUEST_IDS:
            headers: Any = [(b"X-Request-ID", value.encode()) for value in sent]
            assert http.get("/", headers=headers).is_success
    assert request_ids(log) == [kept for _, kept in REQUEST_IDS]
    assert all(
        ("audit" in record["event_data"]) == bool(kept)
        for record, kept in zip(log.records, request_ids(log), strict=True)
    )


def test_an_event_of_another_time_or_request_keeps_its_own(log: RecordedLog, serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        data = EventData.model_validate({"audit": {"request_id": "own", "action": "import"}})
        log.audit.write(Event(event_type="create", event_ts=1_700_000_000_000))
        log.audit.write(Event(event_type="create", event_data=data))
        log.audit.create("Thing", audit={"request_id": "own"})
        log.audit.create("Thing", audit={"action": "import"})
        await answer(send)

    with serve(AuditMiddleware(app)) as site, client(site) as http:
        http.get("/", headers={"X-Request-ID": "r-1"})
    assert sorted(request_ids(log)) == ["", "own", "own", "r-1"]
    actions = [record["event_data"].get("audit", {}).get("action") for record in log.records]
    assert actions.count("import") == 2
