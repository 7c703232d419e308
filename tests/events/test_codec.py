from __future__ import annotations

import dataclasses
import enum
import json
import math
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from auditlog import Cluster, Event, EventData, InvalidEvent, Session
from auditlog.events.codec import decode, encode, encode_event, encode_session, line_at
from auditlog.events.model import PAYLOADS
from auditlog.events.records import decode_record

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "omni.json").read_text())
SESSION = b'{"user_agent":"Omni-Internal-Agent"}'


def line_of(data: dict[str, Any], **options: Any) -> bytes:
    return line_at(encode("create", "", "", data, b"{}", **options), 5)


def details_of(data: dict[str, Any]) -> bytes:
    """What a line holds between `event_data` and the session."""
    before, after = b'{"event_type":"create","event_ts":5,"event_data":{', b'"session":{}}}\n'
    line = line_of(data)
    assert line.startswith(before)
    assert line.endswith(after)
    return line[len(before) : -len(after)].removesuffix(b",")


@pytest.mark.parametrize("vector", VECTORS["events"], ids=lambda vector: vector["name"])
def test_a_vector_is_written_byte_for_byte_from_a_typed_event(vector: dict[str, Any]) -> None:
    event = Event.model_validate(vector["event"])
    assert line_at(encode_event(event, SESSION), 0).decode() == vector["line"]


@pytest.mark.parametrize("vector", VECTORS["events"], ids=lambda vector: vector["name"])
def test_a_vector_is_written_byte_for_byte_from_plain_dicts(vector: dict[str, Any]) -> None:
    event = vector["event"]
    data = dict(event["event_data"])
    session = encode_session(Session(**data.pop("session")))
    names = event.get("resource_type", ""), event.get("resource_id", "")
    encoded = encode(event["event_type"], *names, data, session, event_ts=event["event_ts"])
    assert line_at(encoded, 0).decode() == vector["line"]


@pytest.mark.parametrize("vector", VECTORS["events"], ids=lambda vector: vector["name"])
def test_a_vector_survives_reading_and_writing(vector: dict[str, Any]) -> None:
    assert line_at(encode_event(decode(vector["line"].encode()), SESSION), 0).decode() == vector["line"]


def test_the_models_have_the_keys_of_the_vectors_in_their_order() -> None:
    order = dict(VECTORS["key_order"])
    assert list(Event.model_fields) == order.pop("event")
    assert list(Session.model_fields) == order.pop("session")
    payloads = [name for name in order.pop("event_data") if not name.startswith("(") and name != "session"]
    assert payloads == [name for name in PAYLOADS if name != "audit"]
    assert {name: list(PAYLOADS[name].model_fields) for name in payloads} == order


@pytest.mark.parametrize(("name", "value", "encoded"), VECTORS["strings"], ids=lambda value: None)
def test_a_string_is_escaped_as_go_does(name: str, value: str, encoded: str) -> None:
    assert details_of({"x": value}).decode() == f'"x":{encoded}', name
    assert decode_record(line_of({"x": value}))["event_data"]["x"] == value


@pytest.mark.parametrize(("era", "line"), VECTORS["eras"], ids=lambda value: None)
def test_every_format_that_omni_ever_wrote_is_read(era: str, line: str) -> None:
    event = decode(line.encode())
    assert event.event_data.session is not None, era
    assert event.event_data.session.email == "a@example.com"
    assert not event.event_data.model_extra
    assert event.event_ts > 1_700_000_000_000


def test_a_users_own_flat_fields_are_no_session_where_they_do_not_fit() -> None:
    event = decode(b'{"event_type":"create","event_data":{"role":{"name":"db"}}}\n')
    assert event.event_data.session is None
    assert event.event_data.model_extra == {"role": {"name": "db"}}


def test_unknown_keys_and_types_round_trip() -> None:
    line = (
        b'{"event_type":"snapshot_2","event_ts":7,"event_data":{"cluster":{"id":"c","zz":null},'
        b'"mine":{"enabled":false,"n":0},"session":{"email":"a","zone":"x"}},"trace":{"id":0}}\n'
    )
    assert line_at(encode_event(decode(line), SESSION), 0) == line


