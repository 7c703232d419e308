"""What happened, and who did it: the models of an event."""

from __future__ import annotations

from enum import StrEnum
from typing import get_args

from pydantic import Field

from .payloads import (
    AccessPolicy,
    AuditFacts,
    AuditLogAccess,
    Cluster,
    ConfigPatch,
    K8sAccess,
    Machine,
    MachineConfigDiff,
    MachineLabels,
    MachineSet,
    MachineSetNode,
    MigrationError,
    Model,
    NewUser,
    TalosAccess,
)


class EventType(StrEnum):
    """The event types that Omni and this package write; any `[a-z][a-z0-9_]*` may be written."""

    CREATE = "create"
    UPDATE = "update"
    UPDATE_WITH_CONFLICTS = "update_with_conflicts"
    DESTROY = "destroy"
    TEARDOWN = "teardown"
    K8S_ACCESS = "k8s_access"
    TALOS_ACCESS = "talos_access"
    AUDIT_LOG_ACCESS = "audit_log_access"
    ACCESS_DENIED = "access_denied"
    INTENT = "intent"
    GAP = "gap"


class Session(Model):
    """Who acted. Every field is optional; an internal action has only a user agent.

    `email` is the actor. `public_key_expiration` is in seconds since the epoch.
    """

    user_agent: str = ""
    ip_address: str = ""
    user_id: str = ""
    role: str = ""
    email: str = ""
    fingerprint: str = ""
    confirmation_type: str | int = ""
    public_key_expiration: int = 0


class EventData(Model):
    """The details of an event: typed payloads, the session, and any other field as it is.

    A field that is no payload is the user's own resource data, kept in `model_extra`.
    `session=None` means "whoever is bound when the event is written".
    """

    new_user: NewUser | None = None
    machine: Machine | None = None
    machine_labels: MachineLabels | None = None
    access_policy: AccessPolicy | None = None
    cluster: Cluster | None = None
    machine_set: MachineSet | None = None
    machine_set_node: MachineSetNode | None = None
    config_patch: ConfigPatch | None = None
    machine_config_diff: MachineConfigDiff | None = None
    talos_access: TalosAccess | None = None
    k8s_access: K8sAccess | None = None
    audit_log_access: AuditLogAccess | None = None
    migration_error: MigrationError | None = None
    audit: AuditFacts | None = None
    session: Session | None = None


PAYLOADS: dict[str, type[Model]] = {
    name: get_args(field.annotation)[0] for name, field in EventData.model_fields.items() if name != "session"
}
"""The model of each known field of `event_data`, in the order in which a line has them."""


class Event(Model):
    """One thing that happened: one line of the log.

    `event_ts` is in milliseconds since the epoch; 0 means "assigned by the writer".
    """

    event_type: str
    resource_type: str = ""
    resource_id: str = ""
    event_ts: int = 0
    event_data: EventData = Field(default_factory=EventData)


def denied(
    action: str, *, resource_type: str = "", resource_id: str = "", intent: object = None, **details: object
) -> Event:
    """The event of an attempt that was refused, an `access_denied`, for AuditLogger.write or awrite.

    It is a type of its own, so that whoever looks for what happened does not find what did not.
    action: what was attempted: an event type, or a method and path. intent: the position of the
    event that was written before it was refused. details: as in AuditLogger.create.

    Raises InvalidEvent where a field has a wrong type.
    """
    facts = AuditFacts(action=action, outcome="denied", intent="" if intent is None else str(intent))
    return Event(
        event_type=EventType.ACCESS_DENIED,
        resource_type=resource_type,
        resource_id=resource_id,
        event_data=EventData(**{**details, "audit": facts}),  # type: ignore[arg-type]
    )
