from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, String
from sqlalchemy import update as sql_update
from sqlalchemy.orm import DeclarativeBase, deferred, mapped_column

from auditlog import Session as Actor
from auditlog.capture.hooks import Hooks
from auditlog.capture.session import bind
from auditlog.testing import RecordedLog
from tests.capture.sqlalchemy.helpers import (
    Admin,
    Cluster,
    Color,
    Machine,
    Odd,
    Site,
    Tag,
    User,
    Versioned,
    with_rows,
)


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


@pytest.mark.parametrize("hooked", [True, False])
def test_a_column_that_may_not_be_loaded_stays_unloaded(
    engine: Engine, log: RecordedLog, hooked: bool
) -> None:
    class Own(DeclarativeBase):
        pass

    class Heavy(Own):
        __tablename__ = "heavy"
        id = mapped_column(Integer, primary_key=True)
        big = deferred(mapped_column(String), raiseload=True)

    Own.metadata.create_all(engine)
    hooks = Hooks()
    if hooked:
        hooks.on("heavy")(lambda change: {"row": change.content})
    site = Site(engine, log, hooks)
    with site.make() as session:
        session.add(Heavy(id=1, big="x"))
        session.commit()
        row = session.get_one(Heavy, 1)
        row.big = Heavy.id + 1
        session.commit()
    updated = site.seen()[-1]
    assert updated["event_type"] == "update"
    if hooked:
        assert updated["event_data"]["row"] == {"id": 1, "big": "[not loaded]"}
