from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from auditlog import AuditLogger, InvalidEvent, Session
from auditlog.capture import identify
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.grpc.helpers import (
    DENIED,
    KINDS,
    SERVICE,
    STYLES,
    UNKNOWN_CALLER,
    Aio,
    Style,
    Threads,
    actors,
    call,
    coroutines,
    give_up,
    plain,
    refused,
    session_of,
    statuses,
    who,
)
from tests.helpers import until


@pytest.mark.parametrize("method", KINDS)
def test_each_talos_call_is_recorded_before_it_is_handled(
    style: Style, log: RecordedLog, method: str
) -> None:
    server = style.server
    interceptors = (server.audit(session_from=who), server.talos(log.audit))
    with server.serve(style.handlers(log.audit), *interceptors) as address:
        call(address, method, user="alice", cluster="talos-default", nodes="10.5.0.2")
    access, *others = log.records
    assert access["event_type"] == "talos_access"
    assert access["event_data"]["talos_access"] == {
        "full_method_name": f"{SERVICE}/{method}",
        "cluster_name": "talos-default",
        "machine_ip": "10.5.0.2",
    }
    assert session_of(access)["email"] == "alice@example.com"
    assert [record["event_type"] for record in others] == ["create"] * len(others)


def test_the_target_is_all_that_the_metadata_of_talos_says(server: Threads, log: RecordedLog) -> None:
    pairs: list[tuple[tuple[str, str], ...]] = [
        (("context", "c"), ("node", "10.5.0.4"), ("nodes", "10.5.0.2"), ("nodes", "::3")),
        (("cluster", "a"), ("context", "c"), ("nodes", "10.5.0.2,10.5.0.3")),
        (),
    ]
    with (
        server.serve(plain(log.audit), server.talos(log.audit)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        unary: Any = channel.unary_unary
        for metadata in pairs:
            unary(f"/{SERVICE}/one")(b"1", metadata=metadata)
    targets = [
        (access.get("cluster_name"), access.get("machine_ip"))
        for record in log.records
        if (access := record["event_data"].get("talos_access"))
    ]
    assert targets == [("c", "10.5.0.2,::3,10.5.0.4"), ("a", "10.5.0.2,10.5.0.3"), (None, None)]


def test_target_and_methods_are_a_matter_of_choice(server: Threads, log: RecordedLog) -> None:
    talos = server.talos(
        log.audit,
        target_from=lambda context: ("mine", dict(context.invocation_metadata())["machine"]),
        is_audited=lambda method: method != f"{SERVICE}/many",
    )
    with server.serve(plain(log.audit), talos) as address:
        call(address, "many")
        call(address, "one", machine="10.5.0.9")
    accesses = [record["event_data"].get("talos_access") for record in log.records]
    assert accesses == [
        None,
        None,
        None,
        {"full_method_name": f"{SERVICE}/one", "cluster_name": "mine", "machine_ip": "10.5.0.9"},
        None,
    ]


@pytest.mark.parametrize("method", ["one", "many"])
@pytest.mark.parametrize("manner", ["abort", "set"])
@pytest.mark.parametrize("name", STYLES)
def test_refused_calls_are_recorded_as_such(
    aio: Aio, log: RecordedLog, name: str, manner: str, method: str
) -> None:
    server = Threads() if name == "threads" else aio
    interceptors = (server.audit(session_from=who), server.talos(log.audit))
    with server.serve(statuses(log.audit, name), *interceptors) as address:
        for code, count in ((DENIED, 2), (UNKNOWN_CALLER, 4), (grpc.StatusCode.NOT_FOUND, 5)):
            error = refused(address, method, f"{manner} {code.name}".encode(), user="alice")
            assert error.code() is code
            assert error.details() == ("not you" if manner == "abort" else "")
            # An abort in grpc.aio is answered before it is recorded.
            until(lambda count=count: len(log.records) == count)  # type: ignore[misc]
    first, denial, second, other, third = log.entries
    assert [entry.event.event_type for entry in (first, second, third)] == ["talos_access"] * 3
    for access, refusal in ((first, denial), (second, other)):
        record = refusal.record
        assert record["event_type"] == "access_denied"
        assert record["event_data"]["audit"] == {
            "action": "talos_access",
            "outcome": "denied",
            "intent": str(access.position),
        }
        assert record["event_data"]["talos_access"] == access.record["event_data"]["talos_access"]
        assert session_of(record)["email"] == "alice@example.com"


def test_what_an_interceptor_refuses_is_recorded(server: Threads, log: RecordedLog) -> None:
    def refuse(handler: Any) -> Any:
        identify(Session(email="mallory@example.com"))

        def terminate(request: bytes, context: Any) -> None:
            context.abort(DENIED, "the role Reader may not do that")

        async def aterminate(request: bytes, context: Any) -> None:
            await context.abort(DENIED, "the role Reader may not do that")

        return grpc.unary_unary_rpc_method_handler(aterminate if isinstance(server, Aio) else terminate)

    interceptors = (server.audit(), server.talos(log.audit), server.interceptor(refuse))
    with server.serve(plain(log.audit), *interceptors) as address:
        assert refused(address, "one").code() is DENIED
    until(lambda: len(log.records) == 2)
    assert [record["event_type"] for record in log.records] == ["talos_access", "access_denied"]
    assert {email for _, email in actors(log)} == {"mallory@example.com"}


@pytest.mark.parametrize("method", KINDS)
def test_a_call_that_cannot_be_recorded_is_not_handled(
    style: Style, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    files = FailingFiles()
    server = style.server
    with recorded_log(files=files) as log, recorded_log() as handled:
        with server.serve(style.handlers(handled.audit), server.talos(log.audit)) as address:
            files.fail("write", errno.ENOSPC)
            error = refused(address, method)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "not handled" in error.details()
            assert str(log.directory) not in error.details()  # the operator's affair, not the client's
            files.heal()
            assert handled.records == []
            call(address, method)
        assert [record["event_type"] for record in log.records] == ["talos_access"]
        assert handled.records
    complaints = [entry for entry in caplog.records if entry.name == "auditlog"]
    assert any(f"{SERVICE}/{method} was not handled" in entry.getMessage() for entry in complaints)


def test_a_call_that_cannot_be_recorded_is_not_handled_even_where_aborting_does_not_raise(
    server: Threads,
) -> None:
    class Lenient:
        def __init__(self, context: Any) -> None:
            self.context = context

        def abort(self, *arguments: Any) -> Any:
            if isinstance(server, Aio):
                return self.aabort(*arguments)
            with suppress(Exception):
                self.context.abort(*arguments)
            return None

        async def aabort(self, *arguments: Any) -> None:
            with suppress(Exception):
                await self.context.abort(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.context, name)

    def outside(handler: Any) -> Any:
        def handle(request: bytes, context: Any) -> Any:
            return handler.unary_unary(request, Lenient(context))

        async def ahandle(request: bytes, context: Any) -> Any:
            return await handler.unary_unary(request, Lenient(context))

        return grpc.unary_unary_rpc_method_handler(ahandle if isinstance(server, Aio) else handle)

    files = FailingFiles()
    style = coroutines if isinstance(server, Aio) else plain
    with recorded_log(files=files) as log, recorded_log() as handled:
        interceptors = (server.interceptor(outside), server.talos(log.audit))
        with server.serve(style(handled.audit), *interceptors) as address:
            files.fail("write", errno.ENOSPC)
            assert refused(address, "one").code() is grpc.StatusCode.UNAVAILABLE
        assert handled.records == []


@pytest.mark.parametrize("name", STYLES)
def test_a_refusal_that_cannot_be_recorded_is_logged_and_stands(
    aio: Aio, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    server = Threads() if name == "threads" else aio
    files = FailingFiles()
    with recorded_log(files=files) as log:
        with server.serve(statuses(log.audit, name), server.talos(log.audit)) as address:
            call_count = files.calls.get("write", 0)
            files.fail("write", errno.ENOSPC, after=1)
            assert refused(address, "one", b"abort PERMISSION_DENIED").code() is DENIED
            until(lambda: "refused is not recorded" in caplog.text)
            assert files.calls["write"] > call_count
            files.heal()
        assert [record["event_type"] for record in log.records] == ["talos_access"]


def test_a_call_that_is_given_up_has_one_event(server: Threads, log: RecordedLog) -> None:
    ended = threading.Event()

    def many(request: bytes, context: Any) -> Iterator[bytes]:
        try:
            while True:
                yield b"more"
        finally:
            ended.set()

    async def amany(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
        finally:
            ended.set()

    handlers = {"many": amany if isinstance(server, Aio) else many}
    with server.serve(handlers, server.audit(session_from=who), server.talos(log.audit)) as address:
        give_up(address, "many", "alice")
        assert ended.wait(20)
    assert actors(log) == [("", "alice@example.com")]


def test_a_session_that_is_no_session_refuses_the_call(server: Threads, log: RecordedLog) -> None:
    wrong: Any = lambda context: "alice"  # noqa: E731
    interceptors = (server.audit(session_from=wrong), server.talos(log.audit))
    with server.serve(plain(log.audit), *interceptors) as address:
        assert refused(address, "one").code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(InvalidEvent):
        identify(Session())  # nothing is left bound here
    assert log.records == []


def test_a_disabled_log_leaves_the_handlers_alone(style: Style) -> None:
    audit = AuditLogger(None)
    server = style.server
    found: list[Any] = []

    def look(handler: Any) -> Any:
        found.append(handler)
        return handler

    interceptors = (server.interceptor(look), server.talos(audit))
    handlers = style.handlers(audit)
    with server.serve(handlers, *interceptors) as address:
        assert call(address, "one") == b"1"
        assert refused(address, "one2").code() is grpc.StatusCode.UNIMPLEMENTED
    assert found[0].unary_unary is handlers["one"]
    assert found[1] is None
