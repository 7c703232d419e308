"""Changes of rows as events, with real SQLite files."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Engine, ForeignKey, Table, create_engine, event, func, select
from sqlalchemy import delete as sql_delete
from sqlalchemy import insert as sql_insert
from sqlalchemy import update as sql_update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.types import JSON

from auditlog import AuditLogger, InvalidSetting, WriteFailed
from auditlog import Session as Actor
from auditlog.capture.hooks import Change, Hooks, SkipEvent
from auditlog.capture.session import Pending, bind, binding
from auditlog.capture.sqlalchemy import record_changes
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.helpers import records, snippet


class Base(DeclarativeBase):
    pass


tagging = Table(
    "tagging",
    Base.metadata,
    Column("cluster_id", ForeignKey("clusters.id"), primary_key=True),
    Column("tag_id", ForeignKey("tags.id"), primary_key=True),
)


class Cluster(Base):
    __tablename__ = "clusters"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    size: Mapped[int] = mapped_column(default=1)
    changed: Mapped[int] = mapped_column(default=0, onupdate=lambda: 7)
    machines: Mapped[list[Machine]] = relationship(back_populates="cluster", cascade="all, delete-orphan")
    tags: Mapped[list[Tag]] = relationship(secondary=tagging, back_populates="clusters")


class Tag(Base):
    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True)
    clusters: Mapped[list[Cluster]] = relationship(secondary=tagging, back_populates="tags")


class Machine(Base):
    __tablename__ = "machines"
    __audit_type__ = "Machines.example.com"
    rack: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    cluster_id: Mapped[int | None] = mapped_column(
        ForeignKey("clusters.id", deferrable=True, initially="DEFERRED")
    )
    cluster: Mapped[Cluster | None] = relationship(back_populates="machines")


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "user"}  # noqa: RUF012


class Admin(User):
    __tablename__ = "admins"
    id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    level: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "admin"}  # noqa: RUF012


class Color(Enum):
    RED = "red"


class Odd(Base):
    __tablename__ = "odds"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[Decimal]
    at: Mapped[datetime]
    raw: Mapped[bytes]
    color: Mapped[Color]
    nested: Mapped[Any] = mapped_column(JSON)
    span: Mapped[timedelta]


class Versioned(Base):
    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


TYPES = ("clusters", "tags", "Machines.example.com", "users", "admins", "odds", "versioned")


def with_rows(**options: Any) -> Hooks:
    """Hooks whose events tell all that is known of a row."""
    hooks = Hooks()

    @hooks.on(*TYPES, **options)
    def row(change: Change) -> dict[str, Any]:
        return {side: getattr(change, side).content for side in ("old", "new") if getattr(change, side)}

    return hooks


class Site:
    """A database in a file, sessions that are recorded, and the log."""

    def __init__(self, engine: Engine, log: RecordedLog, hooks: Hooks | None = None, **options: Any) -> None:
        self.engine = engine
        self.log = log
        self.make = sessionmaker(engine)
        record_changes(self.make, log.audit, with_rows() if hooks is None else hooks, **options)

    @property
    def told(self) -> list[tuple[str, str, str]]:
        """What the events since the last look say."""
        return [
            (record["event_type"], record["resource_type"], record.get("resource_id", ""))
            for record in self.seen()
        ]

    def seen(self) -> list[dict[str, Any]]:
        found = self.log.records[getattr(self, "_seen", 0) :]
        self._seen = getattr(self, "_seen", 0) + len(found)
        return found

    def details(self) -> list[dict[str, Any]]:
        """The details of the events since the last look, without the session."""
        return [
            {name: value for name, value in record["event_data"].items() if name != "session"}
            for record in self.seen()
        ]


def engine_for(path: Path) -> Engine:
    """An engine with transactions as other databases have them: SAVEPOINT works, and foreign keys hold."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = engine_for(tmp_path / "fleet.db")
    yield engine
    engine.dispose()


@pytest.fixture
def log() -> Iterator[RecordedLog]:
    with recorded_log() as log:
        yield log


@pytest.fixture
def site(engine: Engine, log: RecordedLog) -> Site:
    return Site(engine, log)


@pytest.fixture
def filled(site: Site) -> Site:
    """With five clusters, a to e, of sizes 1 to 5."""
    with site.make.begin() as session:
        session.add_all([Cluster(id=n, name="abcde"[n - 1], size=n) for n in range(1, 6)])
    site.seen()
    return site


