"""What the tests of all frameworks share: the snippets of the documentation, real ASGI servers."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvicorn
from waitress.server import create_server  # type: ignore[import-untyped]

from auditlog import AuditReader
from tests.conftest import ROOT
from tests.helpers import until

PAGE = ROOT / "docs" / "integrations.md"
LONGEST_SNIPPET = 15  # lines
PROXY = "127.0.0.1"  # where clients of the tests call from

# Whose forwarding headers tell which address: for every server alike.
forwarded = pytest.mark.parametrize(
    ("trusted", "headers", "address"),
    [
        ([], {"X-Forwarded-For": "192.0.2.1"}, PROXY),
        ([PROXY], {}, PROXY),
        ([PROXY], {"X-Forwarded-For": "192.0.2.1"}, "192.0.2.1"),
        ([PROXY], {"X-Forwarded-For": "198.51.100.9, 192.0.2.1"}, "192.0.2.1"),
        ([PROXY], {"Forwarded": 'for="[2001:db8::1]:80"'}, "2001:db8::1"),
        ([PROXY], [("X-Forwarded-For", "198.51.100.9"), ("X-Forwarded-For", "192.0.2.1")], "192.0.2.1"),
        ([PROXY], {"X_Forwarded_For": "198.51.100.9"}, PROXY),
        (["10.0.0.0/8"], {"X-Forwarded-For": "192.0.2.1"}, PROXY),
    ],
)


def snippet(heading: str) -> dict[str, Any]:
    """Run the first Python snippet below a heading of docs/integrations.md; give its names.

    It writes to "audit-log" in the current directory: call `monkeypatch.chdir(tmp_path)` before.
    """
    _, found, rest = PAGE.read_text().partition(f"\n## {heading}\n")
    assert found, f"{PAGE} has no heading {heading!r}"
    match = re.search(r"^```python\n(.*?)^```$", rest.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert match is not None, f"{heading} has no snippet"
    code = match[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= LONGEST_SNIPPET, heading
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code, f"{PAGE.name}: {heading}", "exec", dont_inherit=True), names)
    return names


def records(directory: Path) -> list[dict[str, Any]]:
    """What a log holds, oldest first."""
    return [orjson.loads(entry.line) for entry in AuditReader(directory).read()]


@contextmanager
def serve_asgi(app: Any, **options: Any) -> Iterator[str]:
    """An ASGI app behind a real uvicorn on loopback, in a thread of its own; gives its address."""
    settings: dict[str, Any] = {"port": 0, "log_level": "error", "proxy_headers": False, "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(app, **(settings | options)))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serve_wsgi(app: Any, **options: Any) -> Iterator[str]:
    """A WSGI app behind a real Waitress on loopback, in threads of its own; gives its address."""
    dispatchers: dict[int, Any] = {}
    settings: dict[str, Any] = {"clear_untrusted_proxy_headers": False, "threads": 8} | options
    if "unix_socket" not in settings:
        settings |= {"host": "127.0.0.1", "port": 0}
    server = create_server(app, map=dispatchers, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{getattr(server, 'effective_port', 0)}"
    finally:
        # The server's loop ends when nothing is left to wait for; it must be told in its own thread.
        # A loop that is awake anyway may close the trigger before it is pulled.
        with suppress(OSError):
            server.trigger.pull_trigger(lambda: [each.close() for each in list(dispatchers.values())])
        thread.join()
        server.task_dispatcher.shutdown()
