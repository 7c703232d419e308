"""The fields of an entry that a table, a CSV file or an order may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any

from ..events.records import resource_of, session_of, text_of
from ..query.filters import cluster_of
from ..storage.entry import Entry

Field = Callable[[Entry], Any]

_LONGEST_SUMMARY = 1000  # characters: more than any terminal has columns


def field(name: str, zone: tzinfo | None = None) -> Field | None:
    """What gives a field of an entry, by its name or by a path such as `event_data.cluster.id`.

    `zone` is that of times (None: the machine's). None for a name that means nothing.
    """
    if name == "time":
        return lambda entry: time_of(entry.record, zone)
    if name in _FIELDS:
        give = _FIELDS[name]
        return lambda entry: give(entry.record)
    if name == "position":
        return lambda entry: str(entry.position)
    if name.split(".")[0] in ("event_type", "resource_type", "resource_id", "event_ts", "event_data"):
        path = name.split(".")
        return lambda entry: _at(entry.record, path)
    return None


def time_of(record: Mapping[str, Any], zone: tzinfo | None) -> str:
    """The time of a record as in RFC 3339, to the millisecond."""
    moment = moment_of(record, zone)
    return "" if moment is None else moment.isoformat(timespec="milliseconds")


def moment_of(record: Mapping[str, Any], zone: tzinfo | None) -> datetime | None:
    """The time of a record in a zone (None: the machine's); None where it has none."""
    event_ts = record.get("event_ts")
    if not isinstance(event_ts, int):
        return None
    try:
        moment = datetime.fromtimestamp(event_ts // 1000, UTC).astimezone(zone)
    except (ValueError, OverflowError, OSError):
        return None
    return moment.replace(microsecond=event_ts % 1000 * 1000)


def details_of(record: Mapping[str, Any]) -> str:
    """What a record says of its event in a few words."""
    data = record.get("event_data")
    if not isinstance(data, dict):
        return ""
    words: list[str] = []
    for name, value in data.items():
        if name == "session":
            continue
        if isinstance(value, dict):
            words += [f"{key}={_short(inner)}" for key, inner in value.items() if inner not in ("", None)]
        else:
            words.append(f"{name}={_short(value)}")
    return " ".join(words)[:_LONGEST_SUMMARY]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{…}" if value else "{}"
    if isinstance(value, list):
        return f"[{len(value)}]"
    return str(value)[:200]


def _at(record: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(record, dict):
            return ""
        record = record.get(name, "")
    return record


_FIELDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "event_ts": lambda record: record.get("event_ts", 0),
    "type": lambda record: text_of(record.get("event_type")),
    "event_type": lambda record: text_of(record.get("event_type")),
    "resource": resource_of,
    "resource_type": lambda record: text_of(record.get("resource_type")),
    "resource_id": lambda record: text_of(record.get("resource_id")),
    "cluster_id": cluster_of,
    "actor": lambda record: text_of(session_of(record).get("email")),
    "address": lambda record: text_of(session_of(record).get("ip_address")),
    "role": lambda record: text_of(session_of(record).get("role")),
    "user_agent": lambda record: text_of(session_of(record).get("user_agent")),
    "summary": details_of,
}
NAMES = ("time", *_FIELDS, "position")