# ---------------------------------------------------------------------- flushes


def test_create_update_and_destroy_are_told_with_what_the_row_had(site: Site, alice: Actor) -> None:
    with bind(alice):
        with site.make.begin() as session:
            session.add(Cluster(name="blue"))
        with site.make.begin() as session:
            session.get_one(Cluster, 1).name = "green"
        with site.make.begin() as session:
            session.delete(session.get_one(Cluster, 1))
    seen = site.seen()
    assert [(each["event_type"], each["resource_id"]) for each in seen] == [
        ("create", "1"),
        ("update", "1"),
        ("destroy", "1"),
    ]
    created = {"id": 1, "name": "blue", "size": 1, "changed": 0}
    updated = {"id": 1, "name": "green", "size": 1, "changed": 7}
    assert seen[0]["event_data"]["new"] == created
    assert (seen[1]["event_data"]["old"], seen[1]["event_data"]["new"]) == (created, updated)
    assert seen[2]["event_data"]["old"] == updated
    assert all(each["event_data"]["session"]["email"] == alice.email for each in seen)


def test_nothing_is_written_before_the_commit_or_after_a_rollback(site: Site) -> None:
    with site.make() as session:
        session.add(Cluster(name="blue"))
        session.flush()
        assert site.told == []
        session.rollback()
        assert site.told == []
        session.add(Cluster(name="green"))  # the same session, which starts clean
        session.commit()
        assert site.told == [("create", "clusters", "1")]
        session.add(Cluster(name="red"))
        session.flush()
    assert site.told == []  # closed without a commit


def test_a_flush_that_changes_nothing_tells_nothing(filled: Site) -> None:
    with filled.make.begin() as session:
        cluster = session.get_one(Cluster, 1)
        cluster.name = "x"
        cluster.name = "a"
        assert cluster in session.dirty
    assert filled.told == []


def test_what_the_database_computes_is_told(filled: Site) -> None:
    with filled.make.begin() as session:
        cluster: Any = session.get_one(Cluster, 2)
        cluster.size = Cluster.size + 40
    (details,) = filled.details()
    assert (details["old"]["size"], details["new"]["size"]) == (2, 42)


def test_an_old_value_that_was_not_loaded_is_left_out(filled: Site) -> None:
    with filled.make.begin() as session:
        cluster = session.get_one(Cluster, 2)
        session.expire(cluster)
        cluster.name = "x"
    (details,) = filled.details()
    rest = {"id": 2, "size": 2}  # loaded by the flush, and not changed
    assert details == {"old": rest, "new": rest | {"name": "x", "changed": 7}}


def test_a_version_counter_is_told_as_it_was(site: Site) -> None:
    with site.make.begin() as session:
        session.add(Versioned(name="x"))
    with site.make.begin() as session:
        session.get_one(Versioned, 1).name = "y"
    _, details = site.details()
    assert details["old"] == {"id": 1, "name": "x", "version": 1}
    assert details["new"] == {"id": 1, "name": "y", "version": 2}


def test_a_diff_names_the_columns(engine: Engine, log: RecordedLog) -> None:
    site = Site(engine, log, with_rows(diff="cluster"))
    with site.make() as session:
        session.add(Cluster(name="blue"))
        session.commit()
        session.get_one(Cluster, 1).name = "green"
        session.commit()
    changed = site.details()[1]["changes"]
    assert {"path": "cluster.name", "old": "blue", "new": "green"} in changed


def test_a_row_that_comes_and_goes_in_a_transaction_has_both_events(site: Site) -> None:
    with site.make.begin() as session:
        cluster = Cluster(name="blue")
        session.add(cluster)
        session.flush()
        session.delete(cluster)
    assert site.told == [("create", "clusters", "1"), ("destroy", "clusters", "1")]


def test_a_row_that_takes_the_place_of_another_has_both_events(filled: Site) -> None:
    with filled.make.begin() as session:
        session.delete(session.get_one(Cluster, 1))
        session.add(Cluster(id=1, name="new"))
    assert filled.told == [("destroy", "clusters", "1"), ("create", "clusters", "1")]


