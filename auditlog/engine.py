"""What an enabled AuditLogger runs on: encoding, the writer, and the work in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .background import Periodic, RetentionStatus, SweepJob
from .capture.session import bound, captured
from .coalescing import COALESCED, Coalescer
from .committing import Append, Committer, GroupCommit
from .errors import AuditLogError, DirectoryError, InvalidEvent, InvalidSetting, SyncFailed, WriteFailed
from .events.codec import Encoded, encode, encode_event, encode_session, with_request_id
from .events.model import Event, EventType, Session
from .failures import Failures
from .health import Stats, disk_problem
from .settings import Settings
from .storage import forking
from .storage.layout import Position
from .storage.retention import RetentionSweeper
from .storage.writer import Writer

if TYPE_CHECKING:
    from .forward.forwarder import Forwarder  # loaded where it is asked for

_DAY_MS = 86_400_000
_SHORTEST_GAP_PAUSE, _LONGEST_GAP_PAUSE = 1.0, 60.0
_CHECK_TIMEOUT, _LONGEST_COALESCE_PAUSE = 1.0, 1.0

log = logging.getLogger("auditlog")


class Engine(forking.Forkable):
    """Records events in one directory, syncs and sweeps it."""

    def __init__(self, path: str, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self._redactor = settings.redactor
        self._may_drop = settings.on_failure.may_drop
        self._coalesced = COALESCED if settings.coalesce else frozenset()
        self._needs_time = self._may_drop or bool(self._coalesced)
        self._internal = encode_session(Session(user_agent=settings.internal_agent))
        self._max_line_bytes = settings.max_line_bytes
        self.writer = Writer(
            path,
            settings.zone,
            settings.clock,
            settings.files,
            allow_shared=settings.allow_shared_directory,
            lock_timeout=settings.lock_timeout,
            synced=settings.fsync != "never",
            forked=self._start_in_child,
        )
        self._begin()
        try:
            self._agree_on_zone()
            self._start_background()
        except BaseException as error:
            self._stop()
            if isinstance(error, WriteFailed):  # nothing was to be written yet
                raise DirectoryError(path, error.reason, error.remedy) from error
            raise
        forking.register(self)

    def _begin(self) -> None:
        """The state of a process that has recorded nothing yet."""
        self._failures = Failures()
        self._untold = 0  # repeats that were last found untold
        self._coalescer = Coalescer(round(self.settings.coalesce * 1000))
        self._sync_error = ""
        self._gap_pause = _SHORTEST_GAP_PAUSE
        self._background: list[Periodic] = []
        self._forwarders: list[Forwarder] = []
        self._sweep: SweepJob | None = None
        self._group = GroupCommit(
            self.path,
            self._append_and_sync,
            lambda: self.writer.syncer.refuse_reentry(),  # a forked child has another one
            self.settings.lock_timeout,
        )
        self._append: Append = self.writer.append
        if self.settings.fsync == "always":
            self._append = self._group.append
        self._committer = Committer(self.path, self._append)

    def after_fork_in_child(self) -> None:
        """Leave the parent what it has to commit and to tell."""
        self._begin()

    # ------------------------------------------------------------------ writing

    def record(
        self, event_type: str, resource_type: str, resource_id: str, data: dict[str, object]
    ) -> Position | None:
        """Write one event of the bound session; see AuditLogger for what is raised."""
        began_ms = self._now_ms() if self._needs_time else 0
        session, request_id = self._bound_session()
        if request_id:
            data = with_request_id(data, request_id)
        data = self._redactor.details(data)
        event = encode(event_type, resource_type, resource_id, data, session, self._max_line_bytes)
        return self._write_one(event_type, event, request_id, began_ms)

    def write(self, event: Event, may_drop: bool = True) -> Position | None:
        """Write a typed event. `may_drop`: may it be lost where `on_failure` says so?"""
        began_ms = self._now_ms()
        session, request_id = self._bound_session()
        encoded = self._encode(event, session, request_id, began_ms)
        position = self._write_one(event.event_type, encoded, request_id, began_ms, may_drop)
        _note_denials(event)
        return position

    def write_many(self, events: Iterable[Event], may_drop: bool = True) -> list[Position]:
        """Write typed events, all of them checked before the first."""
        events = list(events)
        began_ms = self._now_ms()
        session, request_id = self._bound_session()
        encoded = [self._encode(event, session, request_id, began_ms) for event in events]
        try:
            positions = self._append(encoded) if encoded else []
        except WriteFailed as error:
            self._give_up(error, [event.event_type for event in events], began_ms, may_drop)
            positions = list(error.positions)
        _note_denials(*events)
        return positions

    async def awrite(self, event: Event, may_drop: bool = True) -> Position | None:
        """Write an event without blocking the loop: it is checked here, and written elsewhere."""
        began_ms = self._now_ms()
        session, request_id = self._bound_session()
        encoded = self._encode(event, session, request_id, began_ms)
        key = self._coalescer.key(encoded, request_id) if event.event_type in self._coalesced else b""
        if key and (known := self._coalescer.repeat(key, began_ms)):
            return known

        def unheard(error: WriteFailed) -> None:
            try:
                self._give_up(error, (event.event_type,), began_ms, may_drop)
            except WriteFailed:
                log.error("an event whose task was cancelled is not there: %s", error)

        position = None
        try:
            position = await self._committer.submit(encoded, unheard)
        except WriteFailed as error:
            self._give_up(error, (event.event_type,), began_ms, may_drop)
        if key and position:
            self._coalescer.opened(key, encoded, position, began_ms)
        _note_denials(event)
        return position

    def _write_one(
        self, event_type: str, encoded: Encoded, request_id: str, began_ms: int, may_drop: bool = True
    ) -> Position | None:
        key = self._coalescer.key(encoded, request_id) if event_type in self._coalesced else b""
        if key and (known := self._coalescer.repeat(key, began_ms)):
            return known
        try:
            position = self._append((encoded,))[0]
        except WriteFailed as error:
            self._give_up(error, (event_type,), began_ms, may_drop)
            return None
        if key:
            self._coalescer.opened(key, encoded, position, began_ms)
        return position

    def _encode(self, event: Event, session: bytes, request_id: str, now_ms: int) -> Encoded:
        if not isinstance(event, Event):
            raise InvalidEvent("event", f"must be an Event, not {type(event).__name__}")
        encoded = encode_event(event, session, self._max_line_bytes, self._redactor, request_id)
        if event.event_ts > now_ms + _DAY_MS:
            raise InvalidEvent("event_ts", "is more than a day ahead of the clock")
        return encoded

    def _bound_session(self) -> tuple[bytes, str]:
        here = bound()
        if here is None:
            return self._internal, ""
        if here.extra or self._redactor.affects_sessions:
            return encode_session(here.session, self._redactor), here.request_id
        return here.encoded, here.request_id

    def _append_and_sync(self, events: Sequence[Encoded]) -> list[Position]:
        """Append events that may have nothing to do with each other, and bring them to the disk."""
        failure: WriteFailed | None = None
        try:
            positions = self.writer.append(events)
        except WriteFailed as error:
            failure, positions = error, list(error.positions)
        if positions:
            try:
                self.writer.syncer.sync()
            except SyncFailed as error:
                raise SyncFailed(error.path, error.reason, tuple(positions)) from failure
        if failure is not None:
            raise failure
        return positions

    # ------------------------------------------------------------------ what fails

    def _give_up(
        self, error: WriteFailed, event_types: Sequence[str], began_ms: int, may_drop: bool = True
    ) -> None:
        """Raise `error`, unless all of these events may be lost; then count what is."""
        whole = 0 if isinstance(error, SyncFailed) else len(error.positions)
        lost = len(event_types) - whole
        self._failures.failed_with(error, lost, self._now_ms(), self.writer.appends)
        if not may_drop or not all(map(self.settings.on_failure.drops, event_types)):
            raise error
        if self._failures.drop(lost, began_ms):
            log.error("%s; events are being dropped until it works again", error)

    def _tell_gap(self) -> float:
        """Write the event that tells of dropped ones; return the seconds until another attempt."""
        gap = self._failures.take_gap()
        if gap is None:
            return _SHORTEST_GAP_PAUSE
        facts = {"lost": gap.lost, "first_ts": gap.first_ms, "last_ts": gap.last_ms}
        position = self._append_own(encode(EventType.GAP, "", "", {"audit": facts}, self._internal))
        if position is None:
            self._failures.give_back(gap)
            self._gap_pause = min(2 * self._gap_pause, _LONGEST_GAP_PAUSE)
            return self._gap_pause
        log.warning("%s: %d events were dropped; the gap event at %s says so", self.path, gap.lost, position)
        self._gap_pause = _SHORTEST_GAP_PAUSE
        return self._gap_pause

    def _tell_repeats(self) -> float:
        """Write what the windows counted that have ended; return the seconds until another look."""

        def write(event: Event) -> Position | None:
            # Its secrets were replaced when the line was made that it repeats.
            return self._append_own(encode_event(event, self._internal, self._max_line_bytes))

        untold = self._coalescer.tell(self._now_ms(), write)
        if untold and untold != self._untold:  # once, not every second
            log.error("%s: %d repeated accesses could not be told", self.path, untold)
        self._untold = untold
        return min(self.settings.coalesce, _LONGEST_COALESCE_PAUSE)

    def _append_own(self, event: Encoded) -> Position | None:
        """Append an event about the log itself; None where it is not there, and must be told later."""
        try:
            return self._append((event,))[0]
        except WriteFailed as error:
            self._failures.failed_with(error, 0, self._now_ms(), self.writer.appends)
            # Where only the sync failed it stands there, as unsynced as what it tells of.
            return error.positions[0] if error.positions else None

    def _now_ms(self) -> int:
        return self.settings.clock.time_ns() // 1_000_000

    # ------------------------------------------------------------------ how it fares

    @property
    def durable(self) -> Position | None:
        """The newest line that is on the disk with all lines before it."""
        return self.writer.syncer.durable

    @property
    def retention_status(self) -> RetentionStatus:
        """How the background sweeper fares."""
        return self._sweep.status if self._sweep else RetentionStatus()

    def stats(self) -> Stats:
        """The figures of this process."""
        writer, failures, sweep = self.writer, self._failures, self.retention_status
        lock_waits, lock_wait_seconds = writer.waits
        error_ms = failures.last_error_ms
        return Stats(
            directory=self.path,
            written=writer.lines,
            failed=failures.failed,
            dropped=failures.dropped,
            lock_waits=lock_waits,
            lock_wait_seconds=lock_wait_seconds,
            syncs=writer.syncer.syncs,
            sync_failures=writer.syncer.failures,
            sync_seconds=writer.syncer.seconds,
            longest_sync_seconds=writer.syncer.longest_seconds,
            last_error=failures.last_error,
            last_error_at=datetime.fromtimestamp(error_ms / 1000, UTC) if error_ms else None,
            last_sweep=sweep.report,
            sweep_error=sweep.error,
        )

    def check(self) -> str:
        """What is wrong and what to do, in one line; "" while all is well."""
        try:
            with self.writer.locked(_CHECK_TIMEOUT) as directory:
                directory.stat_in_place()
                problem = disk_problem(directory.fd, self._max_line_bytes)
        except (AuditLogError, OSError) as error:
            return str(error)
        if problem:
            return f"audit log {self.path}: {problem}"
        syncing = self.writer.syncer.busy_seconds
        if syncing > self.settings.lock_timeout:
            return f"audit log {self.path}: a sync has taken {syncing:.0f} s so far; check the disk"
        failures = self._failures
        if self._sync_error:
            return self._sync_error
        if failures.last_error and failures.appends_before == self.writer.appends:
            return f"nothing was written since: {failures.last_error}"
        sweep_error = self.retention_status.error
        return f"audit log {self.path}: retention sweep: {sweep_error}" if sweep_error else ""

    # ------------------------------------------------------------------ beginning and end

    def flush(self) -> None:
        """Bring everything to the disk, unless it is not to be synced."""
        if self.settings.fsync != "never" and not self.writer.closed:
            self.writer.syncer.sync()

    def close(self) -> None:
        """Flush, and end everything. A second call does nothing."""
        if self.writer.closed:
            return
        self._group.refuse_reentry()
        self.writer.refuse_reentry()
        self._stop()

    def _stop(self) -> None:
        for job in self._background:
            job.stop()
        self._committer.close()
        self._coalescer.close()
        self._tell_repeats()
        if self._untold:
            self._failures.drop(self._untold, self._now_ms())
        self._tell_gap()
        for wait in (False, True):  # all are told before the first is waited for
            for forwarder in self._forwarders:
                forwarder.stop(wait=wait)
        self.writer.close()

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
        jobs: dict[str, Callable[[], float]] = {}
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
            jobs["auditlog-sweep"] = self._sweep.run
        if settings.fsync == "interval":
            jobs["auditlog-sync"] = self._sync
        if self._coalesced:
            jobs["auditlog-coalesce"] = self._tell_repeats
        if self._may_drop:
            jobs["auditlog-gap"] = self._tell_gap
        self._background = [Periodic(name, job) for name, job in jobs.items()]
        if settings.forward:
            from .forward.forwarder import start_all

            self._forwarders = start_all(self.path, settings.forward, settings.clock, settings.files)

    def _start_in_child(self) -> None:
        try:
            self._start_background()
        except InvalidSetting as error:  # as where it may not read a certificate
            log.error("%s: this process does not forward: %s", self.path, error)

    def _sync(self) -> float:
        try:
            self.flush()
            self._sync_error = ""
        except SyncFailed as error:
            if self._sync_error != str(error):  # once, not every second
                log.error("%s", error)
            self._sync_error = str(error)
            self._failures.failed_with(error, 0, self._now_ms(), self.writer.appends)
        return self.settings.fsync_interval


def _note_denials(*events: Event) -> None:
    """Whoever sees a refusal further out need not record again what was recorded, or given up, here."""
    if any(event.event_type == EventType.ACCESS_DENIED for event in events) and (request := captured()):
        request.denied = True
