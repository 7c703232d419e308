"""A small control plane with an audit log: clusters, machines, a Kubernetes proxy, a Talos API.

    python -m examples.control_plane.server --audit-log-dir /tmp/audit-log

Its state is in memory. No handler writes an event: a middleware knows who makes a request, the
wrapper around the store records changes, and one around each API records access.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from auditlog import AccessDenied, AuditLogger, InvalidRange, Session, WriteFailed
from auditlog.capture import current, omni
from auditlog.capture.asgi import AuditMiddleware, DenialRecorder, Scope
from auditlog.capture.grpc import AioAuditInterceptor
from auditlog.capture.kubernetes import KubernetesAccess
from auditlog.capture.store import AuditedStore
from auditlog.capture.talos import AioTalosAccess
from auditlog.forward import load_destinations
from examples.control_plane.store import Conflict, Missing, Resource, ResourceStore, merged

# A real server asks its identity provider; these tokens stand for three people at their desks.
USERS = {
    "alice-token": Session(
        user_id="8a1c6d1e", email="alice@example.com", role="Admin", fingerprint="0263efb13f3b5016"
    ),
    "oscar-token": Session(
        user_id="1f0be7a2", email="oscar@example.com", role="Operator", fingerprint="917e47635eb900d0"
    ),
    "rita-token": Session(
        user_id="c55d20b9", email="rita@example.com", role="Reader", fingerprint="5b7e1c0a44f2d9e8"
    ),
}
TYPES = {"clusters": "Clusters.omni.sidero.dev", "machines": "Machines.omni.sidero.dev"}
CHANGE, ADMIN = ("Operator", "Admin"), ("Admin",)


def user_of(authorization: str) -> Session | None:
    """The user who has a token."""
    return USERS.get(authorization.removeprefix("Bearer "))


def requester(scope: Scope) -> Session | None:
    """The user who makes an HTTP request."""
    headers = dict(scope["headers"])
    return user_of(headers.get(b"authorization", b"").decode("latin-1"))


def caller(context: grpc.aio.ServicerContext[Any, Any]) -> Session | None:
    """The user who makes a gRPC call."""
    metadata = dict(context.invocation_metadata() or ())
    return user_of(str(metadata.get("authorization", "")))


def require(*roles: str) -> Any:
    """Let only these roles pass; without any, everybody who is known."""

    def check() -> None:
        session = current()
        if session is None or not session.role:
            raise HTTPException(401, "who are you?")
        if roles and session.role not in roles:
            raise HTTPException(403, f"this takes one of the roles {', '.join(roles)}")

    return Depends(check)


class Wanted(BaseModel):
    """The body of a request that creates or changes a resource."""

    labels: dict[str, str] = {}
    kubernetes_version: str = ""
    talos_version: str = ""
    management_address: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump(exclude={"labels"}, exclude_unset=True)


class ControlPlane:
    """The routes, over one store and one audit log."""

    def __init__(self, audit: AuditLogger, talos_address: str = "127.0.0.1:0") -> None:
        self.audit = audit
        # An intent is on the disk before each change: none is ever made without a record.
        self.store = AuditedStore(ResourceStore(), audit, omni.hooks(before=True, diff=True))
        self.talos_address = talos_address
        self.talos_port = 0
        self.app = FastAPI(title="example control plane", lifespan=self.lifespan)
        self.app.add_middleware(DenialRecorder, audit=audit)
        self.app.add_middleware(AuditMiddleware, session_from=requester)
        for error, status in ((WriteFailed, 503), (Missing, 404), (Conflict, 409), (InvalidRange, 400)):
            self.app.add_exception_handler(error, answer(status))
        self.app.add_exception_handler(AccessDenied, answer(403))
        routes: list[tuple[str, str, Callable[..., Any], list[Any]]] = [
            ("GET", "/readyz", self.ready, []),
            ("GET", "/metrics", self.metrics, []),
            ("POST", "/api/{kind}/{resource_id}", self.create, [require(*CHANGE)]),
            ("PATCH", "/api/{kind}/{resource_id}", self.update, [require(*CHANGE)]),
            ("POST", "/api/{kind}/{resource_id}/teardown", self.teardown, [require(*ADMIN)]),
            ("DELETE", "/api/{kind}/{resource_id}", self.destroy, [require(*ADMIN)]),
            ("GET", "/audit-log", self.audit_log, [require()]),
        ]
        for method, path, handler, dependencies in routes:
            self.app.add_api_route(path, handler, methods=[method], dependencies=dependencies)
        self.app.mount("/k8s/{cluster}", KubernetesAccess(self.proxy(), audit, cluster_from=cluster_of))

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> Any:
        """Serve the Talos API beside HTTP, and close the log when the server ends."""
        interceptors = [AioAuditInterceptor(session_from=caller), AioTalosAccess(self.audit)]
        talos = grpc.aio.server(interceptors=interceptors)
        reboot = grpc.unary_unary_rpc_method_handler(self.reboot, bytes, bytes)
        service = grpc.method_handlers_generic_handler("machine.MachineService", {"Reboot": reboot})
        talos.add_generic_rpc_handlers((service,))
        self.talos_port = talos.add_insecure_port(self.talos_address)
        await talos.start()
        yield
        await talos.stop(grace=1)
        self.audit.close()

    # ------------------------------------------------------------------ resources

    def create(self, kind: str, resource_id: str, wanted: Wanted) -> Any:
        """Create a resource."""
        return self.store.create(Resource(type_of(kind), resource_id, wanted.labels, wanted.spec))

    def update(self, kind: str, resource_id: str, wanted: Wanted, force: bool = False) -> Any:
        """Change a resource; `?force=true` resolves conflicts."""

        def change(resource: Resource) -> Resource:
            return merged(resource, wanted.labels, wanted.spec)

        if force:
            return self.store.update_with_conflicts(type_of(kind), resource_id, change)
        return self.store.update(change(self.store.get(type_of(kind), resource_id)))

    def teardown(self, kind: str, resource_id: str) -> Any:
        """Announce that a resource will be destroyed."""
        return self.store.teardown(type_of(kind), resource_id)

    def destroy(self, kind: str, resource_id: str) -> Any:
        """Destroy a resource that was torn down."""
        return self.store.destroy(type_of(kind), resource_id)

    # ------------------------------------------------------------------ access to clusters

    def proxy(self) -> FastAPI:
        """Passes requests on to a cluster's Kubernetes API, or would."""
        proxy = FastAPI()
        proxy.add_exception_handler(Missing, answer(404))

        @proxy.api_route(
            "/{path:path}",
            methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            dependencies=[require("Reader", *CHANGE)],
        )
        def pass_on(request: Request, path: str) -> dict[str, Any]:
            self.store.get(TYPES["clusters"], request.path_params["cluster"])
            return {"kind": "Status", "status": "Success", "path": f"/{path}"}

        return proxy

    async def reboot(self, _request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """Reboot a machine, or would."""
        session = current()
        if session is None or session.role not in CHANGE:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "rebooting takes an Operator")
        return b"rebooting"

    # ------------------------------------------------------------------ the audit log itself

    def ready(self) -> Response:
        """Whether a change could be recorded now."""
        problem = self.audit.check()
        return PlainTextResponse(problem or "ready", status_code=503 if problem else 200)

    def metrics(self) -> Response:
        """Figures of the audit log for Prometheus."""
        return PlainTextResponse(self.audit.stats().prometheus())

    def audit_log(self, start: str | None = None, end: str | None = None) -> Response:
        """Stream the stored lines of a range of days (YYYY-MM-DD)."""
        if not self.audit.enabled:
            raise HTTPException(404, "the audit log is disabled: start with --audit-log-dir")
        entries = self.audit.reader_for(current()).read(start, end)
        lines: Iterator[bytes] = (entry.line for entry in entries)
        return StreamingResponse(lines, media_type="application/jsonl")


def type_of(kind: str) -> str:
    """The resource type of a path."""
    if kind not in TYPES:
        raise Missing(f"there are no {kind} here")
    return TYPES[kind]


def cluster_of(scope: Scope) -> tuple[str, str]:
    """The name and UUID of the cluster that a request to the proxy is for."""
    name = scope["path_params"]["cluster"]
    return name, f"uuid-of-{name}"


def answer(status: int) -> Callable[[Request, Exception], Response]:
    """Answer a request that failed with a status and what the error says."""
    return lambda _request, error: JSONResponse({"detail": str(error)}, status_code=status)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="An example control plane with an audit log.")
    parser.add_argument("--audit-log-dir", default="", help="where the audit log is kept; empty: nowhere")
    parser.add_argument("--forward", default="", help="a YAML file of destinations; empty: none")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--talos-port", type=int, default=50000)
    options = parser.parse_args()
    destinations = load_destinations(options.forward) if options.forward else []
    audit = AuditLogger(options.audit_log_dir, forward=destinations)
    plane = ControlPlane(audit, f"{options.host}:{options.talos_port}")
    uvicorn.run(plane.app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