def test_cascades_and_orphans_are_told(site: Site) -> None:
    with site.make.begin() as session:
        machines = [Machine(rack="r1", slot=n) for n in (1, 2)]
        session.add(Cluster(name="blue", machines=machines))
    assert site.told == [
        ("create", "clusters", "1"),
        ("create", "Machines.example.com", "r1,1"),
        ("create", "Machines.example.com", "r1,2"),
    ]
    with site.make.begin() as session:
        cluster = session.get_one(Cluster, 1)
        cluster.machines.pop()
    assert site.told == [("destroy", "Machines.example.com", "r1,2")]
    with site.make.begin() as session:
        session.delete(session.get_one(Cluster, 1))
    assert sorted(site.told) == [
        ("destroy", "Machines.example.com", "r1,1"),
        ("destroy", "clusters", "1"),
    ]


def test_a_foreign_key_that_the_flush_sets_is_an_update(site: Site) -> None:
    with site.make.begin() as session:
        session.add_all([Cluster(name="blue"), Machine(rack="r1", slot=1)])
    site.seen()
    with site.make.begin() as session:
        cluster = session.get_one(Cluster, 1)
        cluster.machines.append(session.get_one(Machine, ("r1", 1)))
    (details,) = site.details()
    assert (details["old"]["cluster_id"], details["new"]["cluster_id"]) == (None, 1)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_many_to_many_collection_is_part_of_both_rows(filled: Site, loaded: bool) -> None:
    with filled.make.begin() as session:
        session.add(Tag(id=1, clusters=[session.get_one(Cluster, 1)]))
    assert filled.told == [("create", "tags", "1"), ("update", "clusters", "1")]
    with filled.make.begin() as session:
        tag = session.get_one(Tag, 1)
        if loaded:
            assert len(tag.clusters) == 1
        cluster = session.get_one(Cluster, 2)
        cluster.tags.append(tag)
    by_type = {each["resource_type"]: each["event_data"]["new"] for each in filled.seen()}
    assert by_type["clusters"]["tags"] == {"added": ["1"], "removed": []}
    assert by_type["tags"]["clusters"] == {"added": ["2"], "removed": []}
    with filled.make.begin() as session:
        cluster = session.get_one(Cluster, 1)
        cluster.tags.clear()
    by_type = {each["resource_type"]: each["event_data"]["new"] for each in filled.seen()}
    assert by_type["clusters"]["tags"] == {"added": [], "removed": ["1"]}


def test_each_class_of_an_inheritance_has_its_type_and_columns(site: Site) -> None:
    with site.make.begin() as session:
        session.add_all([User(name="u"), Admin(name="a", level=1)])
    assert sorted(site.told) == [("create", "admins", "2"), ("create", "users", "1")]
    with site.make.begin() as session:
        session.get_one(Admin, 2).level = 2
    (details,) = site.details()
    assert details["new"] == {"id": 2, "kind": "admin", "name": "a", "level": 2}
    with site.make.begin() as session:
        session.execute(sql_update(User).values(name="x"))
    assert sorted(site.told) == [("update", "admins", "2"), ("update", "users", "1")]
    with site.make.begin() as session:
        session.execute(sql_update(Admin).where(Admin.level == 2).values(level=3))
    (details,) = site.details()
    assert (details["old"]["level"], details["new"]["level"]) == (2, 3)


def test_values_that_json_has_no_form_for_are_told(site: Site) -> None:
    loop: dict[str, Any] = {"n": [1, {"x": None}]}
    with site.make.begin() as session:
        odd = Odd(price=Decimal("1.50"), at=datetime(2024, 8, 12, 12), raw=b"abc", color=Color.RED)  # noqa: DTZ001
        odd.nested, odd.span = loop, timedelta(seconds=1)
        session.add(odd)
    (details,) = site.details()
    assert details["new"] == {
        "id": 1,
        "price": details["new"]["price"],
        "at": "2024-08-12T12:00:00",
        "raw": "[3 bytes]",
        "color": "red",
        "nested": {"n": [1, {"x": None}]},
        "span": "0:00:01",
    }
    assert Decimal(details["new"]["price"]) == Decimal("1.5")


# ---------------------------------------------------------------------- transactions


