from __future__ import annotations

import asyncio
import re
import signal
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import fastapi
import httpx
import litestar
import litestar.exceptions
import pytest
import uvicorn
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from auditlog import AccessDenied, Event, EventData, Session, WriteFailed
from auditlog.capture import current, identify
from auditlog.capture.asgi import (
    App,
    AuditMiddleware,
    DenialRecorder,
    Message,
    Receive,
    Scope,
    Send,
    header_values,
)
from auditlog.capture.kubernetes import KubernetesAccess
from auditlog.errors import InvalidSetting
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.helpers import records, serve_asgi, snippet
from tests.conftest import Start
from tests.helpers import until

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


def aio_client(address: str, local: str = "127.0.0.1", **options: Any) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(local_addr=(local, 0), limit=1)
    return aiohttp.ClientSession(address, connector=connector, **options)


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


def test_concurrent_requests_to_several_processes_never_mix(directory: Path, start: Start) -> None:
    with (directory.parent / "stderr").open("w+b") as stderr:
        site = start("asgi_site", directory, TOGETHER, stderr=stderr)
        try:
            said = Path(stderr.name)
            until(lambda: said.read_bytes().count(b"startup complete") == 2 or site.poll() is not None)
            running = re.search(rb"running on (http://127.0.0.1:\d+)", said.read_bytes())
            assert running is not None, said.read_text()
            expected, pids = asyncio.run(change_things(running[1].decode()))
        finally:
            site.send_signal(signal.SIGTERM)
            site.wait(30)
    events = records(directory)
    assert len(events) == len(expected) == 2 * TOGETHER
    found = {}
    for event in events:
        assert event["event_type"] == "update"
        session = event["event_data"]["session"]
        request_id = event["event_data"]["audit"]["request_id"]
        found[event["resource_id"]] = (session["email"], session["ip_address"], request_id)
    assert found == expected
    assert len(pids) == 2


async def change_things(address: str) -> tuple[dict[str, tuple[str, str, str]], set[int]]:
    """200 requests of 20 users at once, the half of them to each process; give what must be in the log."""
    tls = ssl.create_default_context()  # unused, but each client would make its own
    clients: dict[int, list[tuple[int, httpx.AsyncClient]]] = {}

    async def connect(number: int) -> None:
        transport = httpx.AsyncHTTPTransport(local_address=f"127.0.1.{number % 20 + 1}", verify=tls)
        http = httpx.AsyncClient(base_url=address, transport=transport, timeout=60)
        pid = (await http.get("/pid")).json()  # the connection stays with this process
        connected = clients.setdefault(pid, [])
        if len(connected) == TOGETHER:
            await http.aclose()
            await connect(number)
        else:
            connected.append((number, http))

    for number in range(2 * TOGETHER):
        await connect(number)
    expected = {}

    async def change(number: int, http: httpx.AsyncClient) -> None:
        name, user, request_id = f"thing-{number}", f"user-{number % 20}", f"request-{number}"
        expected[name] = (user, f"127.0.1.{number % 20 + 1}", request_id)
        kind = "threads" if number % 40 < 20 else "tasks"
        headers = {"X-User": user, "X-Request-ID": request_id}
        assert (await http.put(f"/{kind}/{name}", headers=headers)).is_success
        await http.aclose()

    async with asyncio.TaskGroup() as group:
        for number, http in (each for connected in clients.values() for each in connected):
            group.create_task(change(number, http))
    return expected, set(clients)


