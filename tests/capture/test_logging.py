"""The bridge from logging."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from datetime import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import structlog
from pydantic import BaseModel

from auditlog import AuditLogger, InvalidSetting, Session, WriteFailed
from auditlog.capture.logging import AuditHandler, add_session
from auditlog.capture.session import Bound, Pending, binding
from auditlog.testing import FailingFiles, RecordedLog, recorded_log
from tests.capture.helpers import records, snippet


@pytest.fixture
def security(log: RecordedLog) -> Iterator[logging.Logger]:
    """A logger whose messages are events."""
    logger = logging.getLogger("shop.security")
    logger.setLevel(logging.INFO)
    handler = AuditHandler(log.audit, "shop.security", level="INFO")
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def test_a_message_of_a_chosen_logger_is_an_event_of_the_bound_session(
    log: RecordedLog, security: logging.Logger, alice: Session
) -> None:
    with binding(Bound(alice, "r-1")):
        security.warning("%s locked", "bob", extra={"attempts": 3})
    (record,) = log.records
    assert record["event_type"] == "log"
    assert record["event_data"]["log"] == {
        "logger": "shop.security",
        "level": "WARNING",
        "message": "bob locked",
        "extra": {"attempts": 3},
    }
    assert record["event_data"]["session"]["email"] == alice.email
    assert record["event_data"]["audit"] == {"request_id": "r-1"}


def test_loggers_below_count_and_all_others_do_not(log: RecordedLog) -> None:
    handler = AuditHandler(log.audit, "shop.security")
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        for name in ("shop.security.login", "shop", "shop.securityx", "other", "auditlog"):
            logging.getLogger(name).error("from %s", name)
        root.error("from the root")
    finally:
        root.removeHandler(handler)
    assert [record["event_data"]["log"]["logger"] for record in log.records] == ["shop.security.login"]


@pytest.mark.parametrize("loggers", [(), ("",), ("root",), ("a", "auditlog"), ("auditlog.x",), (None,)])
def test_the_root_and_our_own_loggers_are_refused(log: RecordedLog, loggers: Any) -> None:
    with pytest.raises(InvalidSetting, match="loggers"):
        AuditHandler(log.audit, *loggers)


class Login(BaseModel):
    password: str
    at: time


class Point(NamedTuple):
    password: str
    at: time


class Odd:
    def __str__(self) -> str:
        raise ValueError("no text")


def test_whatever_is_passed_as_extra_the_message_is_recorded(
    log: RecordedLog, security: logging.Logger
) -> None:
    number = uuid.uuid4()
    given = {"id": number, "lock": threading.Lock, "odd": Odd(), "nan": float("nan"), "password": "x"}
    try:
        raise ValueError("a secret value")
    except ValueError:
        security.exception("failed\x1b[31m", extra=given)
    (record,) = log.records
    found = record["event_data"]["log"]
    assert found["error"] == "ValueError"
    assert found["message"] == "failed\ufffd[31m"
    assert found["extra"]["id"] == str(number)
    assert found["extra"]["nan"] == "nan"
    assert found["extra"]["odd"] == "a Odd"
    assert found["extra"]["password"] == "[redacted]"
    assert b"a secret value" not in log.entries[0].line


def test_secrets_are_found_in_extras_that_json_has_no_form_for(
    log: RecordedLog, security: logging.Logger
) -> None:
    cycle: dict[str, Any] = {}
    cycle["me"] = cycle
    form = {
        "password": "hunter2",
        "at": time(12),
        "raw": b"hunter2",
        1: {Decimal("1.5")},
    }
    model = Login(password="hunter2", at=time(12))
    others = [SimpleNamespace(password="hunter2"), Point("hunter2", time(12)), {b"password": "hunter2"}]
    extra = {"form": form, "views": form.values(), "cycle": cycle, "model": model, "others": others}
    security.info("login", extra=extra)
    line = log.entries[0].line
    assert line.count(b"hunter2") == 1  # a view of values has no names
    extra = log.records[0]["event_data"]["log"]["extra"]
    assert extra["model"] == {"password": "[redacted]", "at": "12:00:00"}
    assert extra["others"] == [
        "a SimpleNamespace",
        {"password": "[redacted]", "at": "12:00:00"},
        {"password": "[redacted]"},
    ]
    assert extra["form"]["password"] == "[redacted]"
    assert extra["form"]["raw"] == "7 bytes"
    assert extra["form"]["1"] == ["1.5"]
    assert "nested too deep" in str(extra["cycle"])


def test_a_message_that_does_not_fit_its_arguments_is_recorded(log: RecordedLog) -> None:
    handler = AuditHandler(log.audit, "shop")
    handler.handle(logging.makeLogRecord({"name": "shop", "msg": "%d tries", "args": ("three",)}))
    assert log.records[0]["event_data"]["log"]["message"] == "%d tries"


def test_threads_that_log_share_a_sync(directory: Path) -> None:
    audit = AuditLogger(directory, fsync="always")
    logger = logging.getLogger("shop.threads")
    logger.setLevel(logging.INFO)
    logger.addHandler(AuditHandler(audit, "shop.threads"))

    def work() -> None:
        for _ in range(40):
            logger.info("x")

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.handlers.clear()
    assert audit.stats().written == 640
    assert audit.stats().syncs < 640
    audit.close()


def test_a_message_that_cannot_be_recorded_raises_unless_it_may_be_dropped() -> None:
    files = FailingFiles()
    with recorded_log(files=files, on_failure={"log": "drop"}) as log:
        handler = AuditHandler(log.audit, "shop")
        files.fail("write")
        handler.handle(logging.makeLogRecord({"name": "shop", "msg": "lost"}))
        assert log.audit.stats().dropped == 1
    files.heal()
    with recorded_log(files=files) as log:
        handler = AuditHandler(log.audit, "shop")
        files.fail("write")
        with pytest.raises(WriteFailed):
            handler.handle(logging.makeLogRecord({"name": "shop", "msg": "not recorded"}))


def test_structlog_messages_say_who_acts(alice: Session, capsys: pytest.CaptureFixture[str]) -> None:
    logger = structlog.wrap_logger(
        structlog.PrintLogger(),
        processors=[add_session, structlog.processors.KeyValueRenderer(sort_keys=True)],
    )
    with binding(Bound(alice, "r-1")):
        logger.info("bought", role="customer")
    logger.info("rebooted")
    assert capsys.readouterr().out.splitlines() == [
        "actor='alice@example.com' event='bought' ip_address='10.1.2.3' request_id='r-1' role='customer'",
        "event='rebooted'",
    ]


def test_a_session_that_cannot_be_found_keeps_no_message_back() -> None:
    def fail() -> Session:
        raise LookupError

    with binding(Pending(lambda: (Session(), ""), fail)):
        assert add_session(None, "info", {"event": "x"}) == {"event": "x"}


def test_the_documentation_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = snippet("logging and structlog")
    names["security"].handlers.clear()
    names["audit"].close()
    structlog.reset_defaults()
    assert [record["event_data"]["log"]["message"] for record in records(tmp_path / "audit-log")] == [
        "bob is locked"
    ]
