from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastapi
import httpx
import pytest

from auditlog import Event, InvalidSetting, Session, denied
from auditlog.capture import bind, current, identify, wrap
from auditlog.capture.asgi import AuditMiddleware
from auditlog.capture.session import Pending, binding, is_denied, stepping
from auditlog.errors import InvalidEvent
from auditlog.testing import RecordedLog, recorded_log
from tests.capture.helpers import serve_asgi
from tests.helpers import until


def pending(session_from: Any = None) -> Pending:
    """The session of a request, as the captures make it."""
    return Pending(lambda: (Session(ip_address="192.0.2.1", user_agent="curl"), "r-1"), session_from)


def sessions(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"]["session"] for record in log.records]


def actors(log: RecordedLog) -> list[str]:
    return [session.get("email", "") for session in sessions(log)]


def test_identify_outside_of_a_request_is_refused(alice: Session) -> None:
    with pytest.raises(InvalidEvent, match="no request is captured here"):
        identify(alice)
    with bind(alice), pytest.raises(InvalidEvent):  # somebody's own session is not a request's
        identify(Session(email="bob"))
    with binding(pending()):
        identify(alice)
    with pytest.raises(InvalidEvent):
        identify(alice)


@pytest.mark.parametrize("wrong", [None, "alice", {"email": "alice"}, Session])
def test_identify_takes_a_session_only(log: RecordedLog, wrong: Any) -> None:
    with binding(pending()):
        with pytest.raises(InvalidEvent, match="identify must give a Session"):
            identify(wrong)
        log.audit.create("Thing")
    assert sessions(log) == [{"user_agent": "curl", "ip_address": "192.0.2.1"}]


def test_several_identifications_add_up(log: RecordedLog) -> None:
    transport = {"user_agent": "curl", "ip_address": "192.0.2.1"}
    with binding(pending()):
        identify(Session(email="alice"))
        log.audit.create("Thing")
        identify(Session(user_id="7"))
        log.audit.create("Thing")
        identify(Session(email="bob", user_agent="cli"))
        log.audit.create("Thing")
        identify(Session(email=""))  # given, and empty: logged out
        log.audit.create("Thing")
    assert sessions(log) == [
        transport | {"email": "alice"},
        transport | {"email": "alice", "user_id": "7"},
        transport | {"email": "bob", "user_id": "7", "user_agent": "cli"},
        transport | {"user_id": "7", "user_agent": "cli"},
    ]


def test_what_was_identified_wins_over_session_from(log: RecordedLog) -> None:
    with binding(pending(lambda: Session(email="alice", role="Reader"))):
        log.audit.create("Thing")
        identify(Session(role="Admin"))
        log.audit.create("Thing")
    assert actors(log) == ["alice", "alice"]
    assert [session["role"] for session in sessions(log)] == ["Reader", "Admin"]


def test_fields_that_the_model_does_not_know_are_kept(log: RecordedLog) -> None:
    with binding(pending(lambda: Session.model_validate({"email": "alice", "tenant": "a"}))):
        identify(Session.model_validate({"shift": "night", "password": "secret"}))
        log.audit.create("Thing")
    (session,) = sessions(log)
    assert session["tenant"] == "a"
    assert session["shift"] == "night"
    assert "secret" not in str(session)


def test_a_login_in_the_middle_of_a_request_counts_for_later_events_only(log: RecordedLog) -> None:
    user: list[str] = []

    def ask() -> Session | None:
        return Session(email=user[-1]) if user else None

    with binding(pending(ask)):
        log.audit.create("Thing")
        user.append("alice")
        log.audit.create("Thing")
        user.append("bob")
        log.audit.create("Thing")
        user.clear()
        log.audit.create("Thing")
    assert actors(log) == ["", "alice", "bob", ""]


def test_the_request_is_described_once_and_only_for_an_event(log: RecordedLog) -> None:
    calls = []

    def describe() -> tuple[Session, str]:
        calls.append("described")
        return Session(ip_address="192.0.2.1"), ""

    def ask() -> None:
        calls.append("asked")

    with binding(Pending(describe, ask)):
        assert calls == []
        log.audit.create("Thing")
        log.audit.create("Thing")
    assert calls == ["described", "asked", "asked"]


def test_a_session_from_that_writes_an_event_is_not_asked_again(log: RecordedLog) -> None:
    def ask() -> Session:
        log.audit.create("Lookup")
        assert current() == Session(ip_address="192.0.2.1", user_agent="curl")
        return Session(email="alice")

    with binding(pending(ask)):
        log.audit.create("Thing")
    assert [record["resource_type"] for record in log.records] == ["Lookup", "Thing"]
    assert actors(log) == ["", "alice"]
    assert {record["event_data"]["audit"]["request_id"] for record in log.records} == {"r-1"}


def test_what_session_from_raises_the_write_raises_and_writes_nothing(log: RecordedLog) -> None:
    failure = LookupError("the directory of users is away")

    def ask() -> Session:
        raise failure

    event = Event(event_type="create")
    with binding(pending(ask)):
        for write in (lambda: log.audit.create("Thing"), lambda: log.audit.write(event), current):
            with pytest.raises(LookupError) as caught:
                write()
            assert caught.value is failure
        with pytest.raises(LookupError):
            log.audit.write_many([event])
        with pytest.raises(LookupError):
            asyncio.run(log.audit.awrite(event))
        with pytest.raises(LookupError):
            wrap(print)
        with log.audit.session(Session(email="job")):  # a session that is known asks nobody
            log.audit.create("Thing")
    assert actors(log) == ["job"]


async def coroutine() -> Session:
    return Session(email="alice")


@pytest.mark.parametrize("given", ["alice", {"email": "alice"}, 0, False, Session, [Session()]])
def test_a_session_from_that_gives_no_session_is_refused(log: RecordedLog, given: Any) -> None:
    with (
        binding(pending(lambda: given)),
        pytest.raises(InvalidEvent, match="session_from must give a Session"),
    ):
        log.audit.create("Thing")
    assert log.records == []


@pytest.mark.filterwarnings("error")
def test_a_session_from_that_gives_a_coroutine_is_refused_without_a_warning(log: RecordedLog) -> None:
    with binding(pending(lambda: coroutine())), pytest.raises(InvalidEvent, match="not coroutine"):
        log.audit.create("Thing")
    assert log.records == []


def test_wrap_takes_the_session_as_it_is_known_at_that_moment(log: RecordedLog) -> None:
    user = ["alice"]
    with binding(pending(lambda: Session(email=user[-1]))), ThreadPoolExecutor() as pool:
        task = wrap(log.audit.create)
        user.append("bob")
        identify(Session(role="Admin"))
        pool.submit(task, "Thing").result()
        pool.submit(log.audit.create, "Thing").result()  # a thread inherits nothing
        pool.submit(wrap(log.audit.create), "Thing").result()
    task("Thing")  # after the request, too
    assert actors(log) == ["alice", "", "bob", "alice"]
    assert [session.get("role", "") for session in sessions(log)] == ["", "", "Admin", ""]
    ids = [record["event_data"].get("audit", {}).get("request_id", "") for record in log.records]
    assert ids == ["r-1", "", "r-1", "r-1"]
    assert current() is None


def test_wrap_leaves_a_coroutine_function_one(log: RecordedLog, alice: Session) -> None:
    with bind(alice):

        @wrap
        async def write(name: str) -> str:
            """Write it."""
            log.audit.create("Thing", name)
            return name

    async def run() -> None:
        assert current() is None
        assert await write("a") == "a"
        assert current() is None

    asyncio.run(run())
    assert write.__doc__ == "Write it."
    assert actors(log) == ["alice@example.com"]


def test_a_session_ends_with_its_block_even_when_that_fails(alice: Session) -> None:
    for who in (bind(alice), binding(pending()), stepping(pending())):
        with pytest.raises(RuntimeError, match="it fails"), who:
            raise RuntimeError("it fails") if current() is not None else AssertionError
        assert current() is None


def test_bindings_nest(alice: Session) -> None:
    with bind(alice), binding(pending()):
        assert current() == Session(ip_address="192.0.2.1", user_agent="curl")
        with binding(None):
            assert current() is None
        with bind(Session(email="bob")):
            assert current() == Session(email="bob")
        assert current() == Session(ip_address="192.0.2.1", user_agent="curl")
    assert current() is None


@pytest.mark.parametrize("wrong", [None, "alice", Session])
def test_only_a_session_can_be_bound(wrong: Any) -> None:
    with pytest.raises(InvalidEvent):
        bind(wrong)


def test_threads_of_a_request_share_what_was_identified(log: RecordedLog) -> None:
    request = pending()
    identified = threading.Barrier(2)

    def authenticates() -> None:
        with binding(request):
            identify(Session(email="alice"))
            identified.wait()

    def writes() -> None:
        with binding(request):
            log.audit.create("Thing")
            identified.wait()
            log.audit.create("Thing")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(writes)
        until(lambda: log.records)
        pool.submit(authenticates).result()
        first.result()
    assert actors(log) == ["", "alice"]


def client(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, headers={"X-User": "alice"})


@pytest.mark.parametrize("asks", ["sync", "async"])
def test_the_response_shows_that_session_from_failed(log: RecordedLog, asks: str) -> None:
    class Away(Exception):
        pass

    app = fastapi.FastAPI()
    changed = []

    def ask(scope: Any) -> Session:
        raise Away

    async def ask_async(scope: Any) -> Session:
        raise Away

    @app.exception_handler(Away)
    async def away(request: Any, error: Away) -> fastapi.Response:
        return fastapi.Response("who are you?", status_code=503)

    @app.get("/")
    def index() -> None:
        log.audit.create("Thing")
        changed.append("a thing")

    if asks == "sync":
        site: Any = AuditMiddleware(app, session_from=ask)
    else:
        site = AuditMiddleware(app, session_from=ask_async)
    with serve_asgi(site, log_level="critical") as address, client(address) as http:
        response = http.get("/")
    # A coroutine function is awaited outside of the application, where its handlers see nothing.
    assert (response.status_code, response.text) == (
        (503, "who are you?") if asks == "sync" else (500, "Internal Server Error")
    )
    assert changed == []
    assert log.records == []


@pytest.mark.filterwarnings("error")
def test_a_wrong_session_from_keeps_the_change_from_being_recorded_as_somebody_elses(
    log: RecordedLog,
) -> None:
    app = fastapi.FastAPI()
    raised: list[str] = []

    @app.get("/")
    async def index() -> None:
        try:
            log.audit.create("Thing")
        except InvalidEvent as error:
            raised.append(error.path)
            raise

    async def gives_a_name(scope: Any) -> Any:
        return "alice"

    forgotten: Any = lambda scope: coroutine()  # noqa: E731 - looks like a function
    for ask in (forgotten, gives_a_name):
        site = AuditMiddleware(app, session_from=ask)
        with serve_asgi(site, log_level="critical") as address, client(address) as http:
            assert http.get("/").status_code == 500
    assert raised == ["session"]
    assert log.records == []


def test_a_session_bound_within_a_request_keeps_the_request_id(alice: Session) -> None:
    def describe() -> tuple[Session, str]:
        return Session(ip_address="10.1.2.3"), "r-1"

    with recorded_log() as log:
        with binding(Pending(describe)):
            with log.audit.session(alice), log.audit.session(Session(email="sudo@example.com")):
                log.audit.create("T", "1")
            log.audit.create("T", "2")
        assert [record["event_data"]["audit"] for record in log.records] == [{"request_id": "r-1"}] * 2


def test_one_binding_may_be_entered_again_and_again_and_anywhere(log: RecordedLog, alice: Session) -> None:
    here = bind(alice)

    async def job(name: str) -> None:
        with here:
            await asyncio.sleep(0)
            log.audit.create("Thing", name)
            await asyncio.sleep(0)
        assert current() is None

    async def jobs() -> None:
        await asyncio.gather(job("1"), job("2"))

    asyncio.run(jobs())
    with here, here:
        log.audit.create("Thing", "3")
    assert current() is None
    assert actors(log) == [alice.email] * 3


def test_a_block_that_ends_in_another_context_leaves_nothing_behind(alice: Session) -> None:
    def rows() -> Iterator[int]:
        with bind(alice):
            yield 1
        yield 2

    stream = rows()
    contextvars.copy_context().run(next, stream)
    with binding(pending()):
        assert next(stream) == 2
        assert current() == Session(user_agent="curl", ip_address="192.0.2.1")


def test_a_session_within_a_request_hides_neither_its_denials_nor_who_makes_it(
    log: RecordedLog, alice: Session
) -> None:
    request = pending()
    with binding(request):
        with bind(Session(email="service")):
            identify(alice)
            log.audit.write(denied("destroy"))
            assert is_denied()
            threading.Thread(target=wrap(identify), args=(Session(role="Auditor"),)).start()
            until(lambda: request.now().session.role == "Auditor")
        log.audit.create("Thing")
    assert actors(log) == ["service", alice.email]


def test_an_authentication_that_runs_when_an_event_asks_may_identify(log: RecordedLog) -> None:
    def load() -> None:
        identify(Session(email="late"))

    with binding(pending(load)):
        log.audit.create("Thing")
    assert actors(log) == ["late"]


def test_what_a_row_does_not_know_of_the_transport_stays(log: RecordedLog) -> None:
    row: dict[str, Any] = {"email": "alice", "user_id": "", "ip_address": "", "user_agent": ""}
    with binding(pending(lambda: Session(**row))):
        log.audit.create("Thing")
    assert sessions(log) == [{"user_agent": "curl", "ip_address": "192.0.2.1", "email": "alice"}]


def test_a_generator_function_is_not_wrapped() -> None:
    def rows() -> Iterator[int]:
        yield 1

    with pytest.raises(InvalidSetting, match="generator function"):
        wrap(rows)


def test_a_call_of_another_captured_application_has_its_own_actor(log: RecordedLog, alice: Session) -> None:
    inner, outer = fastapi.FastAPI(), fastapi.FastAPI()
    captured = AuditMiddleware(inner, session_from=lambda _: Session(email="service"))

    @inner.get("/")
    def create() -> None:
        log.audit.create("Thing")

    @outer.get("/")
    async def pass_on() -> None:
        identify(alice)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(captured)) as client:
            await client.get("http://inner/")

    with serve_asgi(AuditMiddleware(outer)) as address:
        httpx.get(address)
    assert [(session["email"], session.get("role")) for session in sessions(log)] == [("service", None)]


def test_blocks_that_end_out_of_order_leave_nothing_behind(alice: Session) -> None:
    def rows() -> Iterator[int]:
        with bind(alice):
            yield 1

    stream = rows()
    next(stream)
    bob = Session(email="bob")
    with bind(bob):
        assert list(stream) == []
        assert current() == bob
    assert current() is None
