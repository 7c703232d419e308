"""The way to a destination by HTTP: a request for each batch, and what its answer means."""

from __future__ import annotations

import gzip
import logging
import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, NamedTuple

import h11  # noqa: F401 - loaded here for the same reason as in sockets.py
import httpx

from ..errors import DestinationError, InvalidSetting
from ..storage.entry import Entry
from ..storage.progress import Progress
from .apis import REFUSED, Api, Elasticsearch, Loki, SplunkHec, Verdict
from .channel import Delivery, trouble
from .destination import Destination
from .otlp import Otlp
from .secrecy import Secrecy, unlogged
from .sockets import tls_context

CUT_BYTES = 64 << 10  # of a message that the receiver refused and that is longer
# Of an answer, and so many for each of the request, which it may repeat; the rest is not read.
_ANSWER_BYTES, _ANSWER_BYTES_EACH = 1 << 20, 4
_LONGEST_RETRY_AFTER = 300.0
_GZIP_LEVEL = 3  # the best for its time with lines of JSON

_NO_SERVER_NAME = "serverName has no effect behind the proxy of the environment; set NO_PROXY for this host"

_is_header_name = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_is_header_value = re.compile(r"[!-~]([ \t!-~]*[!-~])?").fullmatch
_OUR_HEADERS = frozenset({"content-encoding", "content-length", "transfer-encoding"})

_APIS: dict[str, type[Api]] = {
    "loki": Loki,
    "splunk_hec": SplunkHec,
    "elasticsearch": Elasticsearch,
    "otlp": Otlp,
}

log = logging.getLogger("auditlog")


class _Answer(NamedTuple):
    """A receiver's answer: was the content taken; the status as text; the content."""

    taken: bool
    status: str
    content: bytes


class _Refused(NamedTuple):
    """Messages of a batch that were refused. doubtful: the receiver may refuse everything by mistake."""

    number: int
    first: Entry
    last: Entry
    reason: str
    doubtful: bool


@dataclass(slots=True)
class _Outcome:
    """What became of the messages of one `send`."""

    taken: int = 0
    cut: int = 0
    refused: list[_Refused] = field(default_factory=list)


