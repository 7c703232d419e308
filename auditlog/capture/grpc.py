"""Capture for gRPC servers: those with threads (grpc.server) and those on asyncio (grpc.aio.server)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc
import grpc.aio

from .address import UNIX, ForwardedHeader, Header
from .request import AsyncSessionFrom, Capture, SessionFrom, text_of
from .session import Pending, binding, stepping

if TYPE_CHECKING:
    AioContext = grpc.aio.ServicerContext[Any, Any]

Metadata = Sequence[tuple[str, str | bytes]]
Handler = Any  # an RpcMethodHandler, or None for a method that is unknown
Behavior = Callable[..., Any]

_NOT_KNOWN = "unknown"  # a peer that nobody trusts; "" would be a Unix socket


class AuditInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg,unused-ignore]
    """Binds to each call of a grpc.server the session of whoever makes it.

    Put it first: interceptors behind it are part of the call, and may call
    `auditlog.capture.identify` where authentication has succeeded.

    session_from: who makes a call, as a Session, or None while that is not known: a function of
        the call's ServicerContext, called for each event.
    trusted_proxies, forwarded_header: whose forwarding headers tell the client's address; see
        auditlog.capture.address.ClientAddress.

    Raises InvalidSetting.
    """

    def __init__(
        self,
        *,
        session_from: SessionFrom[grpc.ServicerContext] | None = None,
        trusted_proxies: Iterable[str] = (),
        forwarded_header: ForwardedHeader | None = None,
    ) -> None:
        self._capture = _Capture(session_from, trusted_proxies, forwarded_header, allow_async=False)

    def intercept_service(self, continuation: Behavior, handler_call_details: Any) -> Handler:
        """Find the handler of a call, as gRPC says."""
        header = partial(values_of, handler_call_details.invocation_metadata)
        early = self._capture.early(header)
        with binding(early):
            handler = continuation(handler_call_details)

        def call_of(context: Any) -> Call:
            pending = self._capture.pending(context, _address_of(context.peer()), header)
            return _Captured(context, early.goes_on_as(pending))

        return around(handler, call_of)


class AioAuditInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg,unused-ignore]
    """AuditInterceptor for a grpc.aio.server.

    session_from: may also be a coroutine function, which is awaited once, before the handler. What
        it gets tells of the caller what the call's ServicerContext does, even after the call.
    trusted_proxies, forwarded_header: as in AuditInterceptor.

    Raises InvalidSetting.
    """

    def __init__(
        self,
        *,
        session_from: SessionFrom[AioContext] | AsyncSessionFrom[AioContext] | None = None,
        trusted_proxies: Iterable[str] = (),
        forwarded_header: ForwardedHeader | None = None,
    ) -> None:
        self._capture = _Capture(session_from, trusted_proxies, forwarded_header, allow_async=True)
        self._asks = session_from is not None

    async def intercept_service(self, continuation: Behavior, handler_call_details: Any) -> Handler:
        """Find the handler of a call, as gRPC says."""
        metadata = handler_call_details.invocation_metadata
        header = partial(values_of, metadata)
        early = self._capture.early(header)
        with binding(early):
            handler = await continuation(handler_call_details)
        loop = asyncio.get_running_loop()

        def call_of(context: Any) -> Call:
            peer = context.peer()
            caller = _Caller(context, metadata, peer) if self._asks else None
            pending = early.goes_on_as(self._capture.pending(caller, _address_of(peer), header))
            if self._capture.awaits:
                return _Asked(context, pending, partial(self._capture.ask, caller, pending), loop)
            return _Captured(context, pending)

        return around_aio(handler, call_of)


def values_of(metadata: Metadata, name: str) -> list[str]:
    """The values of a key of the metadata."""
    return [value if isinstance(value, str) else text_of(value) for key, value in metadata if key == name]


def _address_of(peer: str) -> str:
    """The address in a peer as gRPC writes it: "ipv4:127.0.0.1:80", "ipv6:%5B::1%5D:80", "unix:"."""
    kind, _, address = peer.partition(":")
    if kind in ("ipv4", "ipv6"):
        return unquote(address)
    return UNIX if kind in ("unix", "unix-abstract") else _NOT_KNOWN


class _Early(Pending):
    """The session while interceptors look for the handler: gRPC does not tell them the peer."""

    __slots__ = ()

    def goes_on_as(self, pending: Pending) -> Pending:
        """`pending`, with what the interceptors have identified."""
        pending.identified = self.identified
        return pending


class _Capture(Capture[Any]):
    def early(self, header: Header) -> _Early:
        return _Early(partial(self._describe, _NOT_KNOWN, header))


class _Caller:
    """A context of grpc.aio that still tells of the caller when the call has ended.

    grpc.aio frees the call then, and whoever asks its context crashes the process or reads what is
    in that memory now. But events may come later, from a task that the handler has started.
    """

    def __init__(self, context: Any, metadata: Metadata, peer: str) -> None:
        self._context = context
        self._metadata = metadata
        self._peer = peer
        self._auth_context = context.auth_context()
        self._key: str | None = context.peer_identity_key()

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Any:
        return self._auth_context

    def peer_identity_key(self) -> str | None:
        return self._key

    def peer_identities(self) -> Any:
        return None if self._key is None else self._auth_context.get(self._key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


# ---------------------------------------------------------------------- around a handler


class Call:
    """What an interceptor does around one call; `context` is what the handler gets."""

    __slots__ = ("context",)

    def __init__(self, context: Any) -> None:
        self.context = context

    def begin(self) -> None:
        """Called once, before the handler. What it raises ends the call."""

    async def abegin(self) -> None:
        """The same, where the handler is asynchronous."""

    def step(self) -> AbstractContextManager[object]:
        """Entered around each piece of the handler's code."""
        return nullcontext()

    def end(self) -> None:
        """Called once, when the handler is through, has failed or was given up."""

    async def aend(self) -> None:
        """The same, where the handler is asynchronous."""


