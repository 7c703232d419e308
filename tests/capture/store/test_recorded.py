from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from auditlog import (
    Session,
)
from auditlog.capture import bind, omni
from auditlog.capture.asgi import AuditMiddleware
from auditlog.capture.hooks import Change, Hooks, SkipEvent
from auditlog.capture.session import Pending, binding
from auditlog.capture.store import AsyncAuditedStore, AuditedStore
from auditlog.testing import RecordedLog
from examples.control_plane.store import Conflict, Missing, Resource, ResourceStore
from tests.capture.helpers import records, serve_asgi, snippet
from tests.capture.store.helpers import (
    CLUSTERS,
    REF,
    AsyncStore,
    cluster,
    facts,
    kinds,
    relabel,
)


def test_the_documented_program_records_actor_address_and_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("Audited resources")
    audit, store = names["audit"], names["audited"](ResourceStore())
    app = FastAPI()
    app.add_middleware(AuditMiddleware, session_from=lambda _: Session(email="alice@example.com"))

    @app.put("/tenants/{name}")
    def put(name: str, plan: str) -> None:
        try:
            store.update_with_conflicts("Tenants", name, lambda it: replace(it, spec={"plan": plan}))
        except Missing:
            store.create(Resource("Tenants", name, spec={"plan": plan}))

    with (
        audit,
        serve_asgi(app) as address,
        httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address="127.0.0.7")) as http,
    ):
        for plan in ("free", "paid", "paid"):
            assert http.put(f"/tenants/t?plan={plan}", headers={"X-Request-ID": plan}).status_code == 200
    found = records(tmp_path / "audit-log")
    for record in found:
        session = record["event_data"].pop("session")
        assert (session["email"], session["ip_address"]) == ("alice@example.com", "127.0.0.7")
        assert (record["resource_type"], record["resource_id"]) == ("Tenants", "t")
    data = [(record["event_type"], record["event_data"]) for record in found]
    first, second, third, fourth = (data[index][1]["audit"].get("intent") for index in range(1, len(data), 2))
    conflicts = "update_with_conflicts"
    assert data == [
        ("intent", {"audit": {"action": conflicts, "request_id": "free"}}),
        (
            "intent",
            {"audit": {"action": conflicts, "outcome": "failed", "intent": first, "request_id": "free"}},
        ),
        ("intent", {"audit": {"action": "create", "request_id": "free"}}),
        (
            "create",
            {"tenant": {"id": "t", "plan": "free"}, "audit": {"intent": second, "request_id": "free"}},
        ),
        ("intent", {"audit": {"action": conflicts, "request_id": "paid"}}),
        (
            conflicts,
            {
                "audit": {"intent": third, "request_id": "paid"},
                "changes": [{"path": "tenant.plan", "old": "free", "new": "paid"}],
                "tenant": {"id": "t", "plan": "paid"},
            },
        ),
        ("intent", {"audit": {"action": conflicts, "request_id": "paid"}}),
        (
            "intent",
            {"audit": {"action": conflicts, "outcome": "unchanged", "intent": fourth, "request_id": "paid"}},
        ),
    ]


def test_each_change_is_one_event_of_who_made_it(log: RecordedLog, alice: Session) -> None:
    store = AuditedStore(ResourceStore(), log.audit, omni.hooks())
    with bind(alice):
        store.create(cluster(kubernetes_version="1.30.1"))
        store.update(cluster(kubernetes_version="1.31.0"))
        store.update_with_conflicts(*REF, relabel)
        store.teardown(*REF)
        store.destroy(*REF)
    assert kinds(log) == ["create", "update", "update_with_conflicts", "teardown", "destroy"]
    for record in log.records:
        assert (record["resource_type"], record["resource_id"]) == REF
        assert record["event_data"]["session"]["email"] == "alice@example.com"
    assert [record["event_data"]["cluster"] for record in log.records] == [
        {"id": "c", "kubernetes_version": "1.30.1"},
        {"id": "c", "kubernetes_version": "1.31.0"},
        {"id": "c", "kubernetes_version": "1.31.0", "labels": {"a": "b"}},
        {"id": "c", "kubernetes_version": "1.31.0", "labels": {"a": "b"}},
        {"id": "c", "kubernetes_version": "1.31.0", "labels": {"a": "b"}},
    ]


