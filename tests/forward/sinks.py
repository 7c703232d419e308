"""Receivers in the test's own process, which keep what they got, and forwarders to them."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import orjson

from auditlog.forward import Destination, Forwarder
from auditlog.storage.days import Clock
from auditlog.storage.files import Files
from auditlog.storage.progress import Progress, read_all
from tests.forward.http_server import ApiServer
from tests.helpers import free_port as free_port
from tests.helpers import line, until

DAY = "2024-08-12"


class Stream:
    """A TCP or TLS server: the bytes of each connection, in the order in which they were made.

    `says_goodbye`: whether it ends TLS in order, as one does that read all, and was not killed.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.connections: list[bytearray] = []
        self.says_goodbye = True
        self.open: list[socket.socket] = []
        self._tls = tls
        self._server = socket.create_server(("127.0.0.1", port))
        self.port: int = self._server.getsockname()[1]
        self.endpoint = f"{'tls' if tls else 'tcp'}://127.0.0.1:{self.port}/"
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._read, args=(connection,)))
            self._threads[-1].start()

    def _read(self, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
        except OSError:
            connection.close()
            return
        got = bytearray()
        self.connections.append(got)
        self.open.append(connection)
        with suppress(OSError):
            while chunk := connection.recv(1 << 20):
                got += chunk
            if self.says_goodbye and isinstance(connection, ssl.SSLSocket):
                connection.unwrap()
        self.open.remove(connection)
        connection.close()

    @property
    def lines(self) -> list[bytes]:
        """The whole lines of all connections."""
        return [line for got in self.connections for line in bytes(got).split(b"\n")[:-1]]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.lines]

    @property
    def ids(self) -> list[str]:
        return [message["resource_id"] for message in self.messages]

    def drop(self) -> None:
        """Close all connections, as a server does that ends."""
        for connection in list(self.open):
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not that of TLS, which another is in
        until(lambda: not self.open)

    def forget(self) -> None:
        """In a forked child: leave the server to the parent."""
        for connection in [*self.open, self._server]:
            connection.close()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.drop()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Packets:
    """A UDP socket: the packets that came."""

    def __init__(self, port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.endpoint = f"udp://127.0.0.1:{self.port}/"
        self._messages: list[dict[str, Any]] = []

    def take(self, count: int) -> list[bytes]:
        """So many packets, in the order in which they came."""
        self._socket.settimeout(20)
        return [self._socket.recv(1 << 16) for _ in range(count)]

    def rest(self) -> list[bytes]:
        """Those that are there."""
        self._socket.settimeout(0)
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(1 << 16))
        return found

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Those that came so far; `take` and `rest` do not give them any more."""
        if self._socket.fileno() >= 0:
            self._messages += map(orjson.loads, self.rest())
        return self._messages

    @property
    def ids(self) -> list[str]:
        return [message["resource_id"] for message in self.messages]

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Requests(ApiServer):
    """An HTTP server that takes lines of JSON."""

    def __init__(self) -> None:
        super().__init__("json_lines")
        self.endpoint = self.url


Sink = Stream | Requests | Packets
SINKS: dict[str, Callable[[], Sink]] = {"tcp": Stream, "http": Requests, "udp": Packets}


# ---------------------------------------------------------------------- forwarders


def forwarder_to(
    endpoint: str,
    directory: Path,
    *,
    clock: Clock | None = None,
    files: Files | None = None,
    in_server: bool = False,
    **settings: Any,
) -> Forwarder:
    """One that was not started yet; `settings` are those of the destination."""
    destination = Destination(endpoint=endpoint, **({"name": "siem"} | settings))
    return Forwarder(directory, destination, clock=clock, files=files, in_server=in_server)


def once(directory: Path, endpoint: str, **options: Any) -> Progress:
    """Forward what there is."""
    forwarder = forwarder_to(endpoint, directory, **options)
    forwarder.run(once=True)
    return forwarder.progress


@contextmanager
def forwarding(directory: Path, endpoint: str, **options: Any) -> Iterator[Forwarder]:
    """A forwarder in its thread."""
    forwarder = forwarder_to(endpoint, directory, **options)
    forwarder.start()
    try:
        yield forwarder
    finally:
        forwarder.stop()


def stored(directory: Path) -> Progress:
    """How far the destination of these forwarders has come, as its file says."""
    return read_all(str(directory), Files()).get("siem") or Progress()


def append(directory: Path, *numbers: int) -> None:
    """Write lines behind those of the day."""
    with (directory / f"{DAY}.jsonlog").open("ab") as file:
        file.write(b"".join(map(line, numbers)))
