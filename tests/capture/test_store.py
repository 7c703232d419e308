"""A store whose changes are recorded: all of them, nothing else, and nobody can tell otherwise."""

from __future__ import annotations

import asyncio
import copy
import errno
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from auditlog import (
    AuditLogger,
    InvalidEvent,
    InvalidSetting,
    LoggerClosed,
    Position,
    Session,
    SyncFailed,
    WriteFailed,
)
from auditlog.capture import bind, omni
from auditlog.capture.asgi import AuditMiddleware
from auditlog.capture.hooks import Change, Hooks, SkipEvent
from auditlog.capture.hooks import Resource as Described
from auditlog.capture.session import Pending, binding
from auditlog.capture.store import AsyncAuditedStore, AuditedStore
from auditlog.storage.files import Files
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from examples.control_plane.store import Conflict, Missing, Resource, ResourceStore
from tests.capture.helpers import records, serve_asgi, snippet
from tests.conftest import Start
from tests.helpers import until

CLUSTERS = "Clusters.omni.sidero.dev"
REF = (CLUSTERS, "c")


@pytest.fixture
def log() -> Iterator[RecordedLog]:
    with recorded_log() as recorded:
        yield recorded


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


# ---------------------------------------------------------------------- what is recorded


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


# ---------------------------------------------------------------------- what the caller sees


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [Conflict("busy"), KeyboardInterrupt(), SystemExit(3)])
def test_the_stores_exception_reaches_the_caller_as_it_is(
    log: RecordedLog, action: str, before: bool, error: BaseException
) -> None:
    cause = ValueError("why")
    error.__cause__, error.__context__ = cause, None
    store = AuditedStore(Spy(error=error), log.audit, omni.hooks(before=before))
    with pytest.raises(type(error)) as caught:
        all_actions(store)[action]()
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__context__ is None
    outcome = "failed" if isinstance(error, Exception) else "unknown"
    assert [fact.get("outcome") for fact in facts(log)] == ([None, outcome] if before else [])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("result", [None, 7, {"revision": 7}, object(), cluster("other"), "c"])
def test_results_are_handed_back_and_arguments_passed_on(log: RecordedLog, before: bool, result: Any) -> None:
    spy = Spy(result)
    store: Any = AuditedStore(spy, log.audit, Hooks(before=before))
    wanted = cluster()
    assert store.create(wanted, 1, owner="o") is result
    assert store.update(wanted, expected="x") is result
    assert store.teardown(*REF, owner="o") is result
    assert store.destroy(*REF, 2) is result
    assert store.update_with_conflicts(*REF, relabel, 3, phase="any") is result
    calls = [call for call in spy.calls if call[0] != "get"]
    assert calls[:4] == [
        ("create", (wanted, 1), {"owner": "o"}),
        ("update", (wanted,), {"expected": "x"}),
        ("teardown", REF, {"owner": "o"}),
        ("destroy", (*REF, 2), {}),
    ]
    name, (*ref, _, extra), more = calls[4]
    assert (name, tuple(ref), extra, more) == ("update_with_conflicts", REF, 3, {"phase": "any"})
    recorded = [record for record in log.records if record["event_type"] != "intent"]
    assert {(record["resource_type"], record["resource_id"]) for record in recorded} == {REF}
    assert len(recorded) == 5


def test_a_result_that_is_no_resource_is_not_taken_for_one(log: RecordedLog) -> None:
    hooks = Hooks(describe=lambda it: Described(it["type"], it["id"], content=it))
    hooks.on("T")(lambda change: {"new": change.new})
    store = AuditedStore(Spy({"revision": 7}), log.audit, hooks)
    store.create({"type": "T", "id": "1"})
    assert log.records[0]["event_data"]["new"] == {"type": "T", "id": "1"}


def test_an_error_of_the_change_function_reaches_the_caller(log: RecordedLog) -> None:
    inner = ResourceStore()
    inner.create(cluster())
    error = ValueError("no")

    def change(_resource: Resource) -> None:
        raise error

    with pytest.raises(ValueError, match="no") as caught:
        AuditedStore(inner, log.audit, Hooks()).update_with_conflicts(*REF, change)
    assert caught.value is error
    assert log.entries == []


