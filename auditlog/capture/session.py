"""The session that is bound to the running code, in a context variable.

Every thread and every asyncio task has a context of its own: concurrent requests never mix. A
task inherits the session of the code that started it; a thread does not (see `wrap`).

Two things can be bound: a session that is known (Bound), and that of a request (Pending), which
is found when an event asks for it. By then authentication has run, wherever the server does it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, Token
from functools import wraps
from typing import ParamSpec, TypeVar, cast

from ..errors import InvalidEvent, InvalidSetting
from ..events.codec import encode_session
from ..events.model import Session
from ..events.payloads import fields_of

P = ParamSpec("P")
R = TypeVar("R")


_OF_TRANSPORT = ("user_agent", "ip_address")


class Bound:
    """A session together with its encoded form, which all of its events share.

    `extra`: has it fields that the model does not know, in which secrets may be?
    `request_id`: of the request in which the events happen, or "".
    """

    __slots__ = ("encoded", "extra", "request_id", "session")

    def __init__(self, session: Session, request_id: str = "") -> None:
        if not isinstance(session, Session):
            raise InvalidEvent("session", f"must be a Session, not {type(session).__name__}")
        self.session = session
        self.request_id = request_id
        self.extra = bool(session.model_extra) or type(session) is not Session
        self.encoded = encode_session(session)

    def described(self) -> Bound:
        """Itself."""
        return self


class Pending:
    """The session of a request: what its transport says, then who its server says it is.

    `describe` gives what is known of any request, a session without an actor and the request's
    id; it is called once, when the first event asks. `session_from` is asked for every event, so that
    a login in the middle of a request counts from there on; what it gives adds to that, and wins.
    `identified` is what was said with `identify`, and wins over both.
    """

    __slots__ = ("_describe", "_described", "_found", "_session_from", "denied", "identified")

    def __init__(
        self,
        describe: Callable[[], tuple[Session, str]],
        session_from: Callable[[], Session | None] | None = None,
    ) -> None:
        self.denied = False  # was an `access_denied` written?
        self.identified: Session | None = None
        self._describe = describe
        self._session_from = session_from
        self._described: Bound | None = None
        # What was asked for and identified, and what came of both: replaced as one, for threads.
        self._found: tuple[Session | None, Session | None, Bound] | None = None

    def identify(self, session: Session, source: str = "identify") -> None:
        """Add the fields of `session` that were given; they win over all others from now on.

        Raises InvalidEvent where `source` gave no Session.
        """
        _check(session, source)
        with _identifying:
            self.identified = _joined(self.identified, session)

    def described(self) -> Bound:
        """What is known of any request: a session without an actor, the request's id."""
        if self._described is None:
            self._described = Bound(*self._describe())
        return self._described

    def now(self) -> Bound:
        """The session as far as it is known now. Raises what `session_from` raises."""
        described = self.described()
        asked = None
        if self._session_from is not None:
            with binding(described):  # an event that it writes does not ask again
                asked = self._session_from()
            if asked is not None:
                _check(asked, "session_from")
        identified = self.identified
        if asked is None and identified is None:
            return described
        found = self._found
        if found is None or found[0] != asked or found[1] is not identified:
            session = described.session
            for known in (asked, identified):
                session = session if known is None else _joined(session, known)
            found = self._found = (asked, identified, Bound(session, described.request_id))
        return found[2]


_identifying = threading.Lock()  # protects Pending.identified from two threads that add to it


def _check(session: object, source: str) -> None:
    if not isinstance(session, Session):
        if isinstance(session, Coroutine):
            session.close()  # else Python warns of it, wherever it is collected
        reason = f"{source} must give a Session, not {type(session).__name__}"
        raise InvalidEvent("session", reason)


def _joined(base: Session | None, more: Session) -> Session:
    if base is None:
        return more
    given = {name: value for name, value in fields_of(more).items() if name in more.model_fields_set}
    for name in _OF_TRANSPORT:
        if not given.get(name):  # of a row that has such a column: it knows no better than the request
            given.pop(name, None)
    return base.model_copy(update=given)


class _Link:
    """What one `with` block has bound: by which object, in which request, and what was bound before."""

    __slots__ = ("by", "outer", "request", "who")

    def __init__(
        self, who: Bound | Pending | None, request: Pending | None, outer: _Link | None, by: object
    ) -> None:
        self.who = who
        self.request = request
        self.outer = outer
        self.by = by


_current: ContextVar[_Link | None] = ContextVar("auditlog.session", default=None)


