from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AuditLogger,
    Cluster,
    DirectoryError,
    Event,
    EventData,
    InvalidEvent,
    InvalidSetting,
    LoggerClosed,
    Position,
    Retention,
    Session,
)
from auditlog.capture import bind, current, wrap
from auditlog.testing import FixedClock, recorded_log
from tests.helpers import Reading, contents


class TestEvents:
    def test_each_method_writes_its_type(self) -> None:
        with recorded_log() as log:
            for name in ("create", "update", "update_with_conflicts", "teardown", "destroy"):
                getattr(log.audit, name)("Type", name, own={"n": 1})
            log.audit.k8s_access(
                full_method_name="POST /", command="kubectl", cluster_name="c", cluster_uuid="u"
            )
            log.audit.talos_access(full_method_name="m", cluster_name="c", machine_ip="10.5.0.2", own=1)
            records = log.records
        for record in records[:5]:
            assert record["event_type"] == record["resource_id"]
            assert record["resource_type"] == "Type"
            assert record["event_data"]["own"] == {"n": 1}
        assert [record["event_type"] for record in records[5:]] == ["k8s_access", "talos_access"]
        assert records[5]["event_data"]["k8s_access"] == {
            "full_method_name": "POST /",
            "command": "kubectl",
            "cluster_name": "c",
            "cluster_uuid": "u",
        }
        assert records[6]["event_data"] == {
            "talos_access": {"full_method_name": "m", "cluster_name": "c", "machine_ip": "10.5.0.2"},
            "own": 1,
            "session": {"user_agent": "Omni-Internal-Agent"},
        }

    def test_a_write_returns_where_the_line_is(self) -> None:
        with recorded_log() as log:
            positions = [log.audit.create("T", str(number)) for number in range(3)]
            assert positions == [entry.position for entry in log.entries]

    def test_write_many_keeps_the_order_and_refuses_all_for_one(self) -> None:
        with recorded_log() as log:
            events = [Event(event_type="create", resource_id=str(number)) for number in range(3)]
            assert log.audit.write_many(events) == [entry.position for entry in log.entries]
            with pytest.raises(InvalidEvent, match="event_type"):
                log.audit.write_many([*events, Event(event_type="No Type")])
            assert log.audit.write_many([]) == []
            assert len(log.entries) == 3

    def test_nothing_of_a_rejected_event_reaches_the_file(self) -> None:
        with recorded_log() as log:
            for data in ({"x": float("nan")}, {"cluster": {"id": 5}}, {"x": object()}):
                with pytest.raises(InvalidEvent):
                    log.audit.create("T", "1", **data)
            with pytest.raises(InvalidEvent, match="session"):
                log.audit.create("T", "1", session={})
            with pytest.raises(InvalidEvent, match="must be an Event"):
                log.audit.write({"event_type": "create"})  # type: ignore[arg-type]
            assert not [name for name in contents(Path(log.directory)) if name.endswith(".jsonlog")]

    def test_a_time_more_than_a_day_ahead_is_refused(self, clock: FixedClock) -> None:
        day = 86_400_000
        with recorded_log(clock=clock) as log:
            now = clock.time_ns() // 1_000_000
            log.audit.write(Event(event_type="create", event_ts=now + day))
            for event_ts in (now + day + 1, -1):
                with pytest.raises(InvalidEvent, match="event_ts"):
                    log.audit.write(Event(event_type="create", event_ts=event_ts))
            assert len(log.entries) == 1

    def test_a_long_event_is_cut_to_the_limit(self) -> None:
        with recorded_log(max_line_bytes=4096) as log:
            log.audit.create("T", "1", config_patch={"id": "p", "data": "x" * 100_000})
            assert len(log.entries[0].line) <= 4096
            assert "[cut: 100000 bytes, sha256 " in log.records[0]["event_data"]["config_patch"]["data"]


