from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from auditlog import (
    LoggerClosed,
    Session,
)
from auditlog.capture import bind
from auditlog.capture.hooks import Hooks
from auditlog.capture.store import AsyncAuditedStore, AuditedStore
from auditlog.storage.files import Files
from auditlog.testing import RecordedLog, recorded_log
from examples.control_plane.store import Missing, Resource, ResourceStore
from tests.capture.store.helpers import (
    REF,
    AsyncStore,
    Spy,
    cluster,
    facts,
    kinds,
)
from tests.helpers import until


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


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_task_that_is_cancelled_while_it_announces_a_change_ends_its_intent(
    log: RecordedLog, times: int
) -> None:
    inner = AsyncStore()
    store = AsyncAuditedStore(inner, log.audit, Hooks(before=True))

    async def cancelled() -> None:
        creating = asyncio.create_task(store.create(cluster()))
        for _ in range(times):
            await asyncio.sleep(0)
            creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(cancelled())
    log.audit.close()
    assert [fact.get("outcome") for fact in facts(log)] == [None, "failed"]
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
