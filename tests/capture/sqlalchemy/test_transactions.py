from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy import delete as sql_delete
from sqlalchemy import update as sql_update
from sqlalchemy.event import listens_for
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import (
    scoped_session,
)

from auditlog import LoggerClosed, WriteFailed
from auditlog import Session as Actor
from auditlog.capture.hooks import Change, Hooks, SkipEvent
from auditlog.capture.session import Pending, bind, binding
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.sqlalchemy.helpers import (
    Cluster,
    Machine,
    Site,
    Tag,
    User,
    Versioned,
    with_rows,
)


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
    outcome = "unknown" if end in ("commit fails", "connection breaks") else "failed"
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


def test_what_an_interrupted_commit_has_made_is_told_and_nothing_else(site: Site) -> None:
    lost: list[Any] = []

    @listens_for(site.engine, "checkin")
    def interrupt(connection: Any, _record: Any) -> None:
        if not lost:
            lost.append(connection)  # which the pool forgets
            raise KeyboardInterrupt

    with site.make() as session:
        session.add(Cluster(name="made"))
        with pytest.raises(KeyboardInterrupt):
            session.commit()
        session.rollback()
        session.add(Cluster(name="rolled back"))
        session.flush()
        session.rollback()
    lost[0].close()
    assert [each["event_data"]["new"]["name"] for each in site.seen()] == ["made"]


def test_a_closed_log_keeps_a_session_from_changing_anything(site: Site) -> None:
    site.log.audit.close()
    with site.make() as session:
        session.add(Cluster(name="blue"))
        with pytest.raises(LoggerClosed):
            session.commit()
        session.rollback()
        with pytest.raises(LoggerClosed):
            session.execute(sql_delete(Cluster))
        assert session.scalars(select(Cluster)).all() == []


def test_a_statement_whose_intent_cannot_be_written_is_rolled_back(engine: Engine) -> None:
    files = FailingFiles()
    with recorded_log(files=files) as log:
        site = Site(engine, log, with_rows(before=True))
        with site.make() as session:
            session.add(Cluster(name="blue"))
            session.commit()
            files.fail("write")
            with pytest.raises(WriteFailed):
                session.execute(sql_update(Cluster).values(name="evil"))
            session.commit()
            files.heal()
            assert session.scalars(select(Cluster.name)).all() == ["blue"]


def test_what_finding_the_actor_flushes_is_the_actors(site: Site) -> None:
    with site.make() as session:
        pending = Pending(
            lambda: (Actor(ip_address="10.1.2.3"), ""),
            lambda: Actor(email=session.scalar(select(Cluster.name).where(Cluster.id == 1)) or ""),
        )
        session.add(Cluster(id=1, name="alice@example.com"))
        session.commit()
        with binding(pending):
            session.add(Cluster(id=2, name="blue"))
            site.log.audit.create("Other")  # asks who acts, and so flushes
            session.commit()
    assert [each["event_data"]["session"].get("email") for each in site.seen()[1:]] == 2 * [
        "alice@example.com"
    ]
