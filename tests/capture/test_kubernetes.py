from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fastapi
import httpx
import litestar
import orjson
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount

from auditlog import AuditLogger, Session, WriteFailed
from auditlog.capture.asgi import App, AuditMiddleware, Message, Receive, Scope, Send
from auditlog.capture.kubernetes import KubernetesAccess, is_audited
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.helpers import records, serve_asgi, snippet
from tests.conftest import ROOT

VECTORS = orjson.loads((ROOT / "tests" / "vectors" / "omni.json").read_bytes())
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@pytest.fixture
def websockets() -> None:
    pytest.importorskip("websockets", reason="uvicorn needs it for WebSockets")


def cluster(scope: Scope) -> tuple[str, str]:
    return "talos-default", "8f4d1c2e"


def client(address: str, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=address, **options)


class Cluster:
    """The app that passes requests on: it looks into the log before it answers."""

    def __init__(self, log: RecordedLog | None = None, status: int = 201) -> None:
        self.log = log
        self.status = status
        self.requests: list[tuple[str, int]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests.append((scope["path"], len(self.log.records) if self.log else -1))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"from the cluster"})


def methods(log: RecordedLog) -> list[str]:
    return [record["event_data"]["k8s_access"]["full_method_name"] for record in log.records]


@pytest.mark.parametrize(("method", "path", "query", "audited"), VECTORS["k8s_rules"])
def test_the_rules_are_those_of_omni(method: str, path: str, query: str, audited: bool) -> None:
    assert is_audited(method, path, query) is audited


@pytest.mark.parametrize(
    ("method", "path", "query", "audited"),
    [
        ("GET", "/api/v1/namespaces/x/pods/y/exec", "command=sh", True),
        ("POST", "/api/v1/namespaces/x/pods/y/exec", "command=sh&dryRun=All", True),
        ("POST", "/api/v1/namespaces/x/pods/y/attach/", "dryRun=All", True),
        ("GET", "/api/v1/namespaces/x/pods/y/portforward", "", True),
        ("GET", "/api/v1/namespaces/services/pods/proxy/exec", "", True),
        ("POST", "/api/v1/namespaces/x/services/y/proxy/admin/delete", "dryRun=All", True),
        ("DELETE", "/api/v1/nodes/y/proxy/run", "dryRun=All", True),
        ("GET", "/api/v1/namespaces/x/services/y/proxy/metrics", "", False),
        ("GET", "/api/v1/namespaces/x/pods/exec", "", False),
        ("POST", "/api/v1/namespaces/exec/pods", "dryRun=All", False),
    ],
)
def test_no_way_into_a_pod_is_taken_for_a_read_or_a_dry_run(
    method: str, path: str, query: str, audited: bool
) -> None:
    assert is_audited(method, path, query) is audited


def test_a_request_is_recorded_by_the_rules_of_omni(log: RecordedLog) -> None:
    expected = []
    app = Cluster()
    with (
        serve_asgi(KubernetesAccess(app, log.audit, cluster_from=cluster)) as address,
        client(address) as http,
    ):
        for method, path, query, audited in VECTORS["k8s_rules"]:
            url = f"{path}?{query}" if query else path
            assert http.request(method, url).status_code == 201
            if audited:
                expected.append(f"{method} {url}")
    assert methods(log) == expected
    assert len(app.requests) == len(VECTORS["k8s_rules"])


@pytest.mark.parametrize(
    "query",
    [
        "dryRun=All&dryRun=None",
        "dryRun=All&dryRun=",
        "dryRun=All&dryRun",
        "dryRun=all",
        "dryrun=All",
        "dryRun=All,None",
        "dryRun=All;dryRun=None",
        "x=dryRun=All",
        "dryRun=All%20",
        "dryRun=All%00",
        "dryRun=All\x1b",
    ],
)
def test_what_may_be_no_dry_run_is_recorded(query: str) -> None:
    assert is_audited("POST", "/api/v1/namespaces", query)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", REVIEWS),
        ("post", REVIEWS),
        ("get", "/api/v1/pods"),
        ("POST", REVIEWS + "/x"),
        ("POST", "/" + REVIEWS),
        ("POST", REVIEWS.upper()),
        ("POST", "/k8s" + REVIEWS),
        ("POST", "/api/.." + REVIEWS),
        ("CONNECT", "/api/v1/namespaces/x/pods/y/exec"),
        ("", ""),
    ],
)
def test_what_resembles_an_exception_is_recorded(method: str, path: str) -> None:
    assert is_audited(method, path, "")


