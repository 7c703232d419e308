"""A small control plane with an audit log: clusters, machines, a Kubernetes proxy, a Talos route.

    python examples/control_plane/server.py --audit-log-dir /tmp/audit-log

Its state is in memory; what it shows is where a server calls the audit log. Every change is
recorded before it is made, so that no change is ever without its record.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from auditlog import AuditLogger, AuditReader, Event, EventData, InvalidRange, K8sAccess, Session, WriteFailed
from auditlog.capture import current

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


@dataclass(frozen=True)
class Kind:
    """A kind of resource: its type in the audit log, and the name of its details there."""

    resource_type: str
    payload: str


KINDS = {
    "clusters": Kind("Clusters.omni.sidero.dev", "cluster"),
    "machines": Kind("Machines.omni.sidero.dev", "machine"),
}


class Resource(BaseModel):
    """The body of a request that creates or changes a resource."""

    labels: dict[str, str] = {}
    kubernetes_version: str = ""
    talos_version: str = ""
    management_address: str = ""

    def details(self, resource_id: str) -> dict[str, Any]:
        """The fields that were given, as the audit log's details of the resource."""
        return {"id": resource_id, **self.model_dump(exclude_unset=True)}


class ControlPlane:
    """The routes, over resources in memory and one audit log."""

    def __init__(self, audit: AuditLogger, audit_log_dir: str) -> None:
        self.audit = audit
        self.audit_log_dir = audit_log_dir
        self.resources: dict[tuple[str, str], dict[str, Any]] = {}
        self.app = FastAPI(title="example control plane", lifespan=self.lifespan)
        self.app.middleware("http")(self.identify)
        self.app.exception_handler(WriteFailed)(self.no_record_no_action)
        change = [Depends(self.require("Operator", "Admin"))]
        admin = [Depends(self.require("Admin"))]
        routes: list[tuple[str, str, Callable[..., Any], list[Any]]] = [
            ("POST", "/api/{kind}/{resource_id}", self.create, change),
            ("PATCH", "/api/{kind}/{resource_id}", self.update, change),
            ("POST", "/api/{kind}/{resource_id}/teardown", self.teardown, admin),
            ("DELETE", "/api/{kind}/{resource_id}", self.destroy, admin),
            ("POST", "/talos/{cluster}/{machine_ip}/{service}/{method}", self.talos, change),
            ("GET", "/audit-log", self.audit_log, admin),
        ]
        self.app.add_api_route("/readyz", self.ready)
        self.app.add_api_route("/metrics", self.metrics)
        for method, path, handler, dependencies in routes:
            self.app.add_api_route(path, handler, methods=[method], dependencies=dependencies)
        self.app.add_api_route(
            "/k8s/{cluster}/{path:path}",
            self.kubernetes,
            methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            dependencies=[Depends(self.require("Reader", "Operator", "Admin"))],
        )

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> Any:
        """Close the log when the server ends."""
        yield
        self.audit.close()

    # ------------------------------------------------------------------ who is acting

    async def identify(self, request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Bind the session of the request's user to all that the request does."""
        if request.url.path in ("/readyz", "/metrics"):  # asked by machines that have no name
            return await go_on(request)
        user = USERS.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if user is None:
            return JSONResponse({"detail": "who are you?"}, status_code=401)
        session = user.model_copy(
            update={
                "user_agent": request.headers.get("user-agent", ""),
                "ip_address": request.client.host if request.client else "",
            }
        )
        with self.audit.session(session):
            return await go_on(request)

    def require(self, *roles: str) -> Callable[[Request], None]:
        """Let only these roles pass; a denied attempt is recorded, too."""

        def check(request: Request) -> None:
            session = current()
            if session is None or session.role not in roles:
                facts = {"action": f"{request.method} {request.url.path}", "outcome": "denied"}
                data = EventData.model_validate({"audit": facts})
                self.audit.write(Event(event_type="access_denied", event_data=data))
                raise HTTPException(403, f"this takes one of the roles {', '.join(roles)}")

        return check

    async def no_record_no_action(self, _request: Request, error: Exception) -> Response:
        """A change that cannot be recorded is not made."""
        return JSONResponse({"detail": f"nothing was changed: {error}"}, status_code=503)

    # ------------------------------------------------------------------ resources

    def find(self, kind: str, resource_id: str) -> tuple[Kind, dict[str, Any]]:
        """The kind and the resource of a path."""
        resource = self.resources.get((kind, resource_id))
        if kind not in KINDS or resource is None:
            raise HTTPException(404, f"there is no {resource_id} among the {kind}")
        return KINDS[kind], resource

    def create(self, kind: str, resource_id: str, body: Resource) -> dict[str, Any]:
        """Create a resource."""
        if kind not in KINDS:
            raise HTTPException(404, f"there are no {kind} here")
        if (kind, resource_id) in self.resources:
            raise HTTPException(409, f"{resource_id} exists")
        details = body.details(resource_id)
        self.audit.create(KINDS[kind].resource_type, resource_id, **{KINDS[kind].payload: details})
        self.resources[kind, resource_id] = details
        return details

    def update(self, kind: str, resource_id: str, body: Resource, force: bool = False) -> dict[str, Any]:
        """Change a resource; `?force=true` resolves conflicts."""
        found, resource = self.find(kind, resource_id)
        details = resource | body.details(resource_id)
        record = self.audit.update_with_conflicts if force else self.audit.update
        record(found.resource_type, resource_id, **{found.payload: details})
        resource.update(details)
        return details

    def teardown(self, kind: str, resource_id: str) -> dict[str, Any]:
        """Announce that a resource will be destroyed."""
        found, resource = self.find(kind, resource_id)
        self.audit.teardown(found.resource_type, resource_id, **{found.payload: {"id": resource_id}})
        resource["phase"] = "tearing down"
        return resource

    def destroy(self, kind: str, resource_id: str) -> dict[str, Any]:
        """Destroy a resource that was torn down."""
        found, resource = self.find(kind, resource_id)
        if resource.get("phase") != "tearing down":
            raise HTTPException(409, f"{resource_id} must be torn down first")
        self.audit.destroy(found.resource_type, resource_id, **{found.payload: {"id": resource_id}})
        return self.resources.pop((kind, resource_id))

    # ------------------------------------------------------------------ access to clusters

    async def kubernetes(self, request: Request, cluster: str, path: str) -> dict[str, Any]:
        """Pass a request on to a cluster's Kubernetes API; what reads only is not recorded."""
        self.find("clusters", cluster)
        if request.method != "GET":
            body = await request.body()
            access = K8sAccess(
                full_method_name=f"{request.method} /{path}",
                command=request.headers.get("kubectl-command", ""),
                kube_session=request.headers.get("kubectl-session", ""),
                body=body.decode(errors="replace"),
                cluster_name=cluster,
                cluster_uuid=f"uuid-of-{cluster}",
            )
            # The disk may take its time; the event loop goes on meanwhile.
            await self.audit.awrite(Event(event_type="k8s_access", event_data=EventData(k8s_access=access)))
        return {"kind": "Status", "status": "Success", "path": f"/{path}"}

    def talos(self, cluster: str, machine_ip: str, service: str, method: str) -> dict[str, Any]:
        """Call a Talos API method of a machine."""
        self.find("clusters", cluster)
        self.audit.talos_access(
            full_method_name=f"{service}/{method}", cluster_name=cluster, machine_ip=machine_ip
        )
        return {"messages": [{"metadata": {"hostname": machine_ip}}]}

    # ------------------------------------------------------------------ the audit log itself

    def ready(self) -> Response:
        """Whether a change could be recorded now."""
        problem = self.audit.check()
        return PlainTextResponse(problem or "ready", status_code=503 if problem else 200)

    def metrics(self) -> Response:
        """Figures of the audit log for Prometheus."""
        return PlainTextResponse(self.audit.stats().prometheus())

    def audit_log(self, start: str | None = None, end: str | None = None) -> Response:
        """Stream the stored lines of a range of days (YYYY-MM-DD). The read is recorded, too."""
        if not self.audit.enabled:
            raise HTTPException(404, "the audit log is disabled: start with --audit-log-dir")
        try:
            entries = AuditReader(self.audit_log_dir).read(start, end)
        except InvalidRange as error:
            raise HTTPException(400, str(error)) from None
        access = {"start": start or "", "end": end or ""}
        self.audit.write(
            Event(
                event_type="audit_log_access",
                event_data=EventData.model_validate({"audit_log_access": access}),
            )
        )
        lines: Iterator[bytes] = (entry.line for entry in entries)
        return StreamingResponse(lines, media_type="application/jsonl")


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="An example control plane with an audit log.")
    parser.add_argument("--audit-log-dir", default="", help="where the audit log is kept; empty: nowhere")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    audit = AuditLogger(options.audit_log_dir)
    plane = ControlPlane(audit, options.audit_log_dir)
    uvicorn.run(plane.app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
