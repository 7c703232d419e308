"""The options of an AuditLogger, checked: what an enabled one is made of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import tzinfo
from typing import TYPE_CHECKING, Literal

from .failures import OnFailure
from .storage.days import Clock
from .storage.files import Files
from .storage.retention import Retention

if TYPE_CHECKING:
    from .events.redact import Redactor  # loads pydantic, which a disabled logger does without
    from .forward.destination import Destination


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of an AuditLogger, checked; durations are in seconds."""

    fsync: Literal["always", "interval", "never"]
    fsync_interval: float
    on_failure: OnFailure
    coalesce: float
    redactor: Redactor
    retention: Retention | None
    forward: tuple[Destination, ...]
    zone_name: str
    zone: tzinfo
    max_line_bytes: int
    allow_shared_directory: bool
    lock_timeout: float
    internal_agent: str
    clock: Clock
    files: Files