def test_the_event_is_there_before_the_request_is_passed_on(log: RecordedLog) -> None:
    app = Cluster(log)
    access = AuditMiddleware(
        KubernetesAccess(app, log.audit, cluster_from=cluster),
        session_from=lambda scope: Session(email="alice"),
    )
    headers = {
        "Kubectl-Command": "kubectl create",
        "Kubectl-Session": "9c0b\x1b",
        "X-Request-ID": "r-1",
        "User-Agent": "kubectl/1.30",
    }
    with serve_asgi(access) as address, client(address, headers=headers) as http:
        http.get("/api/v1/pods")
        http.post("/api/v1/namespaces?fieldManager=kubectl", content=b"a body")
    assert app.requests == [("/api/v1/pods", 0), ("/api/v1/namespaces", 1)]
    (record,) = log.records
    assert record["event_type"] == "k8s_access"
    assert record["event_data"] == {
        "k8s_access": {
            "full_method_name": "POST /api/v1/namespaces?fieldManager=kubectl",
            "command": "kubectl create",
            "kube_session": "9c0b\ufffd",
            "cluster_name": "talos-default",
            "cluster_uuid": "8f4d1c2e",
        },
        "audit": {"request_id": "r-1"},
        "session": {"user_agent": "kubectl/1.30", "ip_address": "127.0.0.1", "email": "alice"},
    }


def test_what_a_client_writes_is_cleaned_and_bounded(log: RecordedLog) -> None:
    headers: Any = {"Kubectl-Command": b"kubectl \x1b[31m" + b"x" * 10_000}
    app = KubernetesAccess(Cluster(), log.audit, cluster_from=cluster)
    with serve_asgi(app) as address, client(address, headers=headers) as http:
        http.delete("/api/%1b%5b31m%00%0a?" + "q" * 10_000 + "&command=rm")
        http.delete("/api/%ff%e2%80%a8")
    first, second = (record["event_data"]["k8s_access"] for record in log.records)
    assert first["full_method_name"].startswith("DELETE /api/\ufffd[31m\ufffd\ufffd?qqq")
    assert first["full_method_name"].endswith("qqq&command=rm")  # nobody hides it behind a long query
    assert first["command"].startswith("kubectl \ufffd[31mxxx")
    assert len(first["command"]) == 512
    assert second["full_method_name"] == "DELETE /api/\ufffd\ufffd"


def test_a_body_is_streamed_through_untouched(log: RecordedLog) -> None:
    began = threading.Event()
    passed: list[Any] = []
    digest, sent = hashlib.sha256(), hashlib.sha256()
    chunks = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.extend((scope, receive))
        while True:
            message = await receive()
            began.set()
            digest.update(message["body"])
            chunks.append(len(message["body"]))
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})

    access = KubernetesAccess(app, log.audit, cluster_from=cluster)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await access(scope, receive, send)
        assert passed[0] is scope
        assert passed[1] is receive
        passed.append("the same")

    def body() -> Iterator[bytes]:
        for number in range(200):
            chunk = bytes([number]) * 100_000
            sent.update(chunk)
            yield chunk
            if number == 0:
                assert began.wait(30)  # the app has it before the rest is sent

    with serve_asgi(server) as address, client(address) as http:
        assert http.post("/api/v1/namespaces", content=body()).status_code == 201
    assert passed[2] == "the same"
    assert digest.digest() == sent.digest()
    assert sum(chunks) == 20_000_000
    assert max(chunks) < 1_000_000
    assert "body" not in log.records[0]["event_data"]["k8s_access"]


def mounted_in_fastapi(access: App) -> App:
    app = fastapi.FastAPI()
    app.mount("/k8s", access)
    return app


def mounted_in_starlette(access: App) -> App:
    return Starlette(routes=[Mount("/k8s", app=access)])


def mounted_twice(access: App) -> App:
    return Starlette(routes=[Mount("/k8s", routes=[Mount("/talos-default", app=access)])])


def mounted_in_litestar(access: App) -> Any:
    async def k8s(scope: Any, receive: Any, send: Any) -> None:
        await access(scope, receive, send)

    return litestar.Litestar(
        [litestar.asgi("/k8s", is_mount=True, copy_scope=True)(k8s)], openapi_config=None
    )


