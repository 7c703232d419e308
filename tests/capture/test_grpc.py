from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from auditlog import AuditLogger, InvalidEvent, InvalidSetting, Session
from auditlog.capture import current, identify
from auditlog.capture.grpc import AioAuditInterceptor, AuditInterceptor
from auditlog.capture.talos import AioTalosAccess, TalosAccess
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.helpers import records, snippet
from tests.helpers import until

Handlers = dict[str, Callable[..., Any]]
KINDS = {"one": "unary_unary", "many": "unary_stream", "collect": "stream_unary", "chat": "stream_stream"}
SERVICE = "machine.MachineService"
EOF: Any = vars(grpc.aio)["EOF"]  # type checkers do not know it
DENIED, UNKNOWN_CALLER = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


# ---------------------------------------------------------------------- servers and clients


def generic(handlers: Handlers) -> Any:
    """Handlers by name ("one", or "many2"), whose messages are bytes."""
    made = {}
    for name, handler in handlers.items():
        make = getattr(grpc, f"{KINDS[name.rstrip('0123456789')]}_rpc_method_handler")
        made[name] = make(handler)
    return grpc.method_handlers_generic_handler(SERVICE, made)


class Threads:
    """A grpc.server."""

    audit = AuditInterceptor
    talos = TalosAccess

    @contextmanager
    def serve(
        self, handlers: Handlers, *interceptors: Any, address: str = "127.0.0.1:0", workers: int = 16
    ) -> Iterator[str]:
        with ThreadPoolExecutor(workers) as self.pool:
            server = grpc.server(self.pool, interceptors=list(interceptors))
            server.add_generic_rpc_handlers((generic(handlers),))
            port = server.add_insecure_port(address)
            server.start()
            try:
                yield address if address.startswith("unix:") else address.removesuffix("0") + str(port)
            finally:
                server.stop(None).wait()

    def interceptor(self, look: Callable[[Any], Any] = lambda handler: handler) -> Any:
        """An interceptor that changes the handlers behind it; of None, too."""

        class Changing(grpc.ServerInterceptor):  # type: ignore[type-arg,unused-ignore]
            def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
                return look(continuation(handler_call_details))

        return Changing()


class Aio(Threads):
    """A grpc.aio.server, all of them in one event loop, in a thread of its own."""

    audit = AioAuditInterceptor  # type: ignore[assignment]
    talos = AioTalosAccess  # type: ignore[assignment]

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @contextmanager
    def serve(
        self, handlers: Handlers, *interceptors: Any, address: str = "127.0.0.1:0", workers: int = 16
    ) -> Iterator[str]:
        async def start() -> tuple[Any, int]:
            server = grpc.aio.server(self.pool, interceptors=list(interceptors))
            server.add_generic_rpc_handlers((generic(handlers),))
            port = server.add_insecure_port(address)
            await server.start()
            return server, port

        with ThreadPoolExecutor(workers) as self.pool:
            server, port = asyncio.run_coroutine_threadsafe(start(), self.loop).result()
            try:
                yield address if address.startswith("unix:") else address.removesuffix("0") + str(port)
            finally:
                asyncio.run_coroutine_threadsafe(server.stop(None), self.loop).result()

    def interceptor(self, look: Callable[[Any], Any] = lambda handler: handler) -> Any:
        class Changing(grpc.aio.ServerInterceptor):  # type: ignore[type-arg,unused-ignore]
            async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
                return look(await continuation(handler_call_details))

        return Changing()


@pytest.fixture(scope="module")
def aio() -> Iterator[Aio]:
    server = Aio()
    yield server
    server.stop()


@pytest.fixture(params=["threads", "aio"])
def server(request: pytest.FixtureRequest, aio: Aio) -> Threads:
    """Each kind of server."""
    return Threads() if request.param == "threads" else aio


@pytest.fixture
def log() -> Iterator[RecordedLog]:
    with recorded_log() as log:
        yield log


def call(address: str, method: str, request: bytes = b"1", **metadata: str) -> Any:
    """Call a method and give the bytes, or the list of bytes, that it answers."""
    with grpc.insecure_channel(address) as channel:
        return call_on(channel, method, request, **metadata)


def call_on(channel: grpc.Channel, method: str, request: bytes = b"1", **metadata: str) -> Any:
    kind = KINDS[method.rstrip("0123456789")]
    multi: Any = getattr(channel, kind)(f"/{SERVICE}/{method}")
    pairs = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    messages = iter([request + b"a", request + b"b"]) if kind.startswith("stream") else request
    answer = multi(messages, metadata=pairs, timeout=20)
    return list(answer) if kind.endswith("stream") else answer


def give_up(address: str, method: str, user: str) -> None:
    """Call a method that streams, and cancel the call after the first response."""
    with grpc.insecure_channel(address) as channel:
        stream: Any = channel.unary_stream
        responses = stream(f"/{SERVICE}/{method}")(user.encode(), metadata=(("user", user),))
        next(responses)
        responses.cancel()


