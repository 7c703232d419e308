"""The session that is bound to the running code, in a context variable.

Every thread and every asyncio task has a context of its own: concurrent requests never mix. A
task inherits the session of the code that started it; a thread does not (see `wrap`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import wraps
from typing import ParamSpec, TypeVar, cast

from ..errors import InvalidEvent
from ..events.codec import encode_session
from ..events.model import Session

P = ParamSpec("P")
R = TypeVar("R")


class Bound:
    """A session together with its encoded form, which all of its events share.

    `extra`: has it fields that the model does not know, in which secrets may be?
    """

    __slots__ = ("encoded", "extra", "session")

    def __init__(self, session: Session) -> None:
        if not isinstance(session, Session):
            raise InvalidEvent("session", f"must be a Session, not {type(session).__name__}")
        self.session = session
        self.extra = bool(session.model_extra) or type(session) is not Session
        self.encoded = encode_session(session)


_current: ContextVar[Bound | None] = ContextVar("auditlog.session", default=None)

bound = _current.get


def current() -> Session | None:
    """The session that is bound here, or None."""
    here = _current.get()
    return None if here is None else here.session


class bind:  # noqa: N801 - used as a function
    """Bind a session for the length of a `with` block. Bindings nest.

    Raises InvalidEvent where `session` is no Session or holds what cannot be written.
    """

    __slots__ = ("_bound", "_token")

    def __init__(self, session: Session) -> None:
        self._bound = Bound(session)

    def __enter__(self) -> Session:
        self._token: Token[Bound | None] = _current.set(self._bound)
        return self._bound.session

    def __exit__(self, *exc_info: object) -> None:
        _current.reset(self._token)


def wrap(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` with the session that is bound now, for a thread or an executor.

    `executor.submit(wrap(task), ...)` writes with the session of the code that submitted it.
    A coroutine function stays one.
    """
    here = _current.get()

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def carry_async(*args: P.args, **kwargs: P.kwargs) -> object:
            token = _current.set(here)
            try:
                return await function(*args, **kwargs)
            finally:
                _current.reset(token)

        return cast("Callable[P, R]", carry_async)

    @wraps(function)
    def carry(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _current.set(here)
        try:
            return function(*args, **kwargs)
        finally:
            _current.reset(token)

    return carry
