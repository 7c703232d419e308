from __future__ import annotations

import asyncio
import copy
import threading
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from typing import Any

import pytest

from auditlog import (
    InvalidSetting,
    LoggerClosed,
)
from auditlog.capture import omni
from auditlog.capture.hooks import Hooks
from auditlog.capture.hooks import Resource as Described
from auditlog.capture.store import AsyncAuditedStore, AuditedStore
from auditlog.testing import RecordedLog
from examples.control_plane.store import Resource, ResourceStore
from tests.capture.store.helpers import (
    CLUSTERS,
    REF,
    AsyncStore,
    Spy,
    cluster,
    facts,
    kinds,
    relabel,
)


class LiveStore(ResourceStore):
    """Gives its own objects, as nobody should."""

    def get(self, resource_type: str, resource_id: str) -> Resource:
        return self._find(resource_type, resource_id)

    def update(self, resource: Resource) -> Resource:
        self._resources[resource.type, resource.id] = resource
        return resource

    def update_with_conflicts(self, resource_type: str, resource_id: str, change: Any) -> Resource:
        current = self._find(resource_type, resource_id)
        return change(current) or current


def test_a_store_that_gives_its_own_objects_is_recorded(log: RecordedLog) -> None:
    store = AuditedStore(LiveStore(), log.audit, omni.hooks(diff=True))
    store.create(cluster(labels={"a": "1"}))
    mine = store.get(*REF)
    mine.labels["a"] = "2"
    store.update(mine)  # what it was before, nobody knows any more
    store.update(cluster(labels={"a": "3"}))
    store.update_with_conflicts(*REF, relabel)
    store.teardown(*REF)
    assert [(record["event_type"], record["event_data"].get("changes")) for record in log.records] == [
        ("create", None),
        ("update", None),
        ("update", [{"path": "cluster.labels.a", "old": "2", "new": "3"}]),
        ("update_with_conflicts", [{"path": "cluster.labels.a", "old": "3", "new": "b"}]),
        ("teardown", None),
    ]


class RetryingStore(ResourceStore):
    """Runs a change three times, on what others made of the resource meanwhile."""

    def update_with_conflicts(self, resource_type: str, resource_id: str, change: Any) -> Any:
        for attempt in range(3):
            current = self.get(resource_type, resource_id)
            current.spec["attempt"] = attempt
            changed = change(current)
            if changed is None:
                changed = current
        self.update(changed)


def test_of_a_change_that_is_tried_again_the_last_run_counts(log: RecordedLog) -> None:
    inner = RetryingStore()
    inner.create(cluster())
    runs: list[Resource] = []

    def change(resource: Resource) -> None:
        runs.append(resource)
        resource.labels["run"] = str(len(runs))

    AuditedStore(inner, log.audit, omni.hooks(diff=True)).update_with_conflicts(*REF, change)
    (record,) = log.records
    assert record["event_data"]["changes"] == [{"path": "cluster.labels.run", "new": "3"}]
    assert len(runs) == 3
    assert inner.get(*REF).labels == {"run": "3"}


class Relabel:
    """A change that is an object."""

    __slots__ = ()

    def __call__(self, resource: Resource) -> None:
        relabel(resource)


class RelabelLater:
    async def __call__(self, resource: Resource) -> None:
        relabel(resource)


async def relabel_later(resource: Resource, *, give: bool = False) -> Resource | None:
    await asyncio.sleep(0)
    relabel(resource)
    return copy.deepcopy(resource) if give else None


