from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    Position,
    Session,
    SyncFailed,
    WriteFailed,
)
from auditlog.capture import bind
from auditlog.capture.hooks import Change, Hooks, SkipEvent
from auditlog.capture.store import AuditedStore
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from examples.control_plane.store import Conflict, Missing, ResourceStore
from tests.capture.helpers import records
from tests.capture.store.helpers import (
    ACTIONS,
    CLUSTERS,
    Spy,
    all_actions,
    cluster,
    facts,
    kinds,
)
from tests.conftest import Start


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
