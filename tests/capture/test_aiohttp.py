from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from auditlog import Event, Session
from auditlog.capture import current, identify
from auditlog.capture.aiohttp import AuditMiddleware
from auditlog.errors import InvalidSetting
from auditlog.testing import RecordedLog
from tests.capture.helpers import PROXY, forwarded, records, snippet

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve(app: web.Application, unix: str = "", **options: Any) -> AsyncIterator[str]:
    """An application behind aiohttp's own server on loopback; gives its address."""
    runner = web.AppRunner(app, access_log=None, **options)
    await runner.setup()
    site = web.UnixSite(runner, unix) if unix else web.TCPSite(runner, PROXY, 0)
    await site.start()
    try:
        yield "http://unix" if unix else f"http://{PROXY}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def client(address: str, *, local: str = PROXY, **options: Any) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(local_addr=(local, 0), limit=1)  # one connection, kept alive
    return aiohttp.ClientSession(address, connector=connector, **options)


async def get(http: aiohttp.ClientSession, path: str, **options: Any) -> str:
    async with http.get(path, **options) as response:
        return await response.text()


def app_of(*handlers: Handler, middlewares: Any) -> web.Application:
    """Each handler at the path of its name."""
    app = web.Application(middlewares=middlewares)
    for handler in handlers:
        app.router.add_get("/" + handler.__name__, handler)
    return app


def thing(resource_id: str) -> Event:
    return Event(event_type="create", resource_type="Thing", resource_id=resource_id)


def user_of(request: web.Request) -> Session | None:
    """The user whom the tests' own authentication has found: its header, taken as it is."""
    user = request.headers.get("X-User")
    return None if user is None else Session(email=user)


