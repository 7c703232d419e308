from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from auditlog.capture.asgi import (
    App,
)
from tests.capture.asgi.helpers import (
    Serve,
    Switch,
)
from tests.capture.helpers import serve_asgi
from tests.helpers import until


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Serves an app; all tests share one uvicorn, which takes longer to stop than most of them."""
    switch = Switch()

    @contextmanager
    def serve_now(app: App) -> Iterator[str]:
        switch.app = app
        yield address
        until(lambda: not switch.running)

    options = {"log_level": "critical", "h11_max_incomplete_event_size": 1 << 20}
    with serve_asgi(switch, **options) as address:
        yield serve_now


@pytest.fixture
def websockets() -> None:
    pytest.importorskip("websockets", reason="uvicorn needs it for WebSockets")
