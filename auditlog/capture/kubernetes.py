"""Access to the Kubernetes API of clusters, through a proxy that the control plane runs."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from ..events.model import Event, EventData, EventType, denied
from ..events.payloads import K8sAccess
from .asgi import App, Receive, Scope, Send, header_values, on_denial
from .request import clean, first, text_of

if TYPE_CHECKING:
    from ..logger import AuditLogger

ClusterFrom = Callable[[Scope], tuple[str, str] | Awaitable[tuple[str, str]]]
IsAudited = Callable[[str, str, str], bool]

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_ASKS_WHAT_IS_ALLOWED = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
# Ahead only: one may begin within another, in a namespace called "services".
_ways = re.compile(r"(?=/(?:pods|services|nodes)/[^/]+/(exec|attach|portforward|proxy)(?:/|$))")
_LONGEST_METHOD = 64 << 10  # characters of method, path and query: no server takes more


def is_audited(method: str, path: str, query: str) -> bool:
    """Is a request recorded, by the rules of Omni?

    Not recorded is what changes nothing: GET, HEAD and OPTIONS, a dry run, and the question of
    kubectl what its user may do. Beyond those rules, what opens a way into a pod (exec, attach, portforward)
    is recorded whatever its method, and for no way through a proxy a dry run counts: the API server
    does not look at `dryRun` there. `path` is that of the Kubernetes API, `query` the raw query.
    """
    ways = set(_ways.findall(path))
    if ways - {"proxy"}:
        return True
    if method in _READS:
        return False
    # All values must say so: what the API server makes of two that differ is its own affair.
    if not ways and set(parse_qs(query, keep_blank_values=True).get("dryRun", ())) == {"All"}:
        return False
    return not (method == "POST" and path.removesuffix("/") == _ASKS_WHAT_IS_ALLOWED)


class KubernetesAccess:
    """Records each request to a Kubernetes API before the proxy app passes it on.

    app: the ASGI application that passes requests on. Put AuditMiddleware around it, so that the
        events have a session.
    audit: where the `k8s_access` events go. A request that cannot be recorded is not passed on:
        what AuditLogger.write raises goes to whoever calls this (a mounted app: to the exception
        handlers of the one around it).
    cluster_from: gives the name and the UUID of the cluster that an ASGI scope is for; a function, or a
        coroutine function.
    is_audited: says of a method, path and raw query whether the request is recorded (default: the
        rules of Omni, `is_audited`). A WebSocket (`kubectl exec` and `port-forward` are some)
        always is.

    The event holds method, path and query, and the headers Kubectl-Command and Kubectl-Session;
    the body is not read. A request that the app answers with 401 or 403 has an `access_denied`
    event as well, whose `audit.intent` is the position of the first.
    """

    def __init__(
        self, app: App, audit: AuditLogger, *, cluster_from: ClusterFrom, is_audited: IsAudited = is_audited
    ) -> None:
        self.app = app
        self.audit = audit
        self._cluster_from = cluster_from
        self._is_audited = is_audited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI says."""
        if scope["type"] not in ("http", "websocket") or not self.audit.enabled:
            await self.app(scope, receive, send)
            return
        method = scope.get("method", "GET")
        path = path_of(scope)
        query = text_of(scope.get("query_string", b""))
        if scope["type"] == "http" and not self._is_audited(method, path, query):
            await self.app(scope, receive, send)
            return
        cluster = self._cluster_from(scope)
        cluster_name, cluster_uuid = await cluster if isinstance(cluster, Awaitable) else cluster
        header = partial(header_values, scope)
        access = K8sAccess(
            full_method_name=clean(f"{method} {path}{'?' if query else ''}{query}", _LONGEST_METHOD),
            command=first(header, "kubectl-command"),
            kube_session=first(header, "kubectl-session"),
            cluster_name=cluster_name,
            cluster_uuid=cluster_uuid,
        )
        data = EventData(k8s_access=access)
        position = await self.audit.awrite(Event(event_type=EventType.K8S_ACCESS, event_data=data))

        async def record_denial() -> None:
            await self.audit.awrite(denied(EventType.K8S_ACCESS, intent=position, k8s_access=access))

        await self.app(scope, receive, on_denial(send, record_denial))


def path_of(scope: Scope) -> str:
    """The path of a request below the place where the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    below = path.removeprefix(root) or "/"
    return below if below.startswith("/") else path
