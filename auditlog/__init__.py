"""An audit log for self-hosted control planes: plain daily files, and nothing acknowledged is lost.

The public names are loaded on first use (PEP 562): importing the package costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("auditlog does not support Windows: it needs flock and POSIX file modes")

if TYPE_CHECKING:
    from .background import RetentionStatus as RetentionStatus
    from .errors import AccessDenied as AccessDenied
    from .errors import AuditLogError as AuditLogError
    from .errors import CorruptEntry as CorruptEntry
    from .errors import DestinationBusy as DestinationBusy
    from .errors import DestinationError as DestinationError
    from .errors import DirectoryError as DirectoryError
    from .errors import DiskFull as DiskFull
    from .errors import InvalidEvent as InvalidEvent
    from .errors import InvalidRange as InvalidRange
    from .errors import InvalidSetting as InvalidSetting
    from .errors import LockTimeout as LockTimeout
    from .errors import LoggerClosed as LoggerClosed
    from .errors import PositionError as PositionError
    from .errors import PositionExpired as PositionExpired
    from .errors import PositionInvalid as PositionInvalid
    from .errors import ReentrantWrite as ReentrantWrite
    from .errors import SweepBusy as SweepBusy
    from .errors import SyncFailed as SyncFailed
    from .errors import WriteFailed as WriteFailed
    from .events.model import Event as Event
    from .events.model import EventData as EventData
    from .events.model import EventType as EventType
    from .events.model import Session as Session
    from .events.model import denied as denied
    from .events.payloads import AccessPolicy as AccessPolicy
    from .events.payloads import AuditFacts as AuditFacts
    from .events.payloads import AuditLogAccess as AuditLogAccess
    from .events.payloads import Cluster as Cluster
    from .events.payloads import ConfigPatch as ConfigPatch
    from .events.payloads import K8sAccess as K8sAccess
    from .events.payloads import Machine as Machine
    from .events.payloads import MachineConfigDiff as MachineConfigDiff
    from .events.payloads import MachineLabels as MachineLabels
    from .events.payloads import MachineSet as MachineSet
    from .events.payloads import MachineSetNode as MachineSetNode
    from .events.payloads import MigrationError as MigrationError
    from .events.payloads import NewUser as NewUser
    from .events.payloads import TalosAccess as TalosAccess
    from .health import Stats as Stats
    from .logger import AuditLogger as AuditLogger
    from .query.access import AuditedReader as AuditedReader
    from .query.filters import Filter as Filter
    from .query.follower import AsyncFollower as AsyncFollower
    from .query.follower import Follower as Follower
    from .query.reader import AuditReader as AuditReader
    from .storage.days import Clock as Clock
    from .storage.days import SystemClock as SystemClock
    from .storage.entry import CorruptLine as CorruptLine
    from .storage.entry import Entry as Entry
    from .storage.layout import Position as Position
    from .storage.retention import Retention as Retention
    from .storage.retention import RetentionSweeper as RetentionSweeper
    from .storage.retention import SweepReport as SweepReport

_HOMES = {
    "background": ("RetentionStatus",),
    "errors": (
        "AccessDenied",
        "AuditLogError",
        "CorruptEntry",
        "DestinationBusy",
        "DestinationError",
        "DirectoryError",
        "DiskFull",
        "InvalidEvent",
        "InvalidRange",
        "InvalidSetting",
        "LockTimeout",
        "LoggerClosed",
        "PositionError",
        "PositionExpired",
        "PositionInvalid",
        "ReentrantWrite",
        "SweepBusy",
        "SyncFailed",
        "WriteFailed",
    ),
    "events.model": ("Event", "EventData", "EventType", "Session", "denied"),
    "events.payloads": (
        "AccessPolicy",
        "AuditFacts",
        "AuditLogAccess",
        "Cluster",
        "ConfigPatch",
        "K8sAccess",
        "Machine",
        "MachineConfigDiff",
        "MachineLabels",
        "MachineSet",
        "MachineSetNode",
        "MigrationError",
        "NewUser",
        "TalosAccess",
    ),
    "health": ("Stats",),
    "logger": ("AuditLogger",),
    "query.access": ("AuditedReader",),
    "query.filters": ("Filter",),
    "query.follower": ("AsyncFollower", "Follower"),
    "query.reader": ("AuditReader",),
    "storage.days": ("Clock", "SystemClock"),
    "storage.entry": ("CorruptLine", "Entry"),
    "storage.layout": ("Position",),
    "storage.retention": ("Retention", "RetentionSweeper", "SweepReport"),
}
_home_of = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_home_of)


def __getattr__(name: str) -> Any:
    home = _home_of.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
