"""Equal access events as one line."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    Event,
    EventData,
    InvalidSetting,
    K8sAccess,
    LoggerClosed,
    Session,
    WriteFailed,
)
from auditlog.capture.session import Bound, binding
from auditlog.testing import FailingFiles, FixedClock, RecordedLog, recorded_log
from tests.conftest import Start
from tests.helpers import Reading, until

BOB = Session(email="bob@example.com")


def access(log: RecordedLog, method: str = "POST /a") -> object:
    return log.audit.k8s_access(full_method_name=method, cluster_name="c")


def facts(log: RecordedLog) -> list[tuple[str, dict[str, Any]]]:
    """Of each entry, what was called, and our own facts about it."""
    data = [record["event_data"] for record in log.records]
    return [(each["k8s_access"]["full_method_name"], each.get("audit", {})) for each in data]


def test_the_first_is_written_at_once_and_its_repeats_as_a_count(clock: FixedClock, alice: Session) -> None:
    with recorded_log(coalesce=60, clock=clock) as log, log.audit.session(alice):
        first = access(log)
        assert facts(log) == [("POST /a", {})]
        clock.advance(10)
        second_ms = clock.time_ns() // 1_000_000
        assert access(log) == first
        clock.advance(20)
        assert access(log) == first
        assert len(log.records) == 1
        clock.advance(30)
        until(lambda: len(log.records) == 2)
        assert facts(log)[1] == (
            "POST /a",
            {"count": 2, "first_ts": second_ms, "last_ts": second_ms + 20_000},
        )
        entry = log.entries[1].event
        assert entry.event_data.session == alice
        assert entry.event_data.audit is not None
        assert entry.event_data.audit.count == 2
        assert access(log) != first
        assert len(log.records) == 3


def test_only_equal_events_are_counted_together(clock: FixedClock, alice: Session) -> None:
    with recorded_log(coalesce=60, clock=clock) as log:
        for who in (alice, BOB):
            with log.audit.session(who):
                for method in ("POST /a", "POST /b"):
                    for _ in range(3):
                        access(log, method)
        log.audit.talos_access(full_method_name="m", cluster_name="c")
        assert len(log.records) == 5


def test_a_request_id_tells_no_events_apart_and_is_not_in_the_sum(clock: FixedClock, alice: Session) -> None:
    with recorded_log(coalesce=60, clock=clock) as log:
        for number in range(3):
            with binding(Bound(alice, f"request-{number}")):
                access(log)
        log.audit.close()
        assert [fact.get("request_id") for _, fact in facts(log)] == ["request-0", None]
        assert facts(log)[1][1]["count"] == 2


def test_changes_and_events_with_a_time_of_their_own_are_never_counted(clock: FixedClock) -> None:
    with recorded_log(coalesce=60, clock=clock) as log:
        data = EventData(k8s_access=K8sAccess(full_method_name="POST /a"))
        imported = Event(event_type="k8s_access", event_ts=1_000, event_data=data)
        for _ in range(2):
            log.audit.create("T", "1")
            log.audit.write(imported)
        log.audit.write_many([Event(event_type="k8s_access", event_data=data)] * 2)
        assert len(log.records) == 6


def test_awrite_and_write_count_too(clock: FixedClock) -> None:
    with recorded_log(coalesce=60, clock=clock) as log:
        data = EventData(k8s_access=K8sAccess(full_method_name="POST /a"))
        event = Event(event_type="k8s_access", event_data=data)
        first = log.audit.write(event)
        assert asyncio.run(log.audit.awrite(event)) == first
        assert log.audit.write(event) == first
        log.audit.close()
        assert [fact.get("count") for _, fact in facts(log)] == [None, 2]


def test_close_tells_what_was_counted_so_far(directory: Path) -> None:
    audit = AuditLogger(directory, coalesce=3600)
    for _ in range(5):
        audit.k8s_access(full_method_name="POST /a")
    audit.close()
    assert [
        entry.record["event_data"].get("audit", {}).get("count") for entry in Reading(directory).entries
    ] == [
        None,
        4,
    ]


def test_a_closed_log_counts_nothing(directory: Path) -> None:
    async def race() -> None:
        audit = AuditLogger(directory, coalesce=3600)
        data = EventData(k8s_access=K8sAccess(full_method_name="POST /a"))
        event = Event(event_type="k8s_access", event_data=data)
        writing = asyncio.create_task(audit.awrite(event))
        await asyncio.sleep(0)
        audit.close()
        await writing
        with pytest.raises(LoggerClosed):
            audit.write(event)
        with pytest.raises(LoggerClosed):
            await audit.awrite(event)

    asyncio.run(race())
    assert len(Reading(directory).entries) == 1


def test_repeats_that_cannot_be_told_at_the_end_count_as_dropped() -> None:
    files = FailingFiles()
    with recorded_log(coalesce=3600, files=files) as log:
        for _ in range(5):
            access(log)
        files.fail("write")
        log.audit.close()
        assert log.audit.stats().dropped == 4


def test_a_long_event_is_not_kept_to_be_compared() -> None:
    with recorded_log(coalesce=3600) as log:
        for _ in range(3):
            log.audit.k8s_access(full_method_name="POST /a", body="x" * 5000)
        assert len(log.records) == 3


def test_nothing_is_counted_before_the_first_is_in_the_file() -> None:
    files = FailingFiles()
    with recorded_log(coalesce=3600, files=files, on_failure="drop") as log:
        files.fail("write")
        assert access(log) is None
        files.heal()
        assert access(log) is not None
        until(lambda: any(record["event_type"] == "gap" for record in log.records))
        log.audit.close()
        assert sum(record["event_type"] == "k8s_access" for record in log.records) == 1


def test_an_event_that_must_be_there_is_not_dropped_where_accesses_are_counted() -> None:
    files = FailingFiles()
    with recorded_log(coalesce=3600, files=files, on_failure="drop") as log:
        data = EventData(k8s_access=K8sAccess(full_method_name="POST /a"))
        files.fail("write")
        with pytest.raises(WriteFailed):
            log.audit.write(Event(event_type="k8s_access", event_data=data), may_drop=False)


def test_a_sum_that_cannot_be_written_is_told_later(
    clock: FixedClock, caplog: pytest.LogCaptureFixture
) -> None:
    files = FailingFiles()
    with recorded_log(coalesce=60, clock=clock, files=files) as log:
        access(log)
        access(log)
        files.fail("write")
        clock.advance(61)
        until(lambda: "could not be told" in caplog.text)
        files.heal()
        until(lambda: len(log.records) == 2)
        assert facts(log)[1][1]["count"] == 1


def test_secrets_are_replaced_once_in_event_and_sum(clock: FixedClock) -> None:
    key = b"sixteen bytes at least"
    with recorded_log(coalesce=60, clock=clock, redact=["k8s_access.kube_session"], hmac_key=key) as log:
        for _ in range(2):
            log.audit.k8s_access(full_method_name="POST /a", kube_session="s-1")
        log.audit.close()
        first, sum_ = (record["event_data"]["k8s_access"]["kube_session"] for record in log.records)
        assert first == sum_
        assert first.startswith("hmac-sha256:")


def test_a_clock_that_steps_back_begins_a_new_window(clock: FixedClock) -> None:
    with recorded_log(coalesce=60, clock=clock) as log:
        access(log)
        access(log)
        clock.step(-30)
        access(log)
        log.audit.close()
        counts = [fact.get("count") for _, fact in facts(log)]
        assert sorted(counts, key=str) == [1, None, None]


def test_threads_lose_and_double_nothing(directory: Path) -> None:
    audit = AuditLogger(directory, coalesce=3600)

    def work() -> None:
        for number in range(300):
            audit.k8s_access(full_method_name=f"POST /{number % 7}")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    found = [
        entry.record["event_data"].get("audit", {}).get("count", 1) for entry in Reading(directory).entries
    ]
    assert sum(found) == 2400
    assert len(found) < 200


def test_a_killed_process_loses_counts_and_no_first_event(directory: Path, start: Start) -> None:
    process = start("repeat_access", directory, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"repeating\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    methods = [
        entry.record["event_data"]["k8s_access"]["full_method_name"] for entry in Reading(directory).entries
    ]
    assert methods == ["POST /0", "POST /1", "POST /2"]


def test_a_forked_child_leaves_its_parent_the_counts(directory: Path) -> None:
    audit = AuditLogger(directory, coalesce=3600)
    for _ in range(3):
        audit.k8s_access(full_method_name="POST /a")
    child = os.fork()
    if child == 0:
        audit.k8s_access(full_method_name="POST /a")
        audit.close()
        os._exit(0)
    os.waitpid(child, 0)
    audit.close()
    counts = [
        entry.record["event_data"].get("audit", {}).get("count") for entry in Reading(directory).entries
    ]
    assert counts == [None, None, 2]


@pytest.mark.parametrize("coalesce", [0, -1, "60", True])
def test_a_window_is_a_positive_time(directory: Path, coalesce: Any) -> None:
    with pytest.raises(InvalidSetting, match="coalesce"):
        AuditLogger(directory, coalesce=coalesce)
