"""Forwarding one log to one destination: in order, from where the last run ended."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterable
from datetime import date

from ..errors import AuditLogError, CorruptEntry, DestinationBusy, DestinationError, PositionInvalid
from ..query.follower import Follower
from ..query.reader import AuditReader
from ..storage import forking
from ..storage.days import Clock, SystemClock
from ..storage.entry import CorruptLine, Entry
from ..storage.files import Files
from ..storage.layout import Position
from ..storage.progress import Place, Progress
from .channel import Channel, channel_for, trouble
from .delivery import KINDS, Handover
from .destination import Destination

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # between attempts to reach a destination
STAND_BY_PAUSE = 1.0  # between two looks whether whoever forwards is gone
_IDLE_SECONDS = 0.2  # between two looks whether the receiver is still there
_STORE_SECONDS = 1.0
_STOP_SECONDS = 5.0  # for the batch that is on its way, and for the receiver's word
_ABORT_SECONDS = 1.0
_LASTING_SECONDS = 10.0  # a connection that lasted so long was a good one
_DRAIN_SECONDS = 1.0  # to send what is there when it ends
_REST = 59  # times as long as the work took, while the other threads have no time to spare

log = logging.getLogger("auditlog")


class Forwarder(forking.Forkable):
    """Forwards the entries of one log to one destination, and goes on as there are more.

    directory: of the log. It need not be writable but for `.auditlog/forward`, where the position
        is kept.
    in_server: whether this process has other work to do. The busier that keeps it, the less of the
        interpreter's time is taken from it: a sixtieth where there is none to spare (default False).

    `progress`: how far it is, and its figures. `active`: whether it is this one that forwards, or
    another process does and this one stands by.

    Raises DirectoryError where there is no log, and InvalidSetting for a destination that cannot work.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        destination: Destination,
        *,
        clock: Clock | None = None,
        files: Files | None = None,
        in_server: bool = False,
    ) -> None:
        self.destination = destination
        self.progress = Progress()
        self.active = False
        self._clock = clock or SystemClock()
        files = files or Files()
        self._reader = AuditReader(directory, on_corrupt=self._note_damage, clock=clock, files=files)
        self._quiet_reader = AuditReader(directory, on_corrupt=_pass_over, clock=clock, files=files)
        self._damaged_through = Position.START
        self._place = Place(os.fspath(directory), destination.name, files)
        self._pace = _Pace() if in_server else None
        self._stop = threading.Event()
        self._stopped_at = 0.0
        self._thread: threading.Thread | None = None
        self._channel: Channel = channel_for(destination, self.progress)
        self._connections = 0
        self._attempts = 0  # in a row that failed
        self._stored_at = 0.0
        self._stored, self._store_error = b"", ""
        forking.register(self)

    # ------------------------------------------------------------------ running

    def start(self) -> None:
        """Forward in a thread of its own, until `stop`."""
        name = f"auditlog-forward-{self.destination.name}"
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """End what `start` or `run` began, after the batch that is on its way, or 5 s later without it.

        wait: until the thread that forwards has ended. Several that are stopped without it end together.
        """
        self._stopped_at = self._stopped_at or time.monotonic()
        self._stop.set()
        if wait and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, self._stopped_at + _STOP_SECONDS - time.monotonic()))
            if self._thread.is_alive():
                self._channel.abort()
                self._thread.join(_ABORT_SECONDS)

    def run(self, *, once: bool = False, stand_by: bool = True) -> None:
        """Forward until `stop`.

        once: only what the log has by now; a failure is not waited out, but raised (DestinationError).
        stand_by: whether to wait while another process forwards there; else DestinationBusy is raised.
        """
        self._thread = threading.current_thread()
        try:
            if self._become_active(stand_by and not once):
                self._forward_now() if once else self._forward_on()
        finally:
            if self.active:
                self._store()
                self.active = False
                self._place.unlock()

    def _become_active(self, stand_by: bool) -> bool:
        told = False
        while True:  # once at least: whoever is stopped at once has still something to send
            try:
                if self._place.lock():
                    self._load()
                    self.active = True
                    return True
            except Exception as error:
                self._place.unlock()
                if not stand_by:
                    raise
                self._tell_failure(error)
            else:
                if not stand_by:
                    raise DestinationBusy(self.destination.name)
                if not told:
                    told = True
                    log.info("destination %s: another process forwards; standing by", self.destination.name)
            if self._stop.wait(STAND_BY_PAUSE):
                return False

    def _load(self) -> None:
        stored = self._place.read()
        if stored is None:
            if self.destination.begin == "now":
                with self._reader.follow() as follower:
                    self.progress.position = self.progress.sent_through = follower.position
        else:
            for name in Progress.__slots__:
                setattr(self.progress, name, getattr(stored, name))
            # Whoever wrote that died before it could say what became of these.
            self.progress.lost += self.progress.in_flight
            self.progress.in_flight = 0
        self.progress.endpoint = self.destination.endpoint.partition("?")[0]  # a query may hold a token
        self._place.write(self.progress)

    def _forward_now(self) -> None:
        last = next(self._quiet_reader.read(newest_first=True, limit=1), None)
        if last is None:
            return
        try:
            if self.progress.position < last.position:
                self._forward(until=last.position)
        except (OSError, DestinationError) as error:
            self._note_failure(reason := _reason_of(error))
            if isinstance(error, DestinationError):
                raise
            raise DestinationError(self.destination.name, reason) from error

    def _forward_on(self) -> None:
        while True:  # once at least, as above
            began, before, pause = time.monotonic(), self.progress.position, 0.0
            try:
                self._forward()
            except Exception as error:
                self._tell_failure(error)
                if self.progress.position > before or time.monotonic() - began > _LASTING_SECONDS:
                    self._attempts = 0  # it works at times
                pause = min(FIRST_PAUSE * 2 ** min(self._attempts, 16), LONGEST_PAUSE)
                pause *= random.uniform(0.5, 1)  # so that many servers do not come back all at once
                self._attempts += 1
                pause = max(pause, getattr(error, "retry_after", None) or 0.0)
            if self._stop.wait(pause):
                return

    def _forward(self, until: Position | None = None) -> None:
        """Connect, and hand over what there is and what comes, until something fails or all is done."""
        try:
            self._look_at_oldest()
            with self._follow() as follower:
                self._connect()
                handover = KINDS[self._channel.delivery](self._channel, self.progress, self._claim)
                finished = False
                try:
                    self._hand_over_all(follower, handover, until)
                    finished = self._channel.finish()
                finally:
                    handover.end(finished)
        finally:
            self._channel.close()

    def _follow(self) -> Follower:
        """Read on from where it is."""
        progress = self.progress
        try:
            return self._reader.follow(after=progress.position, on_missed=self._note_missed)
        except PositionInvalid as error:
            # A power loss took lines that were sent, or somebody edited the file. What stands in their
            # place was not sent, and nobody knows where it begins.
            if self._channel.delivery == "at_most_once":
                follower, place = self._reader.follow(on_missed=self._note_missed), "with what is new"
            else:
                start = progress.position.day
                follower = self._reader.follow(start, on_missed=self._note_missed)
                place = f"with all of {start}"
            log.error("destination %s: %s; going on %s", self.destination.name, error, place)
            progress.position = progress.sent_through = follower.position
            return follower

    def _connect(self) -> None:
        self._channel.open()
        self._connections += 1
        if self._connections > 1:
            self.progress.reconnects += 1

    def _hand_over_all(self, follower: Follower, handover: Handover, until: Position | None) -> None:
        """Hand over entries as they come, until the one at `until`; after a stop, what is still there."""
        ending = 0.0  # since when
        while until is None or follower.position < until:
            if self._stop.is_set():
                ending = ending or time.monotonic()
            took = self._hand_over_next(follower, handover, 0 if ending else _IDLE_SECONDS)
            if ending and (not took or time.monotonic() - ending > _DRAIN_SECONDS):
                return

    def _hand_over_next(self, follower: Follower, handover: Handover, timeout: float) -> bool:
        """Hand over a batch; False where none came."""
        entries = follower.take(timeout)
        if entries:
            handover.hand_over(self._decodable(entries), follower.position)
            self._note_success()
        else:
            self._channel.check()
            if self._channel.delivery == "sent_again":  # the others do not know
                self._note_success()
        if time.monotonic() - self._stored_at >= _STORE_SECONDS:
            self._store()
        if self._pace is not None:
            self._stop.wait(self._pace.rest())
        return bool(entries)

    def _decodable(self, entries: list[Entry]) -> list[Entry]:
        """Those that can be decoded, where the format needs that; the others are damage."""
        if self.destination.format == "raw":
            return entries
        good = []
        for entry in entries:
            try:
                entry.record  # noqa: B018 - decoded
                good.append(entry)
            except CorruptEntry as error:
                self._note_damage(CorruptLine(entry.position, b"", len(entry.line), error.reason))
        return good

    # ------------------------------------------------------------------ how it fares

    def _note_damage(self, line: CorruptLine) -> None:
        if line.position <= max(self._damaged_through, self.progress.sent_through):
            return  # it was told when it was first passed
        self._damaged_through = line.position
        self.progress.damaged += 1
        text = "destination %s: the line at %s is damaged (%s), and is not sent"
        log.warning(text, self.destination.name, line.position, line.reason)

    def _look_at_oldest(self) -> None:
        """Notice a sweep before anything was sent: then there is no line that it could be noticed by."""
        progress = self.progress
        if progress.position != Position.START:
            return
        oldest = next(self._quiet_reader.read(limit=1), None)
        if oldest is None:
            return
        if progress.begins_with == Position.START:
            progress.begins_with = oldest.position
        else:
            self._note_swept(progress.begins_with, oldest.position)

    def _note_missed(self, position: Position, day: date) -> None:
        self._note_swept(position, Position(day, 0))

    def _note_swept(self, behind: Position, there: Position) -> None:
        # Over TCP what was sent may be due once more, and that it is gone is no loss.
        first = max(behind, self.progress.sent_through)
        if there > first and self.progress.note_swept(first, there):
            text = "destination %s: what was written from %s to %s was swept before it was sent"
            log.error(text, self.destination.name, first, there)
            self._store()

    def _note_success(self) -> None:
        if self.progress.failing:
            self.progress.failing = False
            log.info("destination %s takes messages again", self.destination.name)

    def _tell_failure(self, error: Exception) -> None:
        """Note why an attempt failed, and log it once."""
        reason, progress = _reason_of(error), self.progress
        if not progress.failing or reason != progress.last_error:
            unexpected = None if isinstance(error, OSError | AuditLogError) else error
            log.error("destination %s: %s", self.destination.name, reason, exc_info=unexpected)
        self._note_failure(reason)

    def _note_failure(self, reason: str) -> None:
        self.progress.last_error, self.progress.last_error_ms = reason, self._now_ms()
        self.progress.failing = True
        if self.active:
            self._store()

    def _claim(self) -> None:
        """Store what is about to be sent, or do not send it."""
        self._place.write(self.progress)

    def _store(self) -> None:
        """Store how far it is. Where that fails, more is sent again than needs be, and nothing is lost."""
        self._stored_at = time.monotonic()
        content = self.progress.encode()
        if content == self._stored:
            return
        try:
            self._place.write(self.progress)
            self._stored, self._store_error = content, ""
        except AuditLogError as error:
            if self._store_error != str(error):  # once
                self._store_error = str(error)
                text = "destination %s: how far it is cannot be stored: %s"
                log.error(text, self.destination.name, error)

    def _now_ms(self) -> int:
        return self._clock.time_ns() // 1_000_000

    # ------------------------------------------------------------------ forks

    def after_fork_in_child(self) -> None:
        """Leave lock and connection to the parent, whose receiver would else not see it go."""
        self.active = False
        self._thread = None
        self._place.leave_to_parent()
        if not self.destination.url.is_http:  # the library behind that one has locks of its own
            self._channel.close()


