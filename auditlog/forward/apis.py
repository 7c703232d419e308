"""The formats of HTTP APIs: how entries are told to each, and what its answer says of them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

import orjson

from ..errors import InvalidSetting
from ..storage.entry import Entry
from .destination import Destination
from .forms import Form, JsonLines, form_for
from .message import Messages, time_ns_of, time_of

# An answer with one of these says that the content was not taken; any other error, that now nothing is.
REFUSED = frozenset({400, 413, 422})
SECOND_NS = 1_000_000_000
_CONFLICT = 409
_LATEST_NS = (1 << 63) - 1  # what these APIs can read; in 2262


class Verdict(NamedTuple):
    """What an answer says of the messages of a batch. As it is by default: nothing to say.

    refused: those that it will never take, by index. unnamed: how many more, of which it does not say
    which. suspect: the one that the answer is about, where it took only part of the batch, or nothing.
    again: whether the whole batch is to be sent again, later. reason: for all of that.
    """

    refused: tuple[int, ...] = ()
    unnamed: int = 0
    suspect: int | None = None
    again: bool = False
    reason: str = ""


class Api:
    """JSON lines, or the stored lines, for an endpoint that takes just these.

    path: where the endpoint's URL has none. content_type: of a request.
    """

    path = "/"
    content_type = "application/x-ndjson"

    def __init__(self, destination: Destination) -> None:
        self.form: Form = form_for(destination)

    def message(self, entry: Entry, limit: int | None) -> bytes:
        """An entry's message, in at most `limit` bytes where one is given."""
        return self.form.message(entry) if limit is None else self.form.cut(entry, limit)

    def body(self, entries: Sequence[Entry], limit: int | None = None) -> bytes:
        """A request that brings these entries, each message in at most `limit` bytes (default: as it is)."""
        return b"".join([self.form.framed(self.message(entry, limit)) for entry in entries])

    def taken(self, content: bytes, count: int) -> Verdict:
        """What the answer to a request of `count` messages says, where its status is that of a success."""
        return Verdict()

    def refused(self, content: bytes, entries: Sequence[Entry]) -> Verdict:
        """The same where the content was not taken. By default, it does not say which of it is to blame."""
        return Verdict()


class JsonApi(Api):
    """What the APIs that take messages as JSON have in common."""

    content_type = "application/json"

    def __init__(self, destination: Destination) -> None:
        self.form = JsonLines(destination)
        self.messages = Messages(destination)

    def taken(self, content: bytes, count: int) -> Verdict:
        """A page for people is no answer of an API: it was made by something else that stands there."""
        if content.lstrip().startswith(b"<"):
            return not_understood(content)
        return Verdict()


class Loki(JsonApi):
    """Grafana Loki's push API: one stream, told apart by a few labels."""

    path = "/loki/api/v1/push"

    # "entry for stream '{...}' has timestamp too old: <time>, oldest acceptable timestamp is: <time>", or
    # "entry with timestamp <time> ignored, reason: 'entry too far behind, entry timestamp is: <time>, oldest
    # acceptable timestamp is: <time>'"; before several, "2 errors like: ". An answer that begins otherwise
    # is not Loki's own, or about something else, and may repeat what stands in an event.
    _TOO_OLD = re.compile(
        rb"(?:\d+ errors(?: like)?: )?entry "
        rb"(?:for stream '\{.*?\}' has timestamp too old: |"
        rb"with timestamp [-+.: \w]+ ignored, reason: 'entry too far behind, (?:entry timestamp is: )?)"
        rb"(?:[-+:\w]+, )?oldest acceptable timestamp is: "
        rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:Z|[-+]\d\d:\d\d))"
    )

    def __init__(self, destination: Destination) -> None:
        super().__init__(destination)
        default = {"service_name": destination.service, "source": destination.source}
        self._labels = dict(destination.labels) or default
        for name in self._labels:
            if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name):
                reason = "the name of a label has letters, digits and _, and begins with no digit"
                raise InvalidSetting("labels", name, reason)

    def body(self, entries: Sequence[Entry], limit: int | None = None) -> bytes:
        """One stream; times as strings of nanoseconds."""
        values = [[str(time_ns(entry)), self.message(entry, limit).decode()] for entry in entries]
        return orjson.dumps({"streams": [{"stream": self._labels, "values": values}]})

    def refused(self, content: bytes, entries: Sequence[Entry]) -> Verdict:
        """Loki takes no entries older than some time, and says what time; it took the others.

        That leaves no doubt, unless its clock is ahead.
        """
        said = self._TOO_OLD.match(content)
        oldest = _seconds_of(said[1]) if said else 0
        if oldest > time.time():
            return Verdict()
        old = [index for index, entry in enumerate(entries) if time_ns(entry) < oldest * SECOND_NS]
        return Verdict(tuple(old))


