"""Reading the audit log is recorded in it: who asked for what, before the first entry is given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from datetime import date
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AccessDenied
from ..storage.entry import Entry
from ..storage.layout import Position
from .filters import Filter
from .reader import AuditReader
from .timespec import Bound

if TYPE_CHECKING:
    import asyncio

    from ..events.model import Event, Session
    from .follower import AsyncFollower, Follower

READER_ROLES = ("Admin", "Auditor")

F = TypeVar("F", "Follower", "AsyncFollower")
Write = Callable[["Event"], object]


class AuditedReader:
    """An AuditReader for one session, which records each read as an `audit_log_access` of that session.

    The event is written before the first entry is given. Where it cannot be written, nothing is
    read: what AuditLogger.write raises is raised. AuditLogger.reader_for gives one.
    """

    def __init__(self, reader: AuditReader, session: Session, write: Write) -> None:
        self._reader = reader
        self._session = session
        self._write = write

    def read(
        self,
        start: Bound = None,
        end: Bound = None,
        *,
        where: Filter | None = None,
        newest_first: bool = False,
        limit: int | None = None,
        after: Position | None = None,
        strict: bool = False,
    ) -> Iterator[Entry]:
        """AuditReader.read, recorded."""
        entries = self._reader.read(
            start, end, where=where, newest_first=newest_first, limit=limit, after=after, strict=strict
        )
        self._write(_access(self._session, start, end, after, where, follow=False))
        return entries

    def follow(
        self,
        start: Bound = None,
        *,
        after: Position | None = None,
        where: Filter | None = None,
        stop: threading.Event | None = None,
    ) -> Follower:
        """AuditReader.follow, recorded once, when it begins."""
        follower = self._reader.follow(start, after=after, where=where, stop=stop)
        return self._begun(follower, _access(self._session, start, None, after, where, follow=True))

    def afollow(
        self,
        start: Bound = None,
        *,
        after: Position | None = None,
        where: Filter | None = None,
        stop: asyncio.Event | None = None,
    ) -> AsyncFollower:
        """AuditReader.afollow, recorded once, when it begins: by this call, which waits for the write."""
        follower = self._reader.afollow(start, after=after, where=where, stop=stop)
        return self._begun(follower, _access(self._session, start, None, after, where, follow=True))

    def _begun(self, follower: F, event: Event) -> F:
        try:
            self._write(event)
        except BaseException:
            follower.abandon()
            raise
        return follower


def check_role(session: Session | None, roles: Collection[str], write: Write) -> Session:
    """The session, if its role is exactly one of `roles`. Otherwise records that, and raises AccessDenied."""
    from ..events.model import EventType, Session, denied

    if session is not None and session.role in roles:
        return session
    refused = denied(EventType.AUDIT_LOG_ACCESS)
    data = refused.event_data.model_copy(update={"session": session or Session()})
    write(refused.model_copy(update={"event_data": data}))
    raise AccessDenied("" if session is None else session.role, tuple(roles))


def _access(
    session: Session, start: Bound, end: Bound, after: Position | None, where: Filter | None, *, follow: bool
) -> Event:
    from ..events.model import Event, EventData, EventType
    from ..events.payloads import AuditLogAccess

    wanted: dict[str, Any] = {"start": _text(start), "end": _text(end), "follow": follow}
    if after is not None:
        wanted["from_id"] = str(after)
    if where is not None:
        given = ("search", "resource_type", "resource_id", "cluster_id", "actor")
        wanted |= {name: getattr(where, name) or "" for name in given}
        types = where.event_type or ""
        wanted["event_type"] = types if isinstance(types, str) else sorted(types)
    data = EventData(audit_log_access=AuditLogAccess(**wanted), session=session)
    return Event(event_type=EventType.AUDIT_LOG_ACCESS, event_data=data)


def _text(bound: Bound) -> str:
    return bound.isoformat() if isinstance(bound, date) else bound or ""
