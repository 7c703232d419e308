"""Stores, resources and what is to be seen in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partialmethod
from typing import Any

from auditlog.testing import RecordedLog
from examples.control_plane.store import Resource, ResourceStore

CLUSTERS = "Clusters.omni.sidero.dev"
REF = (CLUSTERS, "c")


class AsyncStore:
    """The example's store, each of its methods a coroutine function that lets others run."""

    def __init__(self) -> None:
        self.inner = ResourceStore()

    async def get(self, *given: Any) -> Resource:
        await asyncio.sleep(0)
        return self.inner.get(*given)

    async def create(self, resource: Resource) -> Resource:
        await asyncio.sleep(0)
        return self.inner.create(resource)

    async def update(self, resource: Resource) -> Resource:
        await asyncio.sleep(0)
        return self.inner.update(resource)

    async def update_with_conflicts(self, resource_type: str, resource_id: str, change: Any) -> Resource:
        current = await self.get(resource_type, resource_id)
        changed = change(current)
        if asyncio.iscoroutine(changed):
            changed = await changed
        return self.inner.update(changed or current)

    async def teardown(self, *given: str) -> Resource:
        await asyncio.sleep(0)
        return self.inner.teardown(*given)

    async def destroy(self, *given: str) -> Resource:
        await asyncio.sleep(0)
        return self.inner.destroy(*given)


class Spy:
    """A store that notes each call, and gives or raises what it is told to."""

    def __init__(self, result: Any = None, error: BaseException | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.result, self.error = result, error

    def _called(self, name: str, *given: Any, **more: Any) -> Any:
        self.calls.append((name, given, more))
        if name == "update_with_conflicts" and not asyncio.iscoroutinefunction(given[2]):
            given[2](cluster())
        return self.answer()

    def answer(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result

    def get(self, *given: Any) -> Any:
        self.calls.append(("get", given, {}))

    create: Any = partialmethod(_called, "create")
    update: Any = partialmethod(_called, "update")
    update_with_conflicts: Any = partialmethod(_called, "update_with_conflicts")
    teardown: Any = partialmethod(_called, "teardown")
    destroy: Any = partialmethod(_called, "destroy")


def cluster(identity: str = "c", *, labels: dict[str, str] | None = None, **spec: Any) -> Resource:
    return Resource(CLUSTERS, identity, labels or {}, spec)


def all_actions(store: Any) -> dict[str, Callable[[], Any]]:
    """Each change that a store can make, of a cluster c that exists."""
    return {
        "create": lambda: store.create(cluster("new")),
        "update": lambda: store.update(cluster(kubernetes_version="1.31.0")),
        "update_with_conflicts": lambda: store.update_with_conflicts(*REF, relabel),
        "teardown": lambda: store.teardown(*REF),
        "destroy": lambda: store.destroy(*REF),
    }


ACTIONS = sorted(all_actions(None))


def relabel(resource: Resource) -> None:
    resource.labels["a"] = "b"


def kinds(log: RecordedLog) -> list[str]:
    return [record["event_type"] for record in log.records]


def facts(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"].get("audit", {}) for record in log.records]
