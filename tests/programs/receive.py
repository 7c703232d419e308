"""Receives messages by TCP, TLS, HTTP or UDP, and keeps them in a file, until it is killed.

    python -m tests.programs.receive PROTOCOL PORT FILE MODE [CERTIFICATE]

FILE gets a line for each message, before more is read and before a request is answered; what a
connection leaves without a newline is not kept. It prints a line when it listens. MODE:

    normal      keep everything
    slow        read a little at a time
    one_byte    read a byte of each connection, and close it
    one_read    keep what the first reads of each connection give, a message or more, and close it
    resets      reset each connection after 20,000 bytes; what was read last is not kept
    hoards      keep everything in FILE.unkept, as if it were in this process's memory
    busy        answer 503 and 429 to requests, and keep nothing of them
    half        keep everything, and close in the middle of an answer
"""

from __future__ import annotations

import gzip
import os
import socket
import ssl
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

RESET_AFTER_BYTES = 20_000
READ_BYTES, SLOW_READ_BYTES = 1 << 16, 4096
BUFFER_BYTES, PACKETS_BYTES = 1 << 16, 4 << 20  # of the kernel: else it may take much for us
SLOW_PAUSE = 0.01


class Kept:
    """The file. What a kill left of a line is removed."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        os.ftruncate(self._fd, content.rfind(b"\n") + 1)

    def add(self, lines: bytes) -> None:
        while lines:
            lines = lines[os.write(self._fd, lines) :]


class Server(ThreadingTCPServer):
    """A thread for each connection; one at a time keeps what it got."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, handler: Any, kept: Kept, mode: str, tls: ssl.SSLContext | None) -> None:
        self.kept, self.mode, self.tls, self.handler = kept, mode, tls, handler
        self.keeping = threading.Lock()
        self.requests = 0
        self.slow = mode == "slow"
        super().__init__(("127.0.0.1", port), handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # connections inherit it
        super().server_bind()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is not None:
            request = self.tls.wrap_socket(request, server_side=True)
        with request:
            if self.mode == "one_byte":
                request.recv(1)
            else:
                self.handler(request, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is what all this is about."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Connection(StreamRequestHandler):
    """Messages behind each other."""

    server: Server

    def handle(self) -> None:
        mode, rest, total = self.server.mode, b"", 0
        while chunk := self.request.recv(SLOW_READ_BYTES if self.server.slow else READ_BYTES):
            total += len(chunk)
            if mode == "resets" and total > RESET_AFTER_BYTES:
                reset(self.request)
                return
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            with self.server.keeping:
                self.server.kept.add(whole + newline)
            if mode == "one_read" and whole:
                return
            if self.server.slow:
                time.sleep(SLOW_PAUSE)


class Request(BaseHTTPRequestHandler):
    """Requests behind each other."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        mode, length = self.server.mode, int(self.headers["Content-Length"])
        if mode == "resets":
            self.rfile.read(min(length, RESET_AFTER_BYTES))
            reset(self.request)
            self.close_connection = True
            return
        content = b""
        while (rest := length - len(content)) > 0:
            part = self.rfile.read(min(rest, SLOW_READ_BYTES) if self.server.slow else rest)
            if not part:
                raise ConnectionError("the forwarder is gone")
            content += part
            if self.server.slow:
                time.sleep(SLOW_PAUSE)
        if self.headers["Content-Encoding"] == "gzip":
            content = gzip.decompress(content)
        with self.server.keeping:
            self.server.requests += 1
            if mode != "busy":
                self.server.kept.add(content)
        if mode == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            self.close_connection = True
            return
        self.send_response(200 if mode != "busy" else (429, 503)[self.server.requests % 2])
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other side hears of it as an error."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def receive_packets(port: int, kept: Kept, mode: str) -> None:
    packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES if mode == "slow" else PACKETS_BYTES)
    packets.bind(("127.0.0.1", port))
    print("listening", flush=True)
    while True:
        kept.add(packets.recv(1 << 16) + b"\n")
        if mode == "slow":
            time.sleep(SLOW_PAUSE)


def main() -> None:
    protocol, port, path, mode, *certificate = sys.argv[1:]
    kept = Kept(f"{path}.unkept" if mode == "hoards" else path)
    if protocol == "udp":
        receive_packets(int(port), kept, mode)
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate[0])
    with Server(int(port), Request if protocol == "http" else Connection, kept, mode, tls) as server:
        print("listening", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
