"""Access to the Talos API of machines, through a gRPC server that the control plane runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from ..errors import AuditLogError, InvalidSetting
from ..events import payloads
from ..events.model import Event, EventData, EventType, denied
from .grpc import Behavior, Call, Handler, around, around_aio, values_of
from .request import clean
from .session import is_denied

if TYPE_CHECKING:
    from ..logger import AuditLogger
    from ..storage.layout import Position

TargetFrom = Callable[[Any], tuple[str, str]]
IsAudited = Callable[[str], bool]

_DENIALS = frozenset({grpc.StatusCode.PERMISSION_DENIED.value[0], grpc.StatusCode.UNAUTHENTICATED.value[0]})
_NOT_RECORDED = "the call was not handled: it cannot be recorded in the audit log; try again later"
_LONGEST_MACHINES = 8192  # characters, as many as gRPC takes as metadata unless it is told otherwise

log = logging.getLogger("auditlog")


def target_of(context: Any) -> tuple[str, str]:
    """The cluster and the machines that a call is for, by the metadata of Talos.

    The cluster is what `cluster` says, or else `context`; the machines are all `nodes` and `node`.
    Several values are joined by ",": which of them counts is the server's affair.
    """
    metadata = context.invocation_metadata()
    clusters = values_of(metadata, "cluster") or values_of(metadata, "context")
    machines = values_of(metadata, "nodes") + values_of(metadata, "node")
    return clean(",".join(clusters)), clean(",".join(machines), _LONGEST_MACHINES)


class _Recorder:
    """What the interceptors of both kinds of servers share: which calls are recorded, and how."""

    def __init__(
        self, audit: AuditLogger, *, target_from: TargetFrom = target_of, is_audited: IsAudited | None = None
    ) -> None:
        for name, function in (("target_from", target_from), ("is_audited", is_audited or target_of)):
            if not callable(function) or inspect.iscoroutinefunction(function):
                raise InvalidSetting(name, function, "must be a function, and no coroutine function")
        self.audit = audit
        self._target_from = target_from
        self._is_audited = is_audited

    def _is_recorded(self, method: str) -> bool:
        return self.audit.enabled and (self._is_audited is None or self._is_audited(method))

    def _call_of(self, method: str, context: Any) -> Call:
        cluster_name, machine_ip = self._target_from(context)
        access = payloads.TalosAccess(
            full_method_name=clean(method), cluster_name=cluster_name, machine_ip=machine_ip
        )
        return _Access(context, self.audit, access)


class TalosAccess(_Recorder, grpc.ServerInterceptor):  # type: ignore[type-arg,unused-ignore]
    """Records each call of a grpc.server that passes calls on to the Talos API, before it is handled.

    Put it behind AuditInterceptor, so that the events have a session, and before the interceptor
    that checks roles, so that refused calls are recorded. An interceptor that authenticates in its
    handler, not while the handler is looked for, stands between the two.

    audit: where the `talos_access` events go. A call that cannot be recorded is not handled: it
        ends with UNAVAILABLE, and the reason is logged as an error.
    target_from: gives the name of the cluster and the addresses of the machines, joined by ",",
        that a ServicerContext is for (default: by the metadata of Talos, `target_of`).
    is_audited: says of a method, as in "machine.MachineService/Reboot", whether its calls are
        recorded (default: all are).

    A streaming call has one event, at its start. A call that ends with PERMISSION_DENIED or
    UNAUTHENTICATED has an `access_denied` event as well, whose `audit.intent` is the position of the
    first. Where that cannot be written, an error is logged, and the call remains refused.

    Raises InvalidSetting.
    """

    def intercept_service(self, continuation: Behavior, handler_call_details: Any) -> Handler:
        """Find the handler of a call, as gRPC says."""
        method = handler_call_details.method.removeprefix("/")
        handler = continuation(handler_call_details)
        return around(handler, partial(self._call_of, method)) if self._is_recorded(method) else handler


class AioTalosAccess(_Recorder, grpc.aio.ServerInterceptor):  # type: ignore[type-arg,unused-ignore]
    """TalosAccess for a grpc.aio.server, with the same settings."""

    async def intercept_service(self, continuation: Behavior, handler_call_details: Any) -> Handler:
        """Find the handler of a call, as gRPC says."""
        method = handler_call_details.method.removeprefix("/")
        handler = await continuation(handler_call_details)
        return around_aio(handler, partial(self._call_of, method)) if self._is_recorded(method) else handler


class _Access(Call):
    __slots__ = ("_access", "_audit", "_position")

    def __init__(self, context: Any, audit: AuditLogger, access: payloads.TalosAccess) -> None:
        super().__init__(context if hasattr(context, "code") else _Watched(context))
        self._audit = audit
        self._access = access
        self._position: Position | None = None

    def begin(self) -> None:
        try:
            self._position = self._audit.write(self._event())
        except AuditLogError as error:
            self._refuse(error)
            raise  # where abort does not, as in a plain function in an older grpc.aio

    async def abegin(self) -> None:
        try:
            self._position = await self._audit.awrite(self._event())
        except AuditLogError as error:
            await self._refuse(error)
            raise

    def end(self) -> None:
        if self._is_denied():
            try:
                self._audit.write(self._denial())
            except Exception as error:
                self._log_loss(error)

    async def aend(self) -> None:
        if self._is_denied():
            try:
                await self._audit.awrite(self._denial())
            except Exception as error:
                self._log_loss(error)

    def _event(self) -> Event:
        data = EventData(talos_access=self._access)
        return Event(event_type=EventType.TALOS_ACCESS, event_data=data)

    def _denial(self) -> Event:
        return denied(EventType.TALOS_ACCESS, intent=self._position, talos_access=self._access)

    def _is_denied(self) -> bool:
        """Was the call refused, and nobody further in has recorded that?"""
        code = self.context.code()
        return (
            not is_denied() and getattr(code, "value", (code,))[0] in _DENIALS
        )  # a StatusCode, or its number

    def _refuse(self, error: AuditLogError) -> Any:
        log.error("a call of %s was not handled: %s", self._access.full_method_name, error)
        return self.context.abort(grpc.StatusCode.UNAVAILABLE, _NOT_RECORDED)

    def _log_loss(self, error: Exception) -> None:
        log.error("that a call of %s was refused is not recorded: %s", self._access.full_method_name, error)


class _Watched:
    """The context that grpc.aio gives to plain functions, and the code that they set: it does not tell."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._code: Any = None

    def code(self) -> Any:
        return self._code

    def set_code(self, code: Any) -> None:
        self._code = code
        self._context.set_code(code)

    def abort(self, code: Any, *args: Any, **kwargs: Any) -> None:
        self._code = code
        self._context.abort(code, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)
