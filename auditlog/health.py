"""How a logger fares: figures for metrics, and what is wrong for a readiness probe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from .storage.retention import SweepReport


@dataclass(frozen=True, slots=True)
class Stats:
    """What one AuditLogger did in this process since it was made. Durations are in seconds.

    written: lines that are whole in a file, whether their sync worked or not.
    failed: events whose write raised or was given up; dropped: those given up (`on_failure`).
    lock_waits, lock_wait_seconds: how often, and how long in all, a write had to wait for others.
    syncs, sync_seconds, longest_sync_seconds: of the disk; sync_failures: those that failed.
    last_error, last_error_at: the newest failed write or sync ("" and None: there was none).
    last_sweep: the report of the newest background sweep; sweep_error: why the last attempt
    failed, or why sweeping is paused.
    """

    directory: str = ""
    written: int = 0
    failed: int = 0
    dropped: int = 0
    lock_waits: int = 0
    lock_wait_seconds: float = 0.0
    syncs: int = 0
    sync_failures: int = 0
    sync_seconds: float = 0.0
    longest_sync_seconds: float = 0.0
    last_error: str = ""
    last_error_at: datetime | None = None
    last_sweep: SweepReport | None = None
    sweep_error: str = ""

    def prometheus(self) -> str:
        """The same in the Prometheus text format (version 0.0.4), for a `/metrics` route.

        Times are in seconds since the epoch, 0 where there was none.
        """
        swept_at = self.last_sweep.at if self.last_sweep else None
        samples = [
            ("events_written_total", "counter", "Lines that are whole in a day file.", self.written),
            ("events_failed_total", "counter", "Events that were not acknowledged.", self.failed),
            ("events_dropped_total", "counter", "Events given up by on_failure.", self.dropped),
            ("lock_waits_total", "counter", "Writes that waited for the append lock.", self.lock_waits),
            ("lock_wait_seconds_total", "counter", "Time waited for it.", self.lock_wait_seconds),
            ("syncs_total", "counter", "Syncs of day files to the disk.", self.syncs),
            ("sync_failures_total", "counter", "Syncs that failed.", self.sync_failures),
            ("sync_seconds_total", "counter", "Time spent in syncs.", self.sync_seconds),
            ("sync_longest_seconds", "gauge", "The longest sync.", self.longest_sync_seconds),
            ("last_error_timestamp_seconds", "gauge", "Last failed write.", epoch(self.last_error_at)),
            ("last_sweep_timestamp_seconds", "gauge", "Last retention sweep.", epoch(swept_at)),
            ("sweep_failing", "gauge", "Does sweeping fail, or pause?", int(bool(self.sweep_error))),
        ]
        return "".join(
            metric(name, kind, text, "directory", [(self.directory, value)])
            for name, kind, text, value in samples
        )


def metric(name: str, kind: str, text: str, label: str, samples: Iterable[tuple[str, float]]) -> str:
    """One metric in the Prometheus text format: a sample for each value of the label."""
    lines = [f"# HELP auditlog_{name} {text}\n# TYPE auditlog_{name} {kind}\n"]
    for value, number in samples:
        escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        lines.append(f'auditlog_{name}{{{label}="{escaped}"}} {number}\n')
    return "".join(lines)


def epoch(at: datetime | None) -> float:
    """A time in seconds since the epoch; 0 for none."""
    return at.timestamp() if at else 0


def disk_problem(directory: int, needed_bytes: int) -> str:
    """Why the file system of an open directory takes no line of that size; "" where it does."""
    found = os.fstatvfs(directory)
    if found.f_flag & os.ST_RDONLY:
        return "the file system is read-only; look for the cause in the kernel's log and remount it"
    free = found.f_bavail * found.f_frsize
    if free < needed_bytes:
        return f"the file system is full ({free} bytes are free); free space or shorten the retention"
    if found.f_files and not found.f_favail:
        return "the file system has no inode left for the next day's file; remove files"
    return ""
