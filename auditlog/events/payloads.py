"""The typed payloads that Omni's audit log documents, and our own facts about an event.

Field order is the order of the keys in a written line. A field that has its default value is
left out of the line. Two kinds of mapping differ in that: a map (`dict = {}`) is left out when it
is empty; a message (`dict | None = None`) is written as `{}` when it is present but empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import InvalidEvent

Labels = dict[str, str]
Map = dict[str, Any]
Message = dict[str, Any] | None


class Model(BaseModel):
    """What all stored models share: strict, immutable, and unknown keys are kept."""

    # Schemas are built on first use: most programs touch a few of these models only.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, defer_build=True)

    if not TYPE_CHECKING:  # type checkers read the fields' own signature

        def __init__(self, **data: Any) -> None:
            """Raises InvalidEvent with the name of the first field that has a wrong value."""
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise invalid(type(self).__name__, error) from None

        # Tells pydantic that validating a nested model need not come through here.
        __init__.__pydantic_base_init__ = True


def fields_of(value: Model) -> dict[str, Any]:
    """The fields of a model and the unknown keys it keeps, each as it is."""
    extra = value.model_extra
    return value.__dict__ | extra if extra else dict(value.__dict__)


def invalid(path: str, error: ValidationError) -> InvalidEvent:
    """The first complaint of a validation as an error of ours, without the refused value."""
    complaint = error.errors(include_url=False, include_context=False, include_input=False)[0]
    for step in complaint["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return InvalidEvent(path, complaint["msg"])


class NewUser(Model):
    """A user that was created, edited or deleted."""

    role: str = ""
    id: str = ""
    email: str = ""
    is_service_account: bool = False


class Machine(Model):
    """A machine that was registered or removed."""

    labels: Labels = {}
    id: str = ""
    management_address: str = ""
    is_connected: bool = False


class MachineLabels(Model):
    """A change of a machine's labels."""

    labels: Labels = {}
    id: str = ""


class AccessPolicy(Model):
    """A change of an access policy."""

    id: str = ""
    cluster_groups: Map = {}
    user_groups: Map = {}
    rules: list[Any] = []
    tests: list[Any] = []


class Cluster(Model):
    """A cluster that was created, changed or deleted."""

    id: str = ""
    labels: Labels = {}
    backup_configuration: Message = None
    features: Message = None
    kubernetes_version: str = ""
    talos_version: str = ""


class MachineSet(Model):
    """A change of a machine set."""

    labels: Labels = {}
    machine_allocation: Message = None
    bootstrap_spec: Message = None
    update_strategy_config: Message = None
    delete_strategy_config: Message = None
    id: str = ""
    update_strategy: str | int = ""
    delete_strategy: str | int = ""
    cluster_id: str = ""


class MachineSetNode(Model):
    """A machine that joined or left a machine set."""

    labels: Labels = {}
    id: str = ""
    cluster_id: str = ""


class ConfigPatch(Model):
    """A change of a config patch."""

    labels: Labels = {}
    id: str = ""
    data: str = ""
    cluster_id: str = ""


class MachineConfigDiff(Model):
    """What changed in a machine's configuration."""

    id: str = ""
    diff: str = ""
    cluster_id: str = ""


class TalosAccess(Model):
    """A call of a Talos API method."""

    full_method_name: str = ""
    cluster_name: str = ""
    machine_ip: str = ""


class K8sAccess(Model):
    """A request to the Kubernetes API of a cluster."""

    full_method_name: str = ""
    command: str = ""
    body: str = ""
    kube_session: str = ""
    cluster_name: str = ""
    cluster_uuid: str = ""


class AuditLogAccess(Model):
    """A read of the audit log itself: the range and the filter that were asked for."""

    start: str | int = ""
    end: str | int = ""
    search: str = ""
    event_type: str | list[str] = ""
    resource_type: str = ""
    resource_id: str = ""
    cluster_id: str = ""
    actor: str = ""
    from_id: str | int = ""
    follow: bool = False


class MigrationError(Model):
    """A line that Omni could not carry over when it moved its log to a database."""

    raw_data: str = ""
    error: str = ""


class AuditFacts(Model):
    """Our own facts about an event (`event_data.audit`)."""

    action: str = ""
    outcome: str = ""
    intent: str = ""
    lost: int = 0
    count: int = 0
    first_ts: int = 0
    last_ts: int = 0
    request_id: str = ""
