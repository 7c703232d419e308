"""Where the log is forwarded to, in the words of the Talos logging document."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import orjson

from ..errors import InvalidSetting
from ..storage.days import seconds
from ..storage.layout import is_destination_name

Format = Literal["json_lines", "raw", "syslog", "loki", "splunk_hec", "elasticsearch", "otlp"]
Tag = str | int | float | bool

_OF_ANY = ("json_lines", "raw")
FORMATS: dict[str, tuple[str, ...]] = {
    "udp": (*_OF_ANY, "syslog"),
    "tcp": (*_OF_ANY, "syslog"),
    "tls": (*_OF_ANY, "syslog"),
    "http": (*_OF_ANY, "loki", "splunk_hec", "elasticsearch", "otlp"),
    "https": (*_OF_ANY, "loki", "splunk_hec", "elasticsearch", "otlp"),
}
MIN_MESSAGE_BYTES = 512
# A UDP packet holds at most so much over IPv4: 65,535 bytes less the headers. In a stream any line has room.
MAX_MESSAGE_BYTES = {"udp": 65_507, "tcp": 64 << 20, "tls": 64 << 20}

_is_service = re.compile(r"[!-~]{1,48}", re.ASCII).fullmatch  # as long as RFC 5424 lets an APP-NAME be
_is_source = re.compile(r"[!-~]{1,255}", re.ASCII).fullmatch  # and a HOSTNAME
_not_of_names = re.compile(r"[^A-Za-z0-9._-]", re.ASCII)


class Endpoint(NamedTuple):
    """An endpoint's URL, taken apart. `port` is 0 where an HTTP URL names none."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def is_http(self) -> bool:
        """Is it reached by HTTP?"""
        return self.scheme.startswith("http")

    @property
    def is_encrypted(self) -> bool:
        """Is the receiver's certificate checked?"""
        return self.scheme in ("tls", "https")


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A receiver of the log, and how it wants to be told.

    endpoint: `udp://host:port/`, `tcp://host:port/` or `tls://host:port/`, as the Talos logging
        document has them; or the `http://` or `https://` URL of an API. A URL without a path gets
        that API's usual one.
    format: `json_lines` (default), the document's; `raw`: the stored lines; over UDP, TCP and TLS
        also `syslog` (RFC 5424); over HTTP `loki`, `splunk_hec`, `elasticsearch` (OpenSearch, too)
        and `otlp`.
    extra_tags: fields that every message gets as they are; they win over its own.
    name: of the file that keeps the position, and in messages; made from the endpoint by default.
    service: the `talos-service` of messages (default "audit").
    source: the `source` of messages (default: the host name).
    begin: where the first run begins: at the `oldest` entry (default), or with what is written from
        `now` on.
    ca_file, cert_file, key_file: PEM files for TLS: whom to trust (default: the system's
        authorities), and the certificate and key of this side, where the receiver asks for them.
    server_name: the name that the receiver's certificate must have (default: the endpoint's host).
    headers: of HTTP requests, such as Authorization. Never shown.
    labels: of Loki's stream (default: service_name and source). Few: each value makes a stream.
    gzip: whether HTTP requests are compressed (default True).
    max_message_bytes: the longest message over UDP, TCP and TLS, at least 512; a longer one is cut. 0
        (default): 65,507 over UDP, which is the largest packet; no limit over TCP and TLS.
    connect_timeout, send_timeout: deadlines in seconds (default 10 and 30).

    `shown_endpoint`: the endpoint without its query, which may hold a token.

    Raises InvalidSetting for what makes no sense.
    """

    endpoint: str = field(repr=False)
    format: Format = "json_lines"
    extra_tags: Mapping[str, Tag] = field(default_factory=dict)
    name: str = ""
    service: str = "audit"
    source: str = ""
    begin: Literal["oldest", "now"] = "oldest"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict)
    gzip: bool = True
    max_message_bytes: int = 0
    connect_timeout: float = 10.0
    send_timeout: float = 30.0
    url: Endpoint = field(init=False, repr=False)
    shown_endpoint: str = field(init=False)

    def __post_init__(self) -> None:
        texts = ("endpoint", "format", "name", "service", "source", "begin", "server_name")
        for name in (*texts, "ca_file", "cert_file", "key_file"):
            if not isinstance(getattr(self, name), str):
                raise InvalidSetting(name, getattr(self, name), "must be a string")
        url = _parsed(self.endpoint)
        if self.format not in FORMATS[url.scheme]:
            known = ", ".join(FORMATS[url.scheme])
            raise InvalidSetting("format", self.format, f"{url.scheme} has the formats {known}")
        if self.begin not in ("oldest", "now"):
            raise InvalidSetting("begin", self.begin, 'must be "oldest" or "now"')
        name = self.name or _name_for(url)
        source = self.source or socket.gethostname()
        for setting, value, is_good in (
            ("name", name, is_destination_name),
            ("service", self.service, _is_service),
            ("source", source, _is_source),
        ):
            if not is_good(value):
                allowed = (
                    "letters, digits and . _ -" if setting == "name" else "printable ASCII without spaces"
                )
                raise InvalidSetting(setting, value, f"must be {allowed}, and not too long")
        _check_tags(self.extra_tags)
        _check_texts("headers", self.headers)
        for header, text in self.headers.items():
            if not text.strip():
                raise InvalidSetting(f"headers.{header}", text, "is empty; give it a value, or leave it out")
        _check_texts("labels", self.labels)
        self._check_fit(url)
        if not isinstance(self.gzip, bool):
            raise InvalidSetting("gzip", self.gzip, "must be true or false")
        put = object.__setattr__
        put(self, "url", url)
        put(self, "shown_endpoint", _shown(self.endpoint))
        put(self, "name", name)
        put(self, "source", source)
        put(self, "connect_timeout", seconds("connect_timeout", self.connect_timeout))
        put(self, "send_timeout", seconds("send_timeout", self.send_timeout))

    @property
    def message_limit(self) -> int:
        """The longest message over UDP, TCP and TLS, in bytes."""
        return self.max_message_bytes or MAX_MESSAGE_BYTES[self.url.scheme]

    def _check_fit(self, url: Endpoint) -> None:
        """Is nothing given that this endpoint has no use for?"""
        for name in ("ca_file", "cert_file", "key_file", "server_name"):
            if getattr(self, name) and not url.is_encrypted:
                raise InvalidSetting(name, getattr(self, name), f"{url.scheme} is not encrypted")
        if not _is_host(self.server_name):
            raise InvalidSetting("server_name", self.server_name, "is no host name")
        if bool(self.cert_file) != bool(self.key_file):
            raise InvalidSetting("cert_file", self.cert_file, "takes key_file, and key_file takes it")
        if self.headers and not url.is_http:
            raise InvalidSetting("headers", "[redacted]", f"{url.scheme} has none")
        most, limit = MAX_MESSAGE_BYTES.get(url.scheme, 0), self.max_message_bytes
        if type(limit) is not int or (limit and not MIN_MESSAGE_BYTES <= limit <= most):
            reason = f"must be a number of bytes from {MIN_MESSAGE_BYTES} to {most}"
            if url.is_http:
                reason = f"{url.scheme} has no such limit; leave it out"
            raise InvalidSetting("max_message_bytes", limit, reason)
        if self.labels and self.format != "loki":
            raise InvalidSetting("labels", self.labels, "are Loki's; give extra_tags instead")


def _name_for(url: Endpoint) -> str:
    port = f"-{url.port}" if url.port else ""
    return _not_of_names.sub("_", f"{url.scheme}-{url.host}{port}")[:100]


def checked(destinations: Iterable[object]) -> tuple[Destination, ...]:
    """Several destinations. Raises InvalidSetting for what is none, and for two of one name."""
    if isinstance(destinations, str | Mapping):
        raise InvalidSetting("forward", type(destinations).__name__, "must be a list of Destination")
    names: dict[str, Destination] = {}
    for each in destinations:
        if not isinstance(each, Destination):
            # Only its type is shown, as a mapping has headers.
            kind = type(each).__name__
            raise InvalidSetting("forward", kind, "must be a Destination; load_destinations reads a file")
        if each.name.lower() in names:  # as a file system may not tell them apart
            reason = f"is the name of two destinations ({each.shown_endpoint}); give each a name of its own"
            raise InvalidSetting("name", each.name, reason)
        names[each.name.lower()] = each
    return tuple(names.values())


def _shown(endpoint: str) -> str:
    """An endpoint without its query, which may hold a token."""
    return re.split("[?#]", endpoint, maxsplit=1)[0]


def _is_host(name: str) -> bool:
    """Can it be looked up? Its labels must not be empty, nor longer than 63 characters."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return not re.search(r"[\s\x00-\x1f]", name)


