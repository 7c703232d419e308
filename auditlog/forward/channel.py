"""What every way to a destination has in common."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Literal, Protocol

from ..storage.entry import Entry

# What is promised where a connection breaks.
Delivery = Literal["at_most_once", "sent_again", "at_least_once"]


class Channel(Protocol):
    """A connection to a destination. One thread at a time, but for `abort`.

    Any OSError and DestinationError means that the connection is of no use any more: close it, and
    open it again later. A channel counts what it cuts and what was refused in the Progress that
    it was made with.
    """

    delivery: Delivery

    def open(self, known: Entry | None = None) -> None:
        """Connect, within the destination's `connect_timeout`.

        known: the last entry that the receiver took, where the log still has it.
        """

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


def trouble(error: BaseException) -> str:
    """What went wrong with a connection, in few words; "" where the error is of another kind."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}"
    if isinstance(error, TimeoutError):
        return "it took too long"
    return (error.strerror or "").lower() if isinstance(error, OSError) else ""
