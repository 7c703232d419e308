"""Sites of each framework, a server for all of them, and what is to be seen in the log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import aiohttp
import fastapi
import httpx
import litestar
import litestar.exceptions
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from auditlog import Event, Session
from auditlog.capture import current
from auditlog.capture.asgi import (
    App,
    Receive,
    Scope,
    Send,
    header_values,
)
from auditlog.testing import RecordedLog

Work = Callable[[], Awaitable[None]]
Layer = tuple[Any, dict[str, Any]]


class Switch:
    """The app of the test that is running."""

    app: App
    running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


Serve = Callable[[App], AbstractContextManager[str]]


def client(address: str, *, local: str = "127.0.0.1", **options: Any) -> httpx.Client:
    """A client with one connection, kept alive."""
    limits = httpx.Limits(max_connections=1)
    return httpx.Client(
        base_url=address, transport=httpx.HTTPTransport(local_address=local, limits=limits), **options
    )


def thing(resource_id: str) -> Event:
    return Event(event_type="create", resource_type="Thing", resource_id=resource_id)


def sessions(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"]["session"] for record in log.records]


def actors(log: RecordedLog) -> dict[str, str]:
    """The actor of each event, by its resource id."""
    return {record["resource_id"]: record["event_data"]["session"].get("email", "") for record in log.records}


def request_ids(log: RecordedLog) -> list[str]:
    return [record["event_data"].get("audit", {}).get("request_id", "") for record in log.records]


class Authentication:
    """Leaves in the scope who makes the request, as middlewares for authentication do."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            for name in header_values(scope, "x-user"):
                scope["user"] = SimpleNamespace(email=name)
        await self.app(scope, receive, send)


def who(scope: Scope) -> Session | None:
    user = scope.get("user")
    return None if user is None else Session(email=user.email)


class Watch:
    """Stands where the server does, and notes what comes out of the app."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.seen: set[object] = set()
        self.raised: list[BaseException] = []
        self.ports: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.add(current())
        self.ports.add(scope["client"][1])
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            self.raised.append(error)
            raise
        finally:
            self.seen.add(current())


async def answer(send: Send, status: int = 200, body: bytes = b"") -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def starlette_site(work: Work, layers: list[Layer]) -> Any:
    async def index(request: Any) -> Response:
        await work()
        return Response()

    return Starlette(routes=[Route("/", index)], middleware=[Middleware(cls, **kw) for cls, kw in layers])


def fastapi_site(work: Work, layers: list[Layer]) -> Any:
    async def index() -> None:
        await work()

    app = fastapi.FastAPI(middleware=[Middleware(cls, **kw) for cls, kw in layers])
    app.get("/")(index)
    return app


def litestar_site(work: Work, layers: list[Layer]) -> Any:
    async def index() -> None:
        await work()

    middleware: Any = [DefineMiddleware(cls, **kw) for cls, kw in layers]
    return litestar.Litestar([litestar.get("/")(index)], middleware=middleware, openapi_config=None)


SITES = [starlette_site, fastapi_site, litestar_site]


def aio_client(address: str, local: str = "127.0.0.1", **options: Any) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(local_addr=(local, 0), limit=1)
    return aiohttp.ClientSession(address, connector=connector, **options)


def recorder(log: RecordedLog) -> App:
    """An app that writes one event for each request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        log.audit.create("Thing", scope["query_string"].decode())
        await answer(send)

    return app
