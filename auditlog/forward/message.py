"""What a destination is told of an entry: the message of the Talos logging document, or the stored line."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any

import orjson

from ..storage.entry import Entry
from .destination import Destination
from .summary import level_of, summary_of

_HASH_DIGITS = 8
_OURS = frozenset({"msg", "talos-level", "talos-service", "talos-time", "source", "position", "sha256"})
_LATEST_MS = 253_402_300_799_999  # the last millisecond of the year 9999


class Messages:
    """Makes the messages of one destination."""

    def __init__(self, destination: Destination) -> None:
        self.source = destination.source
        self.service = destination.service
        self.tags = dict(destination.extra_tags)
        self._reserved = _OURS | self.tags.keys()
        self._clash = not _OURS.isdisjoint(self.tags)
        self._service = b',"talos-service":' + orjson.dumps(self.service) + b',"talos-time":"'
        self._source = b',"source":' + orjson.dumps(self.source) + b',"position":"'
        self._end = b"," + orjson.dumps(self.tags)[1:] if self.tags else b"}"

    def json(self, entry: Entry) -> bytes:
        """The message as one JSON object: msg, level, service, time, the event's fields, its key, tags.

        Raises CorruptEntry for an entry that cannot be decoded.
        """
        record = entry.record
        if self._clash or not self._reserved.isdisjoint(record) or not record:
            try:
                return orjson.dumps(self.fields(entry))
            except TypeError:  # another program wrote it, deeper than we can
                return orjson.dumps(self.bare(entry) | self.tags)
        # The stored line is JSON already: what we add goes around it.
        return b"".join(
            (
                b'{"msg":',
                orjson.dumps(summary_of(record)),
                b',"talos-level":"',
                level_of(record).encode(),
                b'"',
                self._service,
                time_of(record).encode(),
                b'",',
                entry.line[1:-2],
                self._source,
                str(entry.position).encode(),
                b'","sha256":"',
                hash_of(entry.line).encode(),
                b'"',
                self._end,
            )
        )

    def fields(self, entry: Entry) -> dict[str, Any]:
        """The same as a dict. Where names meet, a tag wins over ours, and ours over the event's."""
        own = {name: value for name, value in entry.record.items() if name not in self._reserved}
        return self.head(entry) | own | self.key_fields(entry) | self.tags

    def bare(self, entry: Entry) -> dict[str, Any]:
        """What there is to say without the event's own fields, and that these are missing."""
        return self.head(entry) | {"truncated": {"bytes": len(entry.line)}} | self.key_fields(entry)

    def head(self, entry: Entry) -> dict[str, Any]:
        """What the document says that every message has."""
        record = entry.record
        return {
            "msg": summary_of(record),
            "talos-level": level_of(record),
            "talos-service": self.service,
            "talos-time": time_of(record),
        }

    def key_fields(self, entry: Entry) -> dict[str, Any]:
        """What tells the entry from all others, in a message."""
        return {"source": self.source, "position": str(entry.position), "sha256": hash_of(entry.line)}

    def key(self, entry: Entry) -> str:
        """The same in one word: a receiver that has it needs the entry no second time."""
        return f"{self.source}:{entry.position}:{hash_of(entry.line)}"


def hash_of(line: bytes) -> str:
    """The first digits of a stored line's SHA-256."""
    return sha256(line).hexdigest()[:_HASH_DIGITS]


def time_ns_of(record: dict[str, Any]) -> int:
    """When the event happened, in nanoseconds since the epoch; 0 where the record does not say it."""
    event_ts = record.get("event_ts")
    return event_ts * 1_000_000 if type(event_ts) is int and 0 <= event_ts <= _LATEST_MS else 0


def time_of(record: dict[str, Any]) -> str:
    """The same as in RFC 3339, with nanoseconds."""
    ns = time_ns_of(record)
    return f"{_second(ns // 1_000_000_000)}.{ns % 1_000_000_000:09d}Z"


@lru_cache(maxsize=64)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").rjust(19, "0")