def _parsed(endpoint: str) -> Endpoint:
    example = 'must be like "tcp://host:5044/", "udp://host:12345/", "tls://host:6514/" or an HTTP URL'
    if "@" in endpoint:  # looked for first: a password may be such that the rest cannot be told from it
        reason = "credentials belong into headers, not into the URL; elsewhere in it, @ is %40"
        raise InvalidSetting("endpoint", "[redacted]", reason)
    shown = _shown(endpoint)
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname or "", url.port
    except ValueError:
        raise InvalidSetting("endpoint", shown, example) from None
    if url.scheme not in FORMATS or not host or not _is_host(host) or re.search(r"[\s\x00-\x1f]", endpoint):
        raise InvalidSetting("endpoint", shown, example)
    path = url.path + (f"?{url.query}" if url.query else "")
    if not url.scheme.startswith("http"):
        if not port:
            raise InvalidSetting("endpoint", shown, f"names no port; {example}")
        if path not in ("", "/") or url.fragment:
            raise InvalidSetting("endpoint", shown, f"{url.scheme} has no path; {example}")
    return Endpoint(url.scheme, host, port or 0, "" if path == "/" else path)


def _check_tags(tags: object) -> None:
    if not isinstance(tags, Mapping):
        raise InvalidSetting("extra_tags", tags, "must be names with values")
    for name, value in tags.items():
        if not isinstance(name, str) or not name:
            raise InvalidSetting("extra_tags", name, "the name of a tag must be a string; quote it")
        try:
            finite = isinstance(value, str | bool) or (isinstance(value, int | float) and isfinite(value))
            orjson.dumps({name: value})
        except (TypeError, OverflowError):  # a lone surrogate, a number beyond 64 bits
            finite = False
        if not finite:
            reason = "must be a string, a number or a boolean; quote it"
            raise InvalidSetting(f"extra_tags.{name}", value, reason)


def _check_texts(setting: str, values: object) -> None:
    if not isinstance(values, Mapping) or not all(
        isinstance(name, str) and name and isinstance(value, str) for name, value in values.items()
    ):
        raise InvalidSetting(setting, "[redacted]", "must be names with strings")
    if any("\n" in text or "\r" in text or "\0" in text for pair in values.items() for text in pair):
        raise InvalidSetting(setting, "[redacted]", "must have no line breaks")
