"""Work that goes on beside the server: one daemon thread for each job."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import tzinfo

from .storage.days import ONE_DAY, Clock, day_at, start_ns
from .storage.retention import RetentionSweeper, SweepReport

LONGEST_PAUSE = 3600.0
RETRY_PAUSE = 60.0
LONGEST_DRIFT_NS = 86_400 * 1_000_000_000

log = logging.getLogger("auditlog")


class Periodic:
    """Runs `job` now and again, in a thread of its own, until it is stopped.

    `job` returns the seconds until its next run. What it raises is logged and never ends the
    thread; the next run comes a minute later.
    """

    def __init__(self, name: str, job: Callable[[], float]) -> None:
        self._job = job
        self._stopped = threading.Event()
        # A daemon: a server that forgets to close its logger still ends.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            try:
                pause = self._job()
            except Exception:
                log.exception("%s failed; it runs again in %g s", self._thread.name, RETRY_PAUSE)
                pause = RETRY_PAUSE

    def stop(self) -> None:
        """End the thread, after the run that it is in."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


@dataclass(frozen=True, slots=True)
class RetentionStatus:
    """How the background sweeper fares.

    `report`: what the last sweep did, None before the first. `error`: why the last attempt
    failed, or why sweeping is paused; empty while all is well.
    """

    report: SweepReport | None = None
    error: str = ""


class SweepJob:
    """The background sweep: at start, at every midnight of the log's zone, and at least hourly.

    It pauses for as long as the wall clock has moved over a day more, or less, than the boot-time
    clock did: a clock that jumped must not cost anybody a month of logs.
    """

    def __init__(self, sweeper: RetentionSweeper, zone: tzinfo, clock: Clock) -> None:
        self._sweeper = sweeper
        self._zone = zone
        self._clock = clock
        self._offset_ns = clock.time_ns() - clock.boottime_ns()
        self.status = RetentionStatus()

    def run(self) -> float:
        """Sweep once; return the seconds until the next run."""
        drift_ns = self._clock.time_ns() - self._clock.boottime_ns() - self._offset_ns
        report = self.status.report
        try:
            if abs(drift_ns) > LONGEST_DRIFT_NS:
                raise RuntimeError(
                    f"the wall clock jumped by {drift_ns / 3.6e12:+.1f} hours; sweeping is paused: "
                    "set the clock right, or restart the process to confirm it"
                )
            report = self._sweeper.sweep()
            error = "; ".join(f"{day} could not be removed: {reason}" for day, reason in report.failed)
        except Exception as raised:
            error = str(raised)
        if error and error != self.status.error:  # once, not every minute
            log.warning("retention sweep: %s", error)
        self.status = RetentionStatus(report, error)
        if self.status.error:
            return RETRY_PAUSE
        now_ns = self._clock.time_ns()
        tomorrow = day_at(now_ns, self._zone) + ONE_DAY
        return min(LONGEST_PAUSE, max(1.0, (start_ns(tomorrow, self._zone) - now_ns) / 1e9))
