"""Finding by bytes gives what decoding every line would give, and nothing is missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from auditlog import AuditReader, Filter
from auditlog.query import search
from auditlog.storage import blocks
from tests.helpers import Reading, write_day


@pytest.fixture(params=["stringzilla", "without"], autouse=True)
def searching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with the library for searching and without it."""
    if request.param == "without":
        monkeypatch.setattr(blocks, "count", bytearray.count)
        monkeypatch.setattr(blocks, "find", bytearray.find)
        monkeypatch.setattr(search, "find", bytearray.find)


def by_decoding(directory: Path, where: Filter) -> list[str]:
    return [str(entry.position) for entry in Reading(directory).entries if where.matches(entry.record)]


WORDS = [
    *("alice@example.com", "ALICE@example.com", "Müller", "kelvin", "\u212aelvin", "secret", "\u017fecret"),
    *("Straße", "STRASSE", "a<b>&c", 'say "hi"', "back\\slash", "tab\there", "path/to", "\u2028line"),
    *("", "x", "user", "😀 smile"),
]
ENCODERS = [
    lambda record: json.dumps(record, ensure_ascii=False),
    lambda record: json.dumps(record, ensure_ascii=True),
    lambda record: json.dumps(record).replace("/", "\\/"),
    lambda record: json.dumps(record, ensure_ascii=False).replace("<", "\\u003c"),
    lambda record: json.dumps(record, ensure_ascii=False).replace("l", "\\u006c"),
    lambda record: json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace("S", "\\u0053"),
]
words = st.sampled_from(WORDS) | st.text(max_size=5)
records = st.fixed_dictionaries(
    {
        "event_type": st.sampled_from(["create", "destroy"]),
        "resource_type": words,
        "resource_id": words,
        "event_ts": st.just(1),
        "event_data": st.fixed_dictionaries(
            {
                "cluster": st.fixed_dictionaries({"id": words}),
                "session": st.fixed_dictionaries({"email": words}),
                "own": st.lists(words, max_size=2),
            }
        ),
    }
)
filters = st.builds(
    Filter,
    event_type=st.none() | st.sampled_from(["create", "destroy"]),
    **{name: st.none() | words for name in ("resource_type", "resource_id", "cluster_id", "actor", "search")},
)
damage = st.sampled_from([b"torn\n", b"{torn\n", b"\n", b"torn}\n", b"}\n", b"{\n", b"\0\0\0\n"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(records, st.sampled_from(ENCODERS)) | damage, max_size=8), filters)
@example([({"event_data": {"session": {"email": "\u212aelvin"}}}, ENCODERS[0])], Filter(search="KELVIN"))
def test_a_filtered_read_gives_what_decoding_every_line_gives(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any], where: Filter
) -> None:
    directory = tmp_path_factory.mktemp("log")
    content = [item if isinstance(item, bytes) else item[1](item[0]).encode() + b"\n" for item in lines]
    write_day(directory, "2024-08-12", b"".join(content))
    found = Reading(directory, where=where)
    assert found.positions == by_decoding(directory, where)
    assert [line.position for line in found.damage] == [line.position for line in Reading(directory).damage]


@pytest.mark.parametrize("newest", [True, False])
def test_lines_longer_than_a_block_and_tails_are_read_as_without_a_filter(
    directory: Path, newest: bool
) -> None:
    def long(size: int) -> bytes:
        return b'{"resource_id":"needle","x":"%s"}\n' % (b"x" * size)

    sizes = [10, 1 << 20, 10, 3 << 20, (16 << 20) - 32, (16 << 20) - 31, 40 << 20, 5]
    write_day(directory, "2024-08-11", b"".join(map(long, sizes)) + b'{"torn')
    if not newest:
        write_day(directory, "2024-08-12", long(1))
    plain = Reading(directory)
    found = Reading(directory, where=Filter(resource_id="needle"))
    assert found.positions == plain.positions
    assert found.damage == plain.damage
    assert len(plain.damage) == 3 - newest


def test_it_resumes_behind_a_position(directory: Path) -> None:
    write_day(
        directory, "2024-08-12", b"".join(b'{"resource_id":"needle-%d"}\n' % number for number in range(9))
    )
    reader = AuditReader(directory)
    where = Filter(search="NEEDLE")
    fourth = list(reader.read(where=where))[3]
    assert [entry.record["resource_id"][-1] for entry in reader.read(where=where, after=fourth.position)] == [
        *"45678"
    ]


def test_what_is_not_found_is_not_decoded(directory: Path) -> None:
    lines = [b'{"resource_id":"hay"}\n'] * 1000 + [b"{no json}\n", b'{"resource_id":"needle"}\n']
    write_day(directory, "2024-08-12", b"".join(lines))
    reading = Reading(directory, where=Filter(resource_id="needle"))
    assert reading.ids == ["needle"]
    assert reading.damage == []  # it starts and ends like an entry, and nobody had to decode it
