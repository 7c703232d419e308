from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import fastapi
import litestar
import litestar.exceptions
import pytest
from starlette.responses import Response

from auditlog import AccessDenied, Session, WriteFailed
from auditlog.capture import identify
from auditlog.capture.asgi import (
    App,
    AuditMiddleware,
    DenialRecorder,
    Message,
    Receive,
    Scope,
    Send,
)
from auditlog.capture.kubernetes import KubernetesAccess
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.asgi.helpers import (
    SITES,
    Serve,
    Watch,
    aio_client,
    answer,
    client,
    litestar_site,
    sessions,
)


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
