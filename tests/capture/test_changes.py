"""What an update changed: complete, unambiguous, bounded."""

from __future__ import annotations

import copy
import re
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from auditlog.capture.changes import LONGEST_VALUE, MOST_BYTES, changes

_step = re.compile(r'\.?([^.\[\]"]+)|\[(\d+)\]|\[("(?:[^"\\]|\\.)*")\]')

names = st.sampled_from(
    ["a", "b", "a.b", "", "a[0]", "[0]", 'a"b', '["a"]', "a\\", ".", "omni.dev/x"]
) | st.text(max_size=4)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: number != 0)
    | st.text(max_size=8)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=25,
)
objects = st.dictionaries(names, values, max_size=5)


@st.composite
def edited(draw: st.DrawFn) -> tuple[Any, Any]:
    """Content, and what became of it: something else entirely, or the same with a few edits."""
    old = draw(objects)
    if draw(st.booleans()):
        return old, draw(objects)
    new = copy.deepcopy(old)
    for _ in range(draw(st.integers(0, 3))):
        here: Any = new
        while here:
            key = draw(st.sampled_from(sorted(here)))
            if isinstance(here[key], dict) and draw(st.booleans()):
                here = here[key]
                continue
            if draw(st.booleans()):
                del here[key]
            else:
                here[key] = draw(values)
            break
    return old, new


def applied(found: list[dict[str, Any]], content: Any, root: str) -> Any:
    """The content after these changes, found by nothing but their paths."""
    whole = {"root": copy.deepcopy(content)}
    removed = []
    for change in found:
        assert change["path"].startswith(root)
        rest, at = change["path"][len(root) :], 0
        steps: list[Any] = ["root"]
        while at < len(rest):
            match = _step.match(rest, at)
            assert match is not None, change["path"]
            name, index, quoted = match.groups()
            steps.append(name if name is not None else int(index) if index else orjson.loads(quoted))
            at = match.end()
        here: Any = whole
        for step in steps[:-1]:
            here = here[step]
        if "old" in change:
            assert same(here[steps[-1]], change["old"])
        else:
            assert steps[-1] not in here
        if "new" in change:
            here[steps[-1]] = change["new"]
        else:
            removed.append((here, steps[-1]))
    for here, name in removed:
        del here[name]
    return whole["root"]


def same(one: Any, other: Any) -> bool:
    """Equal as JSON, which tells true from 1."""
    return orjson.dumps(one, option=orjson.OPT_SORT_KEYS) == orjson.dumps(other, option=orjson.OPT_SORT_KEYS)


@given(edited(), st.sampled_from(["", "cluster", "config_patch.data"]))
def test_the_changes_turn_the_old_content_into_the_new(content: tuple[Any, Any], root: str) -> None:
    old, new = content
    found = changes(old, new, root)
    assume("changes_left_out" not in found and "truncated" not in str(found))
    assert same(applied(found["changes"], old, root), new)


@given(edited())
def test_no_two_changes_have_one_path(content: tuple[Any, Any]) -> None:
    paths = [change["path"] for change in changes(*content, "x")["changes"]]
    assert len(set(paths)) == len(paths)


@given(values)
def test_equal_contents_have_no_changes(content: Any) -> None:
    assert changes(content, copy.deepcopy(content), "x") == {"changes": []}


@given(edited())
def test_contents_are_left_alone(content: tuple[Any, Any]) -> None:
    before = copy.deepcopy(content)
    changes(*content, "x")
    assert content == before


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 2}, [{"path": "c.a", "old": 1, "new": 2}]),
        ({}, {"a": None}, [{"path": "c.a", "new": None}]),
        ({"a": None}, {}, [{"path": "c.a", "old": None}]),
        ({"a": True}, {"a": 1}, [{"path": "c.a", "old": True, "new": 1}]),
        ({"a": 1}, {"a": 1.0}, [{"path": "c.a", "old": 1, "new": 1.0}]),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, [{"path": "c.a[1].b", "old": 2, "new": 3}]),
        ({"a": [1]}, {"a": [1, 2]}, [{"path": "c.a", "old": [1], "new": [1, 2]}]),
        ({"a": {}}, {"a": []}, [{"path": "c.a", "old": {}, "new": []}]),
        ({"a": {"b": 1}}, {"a": {}}, [{"path": "c.a.b", "old": 1}]),
        ({"a.b": 1}, {"a": {"b": 1}}, [{"path": "c.a", "new": {"b": 1}}, {"path": 'c["a.b"]', "old": 1}]),
        (
            {"b": 1, "a": 1},
            {"b": 2, "a": 2},
            [{"path": "c.a", "old": 1, "new": 2}, {"path": "c.b", "old": 1, "new": 2}],
        ),
    ],
)
def test_a_change_names_the_field_that_differs(old: Any, new: Any, expected: Any) -> None:
    found = changes(old, new, "c")["changes"]
    assert found == expected
    assert list(map(repr, found)) == list(map(repr, expected))  # which tells True from 1


@given(st.dictionaries(st.text(max_size=50), st.integers(0, 3000), max_size=60))
def test_the_changes_are_bounded_and_what_is_left_out_is_counted(sizes: dict[str, int]) -> None:
    found = changes({}, {name: "x" * size for name, size in sizes.items()}, "x")
    assert len(orjson.dumps(found["changes"])) <= MOST_BYTES + len(sizes) + 2
    assert len(found["changes"]) + found.get("changes_left_out", 0) == len(sizes)


def test_what_is_left_out_is_never_nothing() -> None:
    assert changes({}, {"a" * MOST_BYTES: 1}, "x") == {"changes": [], "changes_left_out": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x" * LONGEST_VALUE, "x" * LONGEST_VALUE),
        ("x" * LONGEST_VALUE + "y", "x" * LONGEST_VALUE + "…[cut: 1025 bytes]"),
        ("\n" * 1000, "\n" * 1000),
        ("é" * 512 + "x", "é" * 512 + "…[cut: 1025 bytes]"),
        ("x" + "é" * 512, "x" + "é" * 511 + "…[cut: 1025 bytes]"),
        (["x" * 1020], ["x" * 1020]),
        (["x" * 1021], {"truncated": {"bytes": 1025}}),
        ({"a": "x" * 2000}, {"truncated": {"bytes": 2008}}),
    ],
)
def test_a_long_value_is_cut_visibly(value: Any, expected: Any) -> None:
    assert changes({"a": 1}, {"a": value}, "c")["changes"] == [{"path": "c.a", "old": 1, "new": expected}]


def test_one_long_change_hides_no_other() -> None:
    found = changes({"k" * 17000: 1, "role": "reader"}, {"k" * 17000: 2, "role": "admin"}, "")
    assert found == {
        "changes": [{"path": "role", "old": "reader", "new": "admin"}],
        "changes_left_out": 1,
    }
