"""The options of an AuditLogger, checked: what an enabled one is made of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta, tzinfo
from typing import TYPE_CHECKING, Literal

from .errors import InvalidSetting
from .failures import OnFailure
from .storage.days import Clock
from .storage.files import Files
from .storage.retention import Retention

if TYPE_CHECKING:
    from .events.redact import Redactor  # loads pydantic, which a disabled logger does without


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of an AuditLogger, checked; durations are in seconds."""

    fsync: Literal["always", "interval", "never"]
    fsync_interval: float
    on_failure: OnFailure
    coalesce: float
    redactor: Redactor
    retention: Retention | None
    zone_name: str
    zone: tzinfo
    max_line_bytes: int
    allow_shared_directory: bool
    lock_timeout: float
    internal_agent: str
    clock: Clock
    files: Files


def seconds(setting: str, value: float | timedelta) -> float:
    """A duration in seconds. Raises InvalidSetting where it is none, or not positive."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e6:
        raise InvalidSetting(setting, value, "must be a positive number of seconds, or a timedelta")
    return float(number)
