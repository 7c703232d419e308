"""Plain records: what a stored line says, without the models of events and what they cost to load."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

is_event_type = re.compile("[a-z][a-z0-9_]*").fullmatch


def decode_record(line: bytes) -> dict[str, Any]:
    """The plain dict of a stored line. Raises ValueError, with the reason, where it is none."""
    record = orjson.loads(line)
    if type(record) is not dict:
        raise ValueError("the line is no JSON object")
    return record


def session_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The session of a decoded record, as a mapping; in Omni's oldest format it had no key."""
    data = record.get("event_data")
    if not isinstance(data, dict):
        return {}
    session = data.get("session", data)
    return session if isinstance(session, dict) else {}


def resource_of(record: Mapping[str, Any]) -> str:
    """The resource of a record: its short type and its id."""
    kind = text_of(record.get("resource_type")).partition(".")[0]
    return f"{kind}/{text_of(record.get('resource_id'))}".strip("/")


def text_of(value: Any) -> str:
    """A stored string; "" for anything else that stands in its place."""
    return value if isinstance(value, str) else ""
