"""Capture for WSGI servers: Flask, Bottle, Pyramid, Falcon, anything that is a WSGI application."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .address import UNIX, ForwardedHeader
from .request import Capture, SessionFrom, text_of
from .session import stepping

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

# What stands in REMOTE_ADDR for a peer at a Unix socket: of Gunicorn, Waitress, Werkzeug.
_LOCAL = frozenset({"", "localhost", "<local>"})


class AuditMiddleware:
    """Binds to each request the session of whoever makes it, until its last chunk is made.

    app: the WSGI application (`app.wsgi_app = AuditMiddleware(app.wsgi_app, ...)` for Flask).
    session_from: who makes the request of a WSGI environ, as a Session, or None while that is not
        known. It is called for each event, so that it may look at what authentication has left
        behind; no coroutine function. Or call `auditlog.capture.identify` where authentication has
        succeeded.
    trusted_proxies, forwarded_header: whose forwarding headers tell the client's address; see
        auditlog.capture.address.ClientAddress.

    Raises InvalidSetting.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        session_from: SessionFrom[WSGIEnvironment] | None = None,
        trusted_proxies: Iterable[str] = (),
        forwarded_header: ForwardedHeader | None = None,
    ) -> None:
        self.app = app
        self._capture = Capture(session_from, trusted_proxies, forwarded_header, allow_async=False)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle a request, as WSGI says."""
        pending = self._capture.pending(environ, peer_of(environ), lambda name: header_values(environ, name))
        step = stepping(pending)
        with step:
            body = self.app(environ, start_response)
        return body if _is_ready(body, environ) else _Body(body, step)


class _Body:
    """What the app returned, whose chunks are made within the request."""

    __slots__ = ("_body", "_chunks", "_step")

    def __init__(self, body: Iterable[bytes], step: stepping) -> None:
        self._body = body
        self._step = step

    def __iter__(self) -> Iterator[bytes]:
        with self._step:
            self._chunks = iter(self._body)
        return self

    def __next__(self) -> bytes:
        with self._step:
            return next(self._chunks)

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            with self._step:
                close()


def _is_ready(body: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Is nothing left for the app to do? Servers send such bodies with their length, or by sendfile."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(body, list | tuple) or (isinstance(wrapper, type) and isinstance(body, wrapper))


def peer_of(environ: WSGIEnvironment) -> str:
    """The address that called, as the server says."""
    peer: str = environ.get("REMOTE_ADDR", "")
    return UNIX if peer in _LOCAL else peer


def header_values(environ: WSGIEnvironment, name: str) -> list[str]:
    """The values of a header; the server has joined several of them into one."""
    value = environ.get("HTTP_" + name.upper().replace("-", "_"))
    return [] if value is None else [text_of(value)]
