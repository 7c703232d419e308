"""What a destination must not give away: its headers, and the query of its endpoint, where a token may be."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qsl, quote, unquote_plus

from ..events.visible import visible
from .destination import Destination

_SHORTEST_SECRET = 6  # characters: shorter ones are words
_SHOWN_CHARACTERS = 200
_SEARCHED_CHARACTERS = 1 << 16

# Of escapes that were escaped again. Neither goes back, as else a receiver could have it search for ever.
_BACKSLASHES, _PERCENT = r"\\{0,9}+", "%(?:25){0,9}+"

# They tell of each request its URL and the answer's status line, and that below the application's handlers.
_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy", "httpcore.socks")


class Secrecy:
    """Knows the secrets of one destination, in whatever spelling they come back."""

    def __init__(self, destination: Destination) -> None:
        query = destination.url.path.partition("?")[2]
        values = {unquote_plus(query), *(value for _, value in parse_qsl(query))}
        for value in destination.headers.values():
            values |= {value, *value.split()[-1:]}  # what follows the scheme, too
        secrets = sorted({_on_one_line(value) for value in values}, key=len, reverse=True)
        patterns = [_spelled(secret) for secret in secrets if len(secret) >= _SHORTEST_SECRET]
        self._pattern = re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)

    def shown(self, text: str) -> str:
        """The beginning of what a receiver says, without what it may have heard from us."""
        text = self._pattern.sub("[redacted]", _on_one_line(text)[:_SEARCHED_CHARACTERS])
        return visible(text)[:_SHOWN_CHARACTERS]


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep what this thread does meanwhile out of the log of the HTTP library.

    Other threads, and other uses of the library in this one, are logged as ever.
    """
    _thread.unlogged = True
    try:
        yield
    finally:
        _thread.unlogged = False


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _spelled(secret: str) -> str:
    """A pattern for a secret as it is, or escaped for JSON or a URL, once or several times."""
    shortest = re.sub(r"\\+", r"\\", re.sub("%(?:25)+", "%", secret))
    return "".join(map(_spelled_character, shortest))


def _spelled_character(character: str) -> str:
    if character == "%":
        return _PERCENT
    if character == "\\":
        return rf"(?>{_BACKSLASHES}u005c|\\|{_PERCENT}5c){{1,40}}+"  # several of them, too
    in_url = quote(character, safe="").replace("%", _PERCENT)
    or_plus = r"|\+" if character == " " else ""
    return rf"(?>{_BACKSLASHES}(?:{re.escape(character)}|u{ord(character):04x})|{in_url}{or_plus})"


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_thread, "unlogged", False)


_thread = threading.local()
_filter = _Filter()
for _name in _LOGGERS:
    logging.getLogger(_name).addFilter(_filter)