CallOf = Callable[[Any], Call]


class _Captured(Call):
    __slots__ = ("_step",)

    def __init__(self, context: Any, pending: Pending) -> None:
        super().__init__(context)
        self._step = stepping(pending)

    def step(self) -> stepping:
        return self._step


class _Asked(_Captured):
    """A call whose session a coroutine function finds."""

    __slots__ = ("_ask", "_loop")

    def __init__(
        self,
        context: Any,
        pending: Pending,
        ask: Callable[[], Awaitable[None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(context, pending)
        self._ask = ask
        self._loop = loop

    def begin(self) -> None:
        # In a thread of the pool, where grpc.aio runs handlers that are plain functions.
        asyncio.run_coroutine_threadsafe(self.abegin(), self._loop).result()

    async def abegin(self) -> None:
        with self.step():
            await self._ask()


def around(handler: Handler, call_of: CallOf) -> Handler:
    """The handler of a grpc.server, with a Call around each of its calls."""
    if handler is None:
        return None
    return _changed(handler, partial(_stream if handler.response_streaming else _unary, call_of))


def around_aio(handler: Handler, call_of: CallOf) -> Handler:
    """The handler of a grpc.aio.server, with a Call around each of its calls.

    It remains what it was, a coroutine function, an asynchronous generator or a plain function:
    gRPC looks at that.
    """
    if handler is None:
        return None

    def change(behavior: Behavior) -> Behavior:
        if inspect.isasyncgenfunction(behavior):
            return _async_stream(call_of, behavior)
        if inspect.iscoroutinefunction(behavior):
            return _coroutine(call_of, behavior)
        return (_stream_later if handler.response_streaming else _unary)(call_of, behavior)

    return _changed(handler, change)


def _changed(handler: Handler, change: Callable[[Behavior], Behavior]) -> Handler:
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    make = getattr(grpc, f"{request}_{response}_rpc_method_handler")
    behavior = change(getattr(handler, f"{request}_{response}"))
    return make(behavior, handler.request_deserializer, handler.response_serializer)


def _unary(call_of: CallOf, behavior: Behavior) -> Behavior:
    @wraps(behavior)
    def handle(request: Any, context: Any) -> Any:
        call = call_of(context)
        call.begin()
        try:
            with call.step():
                return behavior(request, call.context)
        finally:
            call.end()

    return handle


def _stream(call_of: CallOf, behavior: Behavior) -> Behavior:
    @wraps(behavior)  # with its attributes: gRPC looks for experimental_non_blocking
    def handle(request: Any, context: Any, *respond: Any) -> Any:
        return _responses(call_of(context), behavior, request, *respond)

    return handle


def _stream_later(call_of: CallOf, behavior: Behavior) -> Behavior:
    # grpc.aio calls a plain function in the event loop, where nothing may block, and iterates what
    # it returns in a thread of the pool.
    def responses(call: Call, request: Any) -> Iterator[Any]:
        yield from _responses(call, behavior, request)

    @wraps(behavior)
    def handle(request: Any, context: Any) -> Iterator[Any]:
        return responses(call_of(context), request)

    return handle


def _responses(call: Call, behavior: Behavior, request: Any, *respond: Any) -> Any:
    call.begin()
    try:
        with call.step():
            responses = behavior(request, call.context, *respond)
    except BaseException:
        call.end()
        raise
    if respond:  # a handler that does not block: it calls that, whenever it has a response
        call.end()
        return responses
    return _iterate(call, responses)


def _iterate(call: Call, responses: Any) -> Iterator[Any]:
    try:
        with call.step():
            iterator = responses if hasattr(responses, "__next__") else iter(responses)
        while True:
            with call.step():
                try:
                    response = next(iterator)
                except StopIteration:
                    return
            yield response
    finally:
        try:
            if inspect.isgenerator(responses):  # what it does when it is given up is its own code, too
                with call.step():
                    responses.close()
        finally:
            call.end()


def _coroutine(call_of: CallOf, behavior: Behavior) -> Behavior:
    @wraps(behavior)
    async def handle(request: Any, context: Any) -> Any:
        call = call_of(context)
        await call.abegin()
        try:
            with call.step():
                return await behavior(request, call.context)
        finally:
            await call.aend()

    return handle


def _async_stream(call_of: CallOf, behavior: Behavior) -> Behavior:
    @wraps(behavior)
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        call = call_of(context)
        await call.abegin()
        responses = behavior(request, call.context)
        try:
            while True:
                with call.step():
                    try:
                        response = await anext(responses)
                    except StopAsyncIteration:
                        return
                yield response
        finally:
            try:
                with call.step():
                    await responses.aclose()
            finally:
                await call.aend()

    return handle
