from __future__ import annotations

from collections.abc import Iterator

import pytest

from auditlog.testing import RecordedLog, recorded_log


@pytest.fixture
def log() -> Iterator[RecordedLog]:
    """A log of the test's own."""
    with recorded_log() as recorded:
        yield recorded