def recorder(log: RecordedLog) -> App:
    """An app that writes one event for each request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        log.audit.create("Thing", scope["query_string"].decode())
        await answer(send)

    return app


@pytest.mark.parametrize(
    ("trusted", "address"), [([], "127.0.0.7"), (["127.0.0.7"], "192.0.2.1"), (["10.0.0.0/8"], "127.0.0.7")]
)
def test_the_address_is_that_of_the_client_as_trusted_proxies_tell_it(
    log: RecordedLog, trusted: list[str], address: str, serve: Serve
) -> None:
    app = AuditMiddleware(recorder(log), trusted_proxies=trusted)
    with serve(app) as site, client(site, local="127.0.0.7") as http:
        http.get("/", headers=[("X-Forwarded-For", "203.0.113.66"), ("x-forwarded-for", "192.0.2.1")])
    assert sessions(log)[0]["ip_address"] == address


def test_the_header_that_counts_may_be_fixed(log: RecordedLog, serve: Serve) -> None:
    headers = {"X-Forwarded-For": "192.0.2.1", "Forwarded": 'for="[2001:db8::1]:80"'}
    for fixed in ("x-forwarded-for", "forwarded", None):
        header: Any = fixed
        app = AuditMiddleware(recorder(log), trusted_proxies=["127.0.0.1"], forwarded_header=header)
        with serve(app) as site, client(site) as http:
            http.get("/", headers=headers)
    assert [session["ip_address"] for session in sessions(log)] == ["192.0.2.1", "2001:db8::1", "127.0.0.1"]


@pytest.mark.parametrize(("trusted", "address"), [(["unix"], "192.0.2.1"), (["127.0.0.1"], "")])
def test_a_proxy_at_a_unix_socket_is_believed_only_where_that_is_trusted(
    log: RecordedLog, tmp_path: Path, trusted: list[str], address: str
) -> None:
    path = str(tmp_path / "site")
    app = AuditMiddleware(recorder(log), trusted_proxies=trusted)
    with serve_unix(app, path), httpx.Client(transport=httpx.HTTPTransport(uds=path)) as http:
        http.get("http://site/", headers={"X-Forwarded-For": "203.0.113.66, 192.0.2.1"})
    assert sessions(log)[0].get("ip_address", "") == address


@contextmanager
def serve_unix(app: App, path: str) -> Iterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    with serve_sockets(app, listener):
        yield


@contextmanager
def serve_sockets(app: App, listener: socket.socket) -> Iterator[None]:
    """A real uvicorn at a socket that is already there."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", proxy_headers=False, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join()


