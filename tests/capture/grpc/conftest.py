from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.capture.grpc.helpers import (
    STYLES,
    Aio,
    Style,
    Threads,
)


@pytest.fixture(scope="module")
def aio() -> Iterator[Aio]:
    server = Aio()
    yield server
    server.stop()


@pytest.fixture(params=["threads", "aio"])
def server(request: pytest.FixtureRequest, aio: Aio) -> Threads:
    """Each kind of server."""
    return Threads() if request.param == "threads" else aio


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest, aio: Aio) -> Style:
    """Each style of handlers, in the server that takes it."""
    return Style(Threads() if request.param == "threads" else aio, STYLES[request.param])
