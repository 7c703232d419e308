"""Syslog as RFC 5424 has it: a header, structured data that a rule can ask for, and the stored line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import orjson

from ..errors import InvalidEvent, InvalidSetting
from ..events.limit import fit
from ..events.records import session_of, text_of
from ..events.visible import visible
from ..query.filters import cluster_of
from ..storage.entry import Entry
from .destination import Destination, Tag
from .message import hash_of, time_ns_of, time_of
from .summary import level_of, summary_of

_LOG_AUDIT = 13  # the facility
_SEVERITIES = {"info": 6, "warn": 4, "error": 3}
_STARTS = {level: f"<{_LOG_AUDIT * 8 + severity}>1 " for level, severity in _SEVERITIES.items()}

# This project has no enterprise number of its own; RFC 5612 keeps this one for examples.
_FACTS = "auditlog@32473"
_TAGS = "tags@32473"
_COOKIE = "@cee: "

# The most bytes of a value, before it is escaped: receivers have bounds of their own.
_LONGEST = 1024
_SHORTER = (512, 256, 128, 64, 32, 0)

_is_msgid = re.compile(r"[!-~]{1,32}", re.ASCII).fullmatch
_is_param_name = re.compile(r"[!#-<>-\\^-~]{1,32}", re.ASCII).fullmatch
_special = re.compile(r'["\\\]]')


class Syslog:
    r"""Messages of RFC 5424; in a stream with octet counting (RFC 5425, RFC 6587).

    The facility is 13 (log audit). The severity is 6, or 4 for what was denied or failed, or 3 where
    events are missing. HOSTNAME is the destination's `source`, APP-NAME its `service`, MSGID the event
    type, TIMESTAMP the event's (`-` where its line has none).

    The structured data's element `auditlog@32473` has event_type, resource_type, resource_id,
    cluster_id, actor, address, msg, position and sha256, those that the event has. Control characters
    are shown in it as `\x0a`, and of a value over 1024 bytes only the beginning, with a mark. A message
    that was cut has `cut` there, too: the bytes of the whole line. The element `tags@32473` has the
    destination's `extra_tags`.

    The message is the stored line behind `@cee: `, the cookie by which rsyslog's mmjsonparse and
    syslog-ng's json-parser know JSON. There is no byte order mark before it: rsyslog would keep it as
    a part of the message, and find no cookie. To RFC 5424 this is a message of bytes, not of text.

    Raises InvalidSetting for a tag with a name that a parameter cannot have.
    """

    def __init__(self, destination: Destination) -> None:
        self._origin = f" {destination.source} {destination.service} - "
        for name, value in destination.extra_tags.items():
            if not _is_param_name(name):
                reason = 'syslog takes names of 1 to 32 printable ASCII characters without space, =, ] and "'
                raise InvalidSetting(f"extra_tags.{name}", value, reason)
        tags = {name: _text_of_tag(value) for name, value in destination.extra_tags.items()}
        self._tags = _element(_TAGS, tags) if tags else ""

    def message(self, entry: Entry) -> bytes:
        """The message of an entry. Raises CorruptEntry for one that cannot be decoded."""
        return self._front(entry, _LONGEST, self._tags, {}) + entry.line[:-1]

    def cut(self, entry: Entry, limit: int) -> bytes:
        """The message with the longest parts of the event's data cut, or without that data.

        What is behind the cookie is JSON still: a receiver may drop what it cannot parse. Where the
        structured data leaves too little room, it goes without tags, and its values are cut shorter.
        """
        size, digest = len(entry.line), sha256(entry.line).hexdigest()
        mark = orjson.dumps({"truncated": {"bytes": size, "sha256": digest}})
        for cap, tags in ((_LONGEST, self._tags), (_LONGEST, ""), *((cap, "") for cap in _SHORTER)):
            front = self._front(entry, cap, tags, {"cut": str(size)})
            if len(front) + len(mark) <= limit:
                return front + (_shorter(entry.record, mark, limit - len(front)) or mark)
        # The longest possible header, at the smallest limit. It has the first digits of the hash.
        return front + orjson.dumps({"truncated": {"bytes": size}})

    def framed(self, message: bytes) -> bytes:
        """The message behind its length."""
        return b"%d %b" % (len(message), message)

    def _front(self, entry: Entry, cap: int, tags: str, more: dict[str, str]) -> bytes:
        """What stands before the JSON, with at most `cap` bytes of each value, and with `more` facts."""
        record = entry.record
        session = session_of(record)
        event_type = text_of(record.get("event_type"))
        facts = {
            "event_type": event_type,
            "resource_type": text_of(record.get("resource_type")),
            "resource_id": text_of(record.get("resource_id")),
            "cluster_id": cluster_of(record),
            "actor": text_of(session.get("email")),
            "address": text_of(session.get("ip_address")),
            "msg": summary_of(record),
        }
        shown = {name: _beginning(visible(value), cap) for name, value in facts.items() if value and cap}
        key = {"position": str(entry.position), "sha256": hash_of(entry.line)}
        time = time_of(record)[:23] + "Z" if time_ns_of(record) else "-"  # RFC 5424 has no nanoseconds
        msgid = event_type if _is_msgid(event_type) else "-"
        start = f"{_STARTS[level_of(record)]}{time}{self._origin}{msgid} "
        return f"{start}{_element(_FACTS, shown | key | more)}{tags} {_COOKIE}".encode()


def _element(name: str, params: Mapping[str, str]) -> str:
    """An element of structured data."""
    return " ".join((f"[{name}", *(f'{key}="{_escaped(value)}"' for key, value in params.items()))) + "]"


def _escaped(value: str) -> str:
    return _special.sub(r"\\\g<0>", value)


def _text_of_tag(value: Tag) -> str:
    return visible(value if isinstance(value, str) else orjson.dumps(value).decode())


def _beginning(text: str, cap: int) -> str:
    """`text` in at most `cap` bytes; where that is not all of it, it ends with a mark."""
    if len(text) * 4 <= cap or len(raw := text.encode()) <= cap:
        return text
    mark = f"…[cut: {len(raw)} bytes]"
    return raw[: cap - len(mark.encode())].decode(errors="ignore") + mark


def _shorter(record: dict[str, Any], mark: bytes, room: int) -> bytes:
    """The record as JSON in at most `room` bytes, marked where it was cut; b"" where it cannot be."""
    data = record.get("event_data")
    ids = {name: value for name, value in record.items() if name != "event_data"}
    try:
        if isinstance(data, dict):
            try:
                return fit(data, room, lambda shorter: orjson.dumps(ids | {"event_data": shorter}))
            except InvalidEvent:
                pass
        marked = orjson.dumps(ids | orjson.loads(mark))
    except (TypeError, RecursionError):  # read from a line that is nested deeper than can be written
        return b""
    return marked if len(marked) <= room else b""
