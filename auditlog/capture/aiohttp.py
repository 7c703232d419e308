"""Capture for servers that are built with aiohttp."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from .address import ForwardedHeader
from .request import AsyncSessionFrom, Capture, SessionFrom, text_of
from .session import binding

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
class AuditMiddleware:
    """Binds to each request, WebSockets too, the session of whoever makes it, until it is answered.

    Put it first: `web.Application(middlewares=[AuditMiddleware(...), ...])`.

    session_from: who makes a request, as a Session, or None while that is not known. A function is
        called for each event, so that it may look at what authentication has left in the request; a
        coroutine function is awaited once, before the handler. Or call `auditlog.capture.identify`
        where authentication has succeeded.
    trusted_proxies, forwarded_header: whose forwarding headers tell the client's address; see
        auditlog.capture.address.ClientAddress.

    Raises InvalidSetting.
    """

    def __init__(
        self,
        *,
        session_from: SessionFrom[web.Request] | AsyncSessionFrom[web.Request] | None = None,
        trusted_proxies: Iterable[str] = (),
        forwarded_header: ForwardedHeader | None = None,
    ) -> None:
        self._capture = Capture(session_from, trusted_proxies, forwarded_header, allow_async=True)

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handle a request, as aiohttp says."""
        pending = self._capture.pending(request, peer_of(request), lambda name: header_values(request, name))
        # Never left: aiohttp runs each request in a context of its own, which ends with it, and in which
        # it iterates a streamed body and calls the signals only after all middlewares have returned.
        binding(pending).__enter__()
        if self._capture.awaits:
            await self._capture.ask(request, pending)
        return await handler(request)


def peer_of(request: web.Request) -> str:
    """The address that called, as the server says; "" for a Unix socket."""
    # None is a peer that the event loop cannot tell. A Unix socket may be trusted; that must not be.
    return "unknown" if request.remote is None else request.remote


def header_values(request: web.Request, name: str) -> list[str]:
    """The values of a header."""
    wanted = name.encode()
    return [text_of(value) for key, value in request.raw_headers if key.lower() == wanted]