class _Pace:
    """How long to rest, so that the other threads of a server do not miss the time that this one takes."""

    def __init__(self) -> None:
        self._at = (time.thread_time(), time.process_time(), time.monotonic())

    def rest(self) -> float:
        """The seconds to rest after what was done since the last call, that rest included."""
        before, self._at = self._at, (time.thread_time(), time.process_time(), time.monotonic())
        own, process, wall = (now - then for now, then in zip(self._at, before, strict=True))
        share = min(1.0, max(0.0, process - own) / wall) if wall > 0 else 0.0
        return _REST * share * own


def start_all(
    directory: str, destinations: Iterable[Destination], clock: Clock, files: Files
) -> list[Forwarder]:
    """Forward to several destinations within a server. Starts none where one of them cannot work."""
    forwarders = [
        Forwarder(directory, each, clock=clock, files=files, in_server=True) for each in destinations
    ]
    for forwarder in forwarders:
        forwarder.start()
    return forwarders


def _pass_over(_line: CorruptLine) -> None:
    """Damage is told where it is passed on the way."""


def _reason_of(error: Exception) -> str:
    if isinstance(error, DestinationError):
        return error.reason
    if isinstance(error, AuditLogError):
        return str(error)
    return trouble(error) or f"{type(error).__name__}: {error}".rstrip(": ")
