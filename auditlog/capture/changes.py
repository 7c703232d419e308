"""What an update changed, as a list of paths with the old and the new value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

LONGEST_VALUE = 1024  # bytes: of a string, or of the JSON of anything else
MOST_BYTES = 16 << 10  # of all changes together

_absent = object()
_ambiguous = frozenset('.[]"')


def changes(old: object, new: object, root: str) -> dict[str, Any]:
    """The details of an event that tell what differs: `changes`, and how many were left out of it.

    `old` and `new` are what JSON has (events.values.canonical). Each change is a dict: `path`
    (dotted, from `root`; `[n]` for an item of a list, `["a.b"]` for a name with a dot, bracket or
    quote in it), `old` where there was a value, `new` where there is one. A value of over 1 KiB is
    cut, visibly, and what does not fit into 16 KiB is left out and counted in `changes_left_out`.
    """
    found: list[dict[str, Any]] = []
    size = left_out = 0
    for change in _walk(old, new, root):
        length = len(orjson.dumps(change))
        if size + length > MOST_BYTES:
            left_out += 1
        else:
            size += length
            found.append(change)
    return {"changes": found, "changes_left_out": left_out} if left_out else {"changes": found}


def _walk(old: Any, new: Any, path: str) -> Iterator[dict[str, Any]]:
    if type(old) is type(new) and old == new and not isinstance(old, dict | list):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _walk(old.get(name, _absent), new.get(name, _absent), _below(path, name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _walk(before, after, f"{path}[{index}]")
    else:
        change = {"path": path}
        for name, value in (("old", old), ("new", new)):
            if value is not _absent:
                change[name] = _short(value)
        yield change


def _below(path: str, name: str) -> str:
    # Quoted as JSON where it would read like several names; events.redact reads it back.
    if not name or _ambiguous.intersection(name):
        return f"{path}[{orjson.dumps(name).decode()}]"
    return f"{path}.{name}" if path else name


def _short(value: Any) -> Any:
    # No hash of what is cut: it may be a secret, which is replaced only when the event is written.
    raw = value.encode() if isinstance(value, str) else orjson.dumps(value)
    if len(raw) <= LONGEST_VALUE:
        return value
    if isinstance(value, str):
        return f"{raw[:LONGEST_VALUE].decode(errors='ignore')}…[cut: {len(raw)} bytes]"
    return {"truncated": {"bytes": len(raw)}}
