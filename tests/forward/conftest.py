from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from auditlog.forward import forwarder
from tests.forward.receivers import Receiver, Rsyslog, SyslogNg


@pytest.fixture
def rsyslog(tmp_path: Path) -> Iterator[Receiver]:
    """A running rsyslog."""
    with Rsyslog(tmp_path) as receiver:
        yield receiver


@pytest.fixture
def syslog_ng(tmp_path: Path) -> Iterator[Receiver]:
    """A running syslog-ng."""
    with SyslogNg(tmp_path) as receiver:
        yield receiver


@pytest.fixture(params=[Rsyslog, SyslogNg], ids=["rsyslog", "syslog-ng"])
def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Receiver]:
    """A running receiver, of one kind and of the other."""
    kind: type[Receiver] = request.param
    with kind(tmp_path) as receiver:
        yield receiver


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other fast, and so do looks at the receiver and at another forwarder."""
    monkeypatch.setattr(forwarder, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(forwarder, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(forwarder, "STAND_BY_PAUSE", 0.02)
    monkeypatch.setattr(forwarder, "_IDLE_SECONDS", 0.05)
