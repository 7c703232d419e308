"""Who may read the audit log, and the record of each read."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from auditlog import (
    AccessDenied,
    AuditLogger,
    DirectoryError,
    Filter,
    InvalidRange,
    InvalidSetting,
    Position,
    Session,
    WriteFailed,
)
from auditlog.capture.session import Bound, binding
from auditlog.testing import FailingFiles, recorded_log
from tests.helpers import Reading

AUDITOR = Session(email="rita@example.com", role="Auditor")


def test_a_read_is_recorded_before_its_first_entry(alice: Session) -> None:
    with recorded_log() as log:
        log.audit.create("T", "1")
        with binding(Bound(Session(email="gateway@example.com"), "r-1")):
            entries = log.audit.reader_for(alice).read("2024-08-01", date(2999, 1, 1))
        access = log.entries[-1].event
        assert access.event_type == "audit_log_access"
        assert access.event_data.session == alice
        assert access.event_data.audit_log_access is not None
        assert access.event_data.audit_log_access.model_dump(exclude_defaults=True) == {
            "start": "2024-08-01",
            "end": "2999-01-01",
        }
        assert access.event_data.audit is not None
        assert access.event_data.audit.request_id == "r-1"
        assert [entry.event.event_type for entry in entries] == ["create", "audit_log_access"]


def test_the_record_says_what_was_looked_for(alice: Session) -> None:
    with recorded_log() as log:
        position = log.audit.create("T", "1")
        where = Filter(event_type=["destroy", "create"], actor="bob@example.com", search="x", cluster_id="c")
        start = datetime(2024, 8, 1, 12, tzinfo=UTC)
        reader = log.audit.reader_for(alice)
        list(reader.read(start, where=where, after=position, limit=3, newest_first=True))
        assert log.records[-1]["event_data"]["audit_log_access"] == {
            "start": "2024-08-01T12:00:00+00:00",
            "search": "x",
            "event_type": ["create", "destroy"],
            "cluster_id": "c",
            "actor": "bob@example.com",
            "from_id": str(position),
        }


def test_following_is_recorded_once_when_it_begins() -> None:
    with recorded_log() as log:
        with log.audit.reader_for(AUDITOR).follow(after=Position.START) as follower:
            log.audit.create("T", "1")
            log.audit.create("T", "2")
            found = [next(follower).record["event_type"] for _ in range(3)]
        assert found == ["audit_log_access", "create", "create"]
        assert log.records[0]["event_data"]["audit_log_access"] == {"from_id": "start", "follow": True}


def test_following_in_an_event_loop_is_recorded_too() -> None:
    async def first(log: Any) -> str:
        async for entry in log.audit.reader_for(AUDITOR).afollow(after=Position.START):
            return str(entry.record["event_type"])
        return ""

    with recorded_log() as log:
        assert asyncio.run(first(log)) == "audit_log_access"


@pytest.mark.parametrize(
    "session",
    [None, Session(), Session(role="Reader"), Session(role="admin"), Session(role="Admin ")],
    ids=str,
)
def test_no_other_role_may_read_and_the_attempt_is_recorded(session: Session | None) -> None:
    with recorded_log() as log, log.audit.session(Session(email="gateway@example.com", role="Admin")):
        with pytest.raises(AccessDenied, match="may not read the audit log; it takes Admin or Auditor"):
            log.audit.reader_for(session)
        (denied,) = (entry.event for entry in log.entries)
        assert denied.event_type == "access_denied"
        assert denied.event_data.session == (session or Session())
        assert denied.event_data.audit is not None
        assert (denied.event_data.audit.action, denied.event_data.audit.outcome) == (
            "audit_log_access",
            "denied",
        )


def test_the_roles_can_be_chosen(alice: Session) -> None:
    with recorded_log(reader_roles=["Security"]) as log:
        with pytest.raises(AccessDenied):
            log.audit.reader_for(alice)
        assert list(log.audit.reader_for(Session(role="Security")).read(limit=1))


@pytest.mark.parametrize("roles", ["Admin", [""], [None], [3]])
def test_roles_that_make_no_sense_are_refused(directory: Path, roles: Any) -> None:
    with pytest.raises(InvalidSetting, match="reader_roles"):
        AuditLogger(directory, reader_roles=roles)


@pytest.mark.parametrize("on_failure", ["raise", "drop"])
def test_what_cannot_be_recorded_is_not_read(alice: Session, on_failure: str) -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure=on_failure) as log:
        log.audit.create("T", "1")
        reader = log.audit.reader_for(alice)
        files.fail("write")
        for read in (reader.read, reader.follow, reader.afollow):
            with pytest.raises(WriteFailed):
                read()
        with pytest.raises(WriteFailed):
            log.audit.reader_for(None)


def test_a_read_that_is_refused_leaves_no_record(alice: Session) -> None:
    with recorded_log() as log:
        reader = log.audit.reader_for(alice)
        with pytest.raises(InvalidRange):
            reader.read("2024-08-02", "2024-08-01")
        assert log.records == []


def test_damage_is_handed_on(alice: Session, directory: Path) -> None:
    damage: list[Any] = []
    with AuditLogger(directory, retention=None) as audit:
        audit.create("T", "1")
        (directory / "2024-01-01.jsonlog").write_bytes(b"damage\n")
        list(audit.reader_for(alice, on_corrupt=damage.append).read())
    assert [str(line.position) for line in damage] == ["2024-01-01:0"]
    assert len(Reading(directory).entries) == 2


def test_a_disabled_log_has_nothing_to_read(alice: Session) -> None:
    audit = AuditLogger("")
    with pytest.raises(DirectoryError, match="disabled"):
        audit.reader_for(alice)
    with pytest.raises(AccessDenied):
        audit.reader_for(None)
