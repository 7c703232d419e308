"""A TCP server that takes connections, and reads nothing: says its port, then each connection."""

from __future__ import annotations

import socket

with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    open_connections = []
    while True:
        open_connections.append(server.accept()[0])
        print("connected", flush=True)
