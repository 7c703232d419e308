from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditlog import InvalidEvent
from auditlog.events.codec import decode, encode, line_at
from auditlog.events.records import decode_record

LIMIT = 8192


def line_of(data: dict[str, Any], session: bytes = b"{}", limit: int = LIMIT) -> bytes:
    return line_at(encode("create", "Type", "id", data, session, max_line_bytes=limit), 1_723_466_435_280)


def details_of(data: dict[str, Any]) -> dict[str, Any]:
    line = line_of(data)
    assert len(line) <= LIMIT
    decode(line)
    details: dict[str, Any] = decode_record(line)["event_data"]
    return details


def test_a_line_at_the_limit_is_left_alone() -> None:
    room = LIMIT - len(line_of({"x": ""}))
    assert len(line_of({"x": "a" * room})) == LIMIT
    assert "cut" in decode_record(line_of({"x": "a" * (room + 1)}))["event_data"]["x"]


def test_the_longest_strings_are_cut_with_length_and_hash_of_the_original() -> None:
    text = "ß" * 50_000
    details = details_of({"config_patch": {"id": "p", "data": text, "cluster_id": "c"}, "short": "s" * 500})
    cut = details["config_patch"]["data"]
    assert cut.startswith("ßßß")
    assert cut.endswith(f"…[cut: 100000 bytes, sha256 {sha256(text.encode()).hexdigest()}]")
    assert details["short"] == "s" * 500
    assert details["config_patch"]["id"] == "p"


def test_marker_and_replacement_are_about_the_original() -> None:
    details = details_of({"p": "a" * 50_000, "q": "b" * 50_000})
    assert f"[cut: 50000 bytes, sha256 {sha256(b'a' * 50_000).hexdigest()}]" in details["p"]
    assert f"[cut: 50000 bytes, sha256 {sha256(b'b' * 50_000).hexdigest()}]" in details["q"]
    many = details_of({"many": ["c" * 60_000] * 20})
    assert many["many"]["truncated"]["bytes"] == 20 * 60_003 + 1


def test_a_field_without_long_strings_is_replaced_and_keeps_its_ids() -> None:
    labels = {f"label-{number}": "v" for number in range(2000)}
    details = details_of({"machine_set": {"id": "m", "cluster_id": "c", "labels": labels}, "own": [1]})
    assert details["own"] == [1]
    assert details["machine_set"]["id"] == "m"
    assert details["machine_set"]["cluster_id"] == "c"
    assert set(details["machine_set"]["truncated"]) == {"bytes", "sha256"}


def test_the_largest_field_goes_first_and_only_as_many_as_must() -> None:
    details = details_of({"a": list(range(1000)), "b": list(range(3000)), "c": list(range(500))})
    assert list(details["b"]) == ["truncated"]
    assert details["a"] == list(range(1000))
    assert details["c"] == list(range(500))


def test_our_own_facts_and_the_session_are_never_cut() -> None:
    action = "a" * 3000
    line = line_of({"audit": {"action": action}, "x": "y" * 10_000}, b'{"email":"%b"}' % (b"e" * 2000))
    record = decode_record(line)
    assert record["event_data"]["audit"]["action"] == action
    assert record["event_data"]["session"]["email"] == "e" * 2000


@pytest.mark.parametrize(
    ("data", "session"),
    [({}, b'{"email":"%b"}' % (b"e" * LIMIT)), ({"audit": {"action": "a" * LIMIT}}, b"{}")],
)
def test_what_cannot_be_cut_down_is_refused(data: dict[str, Any], session: bytes) -> None:
    with pytest.raises(InvalidEvent, match="over the limit, and too little"):
        line_of(data, session)


@given(
    st.dictionaries(
        st.text(max_size=5).map(lambda name: f"own {name}"),
        st.text(max_size=30).map(lambda text: text * 400) | st.lists(st.integers(0, 10**9), max_size=900),
        max_size=6,
    )
)
def test_any_event_fits_or_is_refused(data: dict[str, Any]) -> None:
    assert len(line_of(data)) <= LIMIT