def test_each_change_of_an_async_store_is_one_event_of_who_made_it(log: RecordedLog, alice: Session) -> None:
    store = AsyncAuditedStore(AsyncStore(), log.audit, omni.hooks(diff=True))

    async def main() -> None:
        with bind(alice):
            assert await store.create(cluster()) == cluster()
            await store.update(cluster(talos_version="1.7.4"))
            await store.update_with_conflicts(*REF, relabel)
            await store.teardown(*REF)
            with pytest.raises(Conflict):
                await store.update(cluster())
            await store.destroy(*REF)

    asyncio.run(main())
    assert kinds(log) == ["create", "update", "update_with_conflicts", "teardown", "destroy"]
    assert {record["event_data"]["session"]["email"] for record in log.records} == {"alice@example.com"}
    assert [record["event_data"].get("changes") for record in log.records] == [
        None,
        [{"path": "cluster.talos_version", "new": "1.7.4"}],
        [{"path": "cluster.labels.a", "new": "b"}],
        None,
        None,
    ]


def test_a_change_that_changes_nothing_is_not_recorded(log: RecordedLog) -> None:
    inner = ResourceStore()
    inner.create(cluster(a=1))
    store = AuditedStore(inner, log.audit, Hooks())
    store.update(cluster(a=1))
    store.update_with_conflicts(*REF, lambda _: None)
    store.update_with_conflicts(*REF, lambda resource: resource)
    assert log.entries == []
    store.teardown(*REF)
    store.teardown(*REF)
    assert kinds(log) == ["teardown"]


def test_a_label_alone_is_a_change(log: RecordedLog) -> None:
    inner = ResourceStore()
    inner.create(cluster(a=1))
    store = AuditedStore(inner, log.audit, omni.hooks(diff=True))
    store.update(cluster(labels={"team": "x"}, a=1))
    assert log.records[0]["event_data"]["changes"] == [{"path": "cluster.labels.team", "new": "x"}]


def test_an_update_into_teardown_is_a_teardown(log: RecordedLog) -> None:
    inner = ResourceStore()
    inner.create(cluster("c"))
    inner.create(cluster("d"))
    store = AuditedStore(inner, log.audit, Hooks())
    store.update(replace(cluster("c"), phase="tearingDown"))
    store.update_with_conflicts(CLUSTERS, "d", lambda resource: replace(resource, phase="tearing down"))
    assert kinds(log) == ["teardown", "teardown"]


def test_a_destroy_tells_what_the_resource_had(log: RecordedLog) -> None:
    inner = ResourceStore()
    kind = "MachineSets.omni.sidero.dev"
    inner.create(Resource(kind, "m", {omni.CLUSTER_LABEL: "c", "team": "x"}, phase="tearing down"))
    AuditedStore(inner, log.audit, omni.hooks()).destroy(kind, "m")
    assert log.records[0]["event_data"]["machine_set"] == {
        "labels": {omni.CLUSTER_LABEL: "c", "team": "x"},
        "id": "m",
        "cluster_id": "c",
    }


def test_data_of_one_event_is_not_in_the_next_of_the_same_request(log: RecordedLog, alice: Session) -> None:
    inner = ResourceStore()
    hooks = omni.hooks(others="record", diff=True)
    store = AuditedStore(inner, log.audit, hooks)

    def request() -> None:
        store.create(cluster(kubernetes_version="1.30.1"))
        store.update(cluster(kubernetes_version="1.31.0"))
        store.create(Resource("Users.omni.sidero.dev", "u", spec={"role": "Admin"}))
        store.create(Resource("Other", "o"))
        store.teardown(*REF)

    with binding(Pending(lambda: (alice, "request-1"))):
        request()
    own = [record["event_data"].keys() - {"session"} for record in log.records]
    assert own == [
        {"cluster", "audit"},
        {"cluster", "changes", "audit"},
        {"new_user", "audit"},
        {"audit"},
        {"cluster", "audit"},
    ]
    assert facts(log) == [{"request_id": "request-1"}] * 5


