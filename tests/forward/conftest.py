from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
