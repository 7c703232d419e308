from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fastapi
import httpx
import litestar
import litestar.exceptions
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from auditlog import Session
from auditlog.capture import current, identify
from auditlog.capture.asgi import (
    AuditMiddleware,
    DenialRecorder,
    Message,
    Receive,
    Scope,
    Send,
    header_values,
)
from auditlog.errors import InvalidSetting
from auditlog.testing import RecordedLog
from tests.capture.asgi.helpers import (
    SITES,
    Authentication,
    Serve,
    Watch,
    actors,
    answer,
    client,
    litestar_site,
    recorder,
    request_ids,
    sessions,
    thing,
    who,
)
from tests.capture.helpers import records, serve_asgi, snippet


def test_the_documented_fastapi_program_records_actor_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("Starlette and FastAPI")
    app, audit = names["app"], names["audit"]

    def create(name: str) -> None:
        audit.create("Clusters.omni.sidero.dev", name)

    app.post("/clusters/{name}")(create)
    with audit, serve(app) as address, client(address, local="127.0.0.7") as http:
        assert http.post("/clusters/a").status_code == 401
        assert http.post("/clusters/b", headers={"X-Token": "s3cret"}).status_code == 200
    denial, change = records(tmp_path / "audit-log")
    assert denial["event_type"] == "access_denied"
    assert denial["event_data"]["audit"] == {"action": "POST /clusters/a", "outcome": "denied"}
    assert denial["event_data"]["session"]["ip_address"] == "127.0.0.7"
    assert change["resource_id"] == "b"
    session = change["event_data"]["session"]
    assert session["email"] == "alice@example.com"
    assert session["ip_address"] == "127.0.0.7"
    assert session["user_agent"].startswith("python-httpx/")


def test_the_documented_litestar_program_records_actor_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("Litestar")
    app, audit = names["app"], names["audit"]

    async def create(request: litestar.Request[Any, Any, Any]) -> None:
        await audit.awrite(thing(request.path_params["name"]))

    app.register(litestar.post("/clusters/{name:str}")(create))
    with audit, serve(app) as address, client(address, local="127.0.0.7") as http:
        assert http.post("/clusters/a").status_code == 401
        assert http.post("/clusters/b", headers={"X-Token": "s3cret"}).status_code == 201
    (record,) = records(tmp_path / "audit-log")
    session = record["event_data"]["session"]
    assert record["resource_id"] == "b"
    assert session["email"] == "alice@example.com"
    assert session["ip_address"] == "127.0.0.7"