def test_an_event_type_of_any_form_is_read_and_only_a_regular_one_written() -> None:
    event = decode(b'{"event_type":"Strange Type","event_data":{}}\n')
    assert event.event_type == "Strange Type"
    with pytest.raises(InvalidEvent, match="event_type: must be lower-case"):
        encode_event(event, SESSION)


def test_empty_modelled_fields_are_left_out_and_the_users_own_kept() -> None:
    data: dict[str, Any] = {
        "cluster": {"talos_version": "", "labels": {}, "features": {}, "backup_configuration": None},
        "mine": {"b": False, "a": None, "c": "", "d": {}},
        "none": None,
    }
    kept = b'"cluster":{"features":{}},"mine":{"a":null,"b":false,"c":"","d":{}},"none":null'
    assert details_of(data) == kept


def test_keys_are_in_the_modelled_order_and_all_others_sorted() -> None:
    data: dict[str, Any] = {
        "zeta": 1,
        "audit": {"outcome": "denied", "action": "x"},
        "k8s_access": {"command": "c", "full_method_name": "m", "zz": 1, "aa": {"y": 1, "x": 2}},
        "alpha": 2,
        "cluster": {"labels": {"b": "2", "a": "1"}, "id": "c"},
    }
    assert list(orjson.loads(b"{" + details_of(data) + b"}")) == [
        "cluster",
        "k8s_access",
        "alpha",
        "audit",
        "zeta",
    ]
    assert b'"cluster":{"id":"c","labels":{"a":"1","b":"2"}}' in line_of(data)
    expected = b'{"full_method_name":"m","command":"c","aa":{"x":2,"y":1},"zz":1}'
    assert expected in line_of(data)


