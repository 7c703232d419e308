"""What the captures of all frameworks share: a request, as far as the audit log wants to know."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

from ..errors import InvalidSetting
from ..events.model import Session
from .address import ClientAddress, ForwardedHeader, Header
from .session import Pending

Request = TypeVar("Request")
SessionFrom = Callable[[Request], Session | None]
AsyncSessionFrom = Callable[[Request], Awaitable[Session | None]]

LONGEST_VALUE = 512  # characters of a header value that is kept

_unprintable = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_well_formed_id = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")


class Capture(Generic[Request]):
    """Gives each request a session to bind.

    session_from: says who makes a request: a function of the framework's request that gives a
        Session, of which only the actor's fields need to be set, or None while that is not known.
        It is called for each event, so it should be quick. A coroutine function is awaited once instead,
        before the server handles the request.
    trusted_proxies, forwarded_header: as in ClientAddress.
    allow_async: may `session_from` be a coroutine function?

    Raises InvalidSetting.
    """

    def __init__(
        self,
        session_from: SessionFrom[Request] | AsyncSessionFrom[Request] | None,
        trusted_proxies: Iterable[str],
        forwarded_header: ForwardedHeader | None,
        *,
        allow_async: bool,
    ) -> None:
        if session_from is not None and not callable(session_from):
            raise InvalidSetting("session_from", session_from, "must be a function that gives a Session")
        self._address = ClientAddress(trusted_proxies, forwarded_header)
        self.awaits = _is_async(session_from)
        if self.awaits and not allow_async:
            raise InvalidSetting("session_from", session_from, "must be no coroutine function here")
        self._session_from: Callable[[Request], Any] | None = session_from

    def pending(self, request: Request, peer: str, header: Header) -> Pending:
        """The session of a request from `peer`. Nothing is looked at before an event asks for it."""
        ask = None if self._session_from is None or self.awaits else partial(self._session_from, request)
        return Pending(partial(self._describe, peer, header), ask)

    async def ask(self, request: Request, pending: Pending) -> None:
        """Await a `session_from` that is a coroutine function, while `pending` is bound."""
        assert self._session_from is not None
        session = await self._session_from(request)
        if session is not None:
            pending.identify(session, "session_from")

    def _describe(self, peer: str, header: Header) -> tuple[Session, str]:
        session = Session(user_agent=first(header, "user-agent"), ip_address=self._address.of(peer, header))
        request_id = first(header, "x-request-id")
        return session, request_id if _well_formed_id.fullmatch(request_id) else ""


def first(header: Header, name: str) -> str:
    """The first value of a header, cleaned; "" where there is none."""
    values = header(name)
    return clean(values[0]) if values else ""


def clean(text: str, longest: int = LONGEST_VALUE) -> str:
    """What somebody else wrote, without control characters, and at most `longest` characters of it."""
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return _unprintable.sub("\ufffd", text)


def text_of(raw: bytes | str) -> str:
    """A header value that came as bytes, or as those bytes in a string (Latin-1), as WSGI has it."""
    octets = raw.encode("latin-1", "replace") if isinstance(raw, str) else raw
    try:
        return octets.decode()
    except UnicodeDecodeError:
        return octets.decode("latin-1")


def _is_async(function: object) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - of an object that can be called
    )
