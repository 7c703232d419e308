"""What every way to a destination has in common."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Literal, Protocol

from ..errors import InvalidSetting
from ..storage.entry import Entry
from ..storage.progress import Progress
from .destination import Destination

# What a receiver that took a message without a word may still not have.
Delivery = Literal["at_most_once", "sent_again", "at_least_once"]


class Channel(Protocol):
    """A connection to a destination. One thread at a time, but for `abort`.

    Any OSError and DestinationError means that the connection is of no use any more: close it, and
    open it again later. A channel counts what it cuts and what was refused in the Progress that
    it was made with.

    taken: how many entries of a `send` that failed were handed over, where none is sent twice.
    """

    delivery: Delivery
    taken: int

    def open(self) -> None:
        """Connect, within the destination's `connect_timeout`."""

    def send(self, entries: Sequence[Entry]) -> int:
        """Hand over entries in their order; all of them can be decoded, unless the format is `raw`.

        Returns how many bytes were handed over of which the receiver has said nothing. Raises OSError or
        DestinationError where some were not taken; the receiver has `send_timeout` for each step.
        """

    def check(self) -> None:
        """Raise ConnectionError where the receiver has gone meanwhile. Does not wait."""

    def finish(self) -> bool:
        """Close in order. Has the receiver read all that was sent, for certain?

        Raises OSError or DestinationError where it has not, for certain.
        """

    def close(self) -> None:
        """Close at once. A second call does nothing."""

    def abort(self) -> None:
        """Make a call that another thread is in fail soon."""


def channel_for(destination: Destination, progress: Progress) -> Channel:
    """The way to a destination."""
    if destination.url.is_http:
        try:
            from .http import HttpChannel  # its library is slow to load
        except ImportError:
            reason = "needs the extra: pip install 'auditlog-jsonl[forward]'"
            raise InvalidSetting("endpoint", destination.endpoint, reason) from None
        return HttpChannel(destination, progress)
    from .sockets import StreamChannel, UdpChannel

    if destination.url.scheme == "udp":
        return UdpChannel(destination, progress)
    return StreamChannel(destination, progress)


def trouble(error: BaseException) -> str:
    """What went wrong with a connection, in few words; "" where the error is of another kind."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}"
    if isinstance(error, TimeoutError):
        return "it took too long"
    return (error.strerror or "").lower() if isinstance(error, OSError) else ""
