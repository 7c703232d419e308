"""A receiver of five HTTP APIs on loopback: it checks what it is told, and answers as they do."""

from __future__ import annotations

import gzip
import re
import ssl
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import orjson

from tests.forward.api_rules import PARSERS, BrokenRule, Message, must

PATHS = {
    "json_lines": "/",
    "raw": "/",
    "loki": "/loki/api/v1/push",
    "splunk_hec": "/services/collector/event",
    "elasticsearch": "/auditlog/_bulk",
    "otlp": "/v1/logs",
}
CONTENT_TYPES = {"loki": "application/json", "splunk_hec": "application/json", "otlp": "application/json"}
NDJSON = "application/x-ndjson"


@dataclass
class Answer:
    """An answer to give instead of the API's own.

    how: `whole`; `last`: the connection is closed behind it; `torn`: within it; `nothing`: before it;
    `dribble_headers` and `dribble_body`, which never end; `silence`: never.
    takes: whether what was told is kept before. reason: the phrase behind the status, if another.
    """

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    how: Literal["whole", "last", "torn", "nothing", "dribble_headers", "dribble_body", "silence"] = "whole"
    takes: bool = False
    reason: str | None = None


@dataclass
class Request:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    messages: list[Message]


class ApiServer(ThreadingHTTPServer):
    """An API's server, for one format. In a `with` it runs, and at the end no rule may have been broken.

    accepted: what it took, in order. requests: all that came. planned: answers for the next ones.
    poison: ids of resources whose events it refuses for good. busy: the same, for now.
    largest_bytes: of a request that it takes. oldest_ns: of an event that Loki takes.
    required: headers that every request must have.
    """

    daemon_threads = False  # so that the end waits for them, and no socket is left open

    def __init__(
        self, api: str, *, context: ssl.SSLContext | None = None, required: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.api = api
        self.required = required or {}
        self.accepted: list[Message] = []
        self.requests: list[Request] = []
        self.planned: deque[Answer] = deque()
        self.poison: set[str] = set()
        self.busy: set[str] = set()
        self.largest_bytes = 100 << 20
        self.oldest_ns = 0
        self.broken_rules: list[str] = []
        self.ended = threading.Event()
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server_address[1]}"

    @property
    def keys(self) -> list[str]:
        return [message.key for message in self.accepted]

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self.accepted]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go when they like, and may refuse our certificate."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        assert not self.broken_rules, self.broken_rules

    def answer(self, request: Request) -> Answer:
        """Check a request, keep what is right in it, and say so as the API does."""
        plan = self.planned.popleft() if self.planned else None
        self.requests.append(request)
        body = request.body
        try:
            for name, value in self.required.items():
                must(request.headers.get(name.lower()) == value, f"{name} is missing or wrong")
            must(urlsplit(request.path).path == PATHS[self.api], f"path {request.path}")
            expected = CONTENT_TYPES.get(self.api, NDJSON)
            must(request.headers.get("content-type") == expected, "content type")
            must(re.match(r"auditlog/\d", request.headers.get("user-agent", "")), "user agent")
            if request.headers.get("content-encoding"):
                must(request.headers["content-encoding"] == "gzip", "content encoding")
                body = gzip.decompress(body)
            if plan is None and len(body) > self.largest_bytes:
                return Answer(413, b"request entity too large")
            request.messages = list(PARSERS[self.api](body))
            must(request.messages, "an empty request")
        except (BrokenRule, ValueError, KeyError, TypeError) as error:
            self.broken_rules.append(f"{type(error).__name__}: {error}")
            return Answer(400, b"broken rule")
        if plan is not None:
            if plan.takes:
                self.accepted += request.messages
            return plan
        return getattr(self, f"_{self.api}")(request.messages)  # type: ignore[no-any-return]

    # What each API says, and what it keeps of a request that it does not like as a whole.

    def _json_lines(self, messages: list[Message]) -> Answer:
        if any(message.id in self.poison for message in messages):
            return Answer(422, b'{"error":"a document was not understood"}')
        self.accepted += messages
        return Answer(202)

    _raw = _json_lines

    def _loki(self, messages: list[Message]) -> Answer:
        said = []
        for message in messages:
            at = datetime.fromtimestamp(message.ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if message.ns < self.oldest_ns:
                oldest = datetime.fromtimestamp(self.oldest_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                said.append(
                    "entry for stream '{service_name=\"audit\"}' has timestamp too old: "
                    f"{at}, oldest acceptable timestamp is: {oldest}"
                )
            elif message.id in self.poison:
                said.append(f"entry for stream '{{service_name=\"audit\"}}' has timestamp too new: {at}")
            elif message not in self.accepted:  # the same time and line in the same stream is one entry
                self.accepted.append(message)
        if len(said) > 1:
            said = [f"1 errors like: {each}" for each in said]
        return Answer(400, "; ".join(said).encode()) if said else Answer(204)

    def _splunk_hec(self, messages: list[Message]) -> Answer:
        for number, message in enumerate(messages):
            if message.id in self.poison:
                said = {"text": "Invalid data format", "code": 6, "invalid-event-number": number}
                return Answer(400, orjson.dumps(said))
            self.accepted.append(message)
        return Answer(200, b'{"text":"Success","code":0}')

    def _elasticsearch(self, messages: list[Message]) -> Answer:
        items = []
        have = set(self.keys)
        for message in messages:
            result: dict[str, Any] = {"_index": "auditlog", "_id": message.key, "status": 201}
            if message.id in self.poison:  # a document is parsed before its _id is looked up
                cause = {"type": "illegal_argument_exception", "reason": "object field ending with [.]"}
                failed: dict[str, Any] = {"type": "document_parsing_exception", "reason": "failed to parse"}
                result |= {"status": 400, "error": failed | {"caused_by": cause}}
            elif message.key in have:
                reason = f"[{message.key}]: version conflict, document already exists"
                conflict = {"type": "version_conflict_engine_exception", "reason": reason}
                result |= {"status": 409, "error": conflict}
            elif message.id in self.busy:
                rejected = {"type": "es_rejected_execution_exception", "reason": "rejected execution"}
                result |= {"status": 429, "error": rejected}
            else:
                self.accepted.append(message)
            items.append({"create": result})
        errors = any("error" in item["create"] for item in items)
        return Answer(200, orjson.dumps({"took": 3, "errors": errors, "items": items}))

    def _otlp(self, messages: list[Message]) -> Answer:
        good = [message for message in messages if message.id not in self.poison]
        self.accepted += good
        if len(good) == len(messages):
            return Answer(200, b'{"partialSuccess":{}}')
        rejected = str(len(messages) - len(good))
        said = {"rejectedLogRecords": rejected, "errorMessage": "too many attributes"}
        return Answer(200, orjson.dumps({"partialSuccess": said}))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30
    server: ApiServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers["content-length"]))
        answer = self.server.answer(Request(self.path, headers, body, []))
        self.close_connection = answer.how != "whole"
        with suppress(OSError):  # a client may go when it likes
            self._give(answer)

    def _give(self, answer: Answer) -> None:
        if answer.how == "nothing":
            return
        if answer.how == "silence":
            self._wait_for_the_end()
            return
        self.send_response(answer.status, answer.reason)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.how == "dribble_headers":
            self.flush_headers()
            self._dribble(b"x-a: b\r\n")
        more = 10**9 if answer.how == "dribble_body" else 10 if answer.how == "torn" else 0
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.content) + more))
        self.end_headers()
        if answer.how == "dribble_body":
            self._dribble(b"x")
        if answer.status != 204:
            self.wfile.write(answer.content)

    def _dribble(self, bytes_: bytes) -> None:
        while not self.server.ended.wait(0.02):
            self.wfile.write(bytes_)

    def _wait_for_the_end(self) -> None:
        self.connection.settimeout(0.05)
        while not self.server.ended.is_set():
            with suppress(TimeoutError):
                if not self.connection.recv(1):
                    return  # the client went
