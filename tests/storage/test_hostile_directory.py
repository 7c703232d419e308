"""What an attacker, or a colleague, may do to the directory while it is used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from auditlog import AuditLogger, DirectoryError, Retention, RetentionSweeper, WriteFailed
from auditlog.storage.files import Files
from auditlog.testing import FixedClock
from tests.helpers import Reading, contents, until


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777, 0o2770])
@pytest.mark.parametrize("name", ["", ".auditlog"])
def test_a_directory_that_others_may_write_to_is_refused_unless_that_is_accepted(
    directory: Path, mode: int, name: str
) -> None:
    (directory / ".auditlog").mkdir(parents=True)
    directory.chmod(0o700)
    (directory / ".auditlog").chmod(0o700)
    (directory / name).chmod(mode)
    with pytest.raises(DirectoryError, match=rf"mode {mode:04o}\).*chmod go-w.*allow_shared_directory=True"):
        AuditLogger(directory)
    assert contents(directory) == {}
    with AuditLogger(directory, allow_shared_directory=True) as log:
        log.create("T", "1")
    assert Reading(directory).ids == ["1"]
    with pytest.raises(DirectoryError, match="others than its owner"):
        RetentionSweeper(directory).sweep()
    RetentionSweeper(directory, allow_shared_directory=True).sweep()


def test_somebody_elses_directory_can_be_accepted(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    directory.mkdir()
    os.chown(directory, 12345, -1)
    with AuditLogger(directory, allow_shared_directory=True) as log:
        log.create("T", "1")
    assert Reading(directory).ids == ["1"]


def test_a_link_that_is_swapped_in_between_check_and_use_gains_nothing(
    directory: Path, tmp_path: Path, clock: FixedClock
) -> None:
    """The day's file becomes a link right before it is created, and right before it is opened."""
    target = tmp_path / "target"
    target.write_bytes(b"precious")

    class Attacked(Files):
        def create_append(self, directory: int, name: str) -> int:
            Path(place).symlink_to(target)
            return super().create_append(directory, name)

        def open_append(self, directory: int, name: str) -> int:
            place.unlink()
            place.symlink_to(target)
            return super().open_append(directory, name)

    place = directory / "2024-08-12.jsonlog"
    with (
        AuditLogger(directory, clock=clock, retention=None, files=Attacked()) as log,
        pytest.raises(WriteFailed, match="is no regular file"),
    ):
        log.create("T", "1")
    assert target.read_bytes() == b"precious"


def move_away(directory: Path) -> None:
    directory.rename(directory.with_suffix(".old"))


def replace(directory: Path) -> None:
    move_away(directory)
    directory.mkdir()


def remove(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("attack", [move_away, replace, remove])
def test_a_directory_that_is_moved_away_is_noticed_and_never_written_into_the_void(
    directory: Path, attack: Callable[[Path], None]
) -> None:
    with AuditLogger(directory, fsync="never", retention=None) as log:
        log.create("T", "1")
        attack(directory)
        with pytest.raises(WriteFailed, match=r"moved away or replaced while it was written \(move it back"):
            until(lambda: not log.create("T", "2"), seconds=1)
        if attack is not remove:
            shutil.rmtree(directory, ignore_errors=True)
            directory.with_suffix(".old").rename(directory)
            log.create("T", "3")
            assert Reading(directory).ids[-1] == "3"


@pytest.mark.parametrize("plant", ["fifo", "hard link", "link"])
def test_what_is_planted_where_the_state_is_prepared_neither_blocks_nor_is_written_to(
    directory: Path, clock: FixedClock, plant: str
) -> None:
    with AuditLogger(directory, clock=clock, retention=None) as log:
        log.create("T", "1")
    clock.advance(86_400)
    with AuditLogger(directory, clock=clock, retention=None) as log:
        log.create("T", "2")
        today = directory / "2024-08-13.jsonlog"
        place = directory / ".auditlog" / f"state.{os.getpid()}.new"
        if plant == "fifo":
            os.mkfifo(place)
        elif plant == "link":
            place.symlink_to(today)
        else:
            os.link(today, place)
        assert RetentionSweeper(directory, Retention(days=1), clock=clock).sweep().removed
    assert Reading(directory).ids == ["2"]
