"""OTLP/HTTP: the log as records of OpenTelemetry, in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from ..events.records import text_of
from ..storage.entry import Entry
from .apis import JsonApi, Verdict, json_object, time_ns
from .destination import Destination
from .message import hash_of
from .summary import level_of, summary_of

# SeverityNumber of the data model: the first of each range.
_SEVERITIES = {"info": 9, "warn": 13, "error": 17}
# A receiver may refuse JSON that is nested too deep, and each level here takes four there.
_DEEPEST = 16
_INT64 = range(-(1 << 63), 1 << 63)


class Otlp(JsonApi):
    """Records of one resource, each with the event's fields as attributes."""

    path = "/v1/logs"

    def __init__(self, destination: Destination) -> None:
        super().__init__(destination)
        facts = {"service.name": destination.service, "host.name": destination.source}
        self._resource = {"attributes": _attributes(facts | self.messages.tags)}
        self._scope = {"name": "auditlog"}

    def body(self, entries: Sequence[Entry], limit: int | None = None) -> bytes:
        """All records below one resource and one scope."""
        records = [self._record(entry, limit) for entry in entries]
        scopes = [{"scope": self._scope, "logRecords": records}]
        return orjson.dumps({"resourceLogs": [{"resource": self._resource, "scopeLogs": scopes}]})

    def _record(self, entry: Entry, limit: int | None) -> dict[str, Any]:
        record, time = entry.record, str(time_ns(entry))
        level = level_of(record)
        fields = record if limit is None else self._cut(entry, limit)
        ours = {
            "log.record.uid": self.messages.key(entry),
            "position": str(entry.position),
            "sha256": hash_of(entry.line),
        }
        return {
            "timeUnixNano": time,
            "observedTimeUnixNano": time,
            "severityNumber": _SEVERITIES[level],
            "severityText": level.upper(),
            "eventName": text_of(record.get("event_type")),
            "body": {"stringValue": summary_of(record)},
            "attributes": _attributes(fields | ours),
        }

    def _cut(self, entry: Entry, limit: int) -> dict[str, Any]:
        message = json_object(self.form.cut(entry, limit))
        return {name: value for name, value in message.items() if name in entry.record or name == "truncated"}

    def taken(self, content: bytes, count: int) -> Verdict:
        """It may say how many records were refused, but not which."""
        partial = json_object(content).get("partialSuccess")
        if not isinstance(partial, dict):
            return super().taken(content, count)
        try:
            rejected = int(partial.get("rejectedLogRecords") or 0)
        except (TypeError, ValueError):
            rejected = 0
        return Verdict(unnamed=max(0, min(rejected, count)), reason=text_of(partial.get("errorMessage")))


def _attributes(fields: Mapping[str, Any], depth: int = 0) -> list[dict[str, Any]]:
    return [{"key": name, "value": _any_value(value, depth)} for name, value in fields.items()]


def _any_value(value: Any, depth: int) -> dict[str, Any]:
    """The AnyValue of a JSON value: an object whose one key names the type, or none for null."""
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if value in _INT64 else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if value is None:
        return {}
    if depth == _DEEPEST:
        return {"stringValue": _as_json(value)}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": _attributes(value, depth + 1)}}
    return {"arrayValue": {"values": [_any_value(each, depth + 1) for each in value]}}


def _as_json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # so deep that it was not us who wrote it
        return "[nested too deep]"
