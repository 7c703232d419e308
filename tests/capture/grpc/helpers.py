"""Servers of both kinds, handlers of each style, and clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from auditlog import AuditLogger, Session
from auditlog.capture.grpc import AioAuditInterceptor, AuditInterceptor
from auditlog.capture.talos import AioTalosAccess, TalosAccess
from auditlog.testing import RecordedLog

Handlers = dict[str, Callable[..., Any]]
KINDS = {"one": "unary_unary", "many": "unary_stream", "collect": "stream_unary", "chat": "stream_stream"}
SERVICE = "machine.MachineService"
EOF: Any = vars(grpc.aio)["EOF"]  # type checkers do not know it
DENIED, UNKNOWN_CALLER = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


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
