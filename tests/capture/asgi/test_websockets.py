from __future__ import annotations

import asyncio
from typing import Any

import fastapi
import litestar
import litestar.exceptions
import pytest
from litestar.middleware import DefineMiddleware
from starlette.middleware import Middleware

from auditlog.capture.asgi import (
    AuditMiddleware,
)
from auditlog.testing import RecordedLog
from tests.capture.asgi.helpers import (
    Authentication,
    Layer,
    Serve,
    Watch,
    actors,
    aio_client,
    request_ids,
    sessions,
    thing,
    who,
)


def fastapi_echo(log: RecordedLog, layers: list[Layer]) -> Any:
    app = fastapi.FastAPI(middleware=[Middleware(cls, **kw) for cls, kw in layers])

    @app.websocket("/")
    async def echo(websocket: fastapi.WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await log.audit.awrite(thing(text))
            await websocket.send_text("done")

    return app


def litestar_echo(log: RecordedLog, layers: list[Layer]) -> Any:
    async def echo(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        async for text in socket.iter_data("text"):
            await log.audit.awrite(thing(text))
            await socket.send_text("done")

    middleware: Any = [DefineMiddleware(cls, **kw) for cls, kw in layers]
    return litestar.Litestar([litestar.websocket("/")(echo)], middleware=middleware, openapi_config=None)


@pytest.mark.usefixtures("websockets")
@pytest.mark.parametrize("site", [fastapi_echo, litestar_echo])
def test_each_websocket_keeps_its_session(log: RecordedLog, site: Any, serve: Serve) -> None:
    async def talk(address: str, user: str) -> None:
        headers = {"X-User": user, "X-Request-ID": f"of-{user}"}
        async with aio_client(address, headers=headers) as http, http.ws_connect("/") as websocket:
            for number in range(10):
                await websocket.send_str(f"{user} {number}")
                assert await websocket.receive_str() == "done"

    async def run(address: str) -> None:
        await asyncio.gather(*(talk(address, user) for user in ("alice", "bob", "carol")))

    watch = Watch(site(log, [(AuditMiddleware, {"session_from": who}), (Authentication, {})]))
    with serve(watch) as address:
        asyncio.run(run(address))
    assert len(log.records) == 30
    assert all(name.split()[0] == actor for name, actor in actors(log).items())
    assert set(request_ids(log)) == {"of-alice", "of-bob", "of-carol"}
    assert {session["ip_address"] for session in sessions(log)} == {"127.0.0.1"}
    assert watch.seen == {None}


TOGETHER = 100  # requests that each of the two processes has at work at the same time