def bound() -> Bound | None:
    """What is bound here, found if need be; None where nothing is."""
    link = _current.get()
    who = None if link is None else link.who
    return who.now() if isinstance(who, Pending) else who


def current() -> Session | None:
    """The session that is bound here, as far as it is known by now, or None."""
    here = bound()
    return None if here is None else here.session


def captured() -> Pending | None:
    """The request that is running here, whatever session is bound within it; None where none is captured."""
    link = _current.get()
    return None if link is None else link.request


def acting() -> Bound | Pending | None:
    """Who acts here, for an event that is written later.

    Like `bound`; but while a request is being asked who makes it, that is the request, which will
    know by then.
    """
    link = _current.get()
    if link is not None and link.request is not None and link.who is link.request.described():
        return link.request
    return bound()


def is_denied() -> bool:
    """Was an `access_denied` written in the request that is running here?"""
    request = captured()
    return request is not None and request.denied


def identify(session: Session) -> None:
    """Say who makes the request that is running: call it where authentication has succeeded.

    Fields of `session` that were given replace those that the request has so far (an empty actor is
    nobody any more); all others stay, as do address and user agent where they are given empty. It
    counts for the whole request from now on, in every task and thread of it, and for nothing else.
    A session that is bound within the request with `audit.session` is that block's all the same.

    Raises InvalidEvent where no request is being captured here: add the capture of your framework
    (docs/integrations.md), or bind the session with `bind` instead.
    """
    request = captured()
    if request is None:
        reason = "no request is captured here; add the framework's middleware, or bind the session"
        raise InvalidEvent("session", reason)
    request.identify(session)


class binding:  # noqa: N801 - used as a function
    """Bind what is known of a session, or will be, for the length of a `with` block.

    None binds nobody. One object can be entered again and again, in any thread and task. A block that
    ends in another context than it began in, as that of a generator may, leaves nothing behind
    there. `request`: in which the block is, where that is not the one that surrounds it.
    """

    __slots__ = ("_request", "_who")

    def __init__(self, who: Bound | Pending | None, request: Pending | None = None) -> None:
        self._who = who
        self._request = who if isinstance(who, Pending) else request

    def __enter__(self) -> object:
        outer, request = _current.get(), self._request
        if request is None and outer is not None and self._who is not None:
            request = outer.request
        _current.set(_Link(self._who, request, outer, self))
        return self._who

    def __exit__(self, *exc_info: object) -> None:
        above, link = [], _current.get()
        while link is not None and link.by is not self:
            above.append(link)
            link = link.outer
        if link is None:
            return
        rest = link.outer
        for each in reversed(above):  # begun within this block, and not ended yet
            rest = _Link(each.who, each.request, rest, each.by)
        _current.set(rest)


class stepping:  # noqa: N801 - used as a function
    """Bound for one step of a request after the other, and not in between.

    Whatever a step leaves bound is bound again in the next one: a generator may hold a
    `with audit.session(...)` open while the server sends what it gave.
    """

    __slots__ = ("_link", "_token")

    def __init__(self, who: Pending) -> None:
        self._link: _Link | None = _Link(who, who, None, self)

    def __enter__(self) -> None:
        self._token: Token[_Link | None] = _current.set(self._link)

    def __exit__(self, *exc_info: object) -> None:
        self._link = _current.get()
        _current.reset(self._token)


class bind(binding):  # noqa: N801 - used as a function
    """Bind a session for the length of a `with` block, which it is given to. Bindings nest.

    Events within a request keep the request's id.

    Raises InvalidEvent where `session` is no Session or holds what cannot be written.
    """

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        link = _current.get()
        here = None if link is None else link.who
        super().__init__(Bound(session, "" if here is None else here.described().request_id))
        self._session = session

    def __enter__(self) -> Session:
        super().__enter__()
        return self._session


def wrap(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` with the session that is bound now, for a thread or an executor.

    `executor.submit(wrap(task), ...)` writes with the session of the code that submitted it, as it is
    known at this moment. A coroutine function stays one. Raises InvalidSetting for a generator
    function, which runs when it is iterated: wrap what iterates it.
    """
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidSetting(
            "function", function, "is a generator function; wrap the function that iterates it"
        )
    carrying = binding(bound(), captured())

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def carry_async(*args: P.args, **kwargs: P.kwargs) -> object:
            with carrying:
                return await function(*args, **kwargs)

        return cast("Callable[P, R]", carry_async)

    @wraps(function)
    def carry(*args: P.args, **kwargs: P.kwargs) -> R:
        with carrying:
            return function(*args, **kwargs)

    return carry