class HttpChannel:
    """HTTP and HTTPS: what an API acknowledged, it has; the rest is sent again, some of it twice.

    A batch whose content is refused is sent in parts, until it is known which message is to blame. That
    one is sent once more, cut, where it is long; else it is counted, logged and passed over. But this
    only where the receiver takes another one: of the same `send`, or the last that it took, which it is
    then given again. A receiver that takes nothing is not set up well, and nothing is lost by that.

    Proxies are those of the environment (HTTPS_PROXY, NO_PROXY). Redirects are not followed.

    Raises InvalidSetting for what the format, or HTTP, cannot take.
    """

    delivery: Delivery = "at_least_once"
    taken = 0

    def __init__(self, destination: Destination, progress: Progress) -> None:
        self._destination = destination
        self._progress = progress
        self._api = _APIS.get(destination.format, Api)(destination)
        self._url = _url_of(destination, self._api.path)
        self._place = (self._url.raw_host.decode(), self._url.port or 443)
        self._headers = _headers_of(destination, self._api.content_type)
        self._shown = Secrecy(destination).shown
        self._deadline = destination.connect_timeout + destination.send_timeout
        self._tls = tls_context(destination)
        self._client: httpx.Client | None = None
        self._socket: socket.socket | None = None
        self._broken = ""  # why, where the connection was broken by us
        self._known: Entry | None = None  # the last one that was taken
        with suppress(DestinationError):  # what that loads no thread must load, as a fork may come upon it
            self.open()
        self.close()

    def open(self, known: Entry | None = None) -> None:
        """Make ready; the first request connects. Certificates are read again, as they are renewed.

        known: an entry that the receiver took before, in case that this channel knows of none.
        """
        self.close()
        self._broken = ""
        self._known = self._known or known
        if self._destination.ca_file or self._destination.cert_file:
            self._tls = tls_context(self._destination)
        timeout = httpx.Timeout(self._destination.send_timeout, connect=self._destination.connect_timeout)
        try:
            self._client = httpx.Client(
                headers=self._headers,
                verify=self._tls,
                timeout=timeout,
                limits=httpx.Limits(max_connections=1),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            reason = f"the proxy of the environment cannot be used: {self._shown(str(error))}"
            raise self._error(reason) from None

    def send(self, entries: Sequence[Entry]) -> int:
        """Have all entries acknowledged, or refused for good; so it returns 0.

        Each request has a deadline of its own, `connect_timeout` and `send_timeout` together.
        """
        outcome = _Outcome()
        self._deliver(entries, outcome)
        doubtful = [refused for refused in outcome.refused if refused.doubtful]
        if doubtful and not outcome.taken and not self._takes_known():
            raise self._error(f"{doubtful[0].reason} (and no other message was taken)")
        self._progress.cut += outcome.cut
        for refused in outcome.refused:
            self._progress.rejected += refused.number
            self._tell(refused)
        return 0

    def check(self) -> None:
        """There is no connection between requests that would matter."""

    def finish(self) -> bool:
        """All that was sent was answered."""
        self.close()
        return True

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()
            self._client = self._socket = None

    def abort(self) -> None:
        """Break the connection under a request; while one is being made, within `connect_timeout`."""
        self._break("ended")

    # ------------------------------------------------------------------ batches

    def _deliver(self, batch: Sequence[Entry], outcome: _Outcome, limit: int | None = None) -> None:
        """Send a batch, and then as long as something of it was neither taken nor refused, that, in order."""
        answer = self._post(self._api.body(batch, limit))
        if answer.taken:
            verdict = self._api.taken(answer.content, len(batch))
        else:
            verdict = self._api.refused(answer.content, batch)
        if verdict.again:
            raise self._error(self._reason(answer, verdict))
        named = [batch[index] for index in verdict.refused]
        others = _others(batch, verdict)
        if answer.taken or not others:
            if named or verdict.unnamed:
                outcome.refused.append(_refused(batch, verdict, self._reason(answer, verdict), answer.taken))
            taken = len(others) - verdict.unnamed
            outcome.taken += taken
            outcome.cut += taken if limit else 0
            if others and not verdict.unnamed:
                self._known = others[-1]
                self._progress.taken = others[-1].position
        elif len(batch) > 1:
            # Those that were named by themselves, so that no other is passed over for words in the answer
            # that somebody else put there.
            for part in (named, others) if named else _parts(batch, verdict.suspect):
                self._deliver(part, outcome)
        elif limit is None and len(batch[0].line) > CUT_BYTES:
            self._deliver(batch, outcome, CUT_BYTES)
        else:
            refused = _Refused(1, batch[0], batch[0], self._reason(answer, verdict), doubtful=True)
            outcome.refused.append(refused)

    def _takes_known(self) -> bool:
        """Does the receiver still take what it took before?"""
        outcome = _Outcome()
        if self._known is not None:
            self._deliver([self._known], outcome)
        return outcome.taken > 0

    def _tell(self, refused: _Refused) -> None:
        where = f"at {refused.first.position}"
        if refused.first is not refused.last:
            where = f"from {refused.first.position} to {refused.last.position}"
        log.error(
            "destination %s: refused for good: %d of the messages %s: %s",
            self._destination.name,
            refused.number,
            where,
            refused.reason,
        )

    # ------------------------------------------------------------------ requests

    def _post(self, body: bytes) -> _Answer:
        """Make a request. Raises DestinationError unless its content was taken, or refused."""
        if self._client is None:
            raise self._error("the channel is closed")
        most = _ANSWER_BYTES + _ANSWER_BYTES_EACH * len(body)
        if self._destination.gzip:
            body = gzip.compress(body, _GZIP_LEVEL, mtime=0)
        extensions: dict[str, Any] = {"trace": self._note_socket}
        if self._destination.server_name:
            extensions["sni_hostname"] = self._destination.server_name
        # The timeouts of httpx are those of each read: a receiver could go on for ever, byte by byte.
        late = threading.Timer(self._deadline, self._break, (f"no answer within {self._deadline:g} s",))
        late.daemon = True
        late.start()
        try:
            with (
                unlogged(),
                self._client.stream("POST", self._url, content=body, extensions=extensions) as response,
            ):
                content = _read(response, most)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise self._error(self._broken or self._reason_of(error)) from None
        finally:
            late.cancel()
        status = f"{response.status_code} {self._shown(response.reason_phrase)}".strip()
        if response.is_success or response.status_code in REFUSED:
            return _Answer(response.is_success, status, content)
        if response.has_redirect_location:
            target = response.headers["location"].partition("?")[0]
            raise self._error(f"{status}: it redirects to {self._shown(target)}; give that as the endpoint")
        reason = f"{status}: {self._shown(content.decode(errors='replace'))}"
        raise self._error(reason, _retry_after(response.headers.get("retry-after", "")))

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        """Know the connection. httpx has no other way to end a request from another thread.

        Nor to say beforehand whether that is with a proxy, where it asks for the name in the URL.
        """
        to_proxy = event.endswith(".connect_tcp.started") and (info["host"], info["port"]) != self._place
        if to_proxy and self._destination.server_name:
            raise self._error(_NO_SERVER_NAME)
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._broken:
                self._break(self._broken)

    def _break(self, why: str) -> None:
        self._broken = why
        connection = self._socket
        if connection is not None:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not that of TLS, which writes

    # ------------------------------------------------------------------ reasons

    def _error(self, reason: str, retry_after: float | None = None) -> DestinationError:
        return DestinationError(self._destination.name, reason, retry_after)

    def _reason(self, answer: _Answer, verdict: Verdict) -> str:
        return f"{answer.status}: {self._shown(verdict.reason or answer.content.decode(errors='replace'))}"

    def _reason_of(self, error: Exception) -> str:
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection within {self._destination.connect_timeout:g} s"
        if isinstance(error, httpx.TimeoutException):
            return f"no answer within {self._destination.send_timeout:g} s"
        cause: BaseException | None = error
        while cause is not None:
            if found := trouble(cause):
                return found
            cause = cause.__cause__ or cause.__context__
        return self._shown(str(error)) or type(error).__name__


def _others(batch: Sequence[Entry], verdict: Verdict) -> list[Entry]:
    """Those of a batch that were not named as refused."""
    named = set(verdict.refused)
    return [entry for index, entry in enumerate(batch) if index not in named]


def _parts(batch: Sequence[Entry], suspect: int | None) -> list[Sequence[Entry]]:
    """A batch in smaller ones: halves, or what is before the suspect, that one, and what is behind it."""
    if suspect is None or not 0 <= suspect < len(batch):
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    parts = (batch[:suspect], batch[suspect : suspect + 1], batch[suspect + 1 :])
    return [part for part in parts if part]


def _refused(batch: Sequence[Entry], verdict: Verdict, reason: str, doubtful: bool) -> _Refused:
    named, unnamed = verdict.refused, verdict.unnamed
    first, last = (0, -1) if unnamed else (named[0], named[-1])
    return _Refused(len(named) + unnamed, batch[first], batch[last], reason, doubtful)


def _read(response: httpx.Response, most: int) -> bytes:
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > most:
            break
    return bytes(content)


def _retry_after(value: str) -> float | None:
    """How many seconds a receiver asks to wait: it gives a number of them, or a date."""
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)


