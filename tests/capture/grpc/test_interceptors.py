from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from auditlog import InvalidSetting, Session
from auditlog.capture import identify
from auditlog.capture.grpc import AioAuditInterceptor, AuditInterceptor
from auditlog.capture.talos import AioTalosAccess, TalosAccess
from auditlog.testing import RecordedLog
from tests.capture.grpc.helpers import (
    KINDS,
    Aio,
    Style,
    Threads,
    actors,
    call,
    coroutines,
    plain,
    refused,
    session_of,
    who,
    who_async,
)


def test_an_interceptor_identifies_while_it_looks_for_the_handler(style: Style, log: RecordedLog) -> None:
    def authenticate(handler: Any) -> Any:
        identify(Session(user_id="7", email="alice@example.com"))
        log.audit.create("Logins")
        return handler

    server = style.server
    interceptors = (server.audit(), server.interceptor(authenticate), server.interceptor())
    with server.serve(style.handlers(log.audit), *interceptors) as address:
        for method in KINDS:
            call(address, method)
        call(address, "one")
    logins = [record for record in log.records if record["resource_type"] == "Logins"]
    others = [record for record in log.records if record["resource_type"] == "Calls"]
    assert len(logins) == 5
    assert len(others) == 9
    assert all(session_of(record)["email"] == "alice@example.com" for record in logins + others)
    assert all("ip_address" not in session_of(record) for record in logins)  # gRPC does not tell it yet
    assert all(session_of(record)["ip_address"] == "127.0.0.1" for record in others)


def test_an_interceptor_identifies_around_the_handler(server: Threads, log: RecordedLog) -> None:
    def authenticate(handler: Any) -> Any:
        def handle(request: bytes, context: Any) -> Any:
            identify(Session(email=f"{request.decode()}@example.com"))
            return handler.unary_unary(request, context)

        async def ahandle(request: bytes, context: Any) -> Any:
            identify(Session(email=f"{request.decode()}@example.com"))
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(ahandle if isinstance(server, Aio) else handle)

    style = coroutines if isinstance(server, Aio) else plain
    interceptors = (server.audit(), server.interceptor(authenticate))
    with server.serve(style(log.audit), *interceptors, workers=1) as address:
        call(address, "one", b"alice")
        call(address, "one", b"bob")
    assert actors(log) == [("alice", "alice@example.com"), ("bob", "bob@example.com")]


def test_unknown_methods_stay_unknown(server: Threads, log: RecordedLog) -> None:
    interceptors = (server.audit(session_from=who), server.talos(log.audit))
    with server.serve({}, *interceptors) as address:
        assert refused(address, "one").code() is grpc.StatusCode.UNIMPLEMENTED
    assert log.records == []


def test_a_handler_that_does_not_block_stays_one(log: RecordedLog) -> None:
    def many(request: bytes, context: Any, respond: Callable[[bytes | None], None]) -> None:
        log.audit.create("Calls", request.decode())
        respond(b"one")
        respond(None)

    many.experimental_non_blocking = True  # type: ignore[attr-defined]
    interceptors = (AuditInterceptor(session_from=who), TalosAccess(log.audit))
    with Threads().serve({"many": many}, *interceptors) as address:
        assert call(address, "many", user="alice") == [b"one"]
    assert actors(log) == [("", "alice@example.com"), ("1", "alice@example.com")]


def test_a_function_may_return_any_iterator(server: Threads, log: RecordedLog) -> None:
    class Countdown:
        left = 2

        def __iter__(self) -> Countdown:
            return self

        def __next__(self) -> bytes:
            log.audit.create("Calls", str(self.left))
            if not self.left:
                raise StopIteration
            self.left -= 1
            return b"%d" % self.left

    with server.serve(
        {"many": lambda request, context: Countdown()}, server.audit(session_from=who)
    ) as address:
        assert call(address, "many", user="alice") == [b"1", b"0"]
    assert actors(log) == [(step, "alice@example.com") for step in "210"]


def test_the_peer_is_the_address_unless_it_is_a_trusted_proxy(
    server: Threads, log: RecordedLog, tmp_path: Path
) -> None:
    handlers = plain(log.audit)

    def address_at(where: str, *trusted: str) -> str:
        with server.serve(handlers, server.audit(trusted_proxies=trusted), address=where) as address:
            call(address, "one", x_forwarded_for="203.0.113.9")
        return str(session_of(log.records[-1]).get("ip_address", ""))

    assert address_at("127.0.0.1:0") == "127.0.0.1"
    assert address_at("[::1]:0") == "::1"
    assert address_at(f"unix:{tmp_path}/socket") == ""
    assert address_at("127.0.0.1:0", "127.0.0.0/8") == "203.0.113.9"
    assert address_at("[::1]:0", "::1") == "203.0.113.9"
    assert address_at(f"unix:{tmp_path}/socket", "unix") == "203.0.113.9"
    assert address_at("127.0.0.1:0", "unix") == "127.0.0.1"


def test_while_the_peer_is_not_known_no_header_tells_the_address(server: Threads, log: RecordedLog) -> None:
    def record(handler: Any) -> Any:
        log.audit.create("Lookups")
        return handler

    interceptors = (server.audit(trusted_proxies=["unix", "0.0.0.0/0"]), server.interceptor(record))
    with server.serve(plain(log.audit), *interceptors) as address:
        call(address, "one", x_forwarded_for="203.0.113.9")
    assert [session_of(record).get("ip_address") for record in log.records] == [None, "203.0.113.9"]


def test_settings_that_make_no_sense_are_refused_at_once(log: RecordedLog) -> None:
    with pytest.raises(InvalidSetting, match="session_from"):
        AuditInterceptor(session_from=who_async)  # type: ignore[arg-type]
    for interceptor in (AuditInterceptor, AioAuditInterceptor):
        with pytest.raises(InvalidSetting, match="session_from"):
            interceptor(session_from="alice")  # type: ignore[arg-type]
        with pytest.raises(InvalidSetting, match="trusted_proxies"):
            interceptor(trusted_proxies="10.0.0.0/8")
        with pytest.raises(InvalidSetting, match="forwarded_header"):
            interceptor(forwarded_header="via")  # type: ignore[arg-type]
    for recorder in (TalosAccess, AioTalosAccess):
        with pytest.raises(InvalidSetting, match="target_from"):
            recorder(log.audit, target_from=who_async)  # type: ignore[arg-type]
        with pytest.raises(InvalidSetting, match="is_audited"):
            recorder(log.audit, is_audited="all")  # type: ignore[arg-type]


def test_what_finds_the_session_fails_the_call_and_nothing_else(style: Style, log: RecordedLog) -> None:
    def ask(context: Any) -> Any:
        if dict(context.invocation_metadata()).get("user") != "alice":
            raise LookupError("no such user")
        return who(context)

    server = style.server
    with server.serve(style.handlers(log.audit), server.audit(session_from=ask), workers=1) as address:
        for method in KINDS:
            assert "no such user" in refused(address, method).details()
        call(address, "one", user="alice")
    assert actors(log) == [("1", "alice@example.com")]
