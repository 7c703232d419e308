"""Ways to a destination by UDP, TCP and TLS."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - else a thread does, and a fork meanwhile leaves the child its import lock
import errno
import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from ..errors import InvalidSetting
from ..storage.entry import Entry
from ..storage.progress import Progress
from .channel import Delivery
from .destination import MIN_MESSAGE_BYTES, Destination
from .forms import form_for

_FINISH_SECONDS = 2.0  # that a receiver may take to read the rest, and to close
_MOST_READS = 16


def tls_context(destination: Destination) -> ssl.SSLContext:
    """Whom to trust, and who we are. Raises InvalidSetting where a file cannot be used."""
    try:
        context = ssl.create_default_context(cafile=destination.ca_file or None)
    except OSError as error:  # SSLError is one
        raise InvalidSetting("ca_file", destination.ca_file, f"cannot be used: {error}") from None
    # Python before 3.11.4 takes a connection that breaks for one that ends in order.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if destination.cert_file:
        try:
            context.load_cert_chain(destination.cert_file, destination.key_file)
        except OSError as error:
            reason = f"cannot be used, or key_file cannot: {error}"
            raise InvalidSetting("cert_file", destination.cert_file, reason) from None
    return context


class _SocketChannel:
    """A socket, and messages that are cut to a limit."""

    def __init__(self, destination: Destination, progress: Progress) -> None:
        self._destination = destination
        self._progress = progress
        self._form = form_for(destination)
        self._limit = destination.message_limit
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close at once."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def _connection(self) -> socket.socket:
        if self._socket is None:
            raise ConnectionError(errno.ENOTCONN, "the connection is closed")
        return self._socket


class StreamChannel(_SocketChannel):
    """TCP, or TLS upon it: messages behind each other.

    That the kernel took a message does not say that the receiver read it. Whoever forwards sends the
    last ones again when the connection has broken.
    """

    delivery: Delivery = "sent_again"

    def __init__(self, destination: Destination, progress: Progress) -> None:
        super().__init__(destination, progress)
        if destination.url.is_encrypted:
            tls_context(destination)  # files that cannot be used are refused now

    def open(self, known: Entry | None = None) -> None:
        """Connect, within `connect_timeout` for each of the host's addresses, and as long for TLS."""
        url, timeout = self._destination.url, self._destination.connect_timeout
        connection = socket.create_connection((url.host, url.port), timeout)
        try:
            if (
                connection.getsockname() == connection.getpeername()
            ):  # a port of ours, which TCP may connect to itself
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a batch is sent as one
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # a receiver that fell off the net is noticed
                milliseconds = round(self._destination.send_timeout * 1000)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            if url.is_encrypted:
                name = self._destination.server_name or url.host
                context = tls_context(self._destination)  # read again, as certificates are renewed
                connection = context.wrap_socket(connection, server_hostname=name)
            connection.settimeout(self._destination.send_timeout)
        except BaseException:
            connection.close()
            raise
        self._socket = connection

    def send(self, entries: Sequence[Entry]) -> int:
        """Hand the messages to the kernel; it must take some of them within each `send_timeout`."""
        self.check()
        framed = self._form.framed
        rest = memoryview(b"".join([framed(self._message(entry)) for entry in entries]))
        size = len(rest)
        connection = self._connection
        while rest:
            rest = rest[connection.send(rest) :]
        return size

    def _message(self, entry: Entry) -> bytes:
        message = self._form.message(entry)
        if len(message) <= self._limit:
            return message
        self._progress.cut += 1
        return self._form.cut(entry, self._limit)

    def check(self) -> None:
        """Raise ConnectionError where the receiver has closed, or broken, the connection."""
        connection = self._connection
        connection.settimeout(0)
        try:
            for _ in range(_MOST_READS):  # a receiver has nothing to say, but may say it
                if not connection.recv(4096):
                    raise ConnectionResetError(errno.ECONNRESET, "the receiver closed the connection")
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        finally:
            connection.settimeout(self._destination.send_timeout)

    def finish(self) -> bool:
        """Say that this is all, and see whether the receiver closes its side, having read that."""
        try:
            self.check()
            connection = self._connection
            connection.settimeout(_FINISH_SECONDS)
            if isinstance(connection, ssl.SSLSocket):
                connection = connection.unwrap()
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
            return True
        except TimeoutError:
            return False
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):  # it has something against us
                raise
            return False  # it closed without a word of TLS, as one does that is killed
        finally:
            self.close()

    def abort(self) -> None:
        """Break the connection under whoever waits for it."""
        connection = self._socket
        if connection is not None:
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not that of TLS, which writes


class UdpChannel(_SocketChannel):
    """UDP: a message a packet, which arrives or does not."""

    delivery: Delivery = "at_most_once"

    def __init__(self, destination: Destination, progress: Progress) -> None:
        super().__init__(destination, progress)
        self._refusals = 0  # after each the host's next address is tried

    def open(self, known: Entry | None = None) -> None:
        """Find the receiver. Nothing says whether it is there."""
        url = self._destination.url
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[self._refusals % len(found)]
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.settimeout(self._destination.send_timeout)
            self._socket.connect(address)  # so that we hear of packets that were refused
        except BaseException:
            self.close()
            raise

    def send(self, entries: Sequence[Entry]) -> int:
        """Send a packet for each entry."""
        for entry in entries:
            message = self._form.message(entry)
            if len(message) > self._limit or not self._was_sent(message):
                self._send_cut(entry)
        return 0

    def _was_sent(self, message: bytes) -> bool:
        """False where the packet is too large for the way to the receiver."""
        try:
            self._connection.send(message)
        except ConnectionRefusedError:  # tells of a packet before this one
            self._note_refusal()
            raise
        except OSError as error:
            if error.errno == errno.EMSGSIZE and self._limit > MIN_MESSAGE_BYTES:
                return False
            raise
        return True

    def _send_cut(self, entry: Entry) -> None:
        while not self._was_sent(self._form.cut(entry, self._limit)):
            self._limit = max(MIN_MESSAGE_BYTES, self._limit // 2)
        self._progress.cut += 1

    def check(self) -> None:
        """Raise ConnectionRefusedError where the receiver's machine said that nobody listens."""
        error = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error == errno.ECONNREFUSED:
            self._note_refusal()
        if error:
            raise OSError(error, os.strerror(error))  # a ConnectionRefusedError, where it is that

    def _note_refusal(self) -> None:
        self._progress.lost += 1
        self._refusals += 1

    def finish(self) -> bool:
        """There is nothing to wait for; but what is known by now of the last packets is noted."""
        with suppress(OSError):
            self.check()
        self.close()
        return True

    def abort(self) -> None:
        """A packet is never waited for."""
