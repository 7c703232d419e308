from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditlog import Position
from auditlog.storage.layout import day_file_name, parse_day_file_name


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("2024-08-12.jsonlog", date(2024, 8, 12)),
        ("2024-02-29.jsonlog", date(2024, 2, 29)),
        ("0001-01-01.jsonlog", date(1, 1, 1)),
        ("9999-12-31.jsonlog", date(9999, 12, 31)),
        ("2023-02-29.jsonlog", None),
        ("2026-02-30.jsonlog", None),
        ("2024-8-12.jsonlog", None),
        ("2024-08-12.jsonlog.bak", None),
        ("2024-08-12.JSONLOG", None),
        ("2024-08-12jsonlog", None),
        (" 2024-08-12.jsonlog", None),
        ("2024-08-12.jsonlog\n", None),
        ("٢٠٢٤-08-12.jsonlog", None),  # digits, but not ours
        ("20240812.jsonlog", None),
        ("2024-W33-1.jsonlog", None),
        ("x.jsonlog", None),
        (".jsonlog", None),
        ("", None),
    ],
)
def test_only_strict_names_are_day_files(name: str, day: date | None) -> None:
    assert parse_day_file_name(name) == day


@given(st.dates())
def test_name_and_day_are_inverse(day: date) -> None:
    assert parse_day_file_name(day_file_name(day)) == day


@given(st.dates(), st.integers(0, 2**50))
def test_a_position_survives_its_text(day: date, offset: int) -> None:
    position = Position(day, offset)
    assert Position.parse(str(position)) == position


def test_positions_sort_in_the_order_of_the_log() -> None:
    texts = ["start", "2024-08-12:0", "2024-08-12:9", "2024-08-12:10", "2024-08-13:0"]
    assert sorted(map(Position.parse, reversed(texts))) == list(map(Position.parse, texts))
    assert Position.parse("start") == Position.START


@pytest.mark.parametrize(
    "text",
    ["", "end", "2024-08-12", "2024-08-12:", "2024-08-12:-1", "2024-08-12:01", "2024-13-01:0", "start:0"],
)
def test_other_texts_are_no_positions(text: str) -> None:
    with pytest.raises(ValueError, match="is no position"):
        Position.parse(text)
