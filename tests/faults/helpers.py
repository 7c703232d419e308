"""What the fault tests need: every byte accounted for, what writers told, a disk that can be full."""

from __future__ import annotations

import io
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from auditlog import Position
from tests.helpers import Reading

DAY_NS = 86_400 * 10**9


def read_all(directory: Path) -> Reading:
    """Everything in a directory, once it is certain that each line is an entry or reported damage."""
    reading = Reading(directory, strict=True)
    told = [(str(entry.position), len(entry.line)) for entry in reading.entries]
    told += [(str(corrupt.position), corrupt.length) for corrupt in reading.damage]
    assert sorted(told) == sorted(_lines(directory))
    return reading


def _lines(directory: Path) -> Iterator[tuple[str, int]]:
    """Where each line is, and its length, split by hand; the newest day's torn tail is none yet."""
    paths = sorted(directory.glob("*.jsonlog"))
    for path in paths:
        offset = 0
        for line in io.BytesIO(path.read_bytes()):
            if line.endswith(b"\n") or path != paths[-1]:
                yield f"{path.stem}:{offset}", len(line)
            offset += len(line)


def assert_once(found: list[str], acknowledged: Iterable[str]) -> None:
    """No id was found twice, and every acknowledged one was found."""
    counted = Counter(found)
    assert [identity for identity, count in counted.items() if count > 1] == []
    assert [identity for identity in acknowledged if identity not in counted] == []


class Told:
    """What a run of tests/programs/write_on.py has told so far, in the file that is its output.

    `acknowledged`: the positions of events by their ids. `failures`: failed writes by their kind.
    """

    def __init__(self, path: Path) -> None:
        self.acknowledged: dict[str, Position] = {}
        self.failures: Counter[str] = Counter()
        self._output = path.open("rb")
        self._half = b""

    def look(self) -> None:
        """Take in what was told since the last look."""
        *lines, self._half = (self._half + self._output.read()).split(b"\n")
        for line in lines:
            identity, _, what = line.decode().partition(" ")
            if identity == "!":
                self.failures[what] += 1
            else:
                self.acknowledged[identity] = Position.parse(what)

    def close(self) -> None:
        """Look no more."""
        self._output.close()


class SmallDisk:
    """A file system that is full when it is told to be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Take all that is left."""
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        """Give back what was taken."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[SmallDisk]:
    """Mount a file system in memory at `path`. Raises PermissionError where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise PermissionError("there is no mount command") from None
    except subprocess.CalledProcessError as error:
        raise PermissionError(error.stderr.strip()) from None
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", path], check=True)