@pytest.mark.parametrize(
    ("mounted", "prefix", "end"),
    [
        (mounted_in_fastapi, "/k8s", ""),
        (mounted_in_starlette, "/k8s", ""),
        (mounted_twice, "/k8s/talos-default", ""),
        (mounted_in_litestar, "/k8s", "/"),
    ],
)
@pytest.mark.parametrize("root", ["", "/site"])
def test_a_mounted_proxy_records_the_path_of_the_kubernetes_api(
    log: RecordedLog, mounted: Callable[[App], App], prefix: str, end: str, root: str
) -> None:
    app = Cluster()
    site = mounted(KubernetesAccess(app, log.audit, cluster_from=cluster))
    with serve_asgi(site, root_path=root) as address, client(address) as http:
        for method, path in (
            ("POST", "/api/v1/namespaces"),
            ("POST", REVIEWS),
            ("GET", "/api"),
            ("PUT", "/k8s/k8s"),
        ):
            assert http.request(method, prefix + path).status_code == 201
    assert methods(log) == [f"POST /api/v1/namespaces{end}", f"PUT /k8s/k8s{end}"]
    assert len(app.requests) == 4


@pytest.mark.parametrize(
    ("root", "path", "recorded"),
    [
        ("", "/api/v1", "/api/v1"),
        ("/k8s", "/k8s/api/v1", "/api/v1"),
        ("/k8s/", "/k8s/api/v1", "/api/v1"),
        ("/k8s", "/k8s", "/"),
        ("/k8s", "/k8s/k8s", "/k8s"),
        ("/k8s", "/api/v1", "/api/v1"),
        ("/api", "/apis/apps", "/apis/apps"),
    ],
)
def test_only_the_whole_root_path_is_left_out(log: RecordedLog, root: str, path: str, recorded: str) -> None:
    access = KubernetesAccess(Cluster(), log.audit, cluster_from=cluster)
    scope = {"type": "http", "method": "PUT", "path": path, "root_path": root, "headers": []}

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        pass

    asyncio.run(access(scope, receive, send))
    assert methods(log) == [f"PUT {recorded}"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_denied_answer_gives_a_second_event_that_names_the_first(log: RecordedLog, status: int) -> None:
    app = Cluster(log, status)
    answers = []

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Message) -> None:
            answers.append(len(log.records))
            await send(message)

        await KubernetesAccess(app, log.audit, cluster_from=cluster)(scope, receive, watch)

    with serve_asgi(noted) as address, client(address) as http:
        assert http.delete("/api/v1/namespaces/x").text == "from the cluster"
    assert app.requests == [("/api/v1/namespaces/x", 1)]
    assert answers == [2, 2]
    access, denial = (entry.record for entry in log.entries)
    assert denial["event_type"] == "access_denied"
    facts = {"action": "k8s_access", "outcome": "denied", "intent": str(log.entries[0].position)}
    assert denial["event_data"]["audit"] == facts
    assert denial["event_data"]["k8s_access"] == access["event_data"]["k8s_access"]


def test_other_answers_give_no_second_event(log: RecordedLog) -> None:
    app = Cluster()
    access = KubernetesAccess(app, log.audit, cluster_from=cluster)
    with serve_asgi(access) as address, client(address) as http:
        for app.status in (200, 302, 404, 409, 422, 500):
            assert http.delete("/api").status_code == app.status
    assert methods(log) == ["DELETE /api"] * 6


@pytest.mark.usefixtures("websockets")
@pytest.mark.parametrize("accepted", [True, False])
def test_a_websocket_is_recorded(log: RecordedLog, accepted: bool) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(len(log.records))
        assert (await receive())["type"] == "websocket.connect"
        if accepted:
            await send({"type": "websocket.accept", "subprotocol": "v5.channel.k8s.io"})
            await send({"type": "websocket.send", "bytes": b"\x01file"})
        await send({"type": "websocket.close", "code": 1000})

    async def run(address: str) -> None:
        async with aiohttp.ClientSession(address) as http:
            path = "/api/v1/namespaces/x/pods/y/exec?command=ls&stdout=true"
            async with http.ws_connect(path, protocols=["v5.channel.k8s.io"]) as websocket:
                assert websocket.protocol == "v5.channel.k8s.io"
                assert await websocket.receive_bytes() == b"\x01file"

    with serve_asgi(KubernetesAccess(app, log.audit, cluster_from=cluster)) as address:
        if accepted:
            asyncio.run(run(address))
        else:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                asyncio.run(run(address))
    assert seen == [1]
    assert methods(log)[0] == "GET /api/v1/namespaces/x/pods/y/exec?command=ls&stdout=true"
    assert [record["event_type"] for record in log.records][1:] == ([] if accepted else ["access_denied"])


