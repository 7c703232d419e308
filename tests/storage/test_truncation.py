"""Somebody truncates today's file while it is written, as `logrotate` does with `copytruncate`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from auditlog import AuditLogger, Position
from auditlog.testing import FixedClock
from tests.conftest import Start
from tests.helpers import until
from tests.programs.shared_clock import SharedClock

LOGROTATE = shutil.which("logrotate", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
ROUNDS = 5


def test_a_file_that_is_cut_anywhere_goes_on_behind_the_cut(
    directory: Path, clock: FixedClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory / "2024-08-12.jsonlog"
    with AuditLogger(directory, fsync="never", retention=None, clock=clock) as log:
        log.create("T", "first")
        inode = path.stat().st_ino
        for cut in range(400):
            left = path.read_bytes()[:cut]
            os.truncate(path, cut)
            if left and not left.endswith(b"\n"):
                left += b"\n"
            assert log.create("T", str(cut)) == Position(date(2024, 8, 12), len(left))
            content = path.read_bytes()
            assert content.startswith(left)
            assert orjson.loads(content[len(left) :])["resource_id"] == str(cut)
    assert path.stat().st_ino == inode
    assert caplog.text.count("was truncated") == 400


def rotate_by_hand(path: Path, number: int) -> None:
    shutil.copyfile(path, path.with_name(f"{path.name}.{number}"))
    os.truncate(path, 0)


def rotate_by_logrotate(path: Path, number: int) -> None:
    assert LOGROTATE is not None
    settings = path.parent.with_name("logrotate.conf")
    settings.write_text(f"{path} {{\n copytruncate\n rotate {ROUNDS}\n}}\n")
    settings.chmod(0o600)
    state = path.parent.with_name("logrotate.state")
    subprocess.run([LOGROTATE, "--force", "--state", state, settings], check=True)


def numbers_in(piece: Path) -> list[int]:
    """The numbers of the lines, whole and in order; a copy may have been made amid the last line."""
    *lines, _ = piece.read_bytes().split(b"\n")
    return [int(orjson.loads(line)["resource_id"].rpartition("-")[2]) for line in lines]


@pytest.mark.parametrize(
    "rotate",
    [
        rotate_by_hand,
        pytest.param(
            rotate_by_logrotate,
            marks=pytest.mark.skipif(LOGROTATE is None, reason="logrotate is not installed"),
        ),
    ],
)
def test_copytruncate_costs_no_line_but_those_between_the_copy_and_the_cut(
    directory: Path, tmp_path: Path, start: Start, rotate: Callable[[Path, int], None]
) -> None:
    noon = round(datetime(2024, 8, 12, 12, tzinfo=UTC).timestamp()) * 10**9
    SharedClock(tmp_path / "clock").move(noon - time.time_ns())
    with (tmp_path / "warnings").open("wb") as warnings:
        arguments = directory, tmp_path / "clock", "p", 1, 10**6
        process = start("write_events", *arguments, stdout=subprocess.DEVNULL, stderr=warnings)
    path = directory / "2024-08-12.jsonlog"
    until(path.exists)
    for number in range(ROUNDS):
        until(lambda: path.stat().st_size > 3 * 10**6)
        rotate(path, number)
    until(lambda: path.stat().st_size > 3 * 10**6)
    process.kill()
    process.wait()

    pieces = sorted(numbers_in(piece) for piece in directory.glob("*.jsonlog*"))
    assert len(pieces) == ROUNDS + 1
    for numbers in pieces:
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert all(earlier[-1] < later[0] for earlier, later in pairwise(pieces))
    assert (tmp_path / "warnings").read_text().count("was truncated") == ROUNDS
