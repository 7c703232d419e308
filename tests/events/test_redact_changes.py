"""In `changes`, a value is what its path calls it: no secret of an update is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import hmac
import time
from collections import OrderedDict
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from auditlog import InvalidEvent
from auditlog.capture.changes import changes
from auditlog.testing import recorded_log

CANARY = "canary-5f1d"
KEY = b"0123456789abcdef"
SECRET_NAMES = [
    "password",
    "dbPassword",
    "pass.word",
    "my.api.key",
    "x[0].token",
    'a"secret',
    "[1]cookie",
    "[1].cookie",
    '["a"].client-secret',
    "\\secret",
    "AUTHORIZATION",
]


def written(found: Any, redact: list[str] | tuple[str, ...] = (), **options: Any) -> Any:
    """The `changes` of an update, as they were written."""
    with recorded_log(redact=redact, **options) as log:
        log.audit.update("T", "1", changes=found)
        return log.records[0]["event_data"]["changes"]


def digest(text: str) -> str:
    return "hmac-sha256:" + hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()


leaves = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["", "open", "a.b"])
secrets = st.recursive(
    st.just(CANARY), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner)
)
contents = st.recursive(
    leaves | st.dictionaries(st.sampled_from(SECRET_NAMES), secrets, max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b.c", "", "d[0]", "secretary"]), inner, max_size=3)
        | st.fixed_dictionaries({"password": secrets, "x": inner})
    ),
    max_leaves=12,
)


@given(contents, contents, st.sampled_from(["", "cluster", "a.b"]), st.sampled_from([None, KEY]))
def test_no_secret_of_a_usual_name_is_written_whatever_the_nesting(
    old: Any, new: Any, root: str, hmac_key: bytes | None
) -> None:
    found = changes({"content": old}, {"content": new}, root)
    before = copy.deepcopy(found)
    with recorded_log(hmac_key=hmac_key) as log:
        log.audit.update("T", "1", **found)
        (entry,) = log.entries
    assert CANARY.encode() not in entry.line
    assert found == before  # the caller's own
    assert len(entry.record["event_data"]["changes"]) == len(found["changes"])


@given(leaves, st.lists(st.sampled_from(["a", "b.c", "", "d[0]", "secretary"]), max_size=4))
def test_what_is_no_secret_is_written_as_it_is(value: Any, names: list[str]) -> None:
    new: Any = [value, "x"]
    for name in names:
        new = {name: [new]}
    found = changes({"content": 1}, {"content": new}, "cluster")["changes"]
    assert written(found) == found


@pytest.mark.parametrize(
    ("pattern", "old", "new", "expected"),
    [
        ("config_patch.data", {"data": "1"}, {"data": "2"}, {"old": "[redacted]", "new": "[redacted]"}),
        ("config_patch.data", {}, {"data": {"a": 1}}, {"new": {"redacted": "[redacted]"}}),
        ("config_patch.data", {"data": ["1"]}, {}, {"old": ["[redacted]"]}),
        ("config_patch.data", {"data": [1]}, {"data": [2]}, {"old": None, "new": None}),
        ("config_patch", {"a": {"b": "1"}}, {"a": {"b": ""}}, {"old": "[redacted]", "new": ""}),
        ("ssn", {"a": [{"b": 1}]}, {"a": [{"b": 1, "SSN": "1"}]}, {"new": "[redacted]"}),
        ("ssn", {}, {"a": [{"b": [{"SSN": "1"}]}]}, {"new": [{"b": [{"SSN": "[redacted]"}]}]}),
        ("*.pin", {"a": {"pin": 1}}, {"a": {"pin": 2}}, {"old": "[redacted]", "new": "[redacted]"}),
        ("config_patch.*.k", {}, {"a": {"b": {"k": "1"}}}, {"new": {"b": {"k": "[redacted]"}}}),
        ("config_patch.a.b/c", {"a": {}}, {"a": {"b/c": "1"}}, {"new": "[redacted]"}),
        ("config_patch.omni.dev/x", {}, {"omni.dev/x": "1"}, {"new": "[redacted]"}),
        ("other.data", {"data": "1"}, {"data": "2"}, {"old": "1", "new": "2"}),
        ("data", {"data_kind": "1"}, {"data_kind": "2"}, {"old": "1", "new": "2"}),
        ("changes.old", {"a": "1"}, {"a": "2"}, {"old": "[redacted]", "new": "2"}),
    ],
)
def test_a_pattern_means_the_same_field_as_in_the_payload(
    pattern: str, old: Any, new: Any, expected: Any
) -> None:
    (change,) = changes(old, new, "config_patch")["changes"]
    assert written([change], [pattern]) == [{"path": change["path"], **expected}]


def test_a_pattern_for_all_changes_hides_them_all() -> None:
    assert written([{"path": "a", "new": CANARY}], ["changes"]) == "[redacted]"
    assert written([{"path": CANARY, "new": 1}], ["changes.path"]) == [{"path": "[redacted]", "new": 1}]


def test_a_secret_has_one_digest_wherever_it_stands() -> None:
    old = {"auth": {"password": "grün"}}
    new = {"auth": {"password": "blau"}, "more": {"deep": [{"password": "grün"}]}}
    with recorded_log(hmac_key=KEY) as log:
        log.audit.update("T", "1", cluster={"password": "grün"}, **changes(old, new, "cluster"))
        data = log.records[0]["event_data"]
    assert data["cluster"]["password"] == digest("grün")
    assert data["changes"] == [
        {"path": "cluster.auth.password", "old": digest("grün"), "new": digest("blau")},
        {"path": "cluster.more", "new": {"deep": [{"password": digest("grün")}]}},
    ]


@dataclasses.dataclass
class OwnChange:
    path: str
    old: Any
    new: Any


class ModelledChange(BaseModel):
    path: str = "login.password"
    new: str = CANARY


class Path(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "change",
    [
        {"path": "password", "new": CANARY},
        {"path": "login.password.x[3].y", "new": CANARY},
        {"path": "users[0].password", "old": [CANARY], "new": {"a": CANARY}},
        {"path": "login", "new": {"x": [{"password": CANARY}]}},
        {"path": 'a["login.password"].b', "new": CANARY},
        {"path": r'a["\u0070assword"]', "new": CANARY},
        {"path": Path("password"), "new": CANARY},
        {"path": "x", "password": CANARY},
        {"path": 5, "new": {"password": CANARY}},
        {"new": [{"token": CANARY}]},
        {"path": "..password", "new": CANARY},
        {"path": "a[b].password", "new": CANARY},
        {"path": '["a.password', "new": CANARY},
        {"path": r'["\q"].password', "new": CANARY},
        {"path": r'["\qpassword"]', "new": CANARY},
        OrderedDict(path="password", new=CANARY),
        OwnChange("password", CANARY, CANARY),
        ModelledChange(),
        [{"password": CANARY}],
    ],
)
@pytest.mark.parametrize("hmac_key", [None, KEY])
def test_a_change_that_somebody_else_wrote_is_redacted_too(change: Any, hmac_key: bytes | None) -> None:
    text = str(written([change], hmac_key=hmac_key))
    assert CANARY not in text
    assert ("[redacted]" if hmac_key is None else "hmac-sha256:") in text


@given(st.text())
def test_any_text_can_stand_before_a_secret(text: str) -> None:
    assert CANARY not in str(written([{"path": f"{text}.password", "new": CANARY}]))


@given(st.text())
def test_any_text_is_a_path(text: str) -> None:
    path = f"{text}.open"
    assert written([{"path": path, "new": 1}], redact_defaults=False)[0]["new"] == 1


@pytest.mark.parametrize("found", ["x", 5, None, {"path": "password"}, [5, None, "password"], []])
def test_what_are_no_changes_is_the_users_own(found: Any) -> None:
    assert written(found) == found


def test_long_paths_take_no_time_and_hide_nothing() -> None:
    started = time.process_time()
    for path in (
        "a." * 500_000 + "password",
        "[0]" * 200_000 + ".password",
        '["a"]' * 100_000,
        '["' * 200_000,
    ):
        assert CANARY not in str(written([{"path": path + ".password", "new": CANARY}]))
    assert time.process_time() - started < 5  # seconds; joining all names again and again takes minutes


@pytest.mark.parametrize("value", [orjson.Fragment(b'{"password":1}'), {1: 2}, float("nan"), object()])
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    for change in ({"path": "a", "new": value}, {"path": "password", "new": value}, value):
        with recorded_log(hmac_key=KEY) as log:
            with pytest.raises(InvalidEvent):
                log.audit.update("T", "1", changes=[change])
            assert log.entries == []


def test_a_secret_that_was_cut_has_no_digest_of_something_else() -> None:
    old, new = ({"token": "x" * 1100 + end, "credentials": ["A" * 1200 + end]} for end in "12")
    found = changes(old, new, "")["changes"]
    after = written(found, hmac_key=b"sixteen bytes at least")
    assert [(each["old"], each["new"]) for each in after] == [("[redacted]", "[redacted]")] * 2
