"""What an enabled AuditLogger runs on: encoding, the writer, and the work in the background."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import Literal

from .background import Periodic, RetentionStatus, SweepJob
from .capture.session import bound
from .errors import DirectoryError, InvalidEvent, SyncFailed
from .events.codec import Encoded, encode, encode_event, encode_session
from .events.model import Event, Session
from .storage.days import Clock
from .storage.files import Files
from .storage.layout import Position
from .storage.retention import Retention, RetentionSweeper
from .storage.writer import Writer

_DAY_MS = 86_400_000

log = logging.getLogger("auditlog")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of an AuditLogger, checked; durations are in seconds."""

    fsync: Literal["always", "interval", "never"]
    fsync_interval: float
    retention: Retention | None
    zone_name: str
    zone: tzinfo
    max_line_bytes: int
    allow_shared_directory: bool
    lock_timeout: float
    internal_agent: str
    clock: Clock
    files: Files


class Engine:
    """Records events in one directory, syncs and sweeps it."""

    def __init__(self, path: str, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self._internal = encode_session(Session(user_agent=settings.internal_agent))
        self._max_line_bytes = settings.max_line_bytes
        self._sweep: SweepJob | None = None
        self._background: list[Periodic] = []
        self._sync_error = ""
        self.writer = Writer(
            path,
            settings.zone,
            settings.clock,
            settings.files,
            allow_shared=settings.allow_shared_directory,
            lock_timeout=settings.lock_timeout,
            synced=settings.fsync != "never",
            forked=self._start_background,
        )
        self._append = self._append_durably if settings.fsync == "always" else self.writer.append
        try:
            self._agree_on_zone()
            self._start_background()
        except BaseException:
            self.writer.close()
            raise

    def record(
        self, event_type: str, resource_type: str, resource_id: str, data: dict[str, object]
    ) -> Position:
        """Write one event of the bound session; see AuditLogger for what is raised."""
        session = self._bound_session()
        event = encode(event_type, resource_type, resource_id, data, session, self._max_line_bytes)
        return self._append((event,))[0]

    def write_many(self, events: Iterable[Event]) -> list[Position]:
        """Write typed events, all of them checked before the first."""
        session = self._bound_session()
        latest = self.settings.clock.time_ns() // 1_000_000 + _DAY_MS
        encoded = []
        for event in events:
            if not isinstance(event, Event):
                raise InvalidEvent("event", f"must be an Event, not {type(event).__name__}")
            encoded.append(encode_event(event, session, self._max_line_bytes))
            if event.event_ts > latest:
                raise InvalidEvent("event_ts", "is more than a day ahead of the clock")
        return self._append(encoded) if encoded else []

    def _bound_session(self) -> bytes:
        here = bound()
        return self._internal if here is None else here.encoded

    def _append_durably(self, events: Sequence[Encoded]) -> list[Position]:
        positions = self.writer.append(events)
        try:
            self.writer.group.sync()
        except SyncFailed as error:
            raise SyncFailed(error.path, error.reason, tuple(positions)) from None
        return positions

    @property
    def durable(self) -> Position | None:
        """The newest line that is on the disk with all lines before it."""
        return self.writer.group.durable

    def flush(self) -> None:
        """Bring everything to the disk, unless it is not to be synced."""
        if self.settings.fsync != "never" and not self.writer.closed:
            self.writer.group.sync()

    def close(self) -> None:
        """Flush, and end everything. A second call does nothing."""
        for job in self._background:
            job.stop()
        self.writer.close()

    @property
    def retention_status(self) -> RetentionStatus:
        """How the background sweeper fares."""
        return self._sweep.status if self._sweep else RetentionStatus()

    def _agree_on_zone(self) -> None:
        zone = self.settings.zone_name
        with self.writer.locked() as directory:
            recorded = directory.read_state().timezone
            if recorded is None:
                directory.update_state(timezone=zone)
            elif recorded != zone:
                raise DirectoryError(
                    self.path,
                    f"its days are those of the zone {recorded}, not {zone}",
                    f'pass timezone="{recorded}", or use another directory',
                )

    def _start_background(self) -> None:
        settings = self.settings
        self._background = []
        if settings.fsync == "interval":
            self._background.append(Periodic("auditlog-sync", self._sync))
        if settings.retention is not None:
            sweeper = RetentionSweeper(
                self.path,
                settings.retention,
                allow_shared_directory=settings.allow_shared_directory,
                lock_timeout=settings.lock_timeout,
                clock=settings.clock,
                files=settings.files,
            )
            self._sweep = SweepJob(sweeper, settings.zone, settings.clock)
            self._background.append(Periodic("auditlog-sweep", self._sweep.run))

    def _sync(self) -> float:
        try:
            self.flush()
            self._sync_error = ""
        except SyncFailed as error:
            if self._sync_error != str(error):  # once, not every second
                log.error("%s", error)
            self._sync_error = str(error)
        return self.settings.fsync_interval