def test_what_was_rolled_back_to_a_savepoint_is_dropped(site: Site) -> None:
    with site.make.begin() as session:
        session.add(Cluster(name="outer"))
        with session.begin_nested():
            session.add(Cluster(name="kept"))
            with session.begin_nested() as inner:
                session.add(Cluster(name="lost"))
                session.flush()
                inner.rollback()
            with session.begin_nested():
                session.add(Cluster(name="deep"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(Cluster(id=1, name="twice"))
        session.add(Cluster(name="last"))
    names = [details["new"]["name"] for details in site.details()]
    assert names == ["outer", "kept", "deep", "last"]
    with site.make() as session:
        assert names == list(session.scalars(select(Cluster.name).order_by(Cluster.id)))


def test_a_released_savepoint_goes_with_its_transaction(site: Site) -> None:
    with site.make() as session:
        with session.begin_nested():
            session.add(Cluster(name="blue"))
        session.rollback()
    assert site.told == []


def test_a_commit_with_an_open_savepoint_tells_of_it(site: Site) -> None:
    with site.make() as session:
        session.begin_nested()
        session.add(Cluster(name="blue"))
        session.commit()
    with site.make() as session, session.begin():
        session.begin_nested()
        session.add(Cluster(name="green"))
    assert site.told == [("create", "clusters", "1"), ("create", "clusters", "2")]


def test_a_commit_that_fails_tells_nothing(site: Site) -> None:
    with site.make() as session:
        session.add(Machine(rack="r1", slot=1, cluster_id=99))  # found out by the COMMIT
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()
        session.add(Cluster(name="blue"))
        session.commit()
    assert site.told == [("create", "clusters", "1")]


def test_threads_and_their_actors_do_not_mix(engine: Engine, log: RecordedLog) -> None:
    site = Site(engine, log)
    scoped = scoped_session(site.make)

    def work(number: int) -> None:
        with bind(Actor(email=f"user{number}@example.com")):
            for step in range(5):
                scoped.add(Cluster(name=f"{number}"))
                scoped.commit() if step % 2 == 0 else scoped.rollback()
            scoped.remove()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = site.seen()
    assert len(seen) == 24
    for record in seen:
        data = record["event_data"]
        assert data["session"]["email"] == f"user{data['new']['name']}@example.com"


def test_each_flush_has_the_actor_who_made_it(site: Site, alice: Actor) -> None:
    with site.make() as session:
        with bind(alice):
            session.add(Cluster(name="hers"))
            session.flush()
        session.add(Cluster(name="nobody's"))
        session.flush()
        with bind(Actor(email="bob@example.com")):
            session.add(Cluster(name="his"))
            session.commit()
    emails = [each["event_data"]["session"].get("email") for each in site.seen()]
    assert emails == [alice.email, None, "bob@example.com"]


def test_an_actor_who_is_a_row_of_the_same_session_is_found(filled: Site) -> None:
    with filled.make() as session:
        cluster = session.get_one(Cluster, 1)
        pending = Pending(lambda: (Actor(), ""), lambda: Actor(email=cluster.name))
        with binding(pending):
            for name in ("x", "y"):
                session.commit()  # expires what the actor is taken from
                session.add(Tag(id=ord(name)))
                session.commit()
    assert [each["event_data"]["session"]["email"] for each in filled.seen()] == ["a", "a"]


def test_an_actor_who_cannot_be_found_prevents_the_change(filled: Site) -> None:
    def nobody() -> Actor:
        raise LookupError("no such user")

    with filled.make() as session:
        with binding(Pending(lambda: (Actor(), ""), nobody)):
            session.add(Tag(id=1))
            with pytest.raises(LookupError):
                session.commit()
            session.rollback()
            with pytest.raises(LookupError):
                session.execute(sql_delete(Cluster))
            session.commit()
        assert session.scalar(select(func.count()).select_from(Cluster)) == 5
    assert filled.told == []


def test_a_write_that_fails_is_raised_to_the_committer_whose_session_lives_on(
    engine: Engine, tmp_path: Path
) -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:
        site = Site(engine, log)
        with site.make() as session:
            files.fail("write")
            cluster = Cluster(name="blue")
            session.add(cluster)
            with pytest.raises(WriteFailed):
                session.commit()
            files.heal()
            assert not session.in_transaction()
            assert cluster.name == "blue"  # it was made
            cluster.name = "green"
            session.commit()
        files.fail("write")
        with pytest.raises(WriteFailed), site.make.begin() as session:
            session.add(Cluster(name="red"))
        files.heal()
        with site.make() as session:
            assert session.scalars(select(Cluster.name).order_by(Cluster.id)).all() == ["green", "red"]
        assert site.told == [("update", "clusters", "1")]
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_hooks_decide_and_what_they_fail_at_loses_no_event(
    engine: Engine, log: RecordedLog, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks(others="skip")
    hooks.plain("users")

    @hooks.on("clusters")
    def cluster(change: Change) -> dict[str, Any]:
        match change.content["name"]:
            case "raise":
                raise ZeroDivisionError
            case "unwritable":
                return {"x": object()}
            case "skip":
                raise SkipEvent
        return {"name": change.content["name"]}

    @hooks.on("tags", internal="skip")
    def tag(change: Change) -> dict[str, Any]:
        return {}

    site = Site(engine, log, hooks)
    with caplog.at_level(logging.CRITICAL, "auditlog"), site.make.begin() as session:
        names = ("good", "raise", "unwritable", "skip", "last")
        session.add_all([Cluster(name=name) for name in names])
        session.add_all([Tag(id=1), User(name="u"), Versioned(name="v")])
    seen = {(each["resource_type"], each["resource_id"]): each["event_data"] for each in site.seen()}
    assert [(*ref, data.get("name")) for ref, data in sorted(seen.items())] == [
        ("clusters", "1", "good"),
        ("clusters", "2", None),
        ("clusters", "3", None),
        ("clusters", "5", "last"),
        ("users", "1", None),
    ]


# ---------------------------------------------------------------------- intents


def test_an_intent_precedes_the_commit_and_is_closed_by_the_event(engine: Engine, log: RecordedLog) -> None:
    site = Site(engine, log, with_rows(before=True))
    with site.make() as session:
        session.add(Cluster(name="blue"))
        with session.begin_nested():
            session.add(Tag(id=1))
        session.flush()
        assert site.told == [("intent", "clusters", "1"), ("intent", "tags", "1")]
        intents = [str(entry.position) for entry in log.entries]
        session.commit()
    created = site.seen()
    assert [each["event_type"] for each in created] == ["create", "create"]
    assert [each["event_data"]["audit"]["intent"] for each in created] == intents


@pytest.mark.parametrize("end", ["rollback", "close", "commit fails", "savepoint", "connection breaks"])
def test_an_intent_whose_change_was_not_made_says_so(engine: Engine, log: RecordedLog, end: str) -> None:
    site = Site(engine, log, with_rows(before=True))
    with site.make() as session:
        if end == "savepoint":
            session.begin_nested()
        session.add(Machine(rack="r1", slot=1, cluster_id=99 if end == "commit fails" else None))
        session.flush()
        if end == "commit fails":
            with pytest.raises(IntegrityError):
                session.commit()
        elif end == "connection breaks":
            session.connection().invalidate()
            with pytest.raises(PendingRollbackError):
                session.commit()
        if end == "savepoint":
            session.get_nested_transaction().rollback()  # type: ignore[union-attr]
        elif end != "close":
            session.rollback()
    intent, closing_ = site.details()
    assert intent == {"audit": {"action": "create"}}
    outcome = "unknown" if end == "connection breaks" else "failed"
    assert closing_ == {
        "audit": {"action": "create", "outcome": outcome, "intent": str(log.entries[0].position)}
    }


@pytest.mark.parametrize("on_failure", ["raise", "drop"])
def test_a_change_whose_intent_cannot_be_written_is_not_made(engine: Engine, on_failure: str) -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure=on_failure) as log:
        site = Site(engine, log, with_rows(before=True))
        with site.make() as session:
            session.add(Cluster(name="blue"))
            files.fail("write")
            with pytest.raises(WriteFailed):
                session.commit()
            files.heal()
            session.rollback()
            assert session.scalars(select(Cluster)).all() == []
        assert {action for action, *_ in site.told} <= {"gap"}


def test_an_actor_whose_events_cannot_be_written_takes_nobody_elses_along(
    engine: Engine, alice: Actor
) -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:
        site = Site(engine, log)
        with site.make() as session:
            for actor in (alice, Actor(email="bob@example.com")):
                with bind(actor):
                    session.add(Cluster(name=actor.email))
                    session.flush()
            files.fail("write", times=1)
            with pytest.raises(WriteFailed):
                session.commit()
        assert [each["event_data"]["session"]["email"] for each in site.seen()] == ["bob@example.com"]


# ---------------------------------------------------------------------- statements


@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch", False])
@pytest.mark.parametrize("way", ["execute", "query", "returning"])
def test_an_update_by_criteria_tells_of_each_row(filled: Site, sync: Any, way: str) -> None:
    with filled.make.begin() as session:
        kept = session.get_one(Cluster, 4)
        kept.size = 40  # to be flushed before
        options = {"synchronize_session": sync}
        statement = sql_update(Cluster).where(Cluster.size > 3).values(size=Cluster.size + 1)
        if way == "execute":
            assert session.execute(statement, execution_options=options).rowcount == 2  # type: ignore[attr-defined]
        elif way == "query":
            wanted: Any = session.query(Cluster).filter(Cluster.size > 3)
            assert wanted.update({"size": Cluster.size + 1}, synchronize_session=sync) == 2
        else:
            found = session.execute(statement.returning(Cluster.id), execution_options=options).all()
            assert sorted(found) == [(4,), (5,)]
    seen = [(each["resource_id"], each["event_data"]) for each in filled.seen()]
    assert [(ref, data["old"]["size"], data["new"]["size"]) for ref, data in seen] == [
        ("4", 4, 40),
        ("4", 40, 41),
        ("5", 5, 6),
    ]


@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch", False])
@pytest.mark.parametrize("way", ["execute", "query", "returning"])
def test_a_delete_by_criteria_tells_what_each_row_had(filled: Site, sync: Any, way: str) -> None:
    with filled.make.begin() as session:
        statement = sql_delete(Cluster).where(Cluster.size > 3)
        options = {"synchronize_session": sync}
        if way == "execute":
            assert session.execute(statement, execution_options=options).rowcount == 2  # type: ignore[attr-defined]
        elif way == "query":
            assert session.query(Cluster).filter(Cluster.size > 3).delete(synchronize_session=sync) == 2
        else:
            found = session.scalars(statement.returning(Cluster.id), execution_options=options).all()
            assert sorted(found) == [4, 5]
    seen = filled.seen()
    assert [(each["event_type"], each["resource_id"]) for each in seen] == [
        ("destroy", "4"),
        ("destroy", "5"),
    ]
    assert [each["event_data"]["old"]["name"] for each in seen] == ["d", "e"]


def test_rows_that_a_statement_does_not_change_or_find_have_no_event(filled: Site) -> None:
    with filled.make.begin() as session:
        session.execute(sql_update(Cluster).where(Cluster.id < 3).values(name="a", changed=0))
        session.execute(sql_delete(Cluster).where(Cluster.id > 99))
    assert filled.told == [("update", "clusters", "2")]


def test_more_rows_than_the_bound_have_one_event(engine: Engine, log: RecordedLog) -> None:
    site = Site(engine, log, most_rows=2)
    with site.make.begin() as session:
        session.execute(sql_insert(Cluster), [{"name": name} for name in "abc"])
        session.execute(sql_update(Cluster).where(Cluster.name != "secret").values(size=9))
        session.execute(sql_update(Cluster), [{"id": n, "size": 8} for n in (1, 2, 3)])
        session.execute(sql_delete(Cluster).where(Cluster.size == 8))
    seen = site.seen()
    assert [each["event_type"] for each in seen] == ["create", "update", "update", "destroy"]
    assert all("resource_id" not in each or each["resource_id"] == "" for each in seen)
    assert [each["event_data"].get("audit", {}).get("count") for each in seen] == [3, 3, None, 3]
    assert seen[1]["event_data"]["statement"].startswith("UPDATE clusters SET")
    assert seen[3]["event_data"]["statement"] == "DELETE FROM clusters WHERE clusters.size = :size_1"
    assert b"secret" not in b"".join(entry.line for entry in log.entries)


def test_a_statement_that_others_change_is_told_by_what_it_did(filled: Site) -> None:
    """Another listener narrows the statement: what was read before is not what it did."""

    @event.listens_for(filled.make, "do_orm_execute")
    def narrow(state: Any) -> None:
        if state.is_delete:
            state.statement = state.statement.where(Cluster.id < 2)

    with filled.make.begin() as session:
        session.execute(sql_delete(Cluster))
    assert filled.told == [("destroy", "clusters", "1")]


def test_a_statement_that_affects_other_rows_than_were_read_has_one_event(filled: Site) -> None:
    """Somebody changes rows between our look and the statement."""

    @event.listens_for(filled.engine, "before_cursor_execute", retval=True)
    def more(connection: Any, cursor: Any, sql: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        if sql.startswith("DELETE"):
            cursor.execute("INSERT INTO clusters VALUES (9, 'i', 9, 0)")
        return sql, parameters

    with filled.make.begin() as session:
        session.execute(sql_delete(Cluster).where(Cluster.size > 4))
    (record,) = filled.seen()
    assert (record["event_type"], record.get("resource_id")) == ("destroy", None)
    assert record["event_data"]["audit"] == {"count": 2}


def test_inserts_tell_of_each_row(site: Site) -> None:
    with site.make.begin() as session:
        session.execute(sql_insert(Cluster), [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
        session.execute(sql_insert(Cluster), {"id": 3, "name": "c"})
        session.execute(sql_insert(Cluster).values(name="d"))
        session.scalars(sql_insert(Cluster).returning(Cluster), [{"id": 5, "name": "e"}]).all()
        session.execute(sql_insert(Cluster), [{"name": "f"}, {"name": "g"}])
        session.execute(sql_insert(Admin), [{"id": 1, "name": "root", "level": 1}])
    seen = site.seen()
    assert [(each.get("resource_id", ""), each["event_data"]["new"]["name"]) for each in seen] == [
        *[("1", "a"), ("2", "b"), ("3", "c"), ("4", "d"), ("5", "e")],
        *[("", "f"), ("", "g"), ("1", "root")],
    ]


def test_inserts_whose_rows_are_not_known_have_one_event(filled: Site) -> None:
    with filled.make.begin() as session:
        session.execute(sql_insert(Cluster).values([{"name": "x"}, {"name": "y"}]))
        session.execute(sql_insert(Tag).from_select(["id"], select(Cluster.id)))
        upsert = sqlite_insert(Cluster).on_conflict_do_update(index_elements=["id"], set_={"name": "z"})
        session.execute(upsert, [{"id": 1, "name": "z"}])
        session.execute(sql_insert(Cluster).prefix_with("OR IGNORE"), [{"id": 1, "name": "z"}])
    seen = filled.seen()
    assert [(each["event_type"], each["resource_type"]) for each in seen] == [
        ("create", "clusters"),
        ("create", "tags"),
        ("upsert", "clusters"),
        ("upsert", "clusters"),
    ]
    assert all(each["event_data"]["statement"].startswith("INSERT") for each in seen)


def test_updates_by_primary_key_tell_of_each_row(filled: Site) -> None:
    with filled.make.begin() as session:
        session.execute(sql_update(Cluster), [{"id": 1, "size": 10}, {"id": 2, "size": 2, "changed": 0}])
        session.add_all([Machine(rack=rack, slot=slot) for rack in "ab" for slot in (1, 2)])
        session.flush()
        moved = [{"rack": "a", "slot": 1, "cluster_id": 1}, {"rack": "b", "slot": 2, "cluster_id": 1}]
        session.execute(sql_update(Machine), moved)
    updates = [each for each in filled.told if each[0] == "update"]
    assert updates == [
        ("update", "clusters", "1"),
        ("update", "Machines.example.com", "a,1"),
        ("update", "Machines.example.com", "b,2"),
    ]


def test_statements_roll_back_with_their_savepoint(filled: Site) -> None:
    with filled.make.begin() as session:
        with session.begin_nested() as savepoint:
            session.execute(sql_delete(Cluster))
            savepoint.rollback()
        session.execute(sql_delete(Cluster).where(Cluster.id == 1))
    assert filled.told == [("destroy", "clusters", "1")]


def test_what_is_not_of_a_mapped_class_is_not_touched(filled: Site) -> None:
    table: Any = Cluster.__table__
    with filled.make.begin() as session:
        session.execute(sql_update(table).values(name="x"))
        session.execute(sql_update(table).where(Cluster.id == 1).values(name="y"))
        session.connection().execute(sql_delete(table).where(table.c.id == 2))
        one = aliased(Cluster)
        assert session.scalars(select(one.name).where(one.id == 1)).all() == ["y"]
    assert filled.told == []


# ---------------------------------------------------------------------- targets


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


# ---------------------------------------------------------------------- asyncio


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
