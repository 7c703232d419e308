from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from auditlog import Session
from auditlog.capture import current
from auditlog.capture.grpc import AioAuditInterceptor
from auditlog.testing import RecordedLog
from tests.capture.grpc.helpers import (
    KINDS,
    STYLES,
    Aio,
    Handlers,
    Style,
    Threads,
    actors,
    call,
    call_on,
    generators,
    generic,
    give_up,
    plain,
    refused,
    session_of,
    who,
    who_async,
)
from tests.capture.helpers import records, snippet
from tests.helpers import until


@pytest.mark.parametrize("method", KINDS)
def test_each_step_of_a_call_has_the_session_of_its_caller(
    style: Style, log: RecordedLog, method: str
) -> None:
    server = style.server
    with server.serve(style.handlers(log.audit), server.audit(session_from=who)) as address:
        call(address, method, user="alice", x_request_id="r-1")
    assert len(log.records) == {"one": 1, "many": 3, "collect": 2, "chat": 2}[method]
    for record in log.records:
        session = session_of(record)
        assert session["email"] == "alice@example.com"
        assert session["ip_address"] == "127.0.0.1"
        assert session["user_agent"].startswith("grpc-python/")
        assert record["event_data"]["audit"] == {"request_id": "r-1"}


@pytest.mark.parametrize("style_name", ["plain", "coroutines", "generators"])
@pytest.mark.parametrize("method", KINDS)
def test_a_coroutine_function_finds_the_session_before_the_handler(
    aio: Aio, log: RecordedLog, style_name: str, method: str
) -> None:
    asked = []

    async def ask(context: Any) -> Session | None:
        asked.append(context.peer())
        log.audit.create("Questions")  # belongs to the call, too, though nobody knows whose it is
        return await who_async(context)

    handlers = STYLES[style_name](log.audit)
    with aio.serve(handlers, AioAuditInterceptor(session_from=ask)) as address:
        call(address, method, user="alice")
    assert len(asked) == 1
    question, *others = log.records
    assert session_of(question)["ip_address"] == "127.0.0.1"
    assert others
    assert all(session_of(record)["email"] == "alice@example.com" for record in others)


