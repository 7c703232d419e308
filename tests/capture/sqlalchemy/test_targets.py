from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    Session,
    scoped_session,
    sessionmaker,
)

from auditlog import AuditLogger, InvalidSetting
from auditlog import Session as Actor
from auditlog.capture.session import bind
from auditlog.capture.sqlalchemy import record_changes
from auditlog.testing import RecordedLog
from tests.capture.helpers import records, snippet
from tests.capture.sqlalchemy.helpers import (
    Cluster,
    with_rows,
)


def test_only_the_sessions_of_the_target_are_recorded(engine: Engine, log: RecordedLog) -> None:
    class Own(Session):
        pass

    with Session(engine) as single, Session(engine) as other, Own(engine) as own:
        record_changes(single, log.audit)
        record_changes(Own, log.audit)
        for session in (single, other, own):
            session.add(Cluster(name="x"))
            session.commit()
    assert [record["resource_id"] for record in log.records] == ["1", "3"]


def test_a_disabled_log_costs_nothing(engine: Engine) -> None:
    make = sessionmaker(engine)
    record_changes(make, AuditLogger(None))
    with make() as session:
        assert not session.dispatch.after_flush
        session.add(Cluster(name="x"))
        session.commit()


def test_bad_settings_are_refused(log: RecordedLog) -> None:
    make = sessionmaker()
    make_one: Any = lambda: Session()  # noqa: E731
    for arguments, setting in (
        ((create_engine("sqlite://"), log.audit), "target"),
        ((None, log.audit), "target"),
        ((scoped_session(make_one), log.audit), "target"),
        ((make, log.audit, {}), "hooks"),
    ):
        with pytest.raises(InvalidSetting) as raised:
            record_changes(*arguments)
        assert raised.value.setting == setting
    for most_rows in (-1, True, 1.0):
        with pytest.raises(InvalidSetting):
            record_changes(make, log.audit, most_rows=most_rows)  # type: ignore[arg-type]


def test_the_snippet_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alice: Actor
) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("SQLAlchemy")
    make, cluster = names["sessions"], names["Cluster"]
    names["Base"].metadata.create_all(make.kw["bind"])
    with names["audit"], bind(alice):
        with make.begin() as session:
            session.add(cluster(name="blue", version="1.30.1"))
        with make.begin() as session:
            session.get_one(cluster, "blue").version = "1.30.2"
    make.kw["bind"].dispose()
    created, updated = records(tmp_path / "audit-log")
    for record in (created, updated):
        assert (record["resource_type"], record["resource_id"]) == ("clusters", "blue")
        session = record["event_data"]["session"]
        assert (session["email"], session["ip_address"]) == (alice.email, alice.ip_address)
    assert created["event_data"]["row"] == {"name": "blue", "version": "1.30.1"}
    assert updated["event_data"]["changes"] == [{"path": "row.version", "old": "1.30.1", "new": "1.30.2"}]


def test_async_sessions_keep_their_actors(engine: Engine, log: RecordedLog) -> None:
    async def main() -> None:
        async_engine = create_async_engine(
            f"sqlite+aiosqlite:///{engine.url.database}", connect_args={"timeout": 30}
        )
        make = async_sessionmaker(async_engine)
        record_changes(make, log.audit, with_rows())
        unrecorded = async_sessionmaker(async_engine)

        async def work(number: int) -> None:
            with bind(Actor(email=f"user{number}@example.com")):
                async with make() as session:
                    session.add(Cluster(id=number, name=str(number)))
                    await session.commit()
                    await session.execute(sql_update(Cluster).where(Cluster.id == number).values(size=3))
                    await session.rollback()
                    cluster = await session.get_one(Cluster, number)
                    await session.delete(cluster)
                    await session.commit()

        await asyncio.gather(*(work(number) for number in range(1, 7)))
        async with unrecorded() as session:
            session.add(Cluster(name="x"))
            await session.commit()
        await async_engine.dispose()

    asyncio.run(main())
    seen = log.records
    assert len(seen) == 12
    for record in seen:
        assert record["event_data"]["session"]["email"] == f"user{record['resource_id']}@example.com"


def test_all_kinds_of_async_targets_are_taken(engine: Engine, log: RecordedLog) -> None:
    class Inner(Session):
        pass

    class Own(AsyncSession):
        sync_session_class = Inner

    async def main() -> None:
        async_engine = create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}")
        record_changes(Own, log.audit)
        scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=asyncio.current_task)
        record_changes(scoped, log.audit)
        single = AsyncSession(async_engine)
        record_changes(single, log.audit)
        for session in (Own(async_engine), scoped(), single, AsyncSession(async_engine)):
            async with session:
                session.add(Cluster(name="x"))
                await session.commit()
        await async_engine.dispose()

    asyncio.run(main())
    assert [record["resource_id"] for record in log.records] == ["1", "2", "3"]