@pytest.mark.parametrize("site", SITES)
def test_session_from_sees_the_user_whom_a_middleware_inside_has_found(
    log: RecordedLog, site: Any, serve: Serve
) -> None:
    async def work() -> None:
        log.audit.create("Thing", "1")
        await log.audit.awrite(thing("2"))

    async def pass_on(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    between = (BaseHTTPMiddleware, {"dispatch": pass_on})
    inner = [between, (Authentication, {}), between]
    asgi = AuditMiddleware(site(work, inner), session_from=who)
    for app in (site(work, [(AuditMiddleware, {"session_from": who}), *inner]), asgi):
        with serve(app) as address, client(address) as http:
            headers = {"X-User": "alice", "X-Request-ID": "r-1", "User-Agent": "tests"}
            assert http.get("/", headers=headers).is_success
            assert http.get("/", headers={"User-Agent": "tests"}).is_success
    nobody = {"user_agent": "tests", "ip_address": "127.0.0.1"}
    alice = nobody | {"email": "alice"}
    assert sessions(log) == [alice, alice, nobody, nobody] * 2
    assert request_ids(log) == ["r-1", "r-1", "", ""] * 2


@pytest.mark.parametrize("site", SITES)
def test_an_async_session_from_is_awaited_once_before_the_handler(
    log: RecordedLog, site: Any, serve: Serve
) -> None:
    calls = []

    async def ask(scope: Scope) -> Session | None:
        log.audit.create("Thing", "asked")
        await asyncio.sleep(0)
        calls.append("ask")
        return Session(email=header_values(scope, "x-user")[0])

    async def work() -> None:
        calls.append("work")
        log.audit.create("Thing", "1")
        await log.audit.awrite(thing("2"))

    app = site(work, [(AuditMiddleware, {"session_from": ask})])
    with serve(app) as address, client(address) as http:
        assert http.get("/", headers={"X-User": "alice"}).is_success
    assert calls == ["ask", "work"]
    assert actors(log) == {"asked": "", "1": "alice", "2": "alice"}


def test_a_request_without_an_event_is_not_looked_at(log: RecordedLog, serve: Serve) -> None:
    class Untouched(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["headers"] = Untouched()
        await answer(send)

    def ask(scope: Scope) -> Session | None:
        raise AssertionError

    with serve(AuditMiddleware(app, session_from=ask)) as address, client(address) as http:
        assert http.get("/").is_success


def identifies(request: fastapi.Request) -> None:
    identify(Session(email=request.headers["X-User"]))


async def identifies_async(request: fastapi.Request) -> None:
    identify(Session(email=request.headers["X-User"]))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("authenticate", [identifies, identifies_async])
@pytest.mark.parametrize("path", ["/threads", "/tasks"])
def test_who_is_identified_in_a_dependency_is_so_until_the_request_has_ended(
    log: RecordedLog, authenticate: Any, path: str, base: bool, serve: Serve
) -> None:
    app = fastapi.FastAPI(dependencies=[fastapi.Depends(authenticate)])

    def background() -> BackgroundTasks:
        sync = BackgroundTask(log.audit.create, "Thing", "sync background")
        return BackgroundTasks([sync, BackgroundTask(log.audit.awrite, thing("background"))])

    @app.get("/threads")
    def in_thread() -> Response:
        log.audit.create("Thing", "handler")

        def body() -> Iterator[str]:
            for number in range(3):
                log.audit.create("Thing", f"streamed {number}")
                yield "x"

        return StreamingResponse(body(), background=background())

    @app.get("/tasks")
    async def in_tasks() -> Response:
        await log.audit.awrite(thing("handler"))
        async with asyncio.TaskGroup() as group:
            group.create_task(log.audit.awrite(thing("task")))
            group.create_task(run_in_threadpool(log.audit.create, "Thing", "thread"))
            group.create_task(asyncio.to_thread(log.audit.create, "Thing", "to_thread"))

        async def body() -> AsyncIterator[str]:
            for number in range(3):
                await log.audit.awrite(thing(f"streamed {number}"))
                yield "x"

        return StreamingResponse(body(), background=background())

    async def pass_on(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        log.audit.create("Thing", "after the handler")
        return response

    if base:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.add_middleware(AuditMiddleware)
    watch = Watch(app)
    with serve(watch) as address, client(address, headers={"X-User": "alice"}) as http:
        assert http.get(path).text == "xxx"
    written = {"handler", "streamed 0", "streamed 1", "streamed 2", "sync background", "background"}
    if path == "/tasks":
        written |= {"task", "thread", "to_thread"}
    if base:
        written.add("after the handler")
    assert actors(log) == dict.fromkeys(written, "alice")
    assert watch.seen == {None}


@pytest.mark.parametrize("site", SITES)
def test_a_failing_handler_leaks_no_session(log: RecordedLog, site: Any, serve: Serve) -> None:
    failure = RuntimeError("the handler fails")
    runs = []

    async def work() -> None:
        runs.append(1)
        if len(runs) % 2:
            identify(Session(email="alice"))
            raise failure
        log.audit.create("Thing")

    watch = Watch(site(work, [(AuditMiddleware, {})]))
    with serve(watch) as address:
        for status in (500, 200, 500, 200):
            with client(address) as http:  # uvicorn closes the connection of an app that raised
                assert http.get("/").status_code == status
    assert len(runs) == 4
    assert sessions(log) == [{"user_agent": http.headers["User-Agent"], "ip_address": "127.0.0.1"}] * 2
    assert watch.seen == {None}
    assert watch.raised == ([] if site is litestar_site else [failure, failure])  # Litestar answers it itself


def test_the_exception_reaches_the_server_unchanged(log: RecordedLog) -> None:
    class Odd(BaseException):
        pass

    failures = [RuntimeError("fails"), Odd("fails"), ExceptionGroup("fails", [ValueError()])]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise failures[int(scope["query_string"])]

    for number, failure in enumerate(failures):
        for middleware in (AuditMiddleware(app), DenialRecorder(app, log.audit)):
            scope = {"type": "http", "headers": [], "query_string": str(number).encode()}
            with pytest.raises(type(failure)) as caught:
                asyncio.run(middleware(scope, receive_nothing, send_nothing))
            assert caught.value is failure
            assert current() is None


async def receive_nothing() -> Message:
    raise AssertionError


async def send_nothing(message: Message) -> None:
    raise AssertionError


def test_a_failing_stream_or_session_from_leaks_no_session(log: RecordedLog, serve: Serve) -> None:
    app = fastapi.FastAPI()
    failure = RuntimeError("it fails")

    async def ask(scope: Scope) -> Session | None:
        if scope["path"] == "/refused":
            raise failure
        return None

    @app.get("/stream")
    async def stream() -> Response:
        identify(Session(email="alice"))

        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            raise failure

        return StreamingResponse(body())

    @app.get("/{name}")
    async def index(name: str) -> None:
        log.audit.create("Thing", name)

    watch = Watch(AuditMiddleware(app, session_from=ask))
    with serve(watch) as address, client(address) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            http.get("/stream")
        http.get("/1")
        assert http.get("/refused").status_code == 500
        http.get("/2")
    assert actors(log) == {"1": "", "2": ""}
    assert watch.seen == {None}
    assert watch.raised == [failure, failure]


def test_a_connection_that_is_kept_alive_keeps_no_session(log: RecordedLog, serve: Serve) -> None:
    app = fastapi.FastAPI()

    @app.get("/{name}")
    async def index(name: str) -> None:
        if user := name.strip("0123456789"):
            identify(Session(email=user))
        await log.audit.awrite(thing(name))
        if user == "alice":
            raise fastapi.HTTPException(409)

    watch = Watch(AuditMiddleware(app))
    with serve(watch) as address, client(address) as http:
        statuses = [http.get(f"/{name}").status_code for name in ("1alice", "2", "3bob", "4")]
    assert statuses == [409, 200, 200, 200]
    assert len(watch.ports) == 1
    assert actors(log) == {"1alice": "alice", "2": "", "3bob": "bob", "4": ""}


def test_the_lifespan_and_unknown_scopes_are_passed_on_as_they_are(log: RecordedLog) -> None:
    passed: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append((scope, receive, send, current()))

    for middleware in (AuditMiddleware(app), DenialRecorder(app, log.audit)):
        for kind in ("lifespan", "from.the.future"):
            scope = {"type": kind}
            asyncio.run(middleware(scope, receive_nothing, send_nothing))
            assert passed.pop() == (scope, receive_nothing, send_nothing, None)
            assert scope == {"type": kind}


def test_the_lifespan_runs_without_a_session(log: RecordedLog) -> None:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
        log.audit.create("Thing", "startup")
        yield {"known": "state"}
        log.audit.create("Thing", "shutdown")

    async def index(request: Any) -> Response:
        return Response(request.state.known)

    app = Starlette(routes=[Route("/", index)], lifespan=lifespan)
    app.add_middleware(DenialRecorder, audit=log.audit)
    app.add_middleware(AuditMiddleware, session_from=who)
    with serve_asgi(app, lifespan="on") as address, client(address) as http:
        assert http.get("/").text == "state"
    assert sessions(log) == [{"user_agent": "Omni-Internal-Agent"}] * 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("session_from", "who"),
        ("trusted_proxies", "10.0.0.0/8"),
        ("trusted_proxies", ["x"]),
        ("trusted_proxies", None),
        ("forwarded_header", "X-Real-IP"),
    ],
)
def test_bad_settings_are_refused_at_construction(log: RecordedLog, setting: str, value: Any) -> None:
    options: dict[str, Any] = {setting: value}
    with pytest.raises(InvalidSetting) as caught:
        AuditMiddleware(recorder(log), **options)
    assert caught.value.setting == setting