def _url_of(destination: Destination, default_path: str) -> httpx.URL:
    scheme, host, port, target = destination.url
    path, mark, query = target.partition("?")
    host = f"[{host}]" if ":" in host else host
    place = f"{host}:{port}" if port else host
    try:
        return httpx.URL(f"{scheme}://{place}{default_path if path in ('', '/') else path}{mark}{query}")
    except httpx.InvalidURL as error:
        shown = destination.endpoint.partition("?")[0]
        raise InvalidSetting("endpoint", shown, str(error)) from None


def _headers_of(destination: Destination, content_type: str) -> httpx.Headers:
    """The headers of every request; the destination's win."""
    package = import_module(__name__.partition(".")[0])
    headers = httpx.Headers(
        {
            "User-Agent": f"auditlog/{package.__version__}",
            "Content-Type": content_type,
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # as the answer is not unpacked
        }
    )
    if destination.gzip:
        headers["Content-Encoding"] = "gzip"
    for name, value in destination.headers.items():
        if not _is_header_name(name) or not _is_header_value(value):
            raise InvalidSetting(f"headers.{name}", "[redacted]", "cannot be said in HTTP; give ASCII")
        if name.lower() in _OUR_HEADERS:
            raise InvalidSetting(f"headers.{name}", "[redacted]", "is made from the request; leave it out")
        headers[name] = value
    return headers
