"""Resources in memory: what a control plane has a database for. It knows nothing of an audit log."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class Missing(LookupError):
    """There is no such resource."""


class Conflict(Exception):
    """The resource is not in the state that a change needs."""


@dataclass
class Resource:
    """A resource of a type, with what its user wants of it (`spec`)."""

    type: str
    id: str
    labels: dict[str, str] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    phase: str = "running"


class ResourceStore:
    """Creates, changes and destroys resources. What it gives and takes are copies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._resources: dict[tuple[str, str], Resource] = {}

    def get(self, resource_type: str, resource_id: str) -> Resource:
        """A resource. Raises Missing."""
        with self._lock:
            return copy.deepcopy(self._find(resource_type, resource_id))

    def create(self, resource: Resource) -> Resource:
        """Create a resource. Raises Conflict where there is one."""
        with self._lock:
            if (resource.type, resource.id) in self._resources:
                raise Conflict(f"{resource.id} exists")
            return self._put(resource)

    def update(self, resource: Resource) -> Resource:
        """Replace a resource. Raises Missing, or Conflict where it is being torn down."""
        with self._lock:
            if self._find(resource.type, resource.id).phase != "running":
                raise Conflict(f"{resource.id} is being torn down")
            return self._put(resource)

    def update_with_conflicts(
        self, resource_type: str, resource_id: str, change: Callable[[Resource], Resource | None]
    ) -> Resource:
        """Change a resource as it is by now, whatever its state. Raises Missing."""
        with self._lock:
            current = copy.deepcopy(self._find(resource_type, resource_id))
            return self._put(change(current) or current)

    def teardown(self, resource_type: str, resource_id: str) -> Resource:
        """Announce that a resource will be destroyed. Raises Missing."""
        with self._lock:
            resource = self._find(resource_type, resource_id)
            resource.phase = "tearing down"
            return copy.deepcopy(resource)

    def destroy(self, resource_type: str, resource_id: str) -> Resource:
        """Destroy a resource that was torn down. Raises Missing, or Conflict where it was not."""
        with self._lock:
            if self._find(resource_type, resource_id).phase == "running":
                raise Conflict(f"{resource_id} must be torn down first")
            return self._resources.pop((resource_type, resource_id))

    def _find(self, resource_type: str, resource_id: str) -> Resource:
        try:
            return self._resources[resource_type, resource_id]
        except KeyError:
            raise Missing(f"there is no {resource_id} among the {resource_type}") from None

    def _put(self, resource: Resource) -> Resource:
        self._resources[resource.type, resource.id] = copy.deepcopy(resource)
        return copy.deepcopy(resource)


def merged(resource: Resource, labels: Mapping[str, str], spec: Mapping[str, Any]) -> Resource:
    """A resource with these labels and fields added."""
    return Resource(
        resource.type, resource.id, {**resource.labels, **labels}, {**resource.spec, **spec}, resource.phase
    )