class Colour(enum.Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    when: datetime


@dataclasses.dataclass
class Pair:
    b: object
    a: object


NOW = datetime(2024, 8, 12, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (NOW, b'"2024-08-12T12:30:00+00:00"'),
        (date(2024, 8, 12), b'"2024-08-12"'),
        (UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
        (Colour.RED, b'"red"'),
        ((1, "a", (2,)), b'[1,"a",[2]]'),
        (Pair(b=1, a=NOW), b'{"a":"2024-08-12T12:30:00+00:00","b":1}'),
        (Point(x=1, when=NOW), b'{"when":"2024-08-12T12:30:00Z","x":1}'),
        (2**64 - 1, b"18446744073709551615"),
        (-(2**63), b"-9223372036854775808"),
        (1e16, b"1e+16"),
        ("a\ud800b\udfff", '"a\ufffdb\ufffd"'.encode()),
        ({"\ud800": 1}, '{"\ufffd":1}'.encode()),
        ({Colour.RED.value: None}, b'{"red":null}'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_these_values_may_be_written(value: object, encoded: bytes) -> None:
    assert details_of({"x": value}) == b'"x":' + encoded
    assert details_of({"x": [value, None]}) == b'"x":[' + encoded + b",null]"


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def cycle() -> object:
    value: dict[str, object] = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"x": {"a": [1, math.nan]}}, "event_data.x.a[1]"),
        ({"x": math.inf}, "event_data.x"),
        ({"x": [2**64]}, "event_data.x[0]"),
        ({"x": -(2**63) - 1}, "event_data.x"),
        ({"x": {1: 2}}, "event_data.x"),
        ({"x": {"y": {"a", "b"}}}, "event_data.x.y"),
        ({"x": b"bytes"}, "event_data.x"),
        ({"x": object()}, "event_data.x"),
        ({"x": datetime(2024, 1, 1)}, "event_data.x"),  # noqa: DTZ001
        ({"x": time(1, 2)}, "event_data.x"),
        ({"x": Pair(a=1, b=[math.nan])}, "event_data.x.b[0]"),
        ({"x": nested(65)}, "event_data.x" + "[0]" * 64),
        ({"x": cycle()}, "event_data.x" + ".self" * 64),
        ({"cluster": {"id": 5}}, "event_data.cluster.id"),
        ({"cluster": {"labels": {"a": 1}}}, "event_data.cluster.labels.a"),
        ({"cluster": {"features": {"a": math.nan}}}, "event_data.cluster.features.a"),
        ({"cluster": {"own": math.nan}}, "event_data.cluster.own"),
        ({"cluster": {"own": math.inf, "id": "c"}}, "event_data.cluster.own"),
        ({"cluster": "c"}, "event_data.cluster"),
        ({"access_policy": {"rules": {}}}, "event_data.access_policy.rules"),
        ({"session": {}}, "event_data.session"),
    ],
    ids=str,
)
def test_what_may_not_be_written_is_refused_by_the_path_of_the_field(data: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        line_of(data)
    assert caught.value.path == path


def test_a_refusal_never_repeats_the_value() -> None:
    with pytest.raises(InvalidEvent) as caught:
        line_of({"cluster": {"id": ["hunter2"]}})
    assert "hunter2" not in repr(caught.value) + str(caught.value)
    assert caught.value.__cause__ is None


def test_a_lone_surrogate_in_a_name_becomes_the_replacement_character() -> None:
    assert details_of({"a\ud800": 1}) == '"a\ufffd":1'.encode()
    assert details_of({"cluster": {"id": "c", "\udfff": 1}}) == '"cluster":{"id":"c","\ufffd":1}'.encode()


def test_nesting_up_to_64_levels_is_written() -> None:
    assert details_of({"x": nested(64)}) == b'"x":' + b"[" * 64 + b"1" + b"]" * 64
    assert details_of({"x": "[" * 100}) == b'"x":"' + b"[" * 100 + b'"'


@pytest.mark.parametrize("event_type", ["", "Create", "a b", "1a", "a-b", "a\n", 5, None])
def test_an_irregular_event_type_is_refused(event_type: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^event_type: "):
        encode(event_type, "", "", {}, b"{}")


@pytest.mark.parametrize(("field", "arguments"), [("resource_type", (5, "")), ("resource_id", ("", 5))])
def test_a_resource_that_is_no_string_is_refused(field: str, arguments: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidEvent, match=rf"^{field}: "):
        encode("create", *arguments, {}, b"{}")


def test_a_wrong_field_of_a_model_is_an_error_of_ours() -> None:
    with pytest.raises(InvalidEvent, match=r"^Session\.role: "):
        Session(role=5)  # type: ignore[arg-type]


def test_fields_of_a_subclass_are_written_and_the_event_stays_as_it_is() -> None:
    class Traced(Event):
        trace: str = "t1"

    event = Traced(event_type="create", own=1)  # type: ignore[call-arg]
    expected = b'{"event_type":"create","event_ts":1,"event_data":{"session":{}},"own":1,"trace":"t1"}\n'
    assert line_at(encode_event(event, b"{}"), 1) == expected
    assert event.model_extra == {"own": 1}


def test_models_are_payloads_too() -> None:
    assert details_of({"cluster": Cluster(id="c", features={})}) == b'"cluster":{"id":"c","features":{}}'
    event = Event(event_type="create", event_data=EventData(cluster=Cluster(id="\ud800")))
    assert '"cluster":{"id":"\ufffd"}' in line_at(encode_event(event, b"{}"), 1).decode()


@pytest.mark.parametrize(
    "line", [b"{\n", b'{"event_type":5}\n', b"{}\n", b'{"event_type":"a","event_ts":"1"}\n']
)
def test_a_line_that_is_no_event_says_why(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line)


texts = st.text(st.characters(codec=None), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def reference(value: object) -> str:
    """The same rules from the standard library."""
    encoded = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    for raw in "<>&\u2028\u2029":
        encoded = encoded.replace(raw, f"\\u{ord(raw):04x}")
    return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in encoded)


def has_lone_surrogate_key(value: object) -> bool:
    if isinstance(value, dict):
        return any(
            any("\ud800" <= char <= "\udfff" for char in key) or has_lone_surrogate_key(member)
            for key, member in value.items()
        )
    return isinstance(value, list) and any(map(has_lone_surrogate_key, value))


@given(values.filter(lambda value: not has_lone_surrogate_key(value)))
def test_any_json_value_is_written_as_the_reference_writes_it(value: object) -> None:
    assert details_of({"own": value}).decode() == f'"own":{reference(value)}'


@given(values)
def test_a_written_line_is_one_line_and_reads_back(value: object) -> None:
    line = line_of({"own": value})
    assert line.count(b"\n") == 1
    assert line.startswith(b"{")
    assert line.endswith(b"}\n")
    assert line_at(encode_event(decode(line), b"{}"), 0) == line
