"""Forwarding one log to one destination: in order, from where the last run ended."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterable

from ..errors import AuditLogError, DestinationBusy, DestinationError, InvalidSetting
from ..query.follower import Follower
from ..storage import forking
from ..storage.days import Clock, SystemClock
from ..storage.files import Files
from ..storage.layout import Position
from ..storage.progress import Place, Progress
from .channel import Channel, trouble
from .delivery import KINDS, Handover
from .destination import Destination
from .sockets import StreamChannel, UdpChannel
from .source import Source

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # between attempts to reach a destination
STAND_BY_PAUSE = 1.0  # between two looks whether whoever forwards is gone
_IDLE_SECONDS = 0.2  # between two looks whether the receiver is still there
_STORE_SECONDS = 1.0
_STOP_SECONDS = 5.0  # for the batch that is on its way, and for the receiver's word
_ABORT_SECONDS = 1.0
_LASTING_SECONDS = 10.0  # a connection that lasted so long was a good one
_DRAIN_SECONDS = 1.0  # to send what is there when it ends
_REST = 59  # rest at most so many times as long as the work took: where other threads have no time to spare

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
        self._source = Source(directory, destination.name, self.progress, self._clock, files)
        self._place = Place(os.fspath(directory), destination.name, files)
        self._pace = _Pace() if in_server else None
        self._stop = threading.Event()
        self._stopped_at = 0.0
        self._thread: threading.Thread | None = None
        self._channel: Channel = channel_for(destination, self.progress)
        self._connections = 0
        self._connected_at, self._sent_before = 0.0, 0
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
                patience = self._stopped_at + _STOP_SECONDS + _ABORT_SECONDS
                self._thread.join(max(0.0, patience - time.monotonic()))

    def run(self, *, once: bool = False, stand_by: bool = True) -> None:
        """Forward until `stop`.

        once: only what the log has by now; a failure is not waited out, but raised (DestinationError).
        stand_by: whether to wait while another process forwards there; else DestinationBusy is raised, and
            DirectoryError where the position cannot be read or stored.
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
                self._source.begin_now()
        else:
            self.progress.take_over(stored)
        self.progress.endpoint = self.destination.shown_endpoint
        self._place.write(self.progress)

    def _forward_now(self) -> None:
        last = self._source.newest()
        if last is None or self.progress.position == last:
            return
        try:
            self._forward(until=last)
        except Exception as error:
            self._note_failure(reason := _reason_of(error))
            if isinstance(error, OSError):
                raise DestinationError(self.destination.name, reason) from error
            raise

    def _forward_on(self) -> None:
        while True:  # once at least, as above
            before, pause = self.progress.position, 0.0
            try:
                self._forward()
            except Exception as error:
                self._tell_failure(error)
                lasted = time.monotonic() - self._connected_at if self._connected_at else 0.0
                if self.progress.position > before or lasted > _LASTING_SECONDS:
                    self._attempts = 0  # it works at times
                pause = min(FIRST_PAUSE * 2 ** min(self._attempts, 16), LONGEST_PAUSE)
                pause *= random.uniform(0.5, 1)  # so that many servers do not come back all at once
                self._attempts += 1
                pause = max(pause, getattr(error, "retry_after", None) or 0.0)
            if self._stop.wait(pause):
                return

    def _forward(self, until: Position | None = None) -> None:
        """Connect, and hand over what there is and what comes, until something fails or all is done."""
        channel, progress = self._channel, self.progress
        self._connected_at = 0.0
        try:
            with self._source.follow(twice=channel.delivery != "at_most_once") as follower:
                channel.open(self._source.entry_at(progress.taken))
                self._connected_at, self._sent_before = time.monotonic(), progress.sent
                self._connections += 1
                if self._connections > 1:
                    progress.reconnects += 1
                handover = KINDS[channel.delivery](channel, progress, self._claim)
                finished = False
                try:
                    self._hand_over_all(follower, handover, until)
                    finished = channel.finish()
                finally:
                    handover.end(finished)
        finally:
            channel.close()

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
            if handover.reached == Position.START:
                self._source.note_first(entries[0])
            good = entries if self.destination.format == "raw" else self._source.decodable(entries)
            handover.hand_over(good, follower.position)
        else:
            if follower.position > handover.reached:  # behind damage
                handover.hand_over([], follower.position)
            self._source.check(follower.position)
            self._channel.check()
        if self._channel.delivery == "at_most_once":  # no answer is a good one
            works = not entries and self.progress.sent > self._sent_before
        else:  # over HTTP nothing is known but by an answer
            works = bool(entries) or self._channel.delivery == "sent_again"
        if works:
            self._note_success()
        if not entries or time.monotonic() - self._stored_at >= _STORE_SECONDS:
            self._store()
        if self._pace is not None:
            self._stop.wait(self._pace.rest())
        return bool(entries)

    # ------------------------------------------------------------------ how it fares

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
        self._source.sign()
        self._stored = b""
        self._place.write(self.progress)

    def _store(self) -> None:
        """Store how far it is. Where that fails, more is sent again than needs be, and nothing is lost."""
        self._stored_at = time.monotonic()
        try:
            self._source.sign()
            content = self.progress.encode()
            if content != self._stored:
                self._place.write(self.progress)
            self._stored, self._store_error = content, ""
        except (AuditLogError, OSError) as error:
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


def channel_for(destination: Destination, progress: Progress) -> Channel:
    """The way to a destination. Raises InvalidSetting where it cannot work."""
    if destination.url.scheme == "udp":
        return UdpChannel(destination, progress)
    if not destination.url.is_http:
        return StreamChannel(destination, progress)
    try:
        from .http import HttpChannel  # its library is slow to load
    except ImportError:
        reason = "needs the extra: pip install 'auditlog-jsonl[forward]'"
        raise InvalidSetting("endpoint", destination.shown_endpoint, reason) from None
    return HttpChannel(destination, progress)


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


def _reason_of(error: Exception) -> str:
    if isinstance(error, DestinationError):
        return error.reason
    if isinstance(error, AuditLogError):
        return str(error)
    return trouble(error) or f"{type(error).__name__}: {error}".rstrip(": ")
