"""The forms of a message on a socket: as bytes, cut to a packet, framed in a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import Protocol

import orjson

from ..errors import InvalidEvent
from ..events.limit import fit
from ..storage.entry import Entry
from .destination import Destination
from .message import Messages
from .syslog import Syslog


class Form(Protocol):
    """How an entry is told on a socket."""

    def message(self, entry: Entry) -> bytes:
        """The message of an entry, unframed. Raises CorruptEntry where the form needs it decoded."""

    def cut(self, entry: Entry, limit: int) -> bytes:
        """The same in at most `limit` bytes (512 at the least); that it was cut can be seen in it."""

    def framed(self, message: bytes) -> bytes:
        """A message as it stands in a stream of messages."""


class JsonLines:
    """The message of the Talos logging document: one JSON object a line."""

    def __init__(self, destination: Destination) -> None:
        self._messages = Messages(destination)
        self.message = self._messages.json

    def cut(self, entry: Entry, limit: int) -> bytes:
        """The message with the longest parts of the event's data cut, or without that data."""
        messages = self._messages
        message = messages.fields(entry)
        data = message.get("event_data")
        bare = messages.bare(entry)
        with suppress(
            InvalidEvent, TypeError, RecursionError
        ):  # too little to be cut; deeper than can be written
            if isinstance(data, dict):
                return fit(data, limit, lambda shorter: orjson.dumps(message | {"event_data": shorter}))
        for shorter in (bare | messages.tags, bare):
            if len(encoded := orjson.dumps(shorter)) <= limit:
                return encoded
        bare["msg"] = _shortened(bare["msg"], len(encoded) - limit)
        return orjson.dumps(bare)

    def framed(self, message: bytes) -> bytes:
        """A line of its own."""
        return message + b"\n"


class Raw:
    """The stored line, as it is."""

    def message(self, entry: Entry) -> bytes:
        """The line without its newline."""
        return entry.line[:-1]

    def cut(self, entry: Entry, limit: int) -> bytes:
        """As much of the line as fits before a mark that says what it was: it is no JSON any more."""
        mark = f"…[cut: {len(entry.line)} bytes, sha256 {sha256(entry.line).hexdigest()}]".encode()
        return entry.line[: limit - len(mark)].decode(errors="ignore").encode() + mark

    def framed(self, message: bytes) -> bytes:
        """A line of its own."""
        return message + b"\n"


def _shortened(text: str, over: int) -> str:
    """`text` without so many bytes of JSON at its end, and with a mark that it was longer."""
    while text and over > 0:
        over -= len(orjson.dumps(text[-1])) - 2
        text = text[:-1]
    return text[:-3] + "…"  # three bytes


_FORMS: dict[str, Callable[[Destination], Form]] = {
    "json_lines": JsonLines,
    "raw": lambda _: Raw(),
    "syslog": Syslog,
}


def form_for(destination: Destination) -> Form:
    """The form that the destination wants. Raises InvalidSetting for tags that it has no room for."""
    return _FORMS[destination.format](destination)