def sessions(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"]["session"] for record in log.records]


def actors(log: RecordedLog) -> dict[str, str]:
    """The actor of each event, by its resource id."""
    return {record["resource_id"]: record["event_data"]["session"].get("email", "") for record in log.records}


def test_the_documented_program_records_actor_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("aiohttp")
    app, audit = names["app"], names["audit"]

    async def create(request: web.Request) -> web.Response:
        await audit.awrite(thing(request.match_info["name"]))
        return web.Response()

    app.router.add_post("/clusters/{name}", create)

    async def run() -> None:
        async with serve(app) as address, client(address, local="127.0.0.7") as http:
            assert (await http.post("/clusters/a", headers={"X-Token": "wrong"})).status == 401
            assert (await http.post("/clusters/b", headers={"X-Token": "s3cret"})).status == 200

    with audit:
        asyncio.run(run())
    (record,) = records(tmp_path / "audit-log")
    session = record["event_data"]["session"]
    assert record["resource_id"] == "b"
    assert session["email"] == "alice@example.com"
    assert session["ip_address"] == "127.0.0.7"
    assert session["user_agent"].startswith("Python/")


def test_who_is_identified_is_so_until_the_end_of_the_request(log: RecordedLog) -> None:
    async def login(request: web.Request) -> web.Response:
        log.audit.create("Thing", "before")
        identify(Session(email="alice"))
        log.audit.create("Thing", "after")

        async def body() -> AsyncIterator[bytes]:
            for number in range(2):
                log.audit.create("Thing", f"streamed {number}")
                yield b"x"

        return web.Response(body=body())

    async def following(request: web.Request) -> web.Response:
        log.audit.create("Thing", "following")
        return web.Response()

    async def prepared(request: web.Request, response: web.StreamResponse) -> None:
        log.audit.create("Thing", f"answer to {request.path}")

    async def run() -> None:
        app = app_of(login, following, middlewares=[AuditMiddleware()])
        app.on_response_prepare.append(prepared)
        async with serve(app) as address, client(address, headers={"X-Request-ID": "r-1"}) as http:
            assert await get(http, "/login") == "xx"
            await get(http, "/following")

    asyncio.run(run())
    ours = dict.fromkeys(["after", "answer to /login", "streamed 0", "streamed 1"], "alice")
    assert actors(log) == {"before": "", **ours, "following": "", "answer to /following": ""}
    assert {record["event_data"]["audit"]["request_id"] for record in log.records} == {"r-1"}


def test_an_async_session_from_is_awaited_once_before_the_handler(log: RecordedLog) -> None:
    calls = []

    async def who(request: web.Request) -> Session | None:
        log.audit.create("Thing", "asked")
        await asyncio.sleep(0)
        calls.append("who")
        return user_of(request)

    async def handle(request: web.Request) -> web.Response:
        calls.append("handle")
        log.audit.create("Thing", "1")
        log.audit.create("Thing", "2")
        return web.Response()

    async def run() -> None:
        app = app_of(handle, middlewares=[AuditMiddleware(session_from=who)])
        async with serve(app) as address, client(address) as http:
            await get(http, "/handle", headers={"X-User": "alice"})

    asyncio.run(run())
    assert calls == ["who", "handle"]
    assert actors(log) == {"asked": "", "1": "alice", "2": "alice"}


def test_a_failing_session_from_or_handler_leaks_no_session(log: RecordedLog) -> None:
    failures: list[Exception] = [web.HTTPConflict(), RuntimeError("the handler fails"), PermissionError()]
    raised, seen, ports = [], set(), set()

    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        seen.add(current())
        try:
            return await handler(request)
        except Exception as error:
            raised.append(error)
            raise web.HTTPInternalServerError from error

    async def who(request: web.Request) -> Session | None:
        if request.path == "/refused":
            raise failures[2]
        return None

    async def refused(request: web.Request) -> web.Response:
        raise AssertionError

    async def conflict(request: web.Request) -> web.Response:
        identify(Session(email="alice"))
        raise failures[0]

    async def fail(request: web.Request) -> web.Response:
        identify(Session(email="bob"))
        raise failures[1]

    async def following(request: web.Request) -> web.Response:
        log.audit.create("Thing", request.query_string)
        return web.Response()

    async def run() -> None:
        middlewares = [watch, AuditMiddleware(session_from=who)]
        app = app_of(conflict, fail, refused, following, middlewares=middlewares)
        async with serve(app) as address, client(address) as http:
            for path in ("conflict", "fail", "refused"):
                await get(http, "/" + path)
                await get(http, "/following?" + path)

    asyncio.run(run())
    assert raised == failures
    assert seen == {None}
    assert len(ports) == 1
    assert actors(log) == {"conflict": "", "fail": "", "refused": ""}


def test_a_connection_that_is_kept_alive_keeps_no_session(log: RecordedLog) -> None:
    ports = set()

    @web.middleware
    async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert current() is None
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return await handler(request)

    async def handle(request: web.Request) -> web.Response:
        user = request.query_string.strip("0123456789")
        if user:
            identify(Session(email=user))
        await log.audit.awrite(thing(request.query_string))
        return web.Response()

    async def run() -> None:
        app = app_of(handle, middlewares=[watch, AuditMiddleware()])
        async with serve(app) as address, client(address) as http:
            for query in ("1alice", "2", "3bob", "4"):
                await get(http, "/handle?" + query)

    asyncio.run(run())
    assert len(ports) == 1
    assert actors(log) == {"1alice": "alice", "2": "", "3bob": "bob", "4": ""}


def test_a_streamed_response_keeps_its_session(log: RecordedLog) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(3):
            await log.audit.awrite(thing(str(number)))
            await response.write(b"x")
        return response

    async def run() -> None:
        app = app_of(stream, middlewares=[AuditMiddleware(session_from=user_of)])
        async with serve(app) as address, client(address) as http:
            assert await get(http, "/stream", headers={"X-User": "alice"}) == "xxx"

    asyncio.run(run())
    assert actors(log) == dict.fromkeys("012", "alice")


def test_each_websocket_keeps_its_session(log: RecordedLog) -> None:
    async def socket(request: web.Request) -> web.StreamResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        async for message in websocket:
            await log.audit.awrite(thing(message.data))
            await websocket.send_str("done")
        return websocket

    async def talk(address: str, user: str) -> None:
        async with client(address) as http, http.ws_connect("/socket", headers={"X-User": user}) as websocket:
            for number in range(10):
                await websocket.send_str(f"{user} {number}")
                assert await websocket.receive_str() == "done"

    async def run() -> None:
        app = app_of(socket, middlewares=[AuditMiddleware(session_from=user_of)])
        async with serve(app) as address:
            await asyncio.gather(*(talk(address, user) for user in ("alice", "bob", "carol")))

    asyncio.run(run())
    assert len(log.records) == 30
    assert all(thing.split()[0] == actor for thing, actor in actors(log).items())


def test_concurrent_requests_never_mix(log: RecordedLog) -> None:
    async def handle(request: web.Request) -> web.Response:
        user, number = request.headers["X-User"], int(request.query_string)
        identify(Session(email=user))
        await log.audit.awrite(thing(f"{user} {number}"))
        if number % 3 == 1:
            raise web.HTTPBadRequest

        async def body() -> AsyncIterator[bytes]:
            for chunk in range(3):
                await log.audit.awrite(thing(f"{user} {number} {chunk}"))
                yield b"x" * 20_000

        return web.Response(body=body())

    async def requests_of(address: str, user: int) -> None:
        async with client(address, local=f"127.0.1.{user}", headers={"X-User": f"user-{user}"}) as http:
            for number in range(12):
                await get(http, f"/handle?{number}")

    async def run() -> None:
        async with serve(app_of(handle, middlewares=[AuditMiddleware()])) as address:
            await asyncio.gather(*(requests_of(address, user) for user in range(1, 21)))

    asyncio.run(run())
    assert len(log.records) == 20 * (12 + 8 * 3)
    for record in log.records:
        session = record["event_data"]["session"]
        user = record["resource_id"].split()[0]
        assert session["email"] == user
        assert session["ip_address"] == f"127.0.1.{user.removeprefix('user-')}"


def test_what_a_request_has_started_keeps_its_session_after_the_answer(log: RecordedLog) -> None:
    answered = asyncio.Event()
    tasks = []

    async def handle(request: web.Request) -> web.Response:
        async def later() -> None:
            await answered.wait()
            log.audit.create("Thing", "later")

        tasks.append(asyncio.create_task(later()))
        return web.Response()

    async def run() -> None:
        app = app_of(handle, middlewares=[AuditMiddleware(session_from=user_of)])
        async with serve(app) as address, client(address) as http:
            await get(http, "/handle", headers={"X-User": "alice"})
            answered.set()
            await asyncio.gather(*tasks)

    asyncio.run(run())
    assert actors(log) == {"later": "alice"}


def test_the_address_is_known_after_the_client_has_gone(log: RecordedLog) -> None:
    received, handled = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        received.set()
        while request.transport is not None:
            await asyncio.sleep(0)
        log.audit.create("Thing")
        handled.set()
        return web.Response()

    async def run() -> None:
        async with serve(app_of(handle, middlewares=[AuditMiddleware()])) as address:
            port = int(address.rpartition(":")[2])
            _, writer = await asyncio.open_connection(PROXY, port, local_addr=("127.0.0.7", 0))
            writer.write(b"GET /handle HTTP/1.1\r\nHost: x\r\nUser-Agent: raw\r\n\r\n")
            await received.wait()
            writer.close()
            await handled.wait()
            await writer.wait_closed()

    asyncio.run(run())
    assert sessions(log) == [{"ip_address": "127.0.0.7", "user_agent": "raw"}]


def test_a_client_that_is_gone_at_once_does_not_pass_for_a_unix_socket(log: RecordedLog) -> None:
    handled = asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        log.audit.create("Thing")
        handled.set()
        return web.Response()

    async def run() -> None:
        app = app_of(handle, middlewares=[AuditMiddleware(trusted_proxies=["unix"])])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        listener = socket.create_server((PROXY, 0))
        with socket.create_connection(listener.getsockname()) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
            sender.sendall(b"GET /handle HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
        await web.SockSite(runner, listener).start()
        await handled.wait()
        await runner.cleanup()

    asyncio.run(run())
    assert sessions(log)[0].get("ip_address", "") in (PROXY, "")  # some event loops have forgotten it


@forwarded
def test_only_trusted_proxies_tell_the_address(
    log: RecordedLog, trusted: list[str], headers: Any, address: str
) -> None:
    async def handle(request: web.Request) -> web.Response:
        log.audit.create("Thing")
        return web.Response()

    async def run() -> None:
        app = app_of(handle, middlewares=[AuditMiddleware(trusted_proxies=trusted)])
        async with serve(app) as url, client(url) as http:
            await get(http, "/handle", headers=headers)

    asyncio.run(run())
    assert sessions(log)[0]["ip_address"] == address


@pytest.mark.parametrize(("trusted", "address"), [([], ""), (["unix"], "192.0.2.1")])
def test_a_proxy_may_call_over_a_unix_socket(
    log: RecordedLog, tmp_path: Path, trusted: list[str], address: str
) -> None:
    async def handle(request: web.Request) -> web.Response:
        log.audit.create("Thing")
        return web.Response()

    async def run() -> None:
        app, path = (
            app_of(handle, middlewares=[AuditMiddleware(trusted_proxies=trusted)]),
            tmp_path / "socket",
        )
        connector = aiohttp.UnixConnector(str(path))
        async with serve(app, str(path)) as url, aiohttp.ClientSession(url, connector=connector) as http:
            await get(http, "/handle", headers={"X-Forwarded-For": "192.0.2.1"})

    asyncio.run(run())
    assert sessions(log)[0].get("ip_address", "") == address


@pytest.mark.parametrize("raw", ["Zoë".encode(), "Zoë".encode("latin-1")])
def test_a_user_agent_is_kept_as_its_client_wrote_it(log: RecordedLog, raw: bytes) -> None:
    async def handle(request: web.Request) -> web.Response:
        log.audit.create("Thing")
        return web.Response()

    async def run() -> None:
        async with serve(app_of(handle, middlewares=[AuditMiddleware()])) as address:
            reader, writer = await asyncio.open_connection(PROXY, int(address.rpartition(":")[2]))
            writer.write(b"GET /handle HTTP/1.0\r\nUser-Agent: " + raw + b"\r\n\r\n")
            await reader.read()
            writer.close()
            await writer.wait_closed()

    asyncio.run(run())
    assert sessions(log)[0]["user_agent"] == "Zoë"


def test_a_part_of_an_application_may_be_captured_alone(log: RecordedLog) -> None:
    async def handle(request: web.Request) -> web.Response:
        log.audit.create("Thing", request.path)
        return web.Response()

    async def run() -> None:
        app = app_of(handle, middlewares=[])
        app.add_subapp("/part", app_of(handle, middlewares=[AuditMiddleware(session_from=user_of)]))
        async with serve(app) as address, client(address, headers={"X-User": "alice"}) as http:
            await get(http, "/part/handle")
            await get(http, "/handle")

    asyncio.run(run())
    assert actors(log) == {"/part/handle": "alice", "/handle": ""}


def test_without_an_event_nobody_is_asked_who_it_is() -> None:
    asked: list[object] = []

    async def handle(request: web.Request) -> web.Response:
        return web.Response(text="x")

    async def run() -> None:
        app = app_of(handle, middlewares=[AuditMiddleware(session_from=asked.append)])
        async with serve(app) as address, client(address) as http:
            assert await get(http, "/handle") == "x"

    asyncio.run(run())
    assert asked == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"session_from": "alice"}, "session_from"),
        ({"trusted_proxies": "10.0.0.0/8"}, "a list of networks"),
        ({"trusted_proxies": ["10.0.0.0/40"]}, "addresses or networks"),
        ({"forwarded_header": "x-real-ip"}, "x-forwarded-for"),
    ],
)
def test_a_bad_setting_is_refused_at_once(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason):
        AuditMiddleware(**settings)
