"""What an event says in one line that a person can read: the `msg` of a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..events.records import resource_of, session_of, text_of
from ..events.visible import visible
from ..query.filters import cluster_of

_LONGEST = 400  # characters: a line in a viewer, not the event again

_DONE = {
    "create": "created",
    "update": "updated",
    "update_with_conflicts": "updated, with conflicts,",
    "destroy": "destroyed",
    "teardown": "began to tear down",
    "upsert": "created or updated",
    "intent": "is about to change",
    "audit_log_access": "read the audit log",
}
_ACCESSES = {"k8s_access": "Kubernetes", "talos_access": "Talos"}
_LEVELS = {"gap": "error", "access_denied": "warn"}


def level_of(record: Mapping[str, Any]) -> str:
    """How much an event should worry: info, warn (denied, failed) or error (events are missing)."""
    event_type = text_of(record.get("event_type"))
    outcome = _part(record, "audit").get("outcome")
    return _LEVELS.get(event_type) or ("warn" if outcome in ("denied", "failed") else "info")


def summary_of(record: Mapping[str, Any]) -> str:
    """Who did what to which resource, in one line; nothing in it speaks to a terminal."""
    session = session_of(record)
    event_type = text_of(record.get("event_type"))
    facts = _part(record, "audit")
    if event_type == "gap":
        return visible(f"{_count(facts)} events could not be written")[:_LONGEST]
    who = (
        text_of(session.get("email")) or text_of(session.get("user_id")) or text_of(session.get("user_agent"))
    )
    words = [who or "somebody"]
    if event_type == "access_denied":
        words += ["was denied", text_of(facts.get("action"))]
    elif event_type in _ACCESSES:
        access = _part(record, event_type)
        words += ["called", _ACCESSES[event_type], text_of(access.get("full_method_name"))]
        if command := text_of(access.get("command")):
            words.append(f"({command})")
    else:
        words.append(_DONE.get(event_type) or event_type)
    if resource := resource_of(record):
        words.append(resource)
    if (cluster := cluster_of(record)) and cluster != record.get("resource_id"):
        words += ["of cluster", cluster]
    if address := text_of(session.get("ip_address")):
        words += ["from", address]
    if outcome := text_of(facts.get("outcome")):
        words.append(f"[{outcome}]")
    if isinstance(count := facts.get("count"), int):
        words.append(f"({count} times)")
    return visible(" ".join(filter(None, words)))[:_LONGEST]


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    data = record.get("event_data")
    part = data.get(name) if isinstance(data, dict) else None
    return part if isinstance(part, dict) else {}


def _count(facts: Mapping[str, Any]) -> str:
    lost = facts.get("lost")
    return str(lost) if isinstance(lost, int) else "some"
