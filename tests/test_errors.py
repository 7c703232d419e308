from __future__ import annotations

import inspect
import pickle
import re
from datetime import date

import pytest

import auditlog
from auditlog import Position, errors

EXAMPLES: dict[str, tuple[object, ...]] = {
    "AuditLogError": (),
    "InvalidSetting": ("days", 0, "must be at least 1"),
    "InvalidEvent": ("event_data.x", "must be a string"),
    "InvalidRange": ("2024-08-02", "2024-08-01", "the end is before the start"),
    "DirectoryError": ("/log", "not a directory", "name a directory"),
    "LoggerClosed": ("/log",),
    "WriteFailed": ("/log", "writing failed", (Position(date(2024, 8, 12), 0),)),
    "DiskFull": ("/log", "writing failed", ()),
    "SyncFailed": ("/log", "a sync failed", ()),
    "LockTimeout": ("/log", "not free for 10 s", ()),
    "ReentrantWrite": ("/log", "from inside a write", ()),
    "SweepBusy": ("/log",),
    "PositionError": (Position.START, "why"),
    "PositionExpired": (Position.START, "its day is gone"),
    "PositionInvalid": (Position.START, "no line starts there"),
    "CorruptEntry": (Position.START, "it is no JSON"),
    "DestinationError": ("siem", "connection refused", 2.0),
    "DestinationBusy": ("siem",),
    "AccessDenied": ("Reader", ("Admin", "Auditor")),
}
CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and name != "Any"}


def test_every_error_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(CLASSES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_survives_pickling_with_its_facts(name: str) -> None:
    error = CLASSES[name](*EXAMPLES[name])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_error_derives_from_the_root_and_is_public(name: str) -> None:
    assert issubclass(CLASSES[name], errors.AuditLogError)
    assert getattr(auditlog, name) is CLASSES[name]


def test_the_drawn_tree_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn: list[tuple[str, str]] = []
    path: list[str] = []
    for row in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)", row)
        if match:
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            drawn.append((match[2], path[-2] if depth else "Exception"))
    assert drawn == [(name, value.__mro__[1].__name__) for name, value in CLASSES.items()]