@pytest.mark.parametrize("internal", ["record", "skip"])
def test_an_internal_change_is_the_internal_agents_or_skipped(
    log: RecordedLog, alice: Session, internal: Any
) -> None:
    hooks = Hooks()
    hooks.plain(CLUSTERS, internal=internal)
    store = AuditedStore(ResourceStore(), log.audit, hooks)
    store.create(cluster("a"))
    with bind(alice):
        store.create(cluster("b"))
    agents = {record["resource_id"]: record["event_data"]["session"] for record in log.records}
    assert agents.pop("b")["email"] == "alice@example.com"
    assert agents == ({"a": {"user_agent": "Omni-Internal-Agent"}} if internal == "record" else {})


def test_a_hook_can_decline_a_change(log: RecordedLog) -> None:
    hooks = Hooks()

    @hooks.on(CLUSTERS)
    def hook(change: Change) -> dict[str, Any]:
        if change.resource_id == "c":
            raise SkipEvent
        return {}

    store = AuditedStore(ResourceStore(), log.audit, hooks)
    store.create(cluster("c"))
    store.create(cluster("d"))
    assert [record["resource_id"] for record in log.records] == ["d"]


def test_an_id_that_the_store_gives_is_recorded(log: RecordedLog) -> None:
    class Numbering(ResourceStore):
        def create(self, resource: Resource) -> Resource:
            return super().create(replace(resource, id="7"))

    class NumberingInPlace(ResourceStore):
        def create(self, resource: Resource) -> Any:
            resource.id = "8"
            super().create(resource)

    for inner in (Numbering(), NumberingInPlace()):
        AuditedStore(inner, log.audit, omni.hooks()).create(cluster(""))
    assert [record["event_data"]["cluster"]["id"] for record in log.records] == ["7", "8"]
    assert [record["resource_id"] for record in log.records] == ["7", "8"]


def test_fifty_threads_each_record_their_own_session(log: RecordedLog) -> None:
    store = AuditedStore(ResourceStore(), log.audit, omni.hooks(before=True, diff=True))
    barrier = threading.Barrier(50)

    def work(number: int) -> None:
        name = f"user-{number}"
        barrier.wait()
        with bind(Session(email=name)):
            store.create(cluster(name))
            store.update(cluster(name, talos_version=name))
            store.update_with_conflicts(CLUSTERS, name, relabel)
            store.teardown(CLUSTERS, name)
            store.destroy(CLUSTERS, name)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(work, range(50)))
    check_sessions(log)


def test_fifty_tasks_each_record_their_own_session(log: RecordedLog) -> None:
    store = AsyncAuditedStore(AsyncStore(), log.audit, omni.hooks(before=True, diff=True))

    async def work(number: int) -> None:
        name = f"user-{number}"
        with bind(Session(email=name)):
            await store.create(cluster(name))
            await store.update(cluster(name, talos_version=name))
            await store.update_with_conflicts(CLUSTERS, name, relabel)
            await store.teardown(CLUSTERS, name)
            await store.destroy(CLUSTERS, name)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(work(number))

    asyncio.run(main())
    check_sessions(log)


def check_sessions(log: RecordedLog) -> None:
    """Each of the fifty has made five changes, each after its own intent."""
    entries = {str(entry.position): entry.record for entry in log.entries}
    changes = [record for record in entries.values() if record["event_type"] != "intent"]
    assert len(entries) == 2 * len(changes) == 500
    for record in changes:
        intent = entries.pop(record["event_data"]["audit"]["intent"])
        assert intent["event_data"]["audit"] == {"action": record["event_type"]}
        for each in (record, intent):
            assert each["event_data"]["session"] == {"email": record["resource_id"]}
            assert each["resource_id"] == record["resource_id"]
        assert record["event_data"].get("changes", []) == (
            [{"path": "cluster.talos_version", "new": record["resource_id"]}]
            if record["event_type"] == "update"
            else [{"path": "cluster.labels.a", "new": "b"}]
            if record["event_type"] == "update_with_conflicts"
            else []
        )
