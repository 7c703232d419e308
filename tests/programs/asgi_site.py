"""A site of several processes that changes resources, each change recorded.

    python -m tests.programs.asgi_site DIRECTORY TOGETHER

uvicorn says on stderr where it runs. Each of its two processes lets its requests wait until there are
TOGETHER of them, so that they are all at work at the same time.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI

from auditlog import AuditLogger, Session
from auditlog.capture.asgi import App, AuditMiddleware, Receive, Scope, Send, header_values
from auditlog.capture.hooks import Hooks
from auditlog.capture.store import AsyncAuditedStore, AuditedStore

DIRECTORY, TOGETHER = "ASGI_SITE_DIRECTORY", "ASGI_SITE_TOGETHER"


@dataclass
class Thing:
    id: str
    type: str = "Thing"
    spec: int = 0


class Things:
    """A store in memory; each thing that is asked for is there."""

    def __init__(self) -> None:
        self.changed: dict[str, Thing] = {}

    def get(self, resource_type: str, resource_id: str) -> Thing:
        return Thing(resource_id)

    def create(self, thing: Thing) -> None:
        raise NotImplementedError

    def update(self, thing: Thing) -> None:
        assert thing.id not in self.changed, "a request was handled twice"
        self.changed[thing.id] = thing

    def update_with_conflicts(self, resource_type: str, resource_id: str, change: Any) -> None:
        raise NotImplementedError

    teardown = destroy = get


class AsyncThings:
    """The same, for coroutines; each call lets others run."""

    def __init__(self) -> None:
        self.things = Things()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.things, name)

        async def call(*arguments: Any) -> Any:
            await asyncio.sleep(0)
            result = method(*arguments)
            await asyncio.sleep(0)
            return result

        return call


class Authentication:
    """Leaves in the scope who makes the request, as middlewares for authentication do."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["user"] = next(iter(header_values(scope, "x-user")), None)
        await self.app(scope, receive, send)


def who(scope: Scope) -> Session | None:
    user = scope.get("user")
    return None if user is None else Session(email=user)


def site() -> FastAPI:
    """The site of one process."""
    audit = AuditLogger(os.environ[DIRECTORY], retention=None)
    hooks = Hooks()
    things: AuditedStore[Thing] = AuditedStore(Things(), audit, hooks)
    async_things: AsyncAuditedStore[Thing] = AsyncAuditedStore(AsyncThings(), audit, hooks)
    all_here = asyncio.Barrier(int(os.environ[TOGETHER]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        audit.close()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(Authentication)
    app.add_middleware(AuditMiddleware, session_from=who)

    @app.get("/pid")
    async def pid() -> int:
        return os.getpid()

    @app.put("/threads/{name}", dependencies=[Depends(all_here.wait)])
    def change(name: str) -> None:
        things.update(Thing(name, spec=os.getpid()))

    @app.put("/tasks/{name}", dependencies=[Depends(all_here.wait)])
    async def change_async(name: str) -> None:
        await async_things.update(Thing(name, spec=os.getpid()))

    return app


if __name__ == "__main__":
    os.environ[DIRECTORY], os.environ[TOGETHER] = sys.argv[1:]
    # The processes are spawned: they import this module by its name.
    uvicorn.run("tests.programs.asgi_site:site", factory=True, workers=2, port=0, access_log=False)
