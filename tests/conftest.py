from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from auditlog import Session
from auditlog.testing import FixedClock

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="try every fault, not a choice of them")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Is there time for every fault?"""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a log may be; it does not exist yet."""
    return tmp_path / "audit-log"


@pytest.fixture
def clock() -> FixedClock:
    """Noon of 12 August 2024, in UTC."""
    return FixedClock(datetime(2024, 8, 12, 12, tzinfo=UTC))


@pytest.fixture
def alice() -> Session:
    return Session(user_agent="Mozilla/5.0", email="alice@example.com", role="Admin", ip_address="10.1.2.3")


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs of tests/programs; none of them outlives the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start_program(program: str, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tests.programs.{program}", *map(str, arguments)]
        processes.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options))
        return processes[-1]

    yield start_program
    for process in processes:
        process.kill()
        if process.stdout and not process.stdout.closed:
            process.stdout.close()
        process.wait()