@pytest.mark.parametrize(
    "change",
    [
        relabel,
        Relabel(),
        partial(relabel),
        lambda resource: replace(resource, labels={"a": "b"}),
        relabel_later,
        partial(relabel_later, give=True),
        RelabelLater(),
        lambda resource: relabel_later(resource),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_change_may_alter_or_return_and_may_be_async(log: RecordedLog, change: Any, before: bool) -> None:
    inner = AsyncStore()
    inner.inner.create(cluster())
    store = AsyncAuditedStore(inner, log.audit, omni.hooks(diff=True, before=before))
    asyncio.run(store.update_with_conflicts(*REF, change))
    assert inner.inner.get(*REF).labels == {"a": "b"}
    assert log.records[-1]["event_data"]["cluster"] == {"id": "c", "labels": {"a": "b"}}
    assert log.records[-1]["event_data"]["changes"] == [{"path": "cluster.labels.a", "new": "b"}]
    assert len(log.records) == 1 + before


def test_the_store_is_given_a_change_of_the_same_kind(log: RecordedLog) -> None:
    spy = Spy()
    store = AuditedStore(spy, log.audit, Hooks())
    store.update_with_conflicts(*REF, relabel)
    store.update_with_conflicts(*REF, relabel_later)
    first, second = (given[2] for _, given, _ in spy.calls)
    assert first.__name__ == "relabel"
    assert not asyncio.iscoroutinefunction(first)
    assert asyncio.iscoroutinefunction(second)


def test_a_change_that_the_store_never_ran_is_none(log: RecordedLog) -> None:
    class Shrugging(ResourceStore):
        def update_with_conflicts(self, *given: Any) -> Any:
            return None  # there is nothing with that id

    AuditedStore(Shrugging(), log.audit, Hooks(before=True)).update_with_conflicts(*REF, relabel)
    intent = str(log.entries[0].position)
    assert facts(log) == [
        {"action": "update_with_conflicts"},
        {"action": "update_with_conflicts", "outcome": "unchanged", "intent": intent},
    ]


def test_a_store_that_gives_awaitables_is_refused_before_it_changes_anything(log: RecordedLog) -> None:
    def traced(method: Any) -> Any:
        return lambda *given: method(*given)

    store = AsyncStore()
    for name in ("create", "destroy"):
        setattr(store, name, traced(getattr(store, name)))
    with pytest.raises(InvalidSetting, match="use AsyncAuditedStore"):
        AuditedStore(store, log.audit, Hooks())
    for name in ("get", "update", "update_with_conflicts", "teardown"):
        setattr(store, name, traced(getattr(store, name)))
    audited = AuditedStore(store, log.audit, Hooks())
    with pytest.raises(InvalidSetting, match="use AsyncAuditedStore"):
        audited.create(cluster())
    with pytest.raises(InvalidSetting, match="use AsyncAuditedStore"):
        AuditedStore(AsyncAuditedStore(AsyncStore(), log.audit, Hooks()), log.audit, Hooks()).create(
            cluster()
        )
    assert log.records == []


def test_a_closed_log_keeps_a_change_from_being_made(log: RecordedLog) -> None:
    spy = Spy()
    store = AuditedStore(spy, log.audit, Hooks())
    log.audit.close()
    with pytest.raises(LoggerClosed):
        store.create(cluster())
    assert spy.calls == []


def test_arguments_may_be_named(log: RecordedLog) -> None:
    store = AuditedStore(ResourceStore(), log.audit, Hooks())
    store.create(resource=cluster())
    store.teardown(resource_type=CLUSTERS, resource_id="c")
    assert kinds(log) == ["create", "teardown"]


class Phase(IntEnum):
    RUNNING = 0
    PAUSED = 1
    TEARING_DOWN = 2


def test_each_change_of_phase_is_a_change(log: RecordedLog) -> None:
    class AnyPhase(ResourceStore):
        def update(self, resource: Resource) -> Resource:
            return self._put(resource)

    store = AuditedStore(AnyPhase(), log.audit, Hooks())
    resource: Any = cluster()
    for phase in Phase:
        resource = replace(resource, phase=phase)
        (store.update if phase else store.create)(resource)
    assert kinds(log) == ["create", "update", "teardown"]


def test_what_a_hook_stumbled_over_is_in_no_message(
    log: RecordedLog, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks()
    hooks.on(CLUSTERS)(lambda change: {"pin": int(change.content["password"])})
    AuditedStore(ResourceStore(), log.audit, hooks).create(cluster(password="hunter2"))
    assert "ValueError" in caplog.text
    assert "test_kinds.py" in caplog.text
    assert "hunter2" not in caplog.text


@dataclass
class Held:
    """A resource that holds what cannot be copied."""

    id: str
    size: int
    type: str = CLUSTERS
    lock: Any = field(default_factory=threading.Lock)


def test_a_resource_that_cannot_be_copied_is_recorded_without_its_past(
    log: RecordedLog, caplog: pytest.LogCaptureFixture
) -> None:
    class Inner(Spy):
        def get(self, *_given: Any) -> Held:
            return Held("c", 1)

        def update_with_conflicts(self, *given: Any) -> Any:
            return given[2](Held("c", 1))

    store = AuditedStore(Inner(), log.audit, Hooks())
    store.update(Held("c", 2))
    changed = store.update_with_conflicts(*REF, lambda it: replace(it, size=3))
    store.destroy(*REF)
    assert changed.size == 3
    assert kinds(log) == ["update", "update_with_conflicts", "destroy"]
    assert caplog.text.count("cannot be copied") == 3


def test_a_store_that_cannot_be_read_is_recorded_without_its_past(log: RecordedLog) -> None:
    class Unreadable(ResourceStore):
        def get(self, *_given: Any) -> Any:
            raise TimeoutError

    inner = Unreadable()
    inner.create(replace(cluster(), phase="tearing down"))
    AuditedStore(inner, log.audit, omni.hooks()).destroy(*REF)
    assert log.records[0]["event_data"]["cluster"] == {"id": "c"}


class Slotted:
    __slots__ = ("id", "labels", "spec", "type")

    def __init__(self, spec: Any) -> None:
        self.type, self.id, self.labels, self.spec = CLUSTERS, "c", {"a": "b"}, spec

    def __eq__(self, other: object) -> bool:
        raise AssertionError("whole resources are not compared")

    __hash__ = None  # type: ignore[assignment]


class SlottedStore(Spy):
    __slots__ = ("kept",)

    def get(self, *_given: Any) -> Slotted:
        return Slotted({"kubernetes_version": "1.30.1"})


def test_resources_with_slots_are_recorded(log: RecordedLog) -> None:
    store = AuditedStore(SlottedStore(), log.audit, omni.hooks(diff=True))
    store.update(Slotted({"kubernetes_version": "1.30.1"}))
    store.update(Slotted({"kubernetes_version": "1.31.0"}))
    (record,) = log.records
    assert record["event_data"]["changes"] == [
        {"path": "cluster.kubernetes_version", "old": "1.30.1", "new": "1.31.0"}
    ]


def test_resources_that_are_dicts_are_recorded(log: RecordedLog) -> None:
    kept: dict[str, Any] = {}

    class DictStore(Spy):
        def get(self, *given: Any) -> Any:
            return copy.deepcopy(kept[given[1]])

        def create(self, resource: Any) -> Any:
            kept[resource["name"]] = copy.deepcopy(resource)

        update = create

        def destroy(self, *given: Any) -> Any:
            del kept[given[1]]

    hooks = omni.hooks(
        diff=True, describe=lambda it: Described(it["kind"], it["name"], it["labels"], it["spec"])
    )
    store = AuditedStore(DictStore(), log.audit, hooks)
    wanted = {"kind": CLUSTERS, "name": "c", "labels": {"a": "b"}, "spec": {"talos_version": "1.7.4"}}
    store.create(wanted)
    store.update(wanted | {"spec": {"talos_version": "1.8.0"}, "resourceVersion": 2})
    store.update(wanted | {"spec": {"talos_version": "1.8.0"}, "resourceVersion": 3})
    store.destroy(*REF)
    assert kinds(log) == ["create", "update", "destroy"]
    assert log.records[1]["event_data"]["changes"] == [
        {"path": "cluster.talos_version", "old": "1.7.4", "new": "1.8.0"}
    ]
    assert log.records[2]["event_data"]["cluster"] == {
        "id": "c",
        "labels": {"a": "b"},
        "talos_version": "1.8.0",
    }