class SplunkHec(JsonApi):
    """Splunk's HTTP Event Collector."""

    path = "/services/collector/event"

    # Success; and the two that say, with a success, that a queue is about to be full.
    _TAKEN = (0, 24, 25)
    # Index, channel, acknowledgement, token in the URL: about the request, not about the events in it.
    _SETUP = (7, 10, 11, 14, 16)

    def __init__(self, destination: Destination) -> None:
        super().__init__(destination)
        facts = {"host": destination.source, "source": destination.service, "sourcetype": "auditlog:json"}
        self._facts = b"," + orjson.dumps(facts)[1:-1] + b',"event":'

    def body(self, entries: Sequence[Entry], limit: int | None = None) -> bytes:
        """An object for each event, one behind the other."""
        return b"".join([self._event(entry, limit) for entry in entries])

    def _event(self, entry: Entry, limit: int | None) -> bytes:
        seconds = b'{"time":%d.%03d' % divmod(time_ns(entry) // 1_000_000, 1000)
        return seconds + self._facts + self.message(entry, limit) + b"}\n"

    def taken(self, content: bytes, count: int) -> Verdict:
        """Splunk says it with a code; other receivers of this format may say nothing."""
        code = json_object(content).get("code", 0)
        return super().taken(content, count) if code in self._TAKEN else not_understood(content)

    def refused(self, content: bytes, entries: Sequence[Entry]) -> Verdict:
        """Splunk takes what precedes the first invalid event, and names that one; others take nothing."""
        answer = json_object(content)
        number = answer.get("invalid-event-number")
        return Verdict(
            suspect=number if type(number) is int else None,
            again=answer.get("code") in self._SETUP,
        )


class Elasticsearch(JsonApi):
    """The bulk API of Elasticsearch and OpenSearch; the key is the document's `_id`."""

    path = "/auditlog/_bulk"
    content_type = "application/x-ndjson"

    def __init__(self, destination: Destination) -> None:
        super().__init__(destination)
        path = destination.url.path.partition("?")[0]
        if path not in ("", "/") and not path.endswith("/_bulk"):
            reason = "the path must be that of the bulk API, like /my-index/_bulk"
            raise InvalidSetting("endpoint", destination.endpoint.partition("?")[0], reason)

    def body(self, entries: Sequence[Entry], limit: int | None = None) -> bytes:
        """Two lines for each entry: what to do, and the document."""
        lines = []
        for entry in entries:
            # What is there already stays, as `create` refuses to write it a second time.
            lines.append(orjson.dumps({"create": {"_id": self.messages.key(entry)}}))
            lines.append(self._document(entry, limit))
        lines.append(b"")
        return b"\n".join(lines)

    def _document(self, entry: Entry, limit: int | None) -> bytes:
        message = self.message(entry, limit)
        if "@timestamp" in entry.record or "@timestamp" in self.messages.tags:
            return message
        return b'{"@timestamp":"%b",%b' % (time_of(entry.record).encode(), message[1:])

    def taken(self, content: bytes, count: int) -> Verdict:
        """There is a status for each document."""
        items = json_object(content).get("items")
        if not isinstance(items, list) or len(items) != count:
            return not_understood(content)
        refused, reason = [], ""
        for index, item in enumerate(items):
            result = item.get("create") if isinstance(item, dict) else None
            status = result.get("status") if isinstance(result, dict) else None
            if not isinstance(result, dict) or not isinstance(status, int):
                return not_understood(content)
            if status < 300 or status == _CONFLICT:
                continue
            why = f"{status} {_why(result.get('error'))}"
            if status not in REFUSED:
                return Verdict(again=True, reason=why)
            reason = reason or why
            refused.append(index)
        return Verdict(tuple(refused), reason=reason)


def time_ns(entry: Entry) -> int:
    """When the event happened; where it does not say so, the day of its file: never now, which changes."""
    ns = time_ns_of(entry.record)
    if 0 < ns <= _LATEST_NS:
        return ns
    return (entry.day - date(1970, 1, 1)).days * 86_400 * SECOND_NS


def json_object(content: bytes) -> dict[str, Any]:
    """The JSON object of an answer; an empty one where there is none."""
    try:
        answer = orjson.loads(content)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def not_understood(content: bytes) -> Verdict:
    """The verdict where an answer with a success does not say what it should."""
    return Verdict(again=True, reason=f"not understood: {content.decode(errors='replace')}")


def _why(error: object) -> str:
    """Why a document was not taken."""
    if not isinstance(error, dict):
        return str(error)
    why = f"{error.get('type')}: {error.get('reason')}"
    cause = error.get("caused_by")
    return f"{why} ({cause.get('reason')})" if isinstance(cause, dict) else why


def _seconds_of(text: bytes) -> int:
    try:
        return int(datetime.fromisoformat(text.decode()).timestamp())
    except ValueError:
        return 0