def test_a_client_that_is_gone_at_once_does_not_pass_for_a_unix_socket(log: RecordedLog) -> None:
    app = AuditMiddleware(recorder(log), trusted_proxies=["unix"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
            sender.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.66\r\n\r\n")
        with serve_sockets(app, listener):
            until(lambda: log.records)
    assert sessions(log)[0].get("ip_address", "") in ("", "127.0.0.1")


USER_AGENTS: list[tuple[bytes, str]] = [
    (b"kubectl/1.30", "kubectl/1.30"),
    (b"", ""),
    (b"a\x1b[31mred\x07\x7fb", "a\ufffd[31mred\ufffd\ufffdb"),
    ("a\x85\u2028\u2029b".encode(), "a\ufffd\ufffd\ufffdb"),
    ("Größe 日本 🔑".encode(), "Größe 日本 🔑"),
    ("Größe".encode("latin-1"), "Größe"),
    (b"a\xff\x9b31m", "aÿ\ufffd31m"),
    (b"x" * 512, "x" * 512),
    (b"x" * 513, "x" * 511 + "…"),
    (b"x" * 102_400, "x" * 511 + "…"),
    ("ß".encode() * 51_200, "ß" * 511 + "…"),
]


def test_what_a_header_says_is_cleaned_and_bounded(log: RecordedLog, serve: Serve) -> None:
    app = AuditMiddleware(recorder(log))
    with serve(app) as site, client(site) as http:
        for sent, _ in USER_AGENTS:
            headers: Any = [(b"User-Agent", sent)]
            assert http.get("/", headers=headers).is_success
    assert [session.get("user_agent", "") for session in sessions(log)] == [kept for _, kept in USER_AGENTS]


REQUEST_IDS: list[tuple[list[str], str]] = [
    ([], ""),
    ([""], ""),
    (["0f8fad5b-d9cb-469f-a165-70867728950e"], "0f8fad5b-d9cb-469f-a165-70867728950e"),
    (["Root=1-67891233-abcdef012345678912345678"], "Root=1-67891233-abcdef012345678912345678"),
    (["r" * 128], "r" * 128),
    (["r" * 129], ""),
    (["r" * 60_000], ""),
    (["two words"], ""),
    (['quo"te'], ""),
    (["<script>"], ""),
    (["a\x1b[31m"], ""),
    (["é"], ""),
    (["first", "second"], "first"),
    (["not good", "second"], ""),
]


def test_a_request_id_is_kept_where_it_is_well_formed(log: RecordedLog, serve: Serve) -> None:
    with serve(AuditMiddleware(recorder(log))) as site, client(site) as http:
        for sent, _ in REQUEST_IDS:
            headers: Any = [(b"X-Request-ID", value.encode()) for value in sent]
            assert http.get("/", headers=headers).is_success
    assert request_ids(log) == [kept for _, kept in REQUEST_IDS]
    assert all(
        ("audit" in record["event_data"]) == bool(kept)
        for record, kept in zip(log.records, request_ids(log), strict=True)
    )


def test_an_event_of_another_time_or_request_keeps_its_own(log: RecordedLog, serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        data = EventData.model_validate({"audit": {"request_id": "own", "action": "import"}})
        log.audit.write(Event(event_type="create", event_ts=1_700_000_000_000))
        log.audit.write(Event(event_type="create", event_data=data))
        log.audit.create("Thing", audit={"request_id": "own"})
        log.audit.create("Thing", audit={"action": "import"})
        await answer(send)

    with serve(AuditMiddleware(app)) as site, client(site) as http:
        http.get("/", headers={"X-Request-ID": "r-1"})
    assert sorted(request_ids(log)) == ["", "own", "own", "r-1"]
    actions = [record["event_data"].get("audit", {}).get("action") for record in log.records]
    assert actions.count("import") == 2


def noted(log: RecordedLog, app: App) -> App:
    """`app`, and how many events there are when its answer is about to go out."""

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.close", "websocket.http.response.start"):
                log.audit.create("Answer", str(len(log.records)))
            await send(message)

        await app(scope, receive, watch)

    return note


def test_a_denied_request_is_recorded_before_its_answer_goes_out(log: RecordedLog, serve: Serve) -> None:
    app = fastapi.FastAPI()

    @app.delete("/{status}")
    async def index(status: int) -> Response:
        identify(Session(email="alice"))
        raise fastapi.HTTPException(status)

    site = AuditMiddleware(noted(log, DenialRecorder(app, log.audit)))
    with serve(site) as address, client(address, headers={"X-Request-ID": "r-1"}) as http:
        for status in (401, 403):
            assert http.delete(f"/{status}?token=secret").status_code == status
        for status in (200, 204, 302, 400, 404, 407, 500):
            assert http.delete(f"/{status}").status_code == status
    unauthorized, first, forbidden, second, *others = log.records
    assert (first["resource_id"], second["resource_id"]) == ("1", "3")
    assert {record["resource_type"] for record in others} == {"Answer"}
    for denial, status in ((unauthorized, 401), (forbidden, 403)):
        assert denial["event_type"] == "access_denied"
        facts = {"action": f"DELETE /{status}", "outcome": "denied", "request_id": "r-1"}
        assert denial["event_data"]["audit"] == facts
        assert denial["event_data"]["session"]["email"] == "alice"


def test_a_denial_that_something_further_in_has_recorded_is_not_recorded_twice(
    log: RecordedLog, serve: Serve
) -> None:
    app = fastapi.FastAPI()

    @app.get("/{name}")
    def read(name: str) -> None:
        try:
            log.audit.reader_for(None)
        except AccessDenied:
            raise fastapi.HTTPException(403) from None

    async def denies(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, 403)

    access = KubernetesAccess(denies, log.audit, cluster_from=lambda scope: ("", ""))
    app.mount("/k8s", access)
    with serve(AuditMiddleware(DenialRecorder(app, log.audit))) as address, client(address) as http:
        assert http.get("/log").status_code == 403
        assert http.post("/k8s/api").status_code == 403
        assert http.get("/k8s/api").status_code == 403  # a read, which only the recorder sees
    happened = [record["event_data"].get("audit", {}).get("action", "") for record in log.records]
    assert happened == ["audit_log_access", "", "k8s_access", "GET /k8s/api"]


@pytest.mark.parametrize("site", SITES)
def test_denials_of_every_framework_are_recorded(log: RecordedLog, site: Any, serve: Serve) -> None:
    async def work() -> None:
        if site is litestar_site:
            raise litestar.exceptions.PermissionDeniedException
        raise fastapi.HTTPException(403)

    app = AuditMiddleware(DenialRecorder(site(work, []), log.audit))
    with serve(app) as address, client(address) as http:
        assert http.get("/").status_code == 403
    assert [record["event_data"]["audit"]["action"] for record in log.records] == ["GET /"]


@pytest.mark.parametrize("site", SITES)
def test_a_denial_that_cannot_be_recorded_does_not_go_out(site: Any, serve: Serve) -> None:
    async def work() -> None:
        if site is litestar_site:
            raise litestar.exceptions.PermissionDeniedException("a reason")
        raise fastapi.HTTPException(403, "a reason")

    files = FailingFiles()
    with recorded_log(files=files) as log:
        files.fail("write")
        watch = Watch(AuditMiddleware(DenialRecorder(site(work, []), log.audit)))
        with serve(watch) as address, client(address) as http:
            response = http.get("/")
        files.heal()
        assert response.status_code == 500
        assert "a reason" not in response.text
        assert [type(error) for error in watch.raised] == [WriteFailed]
        assert log.records == []


@pytest.mark.usefixtures("websockets")
def test_a_rejected_websocket_is_recorded_before_it_is_told_so(log: RecordedLog, serve: Serve) -> None:
    app = fastapi.FastAPI()

    @app.websocket("/{answer}")
    async def reject(websocket: fastapi.WebSocket, answer: str) -> None:
        identify(Session(email="alice"))
        if answer.isdigit():
            await websocket.send_denial_response(Response(status_code=int(answer)))
            return
        if answer == "accepted":
            await websocket.accept()
        await websocket.close(1008)

    async def status(http: aiohttp.ClientSession, path: str) -> int:
        try:
            async with http.ws_connect(path) as websocket:
                assert (await websocket.receive()).data == 1008
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status

    async def run(address: str) -> list[int]:
        async with aio_client(address) as http:
            return [await status(http, path) for path in ("/closed", "/401", "/403", "/404", "/accepted")]

    site = AuditMiddleware(noted(log, DenialRecorder(app, log.audit)))
    with serve(site) as address:
        assert asyncio.run(run(address)) == [403, 401, 403, 404, 101]
    happened = [record["event_data"].get("audit", {}).get("action", "answer") for record in log.records]
    assert happened == [
        "GET /closed",
        "answer",
        "GET /401",
        "answer",
        "GET /403",
        "answer",
        "answer",
        "answer",
    ]
    assert {session["email"] for session in sessions(log)} == {"alice"}


@pytest.mark.usefixtures("websockets")
def test_a_rejection_of_a_websocket_that_cannot_be_recorded_is_an_error(serve: Serve) -> None:
    async def reject(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 1008})

    async def run(address: str) -> None:
        async with aio_client(address) as http:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="500"):
                await http.ws_connect("/")

    files = FailingFiles()
    with recorded_log(files=files) as log:
        files.fail("write")
        watch = Watch(DenialRecorder(reject, log.audit))
        with serve(watch) as address:
            asyncio.run(run(address))
        files.heal()
        assert [type(error) for error in watch.raised] == [WriteFailed]


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