def test_a_disabled_log_calls_the_store_and_does_nothing_else() -> None:
    def ask() -> Session:
        raise AssertionError("nobody is to be asked")

    spy = Spy(7)
    store: Any = AuditedStore(spy, AuditLogger(""), Hooks(describe=lambda _: 1 / 0))  # type: ignore[arg-type,return-value]
    with binding(Pending(lambda: (Session(), ""), ask)):
        assert [store.create("x"), store.update("x", a=1), store.teardown(5, 6)] == [7, 7, 7]
        assert [store.update_with_conflicts(*REF, relabel), store.destroy(*REF)] == [7, 7]
    assert spy.calls == [
        ("create", ("x",), {}),
        ("update", ("x",), {"a": 1}),
        ("teardown", (5, 6), {}),
        ("update_with_conflicts", (*REF, relabel), {}),
        ("destroy", REF, {}),
    ]


def test_a_type_that_is_skipped_costs_no_more_than_the_call(log: RecordedLog) -> None:
    def ask() -> Session:
        raise AssertionError("nobody is to be asked")

    spy = Spy()
    store = AuditedStore(spy, log.audit, Hooks(others="skip", before=True))
    with binding(Pending(lambda: (Session(), ""), ask)):
        for call in all_actions(store).values():
            call()
    assert [name for name, _, _ in spy.calls] == [
        "create",
        "update",
        "update_with_conflicts",
        "teardown",
        "destroy",
    ]
    assert spy.calls[2][1][2] is relabel
    assert log.entries == []


def test_a_change_is_not_made_while_nobody_can_say_who_makes_it(log: RecordedLog) -> None:
    def ask() -> Session:
        raise ZeroDivisionError

    spy = Spy()
    store = AuditedStore(spy, log.audit, Hooks())
    with binding(Pending(lambda: (Session(), ""), ask)):
        for call in all_actions(store).values():
            with pytest.raises(ZeroDivisionError):
                call()
    assert spy.calls == []


@pytest.mark.parametrize("is_async", [True, False])
def test_who_makes_a_change_is_asked_once_for_it(log: RecordedLog, is_async: bool) -> None:
    asked = []

    def ask() -> Session:
        asked.append(1)
        return Session(email=f"{len(asked)}@example.com")

    kind = AsyncAuditedStore if is_async else AuditedStore
    store = kind(ResourceStore(), log.audit, Hooks(before=True))
    with binding(Pending(lambda: (Session(), ""), ask)):
        done = store.create(cluster())
        if is_async:
            asyncio.run(done)
    assert [record["event_data"]["session"]["email"] for record in log.records] == ["1@example.com"] * 2