class TestSessions:
    def test_the_bound_session_is_the_events(self, alice: Session) -> None:
        with recorded_log() as log:
            with log.audit.session(alice) as bound:
                assert bound is alice
                assert current() is alice
                log.audit.create("T", "1")
            assert current() is None
            assert log.entries[0].event.event_data.session == alice

    def test_bindings_nest_and_an_error_unbinds(self, alice: Session) -> None:
        bob = Session(email="bob@example.com")
        with suppress(KeyError), bind(alice):
            with bind(bob):
                assert current() is bob
            assert current() is alice
            raise KeyError
        assert current() is None

    def test_without_a_session_the_internal_agent_acts(self) -> None:
        with recorded_log(internal_agent="Our-Agent") as log:
            log.audit.create("T")
            assert log.records[0]["event_data"]["session"] == {"user_agent": "Our-Agent"}

    def test_an_events_own_session_is_kept(self, alice: Session) -> None:
        with recorded_log() as log, log.audit.session(alice):
            log.audit.write(Event(event_type="create", event_data=EventData(session=Session(email="b"))))
            log.audit.write(Event(event_type="create", event_data=EventData(session=Session())))
            log.audit.write(Event(event_type="create", event_data=EventData(cluster=Cluster(id="c"))))
            sessions = [record["event_data"]["session"] for record in log.records]
        assert sessions[:2] == [{"email": "b"}, {}]
        assert sessions[2]["email"] == alice.email

    def test_wrap_carries_the_session_into_a_thread(self, alice: Session) -> None:
        with ThreadPoolExecutor(1) as executor:
            with bind(alice):
                carried, bare = executor.submit(wrap(current)), executor.submit(current)
            assert carried.result() is alice
            assert bare.result() is None
            assert executor.submit(current).result() is None

    def test_wrap_carries_it_into_a_coroutine_of_another_loop(self, alice: Session) -> None:
        async def who() -> Session | None:
            await asyncio.sleep(0)
            return current()

        with bind(alice):
            carried = wrap(who)
        assert asyncio.run(carried()) is alice

    def test_concurrent_tasks_never_mix(self) -> None:
        async def act(log: AuditLogger, number: int) -> None:
            with log.session(Session(email=str(number))):
                await asyncio.sleep(0)
                log.create("T", str(number))
                await log.awrite(Event(event_type="update", resource_id=str(number)))

        async def act_all(log: AuditLogger) -> None:
            await asyncio.gather(*(act(log, number) for number in range(50)))

        with recorded_log() as log:
            asyncio.run(act_all(log.audit))
            assert len(log.records) == 100
            for record in log.records:
                assert record["event_data"]["session"]["email"] == record["resource_id"]

    @pytest.mark.parametrize("session", [None, {}, "alice", {"email": "a"}])
    def test_what_is_no_session_is_refused(self, session: Any) -> None:
        with pytest.raises(InvalidEvent, match="must be a Session"), recorded_log() as log:
            log.audit.session(session)


class TestAwrite:
    def test_it_does_not_block_the_loop(self) -> None:
        async def main(log: AuditLogger) -> Position | None:
            assert log._engine is not None
            with log._engine.writer.locked():  # keeps all other threads from writing
                writing = asyncio.create_task(log.awrite(Event(event_type="create")))
                for _ in range(100):
                    await asyncio.sleep(0)
                assert not writing.done()
            return await writing

        with recorded_log() as log:
            assert asyncio.run(main(log.audit)) == log.entries[0].position

    def test_tasks_that_wait_together_are_written_and_synced_together(self) -> None:
        async def write_all(log: AuditLogger) -> list[Position | None]:
            await log.awrite(Event(event_type="create"))
            assert log._engine is not None
            with log._engine.writer.locked():
                writing = [asyncio.create_task(log.awrite(Event(event_type="create"))) for _ in range(100)]
                await asyncio.sleep(0)
            return await asyncio.gather(*writing)

        with recorded_log(fsync="always") as log:
            positions = asyncio.run(write_all(log.audit))
            assert positions == [entry.position for entry in log.entries[1:]]
            assert log.audit.durable_through() == positions[-1]
            assert log.audit.stats().syncs <= 3

    def test_tasks_of_several_loops_and_threads_share_it(self) -> None:
        async def write_some(log: AuditLogger, name: str) -> None:
            for number in range(20):
                await log.awrite(Event(event_type="create", resource_id=f"{name}-{number}"))

        with recorded_log(fsync="always") as log:
            with ThreadPoolExecutor(4) as executor:
                for name in "abcd":
                    executor.submit(asyncio.run, write_some(log.audit, name))
                    executor.submit(log.audit.create, "T", name)
            ids = sorted(record["resource_id"] for record in log.records)
        assert ids == sorted([*"abcd", *(f"{name}-{number}" for name in "abcd" for number in range(20))])

    def test_an_event_that_is_refused_and_a_closed_log_are_told_at_once(self, directory: Path) -> None:
        log = AuditLogger(directory)
        with pytest.raises(InvalidEvent):
            asyncio.run(log.awrite(Event(event_type="No Type")))
        asyncio.run(log.awrite(Event(event_type="create")))
        log.close()
        with pytest.raises(LoggerClosed):
            asyncio.run(log.awrite(Event(event_type="create")))
        assert len(Reading(directory).entries) == 1

    def test_one_that_is_cancelled_disturbs_nobody(self) -> None:
        async def main(log: AuditLogger) -> Position | None:
            assert log._engine is not None
            with log._engine.writer.locked():
                cancelled = asyncio.create_task(log.awrite(Event(event_type="create", resource_id="perhaps")))
                writing = asyncio.create_task(log.awrite(Event(event_type="create", resource_id="1")))
                await asyncio.sleep(0)
                cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            return await writing

        with recorded_log() as log:
            position = asyncio.run(main(log.audit))
            assert position in {entry.position for entry in log.entries}

    def test_close_writes_what_was_handed_over_and_ends_the_thread(self, directory: Path) -> None:
        async def main() -> list[Position | None]:
            writing = [asyncio.create_task(log.awrite(Event(event_type="create"))) for _ in range(50)]
            await asyncio.sleep(0)
            log.close()
            return await asyncio.gather(*writing)

        before = threading.active_count()
        log = AuditLogger(directory)
        positions = asyncio.run(main())
        assert positions == [entry.position for entry in Reading(directory).entries]
        assert threading.active_count() == before

    def test_a_forked_child_writes_what_it_was_given_and_nothing_of_its_parents(
        self, directory: Path
    ) -> None:
        log = AuditLogger(directory, fsync="always")

        async def write(resource_id: str) -> None:
            await log.awrite(Event(event_type="create", resource_id=resource_id))

        asyncio.run(write("parent"))
        pid = os.fork()
        if pid == 0:
            asyncio.run(write("child"))
            log.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        asyncio.run(write("parent again"))
        log.close()
        assert Reading(directory).ids == ["parent", "child", "parent again"]


