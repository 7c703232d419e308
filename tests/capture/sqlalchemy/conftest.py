from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from auditlog.testing import RecordedLog
from tests.capture.sqlalchemy.helpers import (
    Cluster,
    Site,
    engine_for,
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = engine_for(tmp_path / "fleet.db")
    yield engine
    engine.dispose()


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