@pytest.mark.parametrize("identity", [5, None, b"c"])
def test_an_id_that_is_no_string_is_refused_before_the_change(log: RecordedLog, identity: Any) -> None:
    spy = Spy()
    store: Any = AuditedStore(spy, log.audit, Hooks())
    for method, given in (
        (store.create, (cluster(identity),)),
        (store.destroy, (CLUSTERS, identity)),
        (store.teardown, (identity, "c")),
    ):
        with pytest.raises(InvalidEvent, match="must be a string, not"):
            method(*given)
    assert spy.calls == []


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "details",
    [
        lambda _: 1 / 0,
        lambda _: {"x": object()},
        lambda _: {"x": float("nan")},
        lambda _: {"session": {"email": "mallory@example.com"}},
        lambda _: {"audit": {"intent": "2024-08-12:0"}},
        lambda _: {"cluster": {"id": 5}},
        lambda _: {"cluster": {"id": "c", "password": "canary", "x": object()}},
    ],
)
def test_a_change_whose_hook_fails_is_recorded_without_details(
    log: RecordedLog, alice: Session, details: Any, before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks(before=before)
    hooks.on(CLUSTERS)(details)
    with bind(alice):
        assert AuditedStore(ResourceStore(), log.audit, hooks).create(cluster()) == cluster()
    record = log.records[-1]
    assert (record["event_type"], record["resource_id"]) == ("create", "c")
    assert record["event_data"].pop("session")["email"] == "alice@example.com"
    intent = str(log.entries[0].position)
    assert record["event_data"] == ({"audit": {"intent": intent}} if before else {})
    assert "the hook for Clusters.omni.sidero.dev" in caplog.text
    assert "canary" not in caplog.text


def test_an_event_that_cannot_be_written_is_an_error_after_the_change() -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:
        inner = ResourceStore()
        store = AuditedStore(inner, log.audit, Hooks())
        files.fail("write", errno.ENOSPC)
        with pytest.raises(WriteFailed):
            store.create(cluster())
        files.heal()
        assert inner.get(*REF) == cluster()


# ---------------------------------------------------------------------- stores of all kinds


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
    assert "test_store.py" in caplog.text
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


# ---------------------------------------------------------------------- other methods


class Plain:
    """A store with methods of its own; it can be pickled."""

    def __init__(self) -> None:
        self.name = "plain"

    def get(self, *given: Any) -> Any:
        return given

    create = update = update_with_conflicts = teardown = destroy = list = watch = wipe = _private = get


def test_only_methods_that_read_are_reached(log: RecordedLog) -> None:
    inner = Plain()
    store = AuditedStore(inner, log.audit, Hooks(), reads=["watch", "name"])
    assert store.get("T", "1") == ("T", "1")
    assert store.watch("T") == ("T",)
    assert store.name == "plain"
    for name in ("list", "wipe", "_private", "nothing"):
        with pytest.raises(AttributeError, match="name it in `reads` if it only reads, or call it on"):
            getattr(store, name)
        assert not hasattr(store, name)
    assert store.unaudited is inner
    assert store.unaudited.wipe() == ()
    assert AuditedStore(inner, log.audit, Hooks()).list("T") == ("T",)
    assert log.entries == []


def test_a_read_that_the_store_lacks_is_its_own_error(log: RecordedLog) -> None:
    with pytest.raises(AttributeError, match="'ResourceStore' object has no attribute 'list'"):
        AuditedStore(ResourceStore(), log.audit, Hooks()).list()


def test_a_store_can_be_copied_and_pickled() -> None:
    store = AuditedStore(Plain(), AuditLogger(""), Hooks())
    assert copy.copy(store).unaudited is store.unaudited
    assert copy.deepcopy(store).list("T") == ("T",)
    assert pickle.loads(pickle.dumps(store)).list("T") == ("T",)
    with pytest.raises(AttributeError):
        AuditedStore.__new__(AuditedStore).list  # noqa: B018


def test_a_setting_that_makes_no_sense_is_refused(log: RecordedLog) -> None:
    class Half:
        get = create = update = print

    hooks = Hooks()
    wrong: list[tuple[Any, Any, str]] = [
        (Half(), hooks, "lacks update_with_conflicts, teardown, destroy"),
        (AsyncStore(), hooks, "use AsyncAuditedStore"),
        (Plain(), omni.hooks, r"must be Hooks, such as omni\.hooks\(\)"),
    ]
    for inner, given, message in wrong:
        with pytest.raises(InvalidSetting, match=message):
            AuditedStore(inner, log.audit, given)
    with pytest.raises(InvalidSetting, match="must be a collection of names"):
        AuditedStore(Plain(), log.audit, hooks, reads="list")


# ---------------------------------------------------------------------- an intent before the change


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("fsync", ["always", "interval"])
def test_an_intent_is_on_the_disk_before_the_store_is_called(action: str, fsync: Any, alice: Session) -> None:
    with recorded_log(fsync=fsync, fsync_interval=3600.0) as log:

        class Watching(Spy):
            durable: Position | None = None
            seen: list[Any]

            def answer(self) -> None:
                self.durable, self.seen = log.audit.durable_through(), log.records

        inner = Watching()
        with bind(alice):
            all_actions(AuditedStore(inner, log.audit, Hooks(before=True)))[action]()
        intent, event = log.entries
        assert inner.durable == intent.position
        (seen,) = inner.seen
        assert seen["event_type"] == "intent"
        assert seen["resource_type"] == CLUSTERS
        assert seen["event_data"]["audit"] == {"action": action}
        assert seen["event_data"]["session"]["email"] == "alice@example.com"
        assert event.record["event_type"] == action
        assert event.record["event_data"]["audit"] == {"intent": str(intent.position)}


def test_each_intent_has_an_end_which_names_it(log: RecordedLog) -> None:
    hooks = Hooks(before=True)

    @hooks.on(CLUSTERS)
    def hook(change: Change) -> dict[str, Any]:
        if change.resource_id == "declined":
            raise SkipEvent
        return {}

    store = AuditedStore(ResourceStore(), log.audit, hooks)
    store.create(cluster())
    store.update(cluster())
    store.create(cluster("declined"))
    with pytest.raises(Missing):
        store.destroy(CLUSTERS, "nothing")
    found = log.records
    positions = [str(entry.position) for entry in log.entries]
    assert kinds(log) == ["intent", "create"] + ["intent"] * 6
    assert facts(log) == [
        {"action": "create"},
        {"intent": positions[0]},
        {"action": "update"},
        {"action": "update", "outcome": "unchanged", "intent": positions[2]},
        {"action": "create"},
        {"action": "create", "outcome": "declined", "intent": positions[4]},
        {"action": "destroy"},
        {"action": "destroy", "outcome": "failed", "intent": positions[6]},
    ]
    assert [record["resource_id"] for record in found[::2]] == ["c", "c", "declined", "nothing"]
    assert [record["resource_id"] for record in found[1::2]] == ["c", "c", "declined", "nothing"]


@pytest.mark.parametrize("action", ["update", "update_with_conflicts", "teardown", "destroy"])
def test_a_killed_process_leaves_the_intent_of_the_change_it_was_making(
    start: Start, directory: Path, action: str
) -> None:
    process = start("change_and_die", directory, action, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -9
    _, created, intent = records(directory)
    assert created["event_type"] == "create"
    assert intent["event_type"] == "intent"
    assert intent["resource_id"] == "c"
    assert intent["event_data"]["audit"] == {"action": action}
    assert intent["event_data"]["session"] == {"email": "alice@example.com"}
    (day,) = directory.glob("*.jsonlog")
    lines = day.read_bytes().splitlines(keepends=True)
    assert output.decode().strip() == f"{day.stem}:{len(lines[0] + lines[1])}"


@pytest.mark.parametrize("fsync", ["always", "interval"])
@pytest.mark.parametrize(("operation", "expected"), [("write", WriteFailed), ("sync_data", SyncFailed)])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("on_failure", ["raise", "drop"])
def test_no_change_is_made_whose_intent_is_not_on_the_disk(
    fsync: Any, operation: str, expected: type[WriteFailed], action: str, on_failure: Any
) -> None:
    files = FailingFiles()
    options: dict[str, Any] = {"fsync": fsync, "fsync_interval": 3600.0, "on_failure": on_failure}
    with recorded_log(files=files, **options) as log:
        spy = Spy()
        store = AuditedStore(spy, log.audit, Hooks(before=True))
        log.audit.create("T")
        files.fail(operation)
        with pytest.raises(WriteFailed if on_failure == "drop" else expected):
            all_actions(store)[action]()
        assert [name for name, _, _ in spy.calls if name != "get"] == []
        files.heal()
        all_actions(store)[action]()
        assert [name for name, _, _ in spy.calls if name != "get"] == [action]
        assert kinds(log)[-2:] == ["intent", action]


def test_a_change_whose_intent_could_not_be_synced_is_recorded_as_failed() -> None:
    files = FailingFiles()
    with recorded_log(files=files, fsync="interval", fsync_interval=3600.0) as log:
        spy = Spy()
        files.fail("sync_data")
        with pytest.raises(SyncFailed):
            AuditedStore(spy, log.audit, Hooks(before=True)).create(cluster())
        files.heal()
        position = str(log.entries[0].position)
        assert facts(log) == [
            {"action": "create"},
            {"action": "create", "outcome": "failed", "intent": position},
        ]
        assert spy.calls == []


def test_the_stores_own_error_is_raised_where_the_outcome_cannot_be_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:

        class Full(Spy):
            def create(self, *_given: Any) -> Any:
                files.fail("write", errno.ENOSPC)
                raise Conflict("the store's")

        with pytest.raises(Conflict, match="the store's"):
            AuditedStore(Full(), log.audit, Hooks(before=True)).create(cluster())
        files.heal()
        assert "the outcome 'failed' of the intent at" in caplog.text
        assert kinds(log) == ["intent"]


# ---------------------------------------------------------------------- many at once


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


# ---------------------------------------------------------------------- asynchronous stores


class HeldFiles(Files):
    """Syncs take until they are released."""

    def __init__(self) -> None:
        self.began, self.released = threading.Event(), threading.Event()
        self.released.set()

    def sync_data(self, fd: int) -> None:
        self.began.set()
        assert self.released.wait(30)
        super().sync_data(fd)


@pytest.mark.parametrize("fsync", ["always", "interval"])
def test_the_loop_runs_on_while_an_intent_is_synced(fsync: Any) -> None:
    files = HeldFiles()
    with recorded_log(files=files, fsync=fsync, fsync_interval=3600.0) as log:
        inner = AsyncStore()
        store = AsyncAuditedStore(inner, log.audit, Hooks(before=True))
        files.began.clear()
        files.released.clear()

        async def main() -> None:
            task = asyncio.create_task(store.create(cluster()))
            while not files.began.is_set():  # only a loop that runs comes here
                await asyncio.sleep(0.001)
            assert not task.done()
            with pytest.raises(Missing):
                inner.inner.get(*REF)
            files.released.set()
            await task

        asyncio.run(main())
        assert kinds(log) == ["intent", "create"]


class StuckStore(AsyncStore):
    """Creates at once, and never says so."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()

    async def create(self, resource: Resource) -> Any:
        self.inner.create(resource)
        self.reached.set()
        await asyncio.Event().wait()


def test_a_cancelled_change_has_an_unknown_outcome(log: RecordedLog, alice: Session) -> None:
    async def main() -> None:
        inner = StuckStore()
        store = AsyncAuditedStore(inner, log.audit, Hooks(before=True))
        with bind(alice):
            task = asyncio.create_task(store.create(cluster()))
        await inner.reached.wait()
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        assert task.cancelled()

    asyncio.run(main())
    intent = str(log.entries[0].position)
    assert facts(log) == [
        {"action": "create"},
        {"action": "create", "outcome": "unknown", "intent": intent},
    ]
    assert {record["event_data"]["session"]["email"] for record in log.records} == {"alice@example.com"}


def test_a_change_that_is_cancelled_before_it_is_made_has_failed() -> None:
    files = HeldFiles()
    with recorded_log(files=files, fsync="interval", fsync_interval=3600.0) as log:
        inner = AsyncStore()
        files.began.clear()
        files.released.clear()

        async def main() -> None:
            task = asyncio.create_task(
                AsyncAuditedStore(inner, log.audit, Hooks(before=True)).create(cluster())
            )
            while not files.began.is_set():
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            files.released.set()

        asyncio.run(main())
        assert [fact.get("outcome") for fact in facts(log)] == [None, "failed"]
        with pytest.raises(Missing):
            inner.inner.get(*REF)


def test_a_task_that_is_cancelled_while_it_announces_a_change_ends_its_intent(log: RecordedLog) -> None:
    inner = AsyncStore()
    store = AsyncAuditedStore(inner, log.audit, Hooks(before=True))

    async def cancelled() -> None:
        creating = asyncio.create_task(store.create(cluster()))
        await asyncio.sleep(0)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(cancelled())
    assert kinds(log) in ([], ["intent", "intent"])
    assert [fact.get("outcome") for fact in facts(log)] in ([], [None, "failed"])
    with pytest.raises(Missing):
        inner.inner.get(*REF)


def test_a_change_that_is_cancelled_once_it_is_made_is_recorded(log: RecordedLog) -> None:
    class Cancelling(AsyncStore):
        async def create(self, resource: Resource) -> Resource:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # is noticed where the task waits next: for the event to be written
            return self.inner.create(resource)

    async def main() -> None:
        task = asyncio.create_task(AsyncAuditedStore(Cancelling(), log.audit, Hooks()).create(cluster()))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: kinds(log) == ["create"])


def test_a_change_that_is_closed_in_the_middle_leaves_its_intent(log: RecordedLog) -> None:
    async def main() -> None:
        inner = StuckStore()
        change = AsyncAuditedStore(inner, log.audit, Hooks(before=True)).create(cluster())
        while not inner.reached.is_set():
            waiting = change.send(None)  # as a task does it
            waiting._asyncio_future_blocking = False
            if not inner.reached.is_set():
                await asyncio.wait([waiting])
        change.close()  # as a loop does it that ends; nothing can be awaited any more

    asyncio.run(main())
    assert facts(log) == [{"action": "create"}]


def test_who_acts_is_who_is_bound_where_the_change_runs(log: RecordedLog) -> None:
    store = AsyncAuditedStore(AsyncStore(), log.audit, Hooks())

    async def main() -> None:
        with bind(Session(email="starts@example.com")):
            first = asyncio.create_task(store.create(cluster("a")))
            second = store.create(cluster("b"))
        with bind(Session(email="awaits@example.com")):
            await first
            await second

    asyncio.run(main())
    emails = {record["resource_id"]: record["event_data"]["session"]["email"] for record in log.records}
    assert emails == {"a": "starts@example.com", "b": "awaits@example.com"}


def test_errors_of_an_async_store_are_raised_where_it_is_awaited(log: RecordedLog) -> None:
    store: Any = AsyncAuditedStore(AsyncStore(), log.audit, Hooks())

    async def main() -> None:
        change = store.create("no resource")
        with pytest.raises(AttributeError):
            await change
        with pytest.raises(Missing):
            await store.destroy(*REF)

    asyncio.run(main())
    assert log.entries == []


def test_a_store_whose_methods_are_no_coroutine_functions_can_be_awaited(log: RecordedLog) -> None:
    store = AsyncAuditedStore(ResourceStore(), log.audit, Hooks(before=True))
    assert asyncio.run(store.create(cluster())) == cluster()
    assert kinds(log) == ["intent", "create"]


def test_a_closed_log_lets_no_announced_change_happen(log: RecordedLog) -> None:
    spy = Spy()
    store = AuditedStore(spy, log.audit, Hooks(before=True))
    log.audit.close()
    with pytest.raises(LoggerClosed):
        store.create(cluster())
    assert spy.calls == []