class TestDisabled:
    @pytest.mark.parametrize("directory", ["", None])
    def test_without_a_directory_every_write_is_a_no_op(self, directory: str | None, alice: Session) -> None:
        with AuditLogger(directory) as log, log.session(alice):
            assert not log.enabled
            assert log.create("T", "1") is None
            assert log.k8s_access(full_method_name="GET /") is None
            assert log.write(Event(event_type="create")) is None
            assert asyncio.run(log.awrite(Event(event_type="create"))) is None
            assert log.write_many([Event(event_type="create")]) == []
            assert log.durable_through() is None
            assert log.retention_status().report is None
            log.flush()
        log.close()

    def test_with_a_directory_it_is_enabled(self, directory: Path) -> None:
        with AuditLogger(directory) as log:
            assert log.enabled


class TestClose:
    def test_a_write_after_close_is_an_error(self, directory: Path) -> None:
        log = AuditLogger(directory)
        log.create("T", "1")
        log.close()
        log.close()
        log.flush()
        with pytest.raises(LoggerClosed, match="is closed; make a new one"):
            log.create("T", "2")
        assert Reading(directory).ids == ["1"]

    def test_close_ends_all_threads(self, directory: Path) -> None:
        before = threading.active_count()
        with AuditLogger(directory):
            assert threading.active_count() > before
        assert threading.active_count() == before


class TestSettings:
    @pytest.mark.parametrize(
        "options",
        [
            {"fsync": "sometimes"},
            {"fsync_interval": 0},
            {"fsync_interval": -1.0},
            {"fsync_interval": "1"},
            {"lock_timeout": timedelta(0)},
            {"max_line_bytes": 100},
            {"max_line_bytes": 1 << 30},
            {"max_line_bytes": 1e6},
            {"on_failure": "shrug"},
            {"redact": ["a b"]},
            {"hmac_key": b"short"},
            {"retention": 30},
            {"timezone": "Mars/Olympus"},
        ],
        ids=str,
    )
    def test_an_option_that_makes_no_sense_is_refused_and_nothing_is_made(
        self, directory: Path, options: dict[str, Any]
    ) -> None:
        (name,) = options
        with pytest.raises(InvalidSetting, match=f"^{name}="):
            AuditLogger(directory, **options)
        assert not directory.exists()

    def test_durations_may_be_timedeltas(self, directory: Path) -> None:
        AuditLogger(directory, fsync_interval=timedelta(seconds=2), lock_timeout=timedelta(minutes=1)).close()

    def test_a_file_is_no_directory(self, directory: Path) -> None:
        directory.write_bytes(b"mine")
        with pytest.raises(DirectoryError, match="not a directory; name a directory, not a file") as caught:
            AuditLogger(directory)
        assert caught.value.path == str(directory)
        assert directory.read_bytes() == b"mine"

    def test_somebody_elses_directory_is_refused(self, directory: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        directory.mkdir()
        os.chown(directory, 12345, -1)
        with pytest.raises(DirectoryError, match=r"belongs to user 12345.*chown"):
            AuditLogger(directory)
        assert list(directory.iterdir()) == []

    def test_a_directory_that_cannot_be_written_is_refused(self) -> None:
        with recorded_log():  # loads all modules, which another user may not be able to read
            pass
        with tempfile.TemporaryDirectory() as parent:
            os.chmod(parent, 0o755)
            directory = Path(parent) / "audit-log"
            directory.mkdir(mode=0o500)
            if os.geteuid() == 0:
                os.chown(directory, 65534, -1)
            child = os.fork()
            if child == 0:  # root may write anywhere: be somebody else
                try:
                    if os.geteuid() == 0:
                        os.setuid(65534)
                    AuditLogger(directory)
                except DirectoryError as error:
                    os._exit(0 if "permission denied; give this user the right" in str(error) else 2)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            directory.chmod(0o700)

    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        with AuditLogger(tmp_path / "a" / "b" / "audit-log", retention=Retention(days=1)) as log:
            log.create("T", "1")
        assert Reading(tmp_path / "a" / "b" / "audit-log").ids == ["1"]