def refused(address: str, method: str, request: bytes = b"1", **metadata: str) -> Any:
    """The error of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call(address, method, request, **metadata)
    return caught.value


def who(context: Any) -> Session | None:
    user = dict(context.invocation_metadata()).get("user")
    return None if user is None else Session(email=f"{user}@example.com")


async def who_async(context: Any) -> Session | None:
    await asyncio.sleep(0)
    return who(context)


# ---------------------------------------------------------------------- handlers of each style


def plain(audit: AuditLogger) -> Handlers:
    """Plain functions; each writes an event at each of its steps."""

    def one(request: bytes, context: Any) -> bytes:
        audit.create("Calls", request.decode())
        return request

    def many(request: bytes, context: Any) -> Iterator[bytes]:
        for step in b"012":
            audit.create("Calls", f"{request.decode()}{step:c}")
            yield b"%c" % step

    def collect(requests: Any, context: Any) -> bytes:
        return b"".join(one(request, context) for request in requests)

    def chat(requests: Any, context: Any) -> Iterator[bytes]:
        for request in requests:
            yield one(request, context)

    return {"one": one, "many": many, "collect": collect, "chat": chat}


def coroutines(audit: AuditLogger) -> Handlers:
    """Coroutine functions; those that stream use `context.write`."""

    async def one(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0)
        audit.create("Calls", request.decode())
        return request

    async def many(request: bytes, context: Any) -> None:
        for step in b"012":
            audit.create("Calls", f"{request.decode()}{step:c}")
            await context.write(b"%c" % step)

    async def collect(requests: Any, context: Any) -> bytes:
        return b"".join([await one(request, context) async for request in requests])

    async def chat(requests: Any, context: Any) -> None:
        while (request := await context.read()) is not EOF:
            await context.write(await one(request, context))

    return {"one": one, "many": many, "collect": collect, "chat": chat}


def generators(audit: AuditLogger) -> Handlers:
    """Coroutine functions; those that stream are asynchronous generators."""
    others = coroutines(audit)

    async def many(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for step in b"012":
            await asyncio.sleep(0)
            audit.create("Calls", f"{request.decode()}{step:c}")
            yield b"%c" % step

    async def chat(requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield await others["one"](request, context)

    return others | {"many": many, "chat": chat}


class Style:
    """A kind of server with a style of handlers."""

    def __init__(self, server: Threads, handlers: Callable[[AuditLogger], Handlers]) -> None:
        self.server, self.handlers = server, handlers


STYLES = {"threads": plain, "plain": plain, "coroutines": coroutines, "generators": generators}


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest, aio: Aio) -> Style:
    """Each style of handlers, in the server that takes it."""
    return Style(Threads() if request.param == "threads" else aio, STYLES[request.param])


def actors(log: RecordedLog) -> list[tuple[str, str]]:
    """Which event is whose."""
    return [
        (record.get("resource_id", ""), record["event_data"]["session"].get("email", ""))
        for record in log.records
    ]


def session_of(record: dict[str, Any]) -> dict[str, Any]:
    session: dict[str, Any] = record["event_data"]["session"]
    return session


def statuses(audit: AuditLogger, name: str) -> Handlers:
    """Handlers of a kind of method that end with the status that they are asked for.

    "abort ..." aborts, "set ..." sets the code, in plain functions and asynchronous ones.
    """

    def plain_one(request: bytes, context: Any) -> bytes:
        manner, _, code = request.decode().partition(" ")
        if manner == "abort":
            context.abort(grpc.StatusCode[code], "not you")
        context.set_code(grpc.StatusCode[code])
        return b""

    def plain_many(request: bytes, context: Any) -> Iterator[bytes]:
        # In a grpc.aio.server a call hangs when its plain function aborts right after a response.
        if name == "threads":
            yield b"first"
        plain_one(request, context)
        yield b"last"

    async def async_one(request: bytes, context: Any) -> bytes:
        manner, _, code = request.decode().partition(" ")
        if manner == "abort":
            await context.abort(grpc.StatusCode[code], "not you")
        context.set_code(grpc.StatusCode[code])
        return b""

    async def async_many(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await async_one(request, context)

    async def writing_many(request: bytes, context: Any) -> None:
        await context.write(b"first")
        await async_one(request, context)

    if name in ("threads", "plain"):
        return {"one": plain_one, "many": plain_many}
    return {"one": async_one, "many": writing_many if name == "coroutines" else async_many}


# ---------------------------------------------------------------------- the session of a call


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


# ---------------------------------------------------------------------- interceptors behind ours


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


# ---------------------------------------------------------------------- addresses and settings


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


# ---------------------------------------------------------------------- access to the Talos API


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


# ---------------------------------------------------------------------- the documentation


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
