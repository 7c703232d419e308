from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import flask
import httpx
import pytest

from auditlog import Session
from auditlog.capture import current, identify
from auditlog.capture.wsgi import AuditMiddleware
from auditlog.errors import InvalidEvent, InvalidSetting
from auditlog.testing import RecordedLog
from tests.capture.helpers import PROXY, forwarded, records, serve_wsgi, snippet
from tests.helpers import until

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    App = Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]


def serve(app: App, **options: Any) -> AbstractContextManager[str]:
    """The app behind a server with fewer threads than the tests have users."""
    return serve_wsgi(app, **({"threads": 2} | options))


def client(address: str, *, local: str = PROXY, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address=local), **options)


def user_of(environ: WSGIEnvironment) -> Session | None:
    """The user whom the tests' own authentication has found: its header, taken as it is."""
    user = environ.get("HTTP_X_USER")
    return None if user is None else Session(email=user)


def sessions(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"]["session"] for record in log.records]


def actors(log: RecordedLog) -> dict[str, str]:
    """The actor of each event, by its resource id."""
    return {record["resource_id"]: record["event_data"]["session"].get("email", "") for record in log.records}


def ok(start_response: StartResponse) -> None:
    start_response("200 OK", [("Content-Type", "text/plain")])


class Watch:
    """Stands where a server would, and notes each session that it could see there."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.seen: set[object] = set()
        self.raised: list[BaseException] = []
        self.closed = 0

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            self.note()
            body = self.app(environ, start_response)
            self.note()
            try:
                for chunk in body:
                    self.note()
                    yield chunk
            finally:
                self.note()
                if hasattr(body, "close"):
                    body.close()
                self.note()
        except Exception as error:
            self.note()
            self.raised.append(error)
            raise
        finally:
            self.closed += 1

    def note(self) -> None:
        self.seen.add(current())


def test_the_documented_program_records_actor_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("Flask and other WSGI frameworks")
    app, audit = names["app"], names["audit"]

    def create(name: str) -> str:
        audit.create("Cluster", name)
        return name

    app.add_url_rule("/clusters/<name>", view_func=create, methods=["POST"])
    with audit, serve(app) as address, client(address, local="127.0.0.7") as http:
        assert http.post("/clusters/a", headers={"X-Token": "wrong"}).status_code == 401
        assert http.post("/clusters/b", headers={"X-Token": "s3cret"}).status_code == 200
    (record,) = records(tmp_path / "audit-log")
    session = record["event_data"]["session"]
    assert record["resource_id"] == "b"
    assert session["email"] == "alice@example.com"
    assert session["ip_address"] == "127.0.0.7"
    assert session["user_agent"].startswith("python-httpx/")


def test_session_from_sees_what_the_authentication_has_found(log: RecordedLog) -> None:
    app = flask.Flask("app")

    def who(_environ: WSGIEnvironment) -> Session | None:
        return Session(email=flask.g.user, role="Admin") if "user" in flask.g else None

    @app.before_request
    def authenticate() -> None:
        log.audit.create("Thing", "before")
        flask.g.user = flask.request.headers["X-User"]

    @app.get("/")
    def index() -> str:
        log.audit.create("Thing", "inside")
        return ""

    with serve(AuditMiddleware(app.wsgi_app, session_from=who)) as address, client(address) as http:
        http.get("/", headers={"X-User": "alice", "X-Request-ID": "r-1"})
    assert actors(log) == {"before": "", "inside": "alice"}
    assert sessions(log)[1]["role"] == "Admin"
    assert [record["event_data"]["audit"]["request_id"] for record in log.records] == ["r-1", "r-1"]


def test_who_is_identified_is_so_until_the_end_of_the_request(log: RecordedLog) -> None:
    app = flask.Flask("app")

    @app.get("/")
    def index() -> flask.Response:
        log.audit.create("Thing", "before")
        identify(Session(email="alice"))
        log.audit.create("Thing", "after")

        def body() -> Iterator[str]:
            log.audit.create("Thing", "streamed")
            yield "x"

        response = flask.Response(body())
        response.call_on_close(lambda: log.audit.create("Thing", "closed"))
        return response

    @app.get("/next")
    def following() -> str:
        log.audit.create("Thing", "next")
        return ""

    with serve(AuditMiddleware(app.wsgi_app), threads=1) as address, client(address) as http:
        assert http.get("/").text == "x"
        http.get("/next")
    assert actors(log) == {"before": "", "after": "alice", "streamed": "alice", "closed": "alice", "next": ""}


def test_a_stream_with_context_is_asked_for_its_session_too(log: RecordedLog) -> None:
    app = flask.Flask("app")

    @app.get("/<user>")
    def index(user: str) -> flask.Response:
        flask.g.user = user

        def body() -> Iterator[str]:
            for number in range(3):
                log.audit.create("Thing", f"{user}-{number}")
                yield "x"

        return flask.Response(flask.stream_with_context(body()))

    watch = Watch(AuditMiddleware(app.wsgi_app, session_from=lambda _: Session(email=flask.g.user)))
    with serve(watch, threads=1) as address, client(address) as http:
        assert http.get("/alice").text == http.get("/bob").text == "xxx"
    assert list(actors(log)) == ["alice-0", "alice-1", "alice-2", "bob-0", "bob-1", "bob-2"]
    assert all(thing.startswith(actor) for thing, actor in actors(log).items())
    assert watch.seen == {None}


def test_the_server_sees_no_session_between_the_chunks(log: RecordedLog) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        ok(start_response)
        for number in range(3):
            log.audit.create("Thing", str(number))
            yield b"x"

    watch = Watch(AuditMiddleware(app, session_from=user_of))
    with serve(watch) as address, client(address) as http:
        assert http.get("/", headers={"X-User": "alice"}).text == "xxx"
    assert actors(log) == dict.fromkeys("012", "alice")
    assert watch.seen == {None}


def test_a_session_that_a_generator_binds_lasts_over_its_chunks(log: RecordedLog) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        ok(start_response)
        with log.audit.session(Session(email="job")):
            yield b"x"
            log.audit.create("Thing", "job")
            yield b"x"
        log.audit.create("Thing", "own")
        yield b"x"

    watch = Watch(AuditMiddleware(app, session_from=user_of))
    with serve(watch) as address, client(address) as http:
        assert http.get("/", headers={"X-User": "alice"}).text == "xxx"
    assert actors(log) == {"job": "job", "own": "alice"}
    assert watch.seen == {None}


def test_a_failing_handler_leaks_no_session(log: RecordedLog) -> None:
    failure = RuntimeError("the handler fails")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        if environ["PATH_INFO"] == "/fail":
            identify(Session(email="alice"))
            raise failure
        log.audit.create("Thing", "next")
        ok(start_response)
        return [b""]

    watch = Watch(AuditMiddleware(app))
    with serve(watch, threads=1) as address, client(address) as http:
        assert http.get("/fail").status_code == 500
        http.get("/")
    assert actors(log) == {"next": ""}
    assert watch.raised == [failure]
    assert watch.seen == {None}


def test_a_failing_stream_leaks_no_session(log: RecordedLog) -> None:
    failure = RuntimeError("the stream fails")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        ok(start_response)
        if environ["PATH_INFO"] == "/fail":
            identify(Session(email="alice"))
            yield b"x"
            raise failure
        log.audit.create("Thing", "next")
        yield b""

    watch = Watch(AuditMiddleware(app))
    with serve(watch, threads=1) as address, client(address) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            http.get("/fail")
        http.get("/")
    assert actors(log) == {"next": ""}
    assert watch.raised == [failure]
    assert watch.seen == {None}


def test_a_stream_that_nobody_reads_to_its_end_is_closed_within_the_request(log: RecordedLog) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        ok(start_response)
        try:
            while True:
                yield b"x" * 100_000
        finally:
            log.audit.create("Thing", "closed")

    watch = Watch(AuditMiddleware(app, session_from=user_of))
    with serve(watch, threads=1) as address:
        with client(address) as http, http.stream("GET", "/", headers={"X-User": "alice"}) as response:
            next(response.iter_raw())
        until(lambda: watch.closed)
    assert actors(log) == {"closed": "alice"}
    assert watch.seen == {None}


class Body:
    """An iterable that says when it is iterated and closed, and within which session."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def note(self, what: str) -> None:
        session = current()
        self.calls.append(f"{what} {session.email if session else None}")

    def __iter__(self) -> Iterator[bytes]:
        self.note("iter")
        return iter([b"x", b"y"])

    def close(self) -> None:
        self.note("close")


def test_a_body_is_closed_exactly_once() -> None:
    body = Body()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        ok(start_response)
        return body

    middleware = AuditMiddleware(app, session_from=user_of)
    with serve(middleware) as address, client(address) as http:
        assert http.get("/", headers={"X-User": "alice"}).text == "xy"
    assert body.calls == ["iter alice", "close alice"]


def test_a_body_without_close_is_served() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        ok(start_response)
        return map(str.encode, "xyz")

    with serve(AuditMiddleware(app)) as address, client(address) as http:
        assert http.get("/").text == "xyz"


def test_the_middleware_keeps_to_the_specification(log: RecordedLog) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        log.audit.create("Thing", environ["wsgi.input"].read(10).decode())
        start_response("200 OK", [("Content-Type", "text/plain")])
        return iter([b"x", b"y"])

    checked = validator(AuditMiddleware(validator(app), session_from=user_of))
    with serve(checked) as address, client(address) as http:
        assert http.post("/?q", content=b"whole body", headers={"X-User": "alice"}).text == "xy"
    assert actors(log) == {"whole body": "alice"}


def test_what_servers_send_with_its_length_or_by_sendfile_is_returned_as_it_is(tmp_path: Path) -> None:
    class Wrapper:
        def __iter__(self) -> Iterator[bytes]:
            return iter([])

    def returned(body: Any, wrapper: object) -> object:
        start: Any = None
        return AuditMiddleware(lambda *_: body)({"wsgi.file_wrapper": wrapper}, start)

    for body in ([b"x"], (b"x",)):
        assert returned(body, None) is body
    file = Wrapper()
    assert returned(file, Wrapper) is file
    for wrapper in (None, print):  # no class to be an instance of
        assert returned(file, wrapper) is not file

    (tmp_path / "file").write_bytes(b"z" * 100_000)
    app = flask.Flask("app", static_folder=tmp_path, static_url_path="/")
    with serve(AuditMiddleware(app.wsgi_app)) as address, client(address) as http:
        response = http.get("/file")
    assert response.headers["Content-Length"] == "100000"
    assert response.content == b"z" * 100_000


def test_concurrent_requests_over_few_threads_never_mix(log: RecordedLog) -> None:
    app = flask.Flask("app")

    @app.before_request
    def authenticate() -> None:
        flask.g.user = flask.request.headers["X-User"]

    @app.get("/<int:number>")
    def index(number: int) -> flask.Response:
        log.audit.create("Thing", f"{flask.g.user} {number}")
        if number % 3 == 1:
            raise RuntimeError("every third handler fails")

        def body() -> Iterator[str]:
            for chunk in range(3):
                log.audit.create("Thing", f"{flask.g.user} {number} {chunk}")
                yield "x" * 20_000

        return flask.Response(flask.stream_with_context(body()))

    def requests_of(user: int) -> None:
        with client(address, local=f"127.0.1.{user}", headers={"X-User": f"user-{user}"}) as http:
            for number in range(12):
                http.get(f"/{number}")

    who: Any = lambda _: Session(email=flask.g.user)  # noqa: E731
    app.logger.disabled = True
    middleware = AuditMiddleware(app.wsgi_app, session_from=who)
    with serve(middleware, threads=4) as address, ThreadPoolExecutor(20) as pool:
        list(pool.map(requests_of, range(1, 21)))
    assert len(log.records) == 20 * (12 + 8 * 3)
    for record in log.records:
        session = record["event_data"]["session"]
        user = record["resource_id"].split()[0]
        assert session["email"] == user
        assert session["ip_address"] == f"127.0.1.{user.removeprefix('user-')}"


def test_a_connection_that_is_kept_alive_keeps_no_session(log: RecordedLog) -> None:
    ports = set()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        ports.add(environ["REMOTE_PORT"])
        user = environ.get("HTTP_X_USER", "")
        if user:
            identify(Session(email=user))
        log.audit.create("Thing", environ["PATH_INFO"] + user)
        ok(start_response)
        return [b"x"]

    with serve(AuditMiddleware(app)) as address, client(address) as http:
        for number, user in enumerate(["alice", "", "bob", ""]):
            http.get(f"/{number}", headers={"X-User": user} if user else {})
    assert len(ports) == 1
    assert actors(log) == {"/0alice": "alice", "/1": "", "/2bob": "bob", "/3": ""}


@forwarded
def test_only_trusted_proxies_tell_the_address(
    log: RecordedLog, trusted: list[str], headers: Any, address: str
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        log.audit.create("Thing")
        ok(start_response)
        return [b"x"]

    middleware = AuditMiddleware(app, trusted_proxies=trusted)
    with serve(middleware) as url, client(url) as http:
        http.get("/", headers=headers)
    assert sessions(log)[0]["ip_address"] == address


@pytest.mark.parametrize(("trusted", "address"), [([], ""), (["unix"], "192.0.2.1")])
def test_a_proxy_may_call_over_a_unix_socket(
    log: RecordedLog, tmp_path: Path, trusted: list[str], address: str
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        log.audit.create("Thing")
        ok(start_response)
        return [b"x"]

    path = str(tmp_path / "socket")
    http = httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://unix")
    with serve(AuditMiddleware(app, trusted_proxies=trusted), unix_socket=path), http:
        http.get("/", headers={"X-Forwarded-For": "192.0.2.1"})
    assert sessions(log)[0].get("ip_address", "") == address


@pytest.mark.parametrize("raw", ["Zoë".encode(), "Zoë".encode("latin-1")])
def test_a_user_agent_is_kept_as_its_client_wrote_it(log: RecordedLog, raw: bytes) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        log.audit.create("Thing")
        ok(start_response)
        return [b"x"]

    with serve(AuditMiddleware(app)) as address, client(address) as http:
        http.get("/", headers=[(b"User-Agent", raw)])
    assert sessions(log)[0]["user_agent"] == "Zoë"


def test_without_an_event_nobody_is_asked_who_it_is() -> None:
    asked: list[object] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        ok(start_response)
        yield b"x"

    with serve(AuditMiddleware(app, session_from=asked.append)) as address, client(address) as http:
        http.get("/")
    assert asked == []


def test_outside_of_a_request_nobody_can_be_identified() -> None:
    with pytest.raises(InvalidEvent, match="no request is captured here"):
        identify(Session(email="alice"))


async def ask_later(environ: object) -> Session | None:
    return None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"session_from": "alice"}, "session_from"),
        ({"session_from": ask_later}, "no coroutine function"),
        ({"trusted_proxies": "10.0.0.0/8"}, "a list of networks"),
        ({"trusted_proxies": ["10.0.0.0/40"]}, "addresses or networks"),
        ({"forwarded_header": "x-real-ip"}, "x-forwarded-for"),
    ],
)
def test_a_bad_setting_is_refused_at_once(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason):
        AuditMiddleware(lambda *_: [], **settings)
