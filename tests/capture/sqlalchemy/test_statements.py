from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy import delete as sql_delete
from sqlalchemy import insert as sql_insert
from sqlalchemy import update as sql_update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import (
    aliased,
)

from auditlog.testing import RecordedLog
from tests.capture.sqlalchemy.helpers import (
    Admin,
    Cluster,
    Machine,
    Site,
    Tag,
)


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


def test_rows_that_a_join_gives_twice_hide_no_others(engine: Engine, log: RecordedLog) -> None:
    site = Site(engine, log, most_rows=5)
    with site.make.begin() as session:
        session.add_all([Cluster(id=number, name=str(number)) for number in (1, 2, 3)])
        racks = [*((1, slot) for slot in range(5)), (2, 0), (3, 0)]
        session.add_all(
            [Machine(rack=f"r{cluster}", slot=slot, cluster_id=cluster) for cluster, slot in racks]
        )
    site.seen()
    with site.make.begin() as session:
        changed = sql_update(Cluster).where(Cluster.id == Machine.cluster_id).values(name="z")
        assert len(set(session.execute(changed.returning(Cluster.id)).all())) == 3
    (told,) = site.seen()
    assert "statement" in told["event_data"]


def test_an_update_of_keys_is_told_as_a_statement(filled: Site) -> None:
    with filled.make.begin() as session:
        session.execute(
            sql_update(Tag).values(id=Tag.id + 100), execution_options={"synchronize_session": False}
        )
    for told in filled.seen():
        assert "statement" in told["event_data"]
