from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import django
import httpx
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib import auth
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from django.db import connection
from django.db.backends.signals import connection_created
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path
from django.views import View
from waitress.buffers import ReadOnlyFileBasedBuffer  # type: ignore[import-untyped]

from auditlog import AuditLogger, Event, Session
from auditlog.capture import current, identify
from auditlog.errors import InvalidSetting
from auditlog.testing import RecordedLog, recorded_log
from tests.capture.helpers import records, serve_asgi, serve_wsgi, snippet
from tests.helpers import until

OURS = "auditlog.capture.django.AuditMiddleware"
LOADING = "auditlog.capture.django.user_session_async"
MIDDLEWARE = [
    OURS,
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
USERS = ["alice", "bob", "carol", "dave"]
CHUNK = b"x" * 65536
both_servers = pytest.mark.parametrize("kind", ["wsgi", "asgi"])
crosses_modes = pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume:Warning")


class Site:
    """What the views of this module work with, as each test sets it."""

    audit: AuditLogger
    meeting: threading.Barrier
    file: Path


def write(name: str) -> None:
    Site.audit.create("Cluster", name)


async def user_named(name: str) -> Any:
    return await auth.get_user_model().objects.aget(username=name)


# ---------------------------------------------------------------------- views


def record(request: HttpRequest, name: str) -> HttpResponse:
    write(name)
    return HttpResponse(name)


async def record_async(request: HttpRequest, name: str) -> HttpResponse:
    await request.auser()
    await Site.audit.awrite(Event(event_type="create", resource_type="Cluster", resource_id=name))
    return HttpResponse(name)


class Record(View):
    def get(self, request: HttpRequest, name: str) -> HttpResponse:
        return record(request, name)


class RecordAsync(View):
    async def get(self, request: HttpRequest, name: str) -> HttpResponse:
        return await record_async(request, name)


async def record_unloaded(request: HttpRequest, name: str) -> HttpResponse:
    write(name)
    return HttpResponse(name)


def look(request: HttpRequest) -> HttpResponse:
    return HttpResponse("seen")


async def look_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse("seen")


def log_in(request: HttpRequest, name: str) -> HttpResponse:
    write("before")
    auth.login(request, auth.get_user_model().objects.get(username=name))
    write("after")
    return HttpResponse(name)


async def log_in_async(request: HttpRequest, name: str) -> HttpResponse:
    await request.auser()
    write("before")
    await auth.alogin(request, await user_named(name))
    write("after")
    return HttpResponse(name)


def log_out(request: HttpRequest) -> HttpResponse:
    write("before")
    auth.logout(request)
    write("after")
    return HttpResponse("bye")


def identified(request: HttpRequest, name: str) -> HttpResponse:
    identify(Session(role="Admin"))
    write(name)
    return HttpResponse(name)


def meet(request: HttpRequest, name: str) -> HttpResponse:
    write(name)
    Site.meeting.wait(20)
    write(name)
    return HttpResponse(name)


async def meet_async(request: HttpRequest, name: str) -> HttpResponse:
    await request.auser()
    write(name)
    await asyncio.to_thread(Site.meeting.wait, 20)
    write(name)
    return HttpResponse(name)


def fail(request: HttpRequest, name: str) -> HttpResponse:
    write(name)
    raise RuntimeError("the view failed")


async def fail_async(request: HttpRequest, name: str) -> HttpResponse:
    await record_async(request, name)
    raise RuntimeError("the view failed")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[str]:
        write("first")
        yield "a"
        with Site.audit.session(Session(email="job@example.com")):
            write("job begins")
            yield "b"
            write("job ends")
        yield "c"
        write("last")

    return StreamingHttpResponse(chunks())


async def stream_async(request: HttpRequest) -> StreamingHttpResponse:
    await request.auser()

    async def chunks() -> AsyncIterator[str]:
        write("first")
        yield "a"
        with Site.audit.session(Session(email="job@example.com")):
            write("job begins")
            yield "b"
            await sync_to_async(write)("job ends")
        yield "c"
        await asyncio.sleep(0)
        write("last")

    return StreamingHttpResponse(chunks())


def stream_on(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[bytes]:
        try:
            while True:
                yield CHUNK
        finally:
            write("closed")

    return StreamingHttpResponse(chunks())


async def stream_on_async(request: HttpRequest) -> StreamingHttpResponse:
    await request.auser()

    async def chunks() -> AsyncIterator[bytes]:
        try:
            while True:
                yield CHUNK
                await asyncio.sleep(0)
        finally:
            write("closed")

    return StreamingHttpResponse(chunks())


async def stream_and_wait(request: HttpRequest) -> StreamingHttpResponse:
    await request.auser()

    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield CHUNK
            await asyncio.Event().wait()
        finally:
            write("closed")

    return StreamingHttpResponse(chunks())


def download(request: HttpRequest) -> FileResponse:
    return FileResponse(Site.file.open("rb"))


urlpatterns = [
    path("record/<name>", record),
    path("record_async/<name>", record_async),
    path("class/<name>", Record.as_view()),
    path("class_async/<name>", RecordAsync.as_view()),
    path("record_unloaded/<name>", record_unloaded),
    path("look", look),
    path("look_async", look_async),
    path("log_in/<name>", log_in),
    path("log_in_async/<name>", log_in_async),
    path("log_out", log_out),
    path("identified/<name>", identified),
    path("meet/<name>", meet),
    path("meet_async/<name>", meet_async),
    path("fail/<name>", fail),
    path("fail_async/<name>", fail_async),
    path("stream", stream),
    path("stream_async", stream_async),
    path("stream_on", stream_on),
    path("stream_on_async", stream_on_async),
    path("stream_and_wait", stream_and_wait),
    path("download", download),
]


# ---------------------------------------------------------------------- middleware, session_from


def spoofing(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    """Believes what clients say, as many sites do, and knows only the sync mode."""

    def handle(request: HttpRequest) -> HttpResponse:
        request.META["REMOTE_ADDR"] = request.META.get("HTTP_X_FORWARDED_FOR", "").split(",")[0]
        return get_response(request)

    return handle


def of_header(request: HttpRequest) -> Session | None:
    return Session(email=request.headers["X-User"]) if "X-User" in request.headers else None


async def of_header_async(request: HttpRequest) -> Session | None:
    await asyncio.sleep(0)
    write("asked")
    return of_header(request)


async def of_nobody(request: HttpRequest) -> Session | None:
    raise LookupError("nobody knows")


# ---------------------------------------------------------------------- servers


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Django's settings hold for the process: they are made once, and changed with override_settings."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path_factory.mktemp("django") / "db"}
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={"default": database | {"OPTIONS": {"timeout": 20}}},
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
        LOGGING_CONFIG=None,
        MIDDLEWARE=MIDDLEWARE,
        ROOT_URLCONF=__name__,
        SECRET_KEY="only for tests",
        USE_TZ=True,
    )
    django.setup()
    call_command("migrate", verbosity=0)
    for name in USERS:
        auth.get_user_model().objects.create(
            username=name,
            email=f"{name}@example.com",
            is_superuser=name == "alice",
            is_staff=name in ("alice", "bob"),
        )
    connection.close()


@pytest.fixture(autouse=True)
def log(site: None) -> Iterator[RecordedLog]:
    with recorded_log() as recorded, override_settings(ROOT_URLCONF=tuple(urlpatterns)):
        Site.audit = recorded.audit
        yield recorded


@contextmanager
def serve(kind: str) -> Iterator[str]:
    """The site behind a real server, which must never see a session; gives its address."""
    seen: list[Session | None] = []

    def watch_wsgi(app: WSGIHandler) -> Any:
        def handle(environ: Any, start_response: Any) -> Iterator[bytes]:
            seen.append(current())
            body = app(environ, start_response)
            seen.append(current())
            try:
                for chunk in body:
                    seen.append(current())
                    yield chunk
            finally:
                body.close()
                seen.append(current())

        return handle

    def watch_asgi(app: ASGIHandler) -> Any:
        async def handle(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            async def watch(message: Any) -> None:
                seen.append(current())
                await send(message)

            seen.append(current())
            await app(scope, receive, watch)
            seen.append(current())

        return handle

    server = (
        serve_wsgi(watch_wsgi(WSGIHandler())) if kind == "wsgi" else serve_asgi(watch_asgi(ASGIHandler()))
    )
    with server as address:
        yield address
    assert not [session for session in seen if session is not None]


def client(address: str, *, local: str = "127.0.0.1", user: str = "", **options: Any) -> httpx.Client:
    """A browser with a connection that is kept, and with the cookie of a user."""
    http = httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address=local), **options)
    if user:
        http.cookies.set("sessionid", cookie_of(user))
    return http


def cookie_of(name: str) -> str:
    from django.contrib.sessions.backends.db import SessionStore

    user = auth.get_user_model().objects.get(username=name)
    store = SessionStore()
    store[auth.SESSION_KEY] = str(user.pk)
    store[auth.BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    store[auth.HASH_SESSION_KEY] = user.get_session_auth_hash()
    store.save()
    connection.close()
    return str(store.session_key)


def actors(log: RecordedLog) -> list[tuple[str, str]]:
    """Each event's resource id, and the actor."""
    return [(each["resource_id"], each["event_data"]["session"].get("email", "")) for each in log.records]


# ---------------------------------------------------------------------- tests


@both_servers
def test_the_documented_site_records_actor_and_address(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("Django")
    urls = (path("clusters/<name>", names["create_cluster"]),)
    changed = {name: names[name] for name in ("MIDDLEWARE", "AUDITLOG")}
    with (
        names["audit"],
        override_settings(ROOT_URLCONF=urls, **changed),
        serve(kind) as address,
        client(address, local="127.0.0.7", user="alice") as http,
    ):
        assert http.get("/clusters/talos-default").status_code == 201
    (entry,) = records(tmp_path / "audit-log")
    assert entry["resource_id"] == "talos-default"
    assert entry["event_data"]["session"]["email"] == "alice@example.com"
    assert entry["event_data"]["session"]["ip_address"] == "127.0.0.7"


@both_servers
def test_an_event_tells_who_made_its_request_and_from_where(kind: str, log: RecordedLog) -> None:
    headers = {"User-Agent": "Browser für Müller".encode(), "X-Request-ID": "r-1"}
    views = ["record", "record_async", "class", "class_async"]
    with serve(kind) as address:
        for user in ("alice", "bob", "carol", ""):
            with client(address, local="127.0.0.7", user=user, headers=headers) as http:
                for view in views:
                    assert http.get(f"/{view}/{view}").status_code == 200
    assert [record["resource_id"] for record in log.records] == views * 4
    known = [record["event_data"]["session"] for record in log.records]
    assert [(each.get("user_id"), each.get("email"), each.get("role")) for each in known] == [
        *[("1", "alice@example.com", "superuser")] * 4,
        *[("2", "bob@example.com", "staff")] * 4,
        *[("3", "carol@example.com", None)] * 4,
        *[(None, None, None)] * 4,
    ]
    assert {session["ip_address"] for session in known} == {"127.0.0.7"}
    assert {session["user_agent"] for session in known} == {"Browser für Müller"}
    assert {record["event_data"]["audit"]["request_id"] for record in log.records} == {"r-1"}


@both_servers
@pytest.mark.parametrize("session_from", ["auditlog.capture.django.user_session", LOADING])
def test_a_login_counts_from_where_it_happens(kind: str, session_from: str, log: RecordedLog) -> None:
    with override_settings(AUDITLOG={"session_from": session_from}), serve(kind) as address:
        for view in ("log_in", "log_in_async"):
            with client(address) as http:
                assert http.get(f"/{view}/alice").status_code == 200
                assert http.get(f"/{view}/bob").status_code == 200
                assert http.get("/record/later").status_code == 200
                assert http.get("/log_out").status_code == 200
    assert actors(log) == 2 * [
        ("before", ""),
        ("after", "alice@example.com"),
        ("before", "alice@example.com"),
        ("after", "bob@example.com"),
        ("later", "bob@example.com"),
        ("before", "bob@example.com"),
        ("after", ""),
    ]


@both_servers
def test_in_async_code_an_actor_who_is_not_loaded_stops_the_event(kind: str, log: RecordedLog) -> None:
    with serve(kind) as address:
        with client(address, user="alice") as http:
            assert http.get("/record_unloaded/a").status_code == 500
        with client(address) as http:  # without a cookie nobody needs to be loaded
            assert http.get("/record_unloaded/b").status_code == 200
    assert actors(log) == [("b", "")]


@both_servers
def test_async_views_know_a_user_who_is_loaded_before_them(kind: str, log: RecordedLog) -> None:
    with (
        override_settings(AUDITLOG={"session_from": LOADING}),
        serve(kind) as address,
        client(address, user="alice") as http,
    ):
        for view in ("record_unloaded", "record_async", "record", "class_async"):
            assert http.get(f"/{view}/{view}").status_code == 200
    assert {actor for _, actor in actors(log)} == {"alice@example.com"}
    assert len(log.records) == 4


@both_servers
def test_a_coroutine_function_is_awaited_once_before_the_view(kind: str, log: RecordedLog) -> None:
    with (
        override_settings(AUDITLOG={"session_from": of_header_async}),
        serve(kind) as address,
        client(address, headers={"X-User": "carol@example.com"}) as http,
    ):
        for view in ("meet", "meet_async"):
            Site.meeting = threading.Barrier(1)
            assert http.get(f"/{view}/{view}").status_code == 200
        assert http.get("/record_unloaded/n", headers={"X-User": ""}).status_code == 200
    assert actors(log) == [
        *[("asked", ""), ("meet", "carol@example.com"), ("meet", "carol@example.com")],
        *[("asked", ""), ("meet_async", "carol@example.com"), ("meet_async", "carol@example.com")],
        *[("asked", ""), ("n", "")],
    ]


@both_servers
def test_a_coroutine_function_that_fails_stops_the_request(kind: str, log: RecordedLog) -> None:
    with override_settings(AUDITLOG={"session_from": of_nobody}), serve(kind) as address:
        assert httpx.get(f"{address}/record/a").status_code == 500
    assert log.records == []


@both_servers
@pytest.mark.parametrize("session_from", [of_header, None])
def test_a_site_says_itself_who_its_users_are(kind: str, session_from: object, log: RecordedLog) -> None:
    with (
        override_settings(AUDITLOG={"session_from": session_from}, MIDDLEWARE=[OURS]),
        serve(kind) as address,
    ):
        for view in ("record", "record_unloaded"):
            assert httpx.get(f"{address}/{view}/a", headers={"X-User": "carol@example.com"}).is_success
    assert actors(log) == [("a", "carol@example.com" if session_from else "")] * 2


@both_servers
def test_a_view_may_say_more_of_who_is_acting(kind: str, log: RecordedLog) -> None:
    with serve(kind) as address, client(address, user="alice") as http:
        assert http.get("/identified/a").status_code == 200
        assert http.get("/record/b").status_code == 200
    known = [record["event_data"]["session"] for record in log.records]
    assert [(session["email"], session["role"]) for session in known] == [
        ("alice@example.com", "Admin"),
        ("alice@example.com", "superuser"),
    ]


@both_servers
def test_a_request_without_an_event_makes_no_query(kind: str) -> None:
    opened: list[object] = []

    def note(**_: object) -> None:
        opened.append(1)  # a request that asks the database opens its own connection

    with serve(kind) as address, client(address, user="alice") as http:
        connection_created.connect(note)
        try:
            assert http.get("/look").status_code == http.get("/look_async").status_code == 200
            assert not opened
            assert http.get("/record/a").status_code == 200
            assert opened
        finally:
            connection_created.disconnect(note)


@both_servers
@pytest.mark.parametrize("view", ["meet", "meet_async"])
def test_concurrent_requests_never_mix(kind: str, view: str, log: RecordedLog) -> None:
    Site.meeting = threading.Barrier(len(USERS))

    def visit(address: str, number: int) -> None:
        user = USERS[number]
        with client(address, local=f"127.0.0.{10 + number}", user=user) as http:
            for _ in range(5):
                assert http.get(f"/{view}/{user}", headers={"X-Request-ID": user}).status_code == 200

    with serve(kind) as address, ThreadPoolExecutor(len(USERS)) as pool:
        list(pool.map(visit, [address] * len(USERS), range(len(USERS))))
    assert len(log.records) == len(USERS) * 5 * 2
    for each in log.records:
        user, data = each["resource_id"], each["event_data"]
        assert data["session"]["email"] == f"{user}@example.com"
        assert data["session"]["ip_address"] == f"127.0.0.{10 + USERS.index(user)}"
        assert data["audit"]["request_id"] == user


@both_servers
def test_a_failing_view_leaks_no_session(kind: str, log: RecordedLog) -> None:
    with serve(kind) as address, client(address, user="alice") as http:
        for view in ("fail", "fail_async"):
            assert http.get(f"/{view}/a").status_code == 500
        http.cookies.clear()
        for view in ("record", "record_async"):
            assert http.get(f"/{view}/b").status_code == 200
    assert actors(log) == [("a", "alice@example.com")] * 2 + [("b", "")] * 2


@both_servers
@crosses_modes
def test_a_stream_keeps_the_session_to_its_end(kind: str, log: RecordedLog) -> None:
    with serve(kind) as address:
        for view in ("stream", "stream_async"):
            with client(address, user="alice") as http:
                assert http.get(f"/{view}").text == "abc"
                http.cookies.clear()
                assert http.get("/record/after").status_code == 200
    assert actors(log) == 2 * [
        ("first", "alice@example.com"),
        ("job begins", "job@example.com"),
        ("job ends", "job@example.com"),
        ("last", "alice@example.com"),
        ("after", ""),
    ]


def leave(address: str, view: str) -> None:
    """Ask for a stream as alice, and close the connection when it has begun."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connected:
        request = f"GET /{view} HTTP/1.1\r\nHost: site\r\nCookie: sessionid={cookie_of('alice')}\r\n\r\n"
        connected.sendall(request.encode())
        assert connected.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("kind", "view"), [("wsgi", "stream_on"), ("asgi", "stream_on_async"), ("asgi", "stream_and_wait")]
)
def test_a_stream_that_its_client_leaves_ends_with_its_session(
    kind: str, view: str, log: RecordedLog
) -> None:
    with serve(kind) as address:
        leave(address, view)
        until(lambda: log.records)
    assert actors(log) == [("closed", "alice@example.com")]


def test_a_stream_that_is_cancelled_between_two_chunks_ends_with_its_session(log: RecordedLog) -> None:
    site = ASGIHandler()

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_slowly(message: Any) -> None:
            await send(message)
            if message.get("body"):
                await asyncio.Event().wait()  # as where the client does not read on

        await site(scope, receive, send_slowly)

    with serve_asgi(app) as address:
        leave(address, "stream_and_wait")
        until(lambda: log.records)
    assert actors(log) == [("closed", "alice@example.com")]


def test_a_file_is_left_to_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Site.file = tmp_path / "file"
    Site.file.write_bytes(CHUNK)
    bodies: list[object] = []
    app = WSGIHandler()

    def watch(environ: Any, start_response: Any) -> Any:
        bodies.append(app(environ, start_response))
        return bodies[-1]

    with serve_wsgi(watch) as address:
        assert httpx.get(f"{address}/download").content == CHUNK
    assert [type(body) for body in bodies] == [ReadOnlyFileBasedBuffer]


@both_servers
def test_the_address_is_that_of_the_client_behind_trusted_proxies(kind: str, log: RecordedLog) -> None:
    trusted = {"trusted_proxies": ["127.0.0.7"], "forwarded_header": "x-forwarded-for"}
    headers = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9"}
    changed = {"AUDITLOG": trusted, "MIDDLEWARE": [OURS, f"{__name__}.spoofing", *MIDDLEWARE[1:]]}
    with override_settings(**changed), serve(kind) as address:
        for local in ("127.0.0.7", "127.0.0.8"):
            with client(address, local=local, headers=headers) as http:
                assert http.get("/record/a").status_code == 200
    found = [record["event_data"]["session"]["ip_address"] for record in log.records]
    assert found == ["203.0.113.9", "127.0.0.8"]


@both_servers
@pytest.mark.parametrize("session_from", [LOADING, of_header_async])
def test_a_sync_middleware_between_changes_nothing(kind: str, session_from: object, log: RecordedLog) -> None:
    changed = {"AUDITLOG": {"session_from": session_from}}
    with (
        override_settings(MIDDLEWARE=[*MIDDLEWARE, f"{__name__}.spoofing"], **changed),
        serve(kind) as address,
        client(address, user="alice", headers={"X-User": "alice@example.com"}) as http,
    ):
        for view in ("record", "record_unloaded"):
            assert http.get(f"/{view}/a").status_code == 200
    assert [each for each in actors(log) if each[0] == "a"] == [("a", "alice@example.com")] * 2


@both_servers
def test_it_works_in_any_place_among_the_middleware(kind: str, log: RecordedLog) -> None:
    middleware = ["django.middleware.clickjacking.XFrameOptionsMiddleware", *MIDDLEWARE[1:], OURS]
    with (
        override_settings(AUDITLOG={"session_from": LOADING}, MIDDLEWARE=middleware),
        serve(kind) as address,
        client(address, user="alice") as http,
    ):
        for view in ("record", "record_unloaded"):
            assert http.get(f"/{view}/a").headers["X-Frame-Options"] == "DENY"
    assert actors(log) == [("a", "alice@example.com")] * 2


@pytest.mark.parametrize("handler", [WSGIHandler, ASGIHandler])
def test_no_server_calls_it_through_the_other_mode(
    handler: type[WSGIHandler | ASGIHandler], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "django.request")
    with override_settings(DEBUG=True):
        handler()
    assert "adapted" not in caplog.text


@pytest.mark.parametrize(
    ("audit_settings", "named"),
    [
        ([], "AUDITLOG=[]: must be a dict"),
        ({"sesion_from": of_header}, "AUDITLOG['sesion_from']="),
        ({"session_from": "nowhere.who"}, "AUDITLOG['session_from']='nowhere.who': cannot be imported"),
        ({"session_from": "who"}, "AUDITLOG['session_from']='who': cannot be imported"),
        ({"session_from": 1}, "AUDITLOG['session_from']=1: must be a function"),
        ({"trusted_proxies": "10.0.0.0/8"}, "AUDITLOG['trusted_proxies']='10.0.0.0/8': must be a list"),
        ({"trusted_proxies": ["proxy"]}, "AUDITLOG['trusted_proxies']=['proxy']: must be"),
        ({"forwarded_header": "via"}, "AUDITLOG['forwarded_header']='via': must be"),
    ],
)
@pytest.mark.parametrize("handler", [WSGIHandler, ASGIHandler])
def test_a_bad_setting_is_refused_before_the_first_request(
    handler: type[WSGIHandler | ASGIHandler], audit_settings: object, named: str
) -> None:
    with override_settings(AUDITLOG=audit_settings), pytest.raises(InvalidSetting) as refused:
        handler()
    assert str(refused.value).startswith(named)
