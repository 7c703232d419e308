"""Capture for ASGI servers: Starlette, FastAPI, Litestar, Quart, Django's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from ..events.model import denied
from .address import UNIX, ForwardedHeader
from .request import AsyncSessionFrom, Capture, SessionFrom, clean, text_of
from .session import binding, is_denied

if TYPE_CHECKING:
    from ..logger import AuditLogger

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DENIALS = frozenset({401, 403})  # status codes: who are you, and not you


class AuditMiddleware:
    """Binds to each HTTP request and WebSocket the session of whoever makes it.

    app: the ASGI application; frameworks pass it (`app.add_middleware(AuditMiddleware, ...)`).
    session_from: who makes the request of an ASGI scope, as a Session, or None while that is not
        known. A function is called for each event, so that it may look at what authentication
        has left in the scope (`scope["user"]`); a coroutine function is awaited once, before the app.
        Or call `auditlog.capture.identify` where authentication has succeeded.
    trusted_proxies, forwarded_header: whose forwarding headers tell the client's address; see
        auditlog.capture.address.ClientAddress.

    Raises InvalidSetting.
    """

    def __init__(
        self,
        app: App,
        *,
        session_from: SessionFrom[Scope] | AsyncSessionFrom[Scope] | None = None,
        trusted_proxies: Iterable[str] = (),
        forwarded_header: ForwardedHeader | None = None,
    ) -> None:
        self.app = app
        self._capture = Capture(session_from, trusted_proxies, forwarded_header, allow_async=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI says."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        pending = self._capture.pending(scope, peer_of(scope), lambda name: header_values(scope, name))
        with binding(pending):
            if self._capture.awaits:
                await self._capture.ask(scope, pending)
            await self.app(scope, receive, send)


class DenialRecorder:
    """Records each request that the app answers with 401 or 403, before the answer goes out.

    Put it inside AuditMiddleware: a refusal that something further in has recorded, such as
    AuditLogger.reader_for or KubernetesAccess, is then not recorded twice. The event is an
    `access_denied` of the bound session, with the request's method and path as its action. Raises
    what AuditLogger.write raises: then the answer does not go out.
    """

    def __init__(self, app: App, audit: AuditLogger) -> None:
        self.app = app
        self.audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI says."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def record() -> None:
            await self.audit.awrite(denied(action_of(scope)))

        await self.app(scope, receive, on_denial(send, record))


def on_denial(send: Send, record: Callable[[], Awaitable[object]]) -> Send:
    """`send`, with `record` before an answer that denies the request, unless that was recorded further in."""
    accepted = False

    async def watch(message: Message) -> None:
        nonlocal accepted
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            denies = message["status"] in DENIALS
        else:
            accepted = accepted or kind == "websocket.accept"
            denies = kind == "websocket.close" and not accepted  # the server makes it a 403
        if denies:
            accepted = True  # once
            if not is_denied():
                await record()
        await send(message)

    return watch


def action_of(scope: Scope) -> str:
    """What a request is about to do: its method and path."""
    return f"{scope.get('method', 'GET')} {clean(scope['path'])}"


def peer_of(scope: Scope) -> str:
    """The address that called, as the server says."""
    client, server = scope.get("client"), scope.get("server")
    if client:
        return str(client[0])
    # A TCP client that was gone before it was accepted has no address either: no Unix socket has a port.
    return UNIX if not server or server[1] is None else "unknown"


def header_values(scope: Scope, name: str) -> list[str]:
    """The values of a header."""
    wanted = name.encode()
    return [text_of(value) for key, value in scope["headers"] if key.lower() == wanted]