def test_what_a_step_binds_is_bound_in_the_next(server: Threads, log: RecordedLog) -> None:
    def many(request: bytes, context: Any) -> Iterator[bytes]:
        with log.audit.session(Session(email="job@example.com")):
            for step in b"01":
                log.audit.create("Calls", f"{step:c}")
                yield b"%c" % step
        log.audit.create("Calls", "2")

    async def many2(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for response in many(request, context):
            yield response

    name = "many2" if isinstance(server, Aio) else "many"
    with server.serve({"many": many, "many2": many2}, server.audit(session_from=who)) as address:
        call(address, name, user="alice")
    job = "job@example.com"
    assert actors(log) == [("0", job), ("1", job), ("2", "alice@example.com")]


def test_concurrent_calls_never_mix(style: Style, log: RecordedLog) -> None:
    users = [f"user{number}" for number in range(12)]
    meet = threading.Barrier(len(users))

    def client(address: str, user: str) -> None:
        with grpc.insecure_channel(address) as channel:
            meet.wait()
            for _ in range(3):
                for method in KINDS:
                    call_on(channel, method, f"{user}/".encode(), user=user)

    server = style.server
    with (
        server.serve(style.handlers(log.audit), server.audit(session_from=who), workers=4) as address,
        ThreadPoolExecutor(len(users)) as clients,
    ):
        list(clients.map(partial(client, address), users))
    assert len(log.records) == len(users) * 3 * 8
    for resource_id, email in actors(log):
        assert email == f"{resource_id.partition('/')[0]}@example.com"


def test_a_failing_handler_leaks_no_session(style: Style, log: RecordedLog) -> None:
    def fail(request: Any, context: Any) -> bytes:
        log.audit.create("Calls", "failing")
        raise ValueError("the handler failed")

    def fail_late(request: Any, context: Any) -> Iterator[bytes]:
        yield b"first"
        fail(request, context)

    async def afail(request: Any, context: Any) -> bytes:
        return fail(request, context)

    async def afail_late(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        fail(request, context)

    handlers: Handlers = {"one": afail, "many": afail_late, "collect": afail, "chat": afail_late}
    if style.handlers is plain:
        handlers = {"one": fail, "many": fail_late, "collect": fail, "chat": fail_late}
    server = style.server
    with server.serve(handlers, server.audit(session_from=who), workers=1) as address:
        for method in KINDS:
            error = refused(address, method, user="alice")
            assert error.code() is grpc.StatusCode.UNKNOWN
            assert "the handler failed" in error.details()
        assert server.pool.submit(current).result() is None
        log.audit.create("Calls", "of nobody")
    assert actors(log) == [("failing", "alice@example.com")] * 4 + [("of nobody", "")]


def test_an_event_without_a_known_user_has_address_and_agent(server: Threads, log: RecordedLog) -> None:
    handlers = plain(log.audit)
    with server.serve(handlers, server.audit()) as address:
        call(address, "one")
    session = session_of(log.records[0])
    assert set(session) == {"ip_address", "user_agent"}


def test_nothing_is_bound_where_the_responses_are_iterated(server: Threads, log: RecordedLog) -> None:
    seen: list[Any] = []

    def outside(handler: Any) -> Any:
        inner = handler.unary_stream

        def iterate(request: bytes, context: Any) -> Iterator[bytes]:
            for response in inner(request, context):
                seen.append(current())
                yield response
            seen.append(current())

        async def aiterate(request: bytes, context: Any) -> AsyncIterator[bytes]:
            async for response in inner(request, context):
                seen.append(current())
                yield response
            seen.append(current())

        return grpc.unary_stream_rpc_method_handler(aiterate if isinstance(server, Aio) else iterate)

    style = generators if isinstance(server, Aio) else plain
    interceptors = (server.interceptor(outside), server.audit(session_from=who))
    with server.serve(style(log.audit), *interceptors) as address:
        call(address, "many", user="alice")
    assert seen == [None] * 4
    assert {email for _, email in actors(log)} == {"alice@example.com"}


def test_what_a_given_up_stream_does_last_has_its_session(server: Threads, log: RecordedLog) -> None:
    def many(request: bytes, context: Any) -> Iterator[bytes]:
        try:
            while True:
                yield b"more"
        finally:
            log.audit.create("Calls", request.decode())

    async def amany(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
        finally:
            await asyncio.sleep(0)
            log.audit.create("Calls", request.decode())

    async def waiting(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await asyncio.Event().wait()
        finally:
            log.audit.create("Calls", request.decode())

    handlers = {"many": amany, "many2": waiting} if isinstance(server, Aio) else {"many": many}
    with server.serve(handlers, server.audit(session_from=who), workers=1) as address:
        for method in handlers:
            for user in ("alice", "bob"):
                give_up(address, method, user)
                until(lambda user=user: user in dict(actors(log)))  # type: ignore[misc]
        assert server.pool.submit(current).result() is None
    expected = [("alice", "alice@example.com"), ("bob", "bob@example.com")]
    assert actors(log) == expected * len(handlers)


def test_a_task_that_outlives_its_call_keeps_the_session(aio: Aio, log: RecordedLog) -> None:
    ended = threading.Event()
    tasks = []

    def ask(context: Any) -> Session | None:
        assert context.peer().startswith("ipv4:127.0.0.1:")
        assert context.auth_context()["transport_security_type"] == [b"insecure"]
        assert context.peer_identities() is context.peer_identity_key() is None
        return who(context)

    async def later() -> None:
        await asyncio.to_thread(ended.wait)
        log.audit.create("Calls", "later")

    async def one(request: bytes, context: Any) -> bytes:
        tasks.append(asyncio.create_task(later()))
        return b""

    with aio.serve({"one": one}, AioAuditInterceptor(session_from=ask)) as address:
        call(address, "one", user="alice")
    ended.set()
    until(lambda: log.records)
    assert actors(log) == [("later", "alice@example.com")]


def test_the_snippet_records_who_calls_from_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("gRPC")
    server, audit = names["server"], names["audit"]
    server.add_generic_rpc_handlers((generic(plain(audit)),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        call(address, "one", authorization="Bearer s3cret", cluster="talos-default", nodes="10.5.0.2")
    finally:
        server.stop(None).wait()
        audit.close()
    access, event = records(tmp_path / "audit-log")
    assert access["event_type"] == "talos_access"
    assert event["resource_id"] == "1"
    for record in (access, event):
        assert session_of(record)["email"] == "alice@example.com"
        assert session_of(record)["ip_address"] == "127.0.0.1"