def test_own_rules_take_the_place_of_omnis(log: RecordedLog) -> None:
    asked = []

    def secrets_only(method: str, path: str, query: str) -> bool:
        asked.append((method, path, query))
        return path.endswith("/secrets")

    access = KubernetesAccess(Cluster(), log.audit, cluster_from=cluster, is_audited=secrets_only)
    with serve_asgi(mounted_in_starlette(access)) as address, client(address) as http:
        http.get("/k8s/api/v1/secrets?watch=1&x=%20")
        http.post("/k8s/api/v1/namespaces")
    assert asked == [("GET", "/api/v1/secrets", "watch=1&x=%20"), ("POST", "/api/v1/namespaces", "")]
    assert methods(log) == ["GET /api/v1/secrets?watch=1&x=%20"]


def test_a_disabled_log_passes_everything_on() -> None:
    def never(scope: Scope) -> tuple[str, str]:
        raise AssertionError

    app = Cluster()
    with serve_asgi(KubernetesAccess(app, AuditLogger(None), cluster_from=never)) as address:
        assert httpx.post(f"{address}/api/v1/namespaces").status_code == 201
    assert len(app.requests) == 1


def test_the_lifespan_is_passed_on_as_it_is(log: RecordedLog) -> None:
    state = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        state.append(scope["type"])
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                assert (await receive())["type"] == f"lifespan.{kind}"
                await send({"type": f"lifespan.{kind}.complete"})

    with serve_asgi(KubernetesAccess(app, log.audit, cluster_from=cluster), lifespan="on"):
        pass
    assert state == ["lifespan"]
    assert log.records == []


def test_a_request_that_cannot_be_recorded_is_not_passed_on() -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:
        cluster_app = Cluster()
        access = KubernetesAccess(cluster_app, log.audit, cluster_from=cluster)
        app = fastapi.FastAPI()
        app.mount("/k8s", access)

        @app.exception_handler(WriteFailed)
        async def unavailable(request: Any, error: WriteFailed) -> Response:
            return Response("the audit log is unavailable", status_code=503)

        with serve_asgi(app) as address, client(address) as http:
            files.fail("write")
            refused = http.post("/k8s/api/v1/namespaces")
            assert (refused.status_code, refused.text) == (503, "the audit log is unavailable")
            assert http.get("/k8s/api/v1/namespaces").status_code == 201  # nothing is to be recorded
            assert len(cluster_app.requests) == 1
            files.heal()
            assert http.post("/k8s/api/v1/namespaces").status_code == 201
        assert methods(log) == ["POST /api/v1/namespaces"]


def test_a_denial_that_cannot_be_recorded_does_not_go_out() -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:

        async def denies(scope: Scope, receive: Receive, send: Send) -> None:
            files.fail("write")
            await Cluster(status=403)(scope, receive, send)

        app = KubernetesAccess(denies, log.audit, cluster_from=cluster)
        with serve_asgi(app, log_level="critical") as address:
            answer = httpx.post(f"{address}/api/v1/namespaces")
        files.heal()
        assert answer.status_code == 500
        assert "from the cluster" not in answer.text
        assert methods(log) == ["POST /api/v1/namespaces"]


def test_dropped_events_leave_the_proxy_working() -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure={"k8s_access": "drop", "access_denied": "drop"}) as log:
        files.fail("write")
        app = KubernetesAccess(Cluster(status=403), log.audit, cluster_from=cluster)
        with serve_asgi(app) as address:
            assert httpx.post(f"{address}/api/v1/namespaces").status_code == 403
        files.heal()


def test_a_cluster_that_is_not_known_keeps_the_request_from_being_passed_on(log: RecordedLog) -> None:
    def unknown(scope: Scope) -> tuple[str, str]:
        raise fastapi.HTTPException(404, "no such cluster")

    cluster_app = Cluster()
    access = KubernetesAccess(cluster_app, log.audit, cluster_from=unknown)
    with serve_asgi(mounted_in_fastapi(access)) as address:
        assert httpx.post(f"{address}/k8s/api/v1/namespaces").status_code == 404
    assert cluster_app.requests == []
    assert log.records == []


def test_the_documented_program_records_actor_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("Kubernetes access")
    transport = httpx.HTTPTransport(local_address="127.0.0.7")
    with names["audit"], serve_asgi(names["app"]) as address, client(address, transport=transport) as http:
        assert http.post("/k8s/api/v1/namespaces").status_code == 201
    (record,) = records(tmp_path / "audit-log")
    assert record["event_data"]["k8s_access"]["full_method_name"] == "POST /api/v1/namespaces"
    assert record["event_data"]["k8s_access"]["cluster_name"] == "talos-default"
    assert record["event_data"]["session"]["email"] == "alice@example.com"
    assert record["event_data"]["session"]["ip_address"] == "127.0.0.7"
