"""Capture for Django, under WSGI and ASGI, for views of both kinds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.exceptions import SynchronousOnlyOperation
from django.http import HttpRequest, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.functional import SimpleLazyObject
from django.utils.module_loading import import_string

from ..errors import InvalidSetting
from ..events.model import Session
from . import asgi, wsgi
from .request import Capture
from .session import Pending, binding, stepping

GetResponse = Callable[[HttpRequest], Any]

_SETTINGS = ("session_from", "trusted_proxies", "forwarded_header")
_PENDING = "auditlog.pending"  # in request.META


def user_session(request: HttpRequest) -> Session | None:
    """The user of django.contrib.auth, or None for nobody: what `session_from` is by default.

    The role is "superuser", "staff" or "": what Django says of the user, which lets nobody read the
    audit log (see AuditLogger.reader_for). The user is looked at when an event is written, and
    loaded only then. In an async view nothing can be loaded: SynchronousOnlyOperation is raised,
    unless `await request.auser()` came before. See also user_session_async.
    """
    user: Any = getattr(request, "user", None)
    if isinstance(user, SimpleLazyObject):  # nobody has logged in or out in this request
        user = getattr(request, "_acached_user", user)  # of request.auser()
    try:
        if user is None or not user.is_authenticated:
            return None
    except SynchronousOnlyOperation:
        raise SynchronousOnlyOperation(
            "who makes this request is not loaded yet, and cannot be in async code: call `await "
            'request.auser()` before the event is written, or let AUDITLOG["session_from"] be '
            '"auditlog.capture.django.user_session_async"'
        ) from None
    role = "superuser" if getattr(user, "is_superuser", False) else ""
    if not role and getattr(user, "is_staff", False):
        role = "staff"
    email = getattr(user, getattr(user, "EMAIL_FIELD", "email"), None)
    return Session(user_id=str(user.pk), email=str(email or ""), role=role)


async def user_session_async(request: HttpRequest) -> Session | None:
    """`user_session` for sites with async views: the user is loaded before each view.

    Each request of a user then costs what loading the user costs, with an event or without.
    """
    if hasattr(request, "auser"):  # Django 5.0
        await request.auser()
        if hasattr(request, "_acached_user"):
            return user_session(request)
    return await sync_to_async(user_session)(request)


class AuditMiddleware:
    """Binds to each request the session of whoever makes it, until its last chunk is made.

    Name it first in MIDDLEWARE. Its settings are those of the dict AUDITLOG, none of which is needed:

    session_from: who makes a request, as a Session, or None while that is not known: a function, or
        its dotted path (default: user_session). It is called for each event, so that a login in a
        view counts from there on; a coroutine function is awaited once, just before the view. Or
        call `auditlog.capture.identify` where authentication has succeeded.
    trusted_proxies, forwarded_header: whose forwarding headers tell the client's address; see
        auditlog.capture.address.ClientAddress.

    Raises InvalidSetting.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response
        session_from, addresses = _settings()
        # The user that was loaded before the view is asked for again at each event: a view may log
        # somebody in.
        self._loads_user = session_from is user_session_async
        asked = user_session if self._loads_user else session_from
        try:
            self._capture = Capture[HttpRequest](asked, *addresses, allow_async=True)
        except InvalidSetting as error:
            raise _invalid(error.setting, error.value, error.reason) from None
        if self._loads_user or self._capture.awaits:
            # Django calls it in its own mode, just before the view, whatever middleware is between.
            self.process_view = self._before_view
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Handle a request, as Django says."""
        if self._is_async:
            return self._handle_async(request)
        pending = self._pending(request)
        with binding(pending):
            response: HttpResponseBase = self.get_response(request)
        return _kept_bound(response, pending)

    async def _handle_async(self, request: HttpRequest) -> HttpResponseBase:
        pending = self._pending(request)
        with binding(pending):
            response: HttpResponseBase = await self.get_response(request)
        return _kept_bound(response, pending)

    def _pending(self, request: HttpRequest) -> Pending:
        scope = getattr(request, "scope", None)
        module, source = (wsgi, request.META) if scope is None else (asgi, scope)
        pending = self._capture.pending(
            request, module.peer_of(source), lambda name: module.header_values(source, name)
        )
        if self._capture.awaits:
            request.META[_PENDING] = pending
        return pending

    async def _before_view(self, request: HttpRequest, *view: object) -> None:
        if self._loads_user:
            await user_session_async(request)
        else:
            await self._capture.ask(request, request.META[_PENDING])


def _settings() -> tuple[Any, tuple[Any, Any]]:
    """Who is asked, and what ClientAddress wants to know."""
    given = getattr(settings, "AUDITLOG", {})
    if not isinstance(given, Mapping):
        raise InvalidSetting("AUDITLOG", given, "must be a dict")
    for name in given:
        if name not in _SETTINGS:
            raise _invalid(name, given[name], f"is no setting; there are {', '.join(_SETTINGS)}")
    session_from = given.get("session_from", user_session)
    if isinstance(session_from, str):
        try:
            session_from = import_string(session_from)
        except ImportError as error:
            raise _invalid("session_from", session_from, f"cannot be imported: {error}") from error
    return session_from, (given.get("trusted_proxies", ()), given.get("forwarded_header"))


def _invalid(name: object, value: object, reason: str) -> InvalidSetting:
    return InvalidSetting(f"AUDITLOG[{name!r}]", value, reason)


def _kept_bound(response: HttpResponseBase, pending: Pending) -> HttpResponseBase:
    """The response; if it is a stream, each of its chunks is made with `pending` bound."""
    if not isinstance(response, StreamingHttpResponse):
        return response
    if getattr(response, "file_to_stream", None) is not None:  # stays for the server's sendfile
        return response
    step = stepping(pending)
    # What the view gave: streaming_content would hide its aclose().
    chunks = response._iterator  # type: ignore[attr-defined]
    response.streaming_content = (_AsyncChunks if response.is_async else _Chunks)(chunks, step)
    close = response.close

    def close_bound() -> None:
        with step:
            close()

    response.close = close_bound  # type: ignore[method-assign] # ends a generator that is left early
    return response


class _Chunks:
    """A stream, bound step by step."""

    def __init__(self, chunks: Iterator[Any], step: stepping) -> None:
        self._chunks = chunks
        self._step = step

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._step:
            return next(self._chunks)


class _AsyncChunks:
    """An async stream, bound step by step."""

    def __init__(self, chunks: Any, step: stepping) -> None:
        self._chunks = chunks
        self._step = step
        self._is_left = False  # after a chunk that is not the last

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        self._is_left = False
        with self._step:
            chunk = await anext(self._chunks)
        self._is_left = True
        return chunk

    def close(self) -> None:
        """End a generator that is left early: Django would leave its `finally` to the garbage collector.

        Django calls it when the response is over, in a thread, where the session is bound.
        """
        if self._is_left and hasattr(self._chunks, "aclose"):
            async_to_sync(self._end)()

    async def _end(self) -> None:
        await self._chunks.aclose()
