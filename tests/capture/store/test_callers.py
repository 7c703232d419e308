from __future__ import annotations

import asyncio
import copy
import errno
import pickle
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    InvalidEvent,
    InvalidSetting,
    Session,
    WriteFailed,
)
from auditlog.capture import bind, omni
from auditlog.capture.hooks import Hooks
from auditlog.capture.hooks import Resource as Described
from auditlog.capture.session import Pending, binding
from auditlog.capture.store import AsyncAuditedStore, AuditedStore
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from examples.control_plane.store import Conflict, Resource, ResourceStore
from tests.capture.store.helpers import (
    ACTIONS,
    CLUSTERS,
    REF,
    AsyncStore,
    Spy,
    all_actions,
    cluster,
    facts,
    relabel,
)


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
