"""Which entries a reader wants: conditions on the decoded record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InvalidSetting
from ..events.records import session_of

# Where a record names its cluster, in the order in which they are asked.
_CLUSTER_FIELDS = (
    ("cluster", "id"),
    ("k8s_access", "cluster_name"),
    ("talos_access", "cluster_name"),
    ("audit_log_access", "cluster_id"),
    ("machine_set", "cluster_id"),
    ("machine_set_node", "cluster_id"),
    ("config_patch", "cluster_id"),
    ("machine_config_diff", "cluster_id"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Conditions that an entry must meet, all of those that are given (not None).

    All are exact but `search`. `event_type`: one type, or several of which one must hold.
    `actor`: the session's email. `cluster_id`: the cluster that the event is about, wherever its
    type of event names it. `search`: a text that must occur, whatever its case, in some single
    value of the record. A field that an entry lacks counts as empty.
    """

    event_type: str | Collection[str] | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    cluster_id: str | None = None
    actor: str | None = None
    search: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, str):
                continue
            if field.name != "event_type":
                raise InvalidSetting(field.name, value, "must be a string, or None")
            try:
                object.__setattr__(self, "event_type", frozenset(value))
            except TypeError:
                raise InvalidSetting("event_type", value, "must be one event type or several") from None

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Does a decoded record (`entry.record`) meet all conditions?"""
        if self.event_type is not None:
            event_type = record.get("event_type", "")
            if isinstance(self.event_type, str):
                if event_type != self.event_type:
                    return False
            elif not isinstance(event_type, str) or event_type not in self.event_type:
                return False
        return (
            (self.resource_type is None or record.get("resource_type", "") == self.resource_type)
            and (self.resource_id is None or record.get("resource_id", "") == self.resource_id)
            and (self.actor is None or session_of(record).get("email", "") == self.actor)
            and (self.cluster_id is None or cluster_of(record) == self.cluster_id)
            and (self.search is None or _occurs(self.search.casefold(), record))
        )


def cluster_of(record: Mapping[str, Any]) -> str:
    """The id of the cluster that a decoded record is about, or an empty string."""
    data = record.get("event_data")
    if isinstance(data, dict):
        for payload, field in _CLUSTER_FIELDS:
            value = data.get(payload)
            if isinstance(value, dict) and isinstance(cluster := value.get(field), str) and cluster:
                return cluster
    return ""


def _occurs(text: str, record: object) -> bool:
    values = [record]  # a stack of our own: a stored line may be nested deeper than Python's
    while values:
        value = values.pop()
        if isinstance(value, str):
            if text in value.casefold():
                return True
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
    return False
