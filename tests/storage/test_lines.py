from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auditlog import AuditReader, CorruptLine, Position
from auditlog.events.limit import MAX_LINE_BYTES
from auditlog.storage import lines
from auditlog.storage.files import Files
from tests.helpers import Reading, line, write_day

DAY = "2024-08-12"

pieces = st.one_of(
    st.integers(0, 10**6).map(line),
    st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"") + b"\n"),
    st.sampled_from(
        [b"\n", b"{\n", b"}\n", b"{}\n", b"{x\n", b"x}\n", b"\r\n", b"{}\r\n", b"\0" * 50 + b"\n"]
    ),
    st.integers(50, 4000).map(lambda size: line(1, padding="x" * size)),
)
tails = st.sampled_from([b"", b"{", b"{}", b"x", b'{"event_type":"create"'])


def is_entry(raw: bytes) -> bool:
    return raw.startswith(b"{") and raw.endswith(b"}\n")


@settings(deadline=None)
@given(st.lists(pieces, max_size=30), tails, st.booleans())
def test_entries_and_damage_are_told_apart_in_both_directions(
    tmp_path_factory: pytest.TempPathFactory, stored: list[bytes], tail: bytes, older: bool
) -> None:
    directory = tmp_path_factory.mktemp("log")
    write_day(directory, DAY, b"".join(stored) + tail)
    if older:
        write_day(directory, "2024-08-13", b"")
    forwards = Reading(directory)
    assert [entry.line for entry in forwards.entries] == [raw for raw in stored if is_entry(raw)]
    damaged = [raw for raw in stored if not is_entry(raw)] + ([tail] if tail and older else [])
    assert [damage.raw for damage in forwards.damage] == damaged
    content = b"".join(stored) + tail
    for entry in forwards.entries:
        at = entry.position.offset
        assert content[at : at + len(entry.line)] == entry.line

    backwards = Reading(directory, newest_first=True)
    assert backwards.positions == forwards.positions[::-1]
    assert [entry.line for entry in backwards.entries] == [entry.line for entry in forwards.entries][::-1]
    assert backwards.damage == forwards.damage[::-1]

    for index, entry in enumerate(forwards.entries):
        later = Reading(directory, after=entry.position)
        assert later.positions == forwards.positions[index + 1 :]
        earlier = Reading(directory, after=entry.position, newest_first=True)
        assert earlier.positions == forwards.positions[:index][::-1]


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_line_longer_than_the_limit_is_damage_and_its_neighbours_are_read(
    directory: Path, newest_first: bool
) -> None:
    limit = MAX_LINE_BYTES
    at_limit = b"{" + b"a" * (limit - 3) + b"}\n"
    over = b"{" + b"b" * (limit - 2) + b"}\n"
    far_over = b"{" + b"c" * (2 * limit) + b"}\n"
    write_day(directory, DAY, line(1) + over + at_limit + far_over + line(2))
    reading = Reading(directory, newest_first=newest_first)
    assert sorted(len(entry.line) for entry in reading.entries) == sorted([len(line(1)), len(line(2)), limit])
    order = -1 if newest_first else 1
    assert [(damage.length, damage.raw[:2], len(damage.raw)) for damage in reading.damage][::order] == [
        (limit + 1, b"{b", 65536),
        (2 * limit + 3, b"{c", 65536),
    ]
    assert {damage.reason for damage in reading.damage} == {f"it is longer than {limit} bytes"}


def test_a_line_that_grows_while_it_is_read_is_not_a_line_yet(directory: Path) -> None:
    path = write_day(directory, DAY, line(1) + b'{"half')
    damage: list[CorruptLine] = []
    fd = Files().open_read(Files().open_directory(str(directory)), path.name)
    reading = lines.forwards(fd, date(2024, 8, 12), 0, True, damage.append)
    assert next(reading).position == Position(date(2024, 8, 12), 0)
    with path.open("ab") as file:
        file.write(b'":1}\n')
    rest = [entry.line for entry in reading]
    assert rest in ([], [b'{"half":1}\n'])
    assert damage == []


def test_a_file_that_is_truncated_while_it_is_read_backwards_ends_the_read(directory: Path) -> None:
    path = write_day(directory, DAY, b"".join(line(number, padding="x" * 1000) for number in range(500)))
    reading = AuditReader(directory).read(newest_first=True)
    assert next(reading).record["resource_id"] == "499"
    path.write_bytes(line(7))
    assert [entry.record["resource_id"] for entry in reading][-1:] == ["7"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"x}\n", "it does not start with {"),
        (b"\n", "it does not start with {"),
        (b"{x\n", "it does not end with }"),
        (b"{}", "it ends without a newline, in a day that is over"),
    ],
)
def test_damage_says_why(directory: Path, raw: bytes, reason: str) -> None:
    write_day(directory, DAY, raw)
    write_day(directory, "2024-08-13", b"")
    assert [damage.reason for damage in Reading(directory).damage] == [reason]
