"""AuditLogger: what a control plane imports."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from .background import RetentionStatus
from .errors import DirectoryError, InvalidSetting
from .events.limit import DEFAULT_MAX_LINE_BYTES, MAX_LINE_BYTES, MIN_LINE_BYTES
from .events.secrets import SecretNames
from .failures import Choice, OnFailure
from .health import Stats
from .query.access import READER_ROLES
from .settings import Settings
from .storage.days import Clock, SystemClock, load_zone, seconds
from .storage.files import Files
from .storage.layout import Position
from .storage.retention import Retention

if TYPE_CHECKING:
    from .capture.session import bind
    from .engine import Engine
    from .events.model import Event, Session
    from .forward.destination import Destination
    from .forward.status import DestinationStatus
    from .query.access import AuditedReader
    from .storage.entry import CorruptLine

_SHORTEST_KEY = 16  # bytes

Record = Callable[[str, str, str, dict[str, object]], Position | None]


class AuditLogger:
    """Writes events to the day files of a directory, from any number of threads and processes.

    A write method that has returned a Position has handed the whole line to the kernel: the
    process may then be killed. What a power loss may cost is the choice of `fsync`.

    directory: where the day files are; it is created if it is missing (mode 0700). With "" or
        None the logger is disabled: every write is checked by nobody and returns None.
    fsync: "always": a write returns when its line is on the disk; threads that wait together
        share one sync. "interval" (default): synced every `fsync_interval` (seconds or a
        timedelta, default 1.0), so that a power loss costs at most that much. "never": when the
        kernel sees fit.
    on_failure: what becomes of the action when its event cannot be written. "raise" (default): the
        write raises, and the action must not go on. "drop": it goes on; the loss is counted and
        logged, and as soon as writing works again a `gap` event tells how many events were lost
        between which times. Or a dict of event types to these, as in {"k8s_access": "drop"},
        where "*" stands for all other types. An InvalidEvent is always raised.
    coalesce: how long (seconds or a timedelta) equal `k8s_access` and `talos_access` events are one: the
        first is written at once, its repeats are counted, and a line at the end tells how many
        they were, and when the first and the last. A crash costs that count. None (default): each
        has its line. `write_many` never coalesces.
    reader_roles: the roles that `reader_for` lets read (default: Admin and Auditor).
    redact: names and paths of secrets in events (`authorization`, `config_patch.data`,
        `*.password`), whose values are replaced by `[redacted]` before anything is encoded; see
        docs/security.md.
    redact_defaults: whether fields whose names end like a password, token, key, cookie or
        authorization are replaced, too (default True).
    hmac_key: replace secrets by `hmac-sha256:<hex>` instead, at least 16 random bytes.
    retention: what the background sweeper keeps (default: 30 days, today included); None: no
        sweeper.
    forward: the destinations that every event is sent to, besides (docs/forwarding.md), by a thread
        for each, which never fails a write or keeps it waiting. Several processes may name the same
        ones: one of them sends, the others stand by.
    timezone: whose midnight ends a day (default "UTC"): an IANA name, or "local". The first
        writer of a directory decides it for good.
    max_line_bytes: the longest line, 4096 to 16 MiB (default 1 MiB). A longer event is cut,
        visibly (docs/format.md).
    allow_shared_directory: True accepts a directory that others than its owner may write to, or
        that belongs to another user (default False: DirectoryError). See docs/security.md.
    lock_timeout: how long (seconds or a timedelta, default 10) a write waits for other writers
        before it raises LockTimeout.
    internal_agent: the user agent of events that are written while no session is bound.

    Raises DirectoryError where the directory cannot be used, and InvalidSetting for an option
    that makes no sense. A write raises InvalidEvent (nothing is written), WriteFailed (not
    acknowledged: the action must not go on) or LoggerClosed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        fsync: Literal["always", "interval", "never"] = "interval",
        fsync_interval: float | timedelta = 1.0,
        on_failure: Choice | Mapping[str, Choice] = "raise",
        coalesce: float | timedelta | None = None,
        reader_roles: Collection[str] = READER_ROLES,
        redact: Iterable[str] = (),
        redact_defaults: bool = True,
        hmac_key: bytes | None = None,
        retention: Retention | None = Retention(),  # noqa: B008 - immutable
        forward: Sequence[Destination] = (),
        timezone: str = "UTC",
        max_line_bytes: int = DEFAULT_MAX_LINE_BYTES,
        allow_shared_directory: bool = False,
        lock_timeout: float | timedelta = 10.0,
        internal_agent: str = "Omni-Internal-Agent",
        clock: Clock | None = None,
        files: Files | None = None,
    ) -> None:
        if fsync not in ("always", "interval", "never"):
            raise InvalidSetting("fsync", fsync, 'must be "always", "interval" or "never"')
        if type(max_line_bytes) is not int or not MIN_LINE_BYTES <= max_line_bytes <= MAX_LINE_BYTES:
            reason = f"must be a number of bytes from {MIN_LINE_BYTES} to {MAX_LINE_BYTES}"
            raise InvalidSetting("max_line_bytes", max_line_bytes, reason)
        if not isinstance(retention, Retention | None):
            raise InvalidSetting("retention", retention, "must be a Retention, or None for no sweeper")
        may_be_lost = OnFailure(on_failure)
        secrets = SecretNames(redact, defaults=redact_defaults)
        if hmac_key is not None and (not isinstance(hmac_key, bytes) or len(hmac_key) < _SHORTEST_KEY):
            raise InvalidSetting(
                "hmac_key", "[redacted]", f"must be at least {_SHORTEST_KEY} random bytes, or None"
            )
        if isinstance(reader_roles, str) or not all(isinstance(role, str) and role for role in reader_roles):
            raise InvalidSetting("reader_roles", reader_roles, "must be a collection of names of roles")
        self._reader_roles = tuple(reader_roles)
        window = 0.0 if coalesce is None else seconds("coalesce", coalesce)
        interval = seconds("fsync_interval", fsync_interval)
        timeout = seconds("lock_timeout", lock_timeout)
        zone_name, zone = load_zone(timezone)
        destinations: tuple[Destination, ...] = ()
        if forward:
            from .forward.destination import checked

            destinations = checked(forward)
        self._engine: Engine | None = None
        self._record: Record = _no_record
        if directory is None or os.fspath(directory) == "":
            return
        # Pydantic takes longer to load than all the rest, and a disabled log does without it.
        from .engine import Engine
        from .events.redact import Redactor

        settings = Settings(
            fsync=fsync,
            fsync_interval=interval,
            on_failure=may_be_lost,
            coalesce=window,
            redactor=Redactor(secrets, hmac_key),
            retention=retention,
            forward=destinations,
            zone_name=zone_name,
            zone=zone,
            max_line_bytes=max_line_bytes,
            allow_shared_directory=allow_shared_directory,
            lock_timeout=timeout,
            internal_agent=internal_agent,
            clock=clock or SystemClock(),
            files=files or Files(),
        )
        self._engine = Engine(os.path.abspath(directory), settings)
        self._record = self._engine.record

    @property
    def enabled(self) -> bool:
        """False where no directory was given: every write is then a no-op that returns None."""
        return self._engine is not None

    @property
    def closed(self) -> bool:
        """Was `close` called? Every write then raises LoggerClosed. A disabled logger is never closed."""
        return self._engine is not None and self._engine.writer.closed

    def session(self, session: Session) -> bind:
        """Bind a session for the length of a `with` block: events in it are that session's."""
        from .capture.session import bind

        return bind(session)

    # ------------------------------------------------------------------ what happened

    def create(self, resource_type: str, resource_id: str = "", **data: object) -> Position | None:
        """Record that a resource was created.

        `data`: the event's details, a typed payload (`cluster={"id": ...}`, a dict or a model)
        or fields of your own. Who did it is the session that is bound. Returns the position of
        the line. For what is raised see the class.
        """
        return self._record("create", resource_type, resource_id, data)

    def update(self, resource_type: str, resource_id: str = "", **data: object) -> Position | None:
        """Record that a resource was updated. Arguments as in `create`."""
        return self._record("update", resource_type, resource_id, data)

    def update_with_conflicts(
        self, resource_type: str, resource_id: str = "", **data: object
    ) -> Position | None:
        """Record an update that resolved conflicts. Arguments as in `create`."""
        return self._record("update_with_conflicts", resource_type, resource_id, data)

    def teardown(self, resource_type: str, resource_id: str = "", **data: object) -> Position | None:
        """Record that a resource is about to be destroyed. Arguments as in `create`."""
        return self._record("teardown", resource_type, resource_id, data)

    def destroy(self, resource_type: str, resource_id: str = "", **data: object) -> Position | None:
        """Record that a resource was destroyed. Arguments as in `create`."""
        return self._record("destroy", resource_type, resource_id, data)

    def k8s_access(
        self,
        *,
        full_method_name: str = "",
        command: str = "",
        body: str = "",
        kube_session: str = "",
        cluster_name: str = "",
        cluster_uuid: str = "",
        **data: object,
    ) -> Position | None:
        """Record an access to the Kubernetes API of a cluster; `data` as in `create`."""
        access = {
            "full_method_name": full_method_name,
            "command": command,
            "body": body,
            "kube_session": kube_session,
            "cluster_name": cluster_name,
            "cluster_uuid": cluster_uuid,
        }
        return self._record("k8s_access", "", "", {"k8s_access": access, **data})

    def talos_access(
        self,
        *,
        full_method_name: str = "",
        cluster_name: str = "",
        machine_ip: str = "",
        **data: object,
    ) -> Position | None:
        """Record a call of the Talos API; `data` as in `create`."""
        access = {
            "full_method_name": full_method_name,
            "cluster_name": cluster_name,
            "machine_ip": machine_ip,
        }
        return self._record("talos_access", "", "", {"talos_access": access, **data})

    def write(self, event: Event, *, may_drop: bool = True) -> Position | None:
        """Write an event of any type. Its own session and `event_ts`, if it has any, are kept.

        may_drop: False raises WriteFailed whatever `on_failure` says: for an event without which
            something must not happen.
        """
        return None if self._engine is None else self._engine.write(event, may_drop)

    async def awrite(self, event: Event, *, may_drop: bool = True) -> Position | None:
        """`write`, without blocking the event loop. When cancelled, the event may still be written.

        Tasks that wait together are written together, and with `fsync="always"` share a sync.
        """
        return None if self._engine is None else await self._engine.awrite(event, may_drop)

    def write_many(self, events: Iterable[Event], *, may_drop: bool = True) -> list[Position]:
        """Write several events together, to one day, all checked before the first is written.

        Returns their positions in the order given. A WriteFailed names those that are whole in
        the file in its `positions`; where it is not to be raised (`on_failure`, for the types of
        all of them), those are what is returned. `may_drop`: as in `write`.
        """
        return [] if self._engine is None else self._engine.write_many(events, may_drop)

    # ------------------------------------------------------------------ who reads it

    def reader_for(
        self, session: Session | None, *, on_corrupt: Callable[[CorruptLine], None] | None = None
    ) -> AuditedReader:
        """A reader for a session, each of whose reads is recorded. None is nobody.

        `on_corrupt`: as in AuditReader. Raises AccessDenied where the session's role is not exactly
        one of `reader_roles`: that is recorded, too. Raises DirectoryError where there is nothing
        to read, as with a disabled logger, and what `write` raises.
        """
        from .query.access import AuditedReader, check_role
        from .query.reader import AuditReader

        write = partial(self.write, may_drop=False)
        session = check_role(session, self._reader_roles, write)
        if self._engine is None:
            raise DirectoryError("", "the audit log is disabled", "give the server a directory for it")
        files, clock = self._engine.settings.files, self._engine.settings.clock
        reader = AuditReader(self._engine.path, on_corrupt=on_corrupt, clock=clock, files=files)
        return AuditedReader(reader, session, write)

    # ------------------------------------------------------------------ what is on the disk

    def durable_through(self) -> Position | None:
        """The newest line of this process that is on the disk together with all lines before it.

        None before the first sync. It never moves past a batch whose sync failed.
        """
        return None if self._engine is None else self._engine.durable

    def flush(self) -> None:
        """Return when everything written so far is on the disk (with fsync="never": at once).

        Raises SyncFailed where that is not certain.
        """
        if self._engine is not None:
            self._engine.flush()

    def close(self) -> None:
        """Flush, stop the background threads and close all files. A second call does nothing."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def retention_status(self) -> RetentionStatus:
        """What the background sweeper did last, and whether it is well."""
        return RetentionStatus() if self._engine is None else self._engine.retention_status

    def forward_status(self) -> list[DestinationStatus]:
        """How each destination fares, whichever process sends to it. Counts what is not sent yet."""
        if self._engine is None:
            return []
        from .forward.status import read_status

        return read_status(self._engine.path)

    def stats(self) -> Stats:
        """What this logger did in this process: counts, waits, syncs, the last error and sweep."""
        return Stats() if self._engine is None else self._engine.stats()

    def check(self) -> str:
        """For a readiness probe: what is wrong and what to do about it, in one line; "" if nothing is.

        Looks at the directory, the append lock (for at most a second), the free space, the last
        write, the last sync and the last sweep. Writes nothing. A disabled logger is well.
        """
        return "" if self._engine is None else self._engine.check()


def _no_record(
    event_type: str, resource_type: str, resource_id: str, data: dict[str, object]
) -> Position | None:
    """What a disabled logger does with an event."""
    return None
