from __future__ import annotations

import re
from datetime import date
from hashlib import sha256
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from auditlog import CorruptEntry, Entry, InvalidSetting
from auditlog.forward.destination import Destination, Tag
from auditlog.forward.syslog import Syslog

# RFC 5424, section 6; stricter where it lets a sender choose.
DATE = r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d{1,6})?(?:Z|[+-]\d{2}:\d{2})"
NAME = r"[!#-<>-\\^-~]{1,32}"
PARAM = rf' ({NAME})="((?:[^"\\\]]|\\["\\\]])*)"'
ELEMENT = rf"\[({NAME})((?:{PARAM})*)\]"
MESSAGE = re.compile(
    rf"<(?P<pri>[1-9]\d{{0,2}})>1 (?P<time>-|{DATE}) (?P<host>[!-~]{{1,255}}) (?P<app>[!-~]{{1,48}})"
    rf" (?P<procid>-|[!-~]{{1,128}}) (?P<msgid>-|[!-~]{{1,32}}) (?P<sd>-|(?:{ELEMENT})+) (?P<msg>.*)",
    re.DOTALL,
)


class Message(NamedTuple):
    pri: int
    time: str
    host: str
    app: str
    procid: str
    msgid: str
    sd: dict[str, dict[str, str]]
    msg: str

    @property
    def facts(self) -> dict[str, str]:
        return self.sd["auditlog@32473"]

    @property
    def record(self) -> dict[str, Any]:
        assert self.msg.startswith("@cee: {")
        record: dict[str, Any] = orjson.loads(self.msg[6:])
        return record


def parse(message: bytes) -> Message:
    """A message of RFC 5424, taken apart; all of it is UTF-8."""
    match = MESSAGE.fullmatch(message.decode())
    assert match, message
    sd = {name: params_of(params) for name, params, *_ in re.findall(ELEMENT, match["sd"])}
    time, host, app, procid, msgid = match.group("time", "host", "app", "procid", "msgid")
    return Message(int(match["pri"]), time, host, app, procid, msgid, sd, match["msg"])


def params_of(text: str) -> dict[str, str]:
    return {name: re.sub(r'\\(["\\\]])', r"\1", value) for name, value in re.findall(PARAM, text)}


def unframed(stream: bytes) -> list[bytes]:
    """The messages of a stream with octet counting (RFC 6587, section 3.4.1)."""
    messages = []
    while stream:
        length, _, stream = stream.partition(b" ")
        assert re.fullmatch(rb"[1-9]\d*", length)
        messages.append(stream[: int(length)])
        assert len(messages[-1]) == int(length)
        stream = stream[int(length) :]
    return messages


def entry_of(record: dict[str, Any] | bytes) -> Entry:
    entry = Entry()
    entry.line = (record if isinstance(record, bytes) else orjson.dumps(record)) + b"\n"
    entry.day, entry.offset = date(2024, 8, 12), 10234
    return entry


def form(tags: dict[str, Tag] | None = None, **settings: Any) -> Syslog:
    settings = {"source": "cp-1.example.com"} | settings
    endpoint = "tls://logs.example.com:6514/"
    return Syslog(Destination(endpoint=endpoint, format="syslog", extra_tags=tags or {}, **settings))


CREATE: dict[str, Any] = {
    "event_type": "create",
    "resource_type": "Clusters.omni.sidero.dev",
    "resource_id": "talos-default",
    "event_ts": 1723466435280,
    "event_data": {
        "cluster": {"id": "talos-default"},
        "session": {"ip_address": "10.1.2.3", "email": "user@example.com"},
    },
}


def test_an_event_is_told_in_header_structured_data_and_message() -> None:
    assert form({"rack": "r 7", "slot": 3, "spare": False}).message(entry_of(CREATE)).decode() == (
        "<110>1 2024-08-12T12:40:35.280Z cp-1.example.com audit - create "
        '[auditlog@32473 event_type="create" resource_type="Clusters.omni.sidero.dev"'
        ' resource_id="talos-default" cluster_id="talos-default" actor="user@example.com"'
        ' address="10.1.2.3" msg="user@example.com created Clusters/talos-default from 10.1.2.3"'
        ' position="2024-08-12:10234" sha256="80d83f9c"]'
        '[tags@32473 rack="r 7" slot="3" spare="false"]'
        ' @cee: {"event_type":"create","resource_type":"Clusters.omni.sidero.dev",'
        '"resource_id":"talos-default","event_ts":1723466435280,"event_data":{"cluster":'
        '{"id":"talos-default"},"session":{"ip_address":"10.1.2.3","email":"user@example.com"}}}'
    )


def test_what_an_event_does_not_have_is_left_out() -> None:
    assert form().message(entry_of({"event_type": "reboot"})).decode() == (
        "<110>1 - cp-1.example.com audit - reboot "
        '[auditlog@32473 event_type="reboot" msg="somebody reboot" position="2024-08-12:10234"'
        ' sha256="16b7891c"] @cee: {"event_type":"reboot"}'
    )


@pytest.mark.parametrize(
    ("record", "severity"),
    [
        ({"event_type": "create"}, 6),
        ({"event_type": "access_denied"}, 4),
        ({"event_type": "create", "event_data": {"audit": {"outcome": "failed"}}}, 4),
        ({"event_type": "gap", "event_data": {"audit": {"lost": 3}}}, 3),
    ],
)
def test_the_priority_is_of_log_audit_and_of_the_events_level(record: dict[str, Any], severity: int) -> None:
    assert parse(form().message(entry_of(record))).pri == 13 * 8 + severity


@pytest.mark.parametrize(
    ("event_ts", "time"),
    [
        (1, "1970-01-01T00:00:00.001Z"),
        (1723466435000, "2024-08-12T12:40:35.000Z"),
        (253402300799999, "9999-12-31T23:59:59.999Z"),
        (253402300800000, "-"),
        (0, "-"),
        (-1, "-"),
        (True, "-"),
        ("1", "-"),
    ],
)
def test_the_time_is_the_events_if_it_has_one(event_ts: Any, time: str) -> None:
    assert parse(form().message(entry_of({"event_ts": event_ts}))).time == time


@pytest.mark.parametrize("event_type", ["", "two words", "größe", "x\n", "e" * 33, 5, None])
def test_an_event_type_that_cannot_be_a_msgid_is_in_the_structured_data_alone(event_type: Any) -> None:
    message = parse(form().message(entry_of({"event_type": event_type})))
    assert message.msgid == "-"
    shown = event_type.replace("\n", r"\x0a") if isinstance(event_type, str) else ""
    assert message.facts.get("event_type", "") == shown


def test_nothing_in_a_value_ends_it_or_speaks_to_a_terminal() -> None:
    hostile = 'x"] [forged@1 a="b\\"]\n<0>1 - - - - - -\x1b[2J\x00\x7f\u202e\ufeffü\U0001f600'
    record = {"event_type": "create", "resource_id": hostile, "event_data": {"session": {"email": hostile}}}
    raw = form({"tag": hostile}).message(entry_of(record))
    shown = 'x"] [forged@1 a="b\\"]\\x0a<0>1 - - - - - -\\x1b[2J\\x00\\x7f\\u202e\\ufeffü\U0001f600'
    message = parse(raw)
    assert message.facts["resource_id"] == message.facts["actor"] == shown
    assert message.sd["tags@32473"] == {"tag": shown}
    assert set(message.sd) == {"auditlog@32473", "tags@32473"}
    assert message.record == record
    assert b"\n" not in raw


def test_a_value_that_is_too_long_is_cut_visibly_and_whole_in_the_message() -> None:
    record = {"resource_type": "t" * 1024, "resource_id": "ü" * 1000}
    message = parse(form().message(entry_of(record)))
    assert message.facts["resource_type"] == "t" * 1024
    assert message.facts["resource_id"] == "ü" * 502 + "…[cut: 2000 bytes]"
    assert message.record == record


@pytest.mark.parametrize("name", ["n" * 33, "a=b", "a b", "a]", 'a"b', "ü", "a\nb", "\x7f"])
def test_a_tag_whose_name_cannot_be_a_parameter_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match="printable ASCII") as raised:
        form({"good": 1, name: "value"})
    assert raised.value.setting == f"extra_tags.{name}"
    assert raised.value.value == "value"


def test_any_legal_name_of_a_tag_is_taken() -> None:
    name = "".join(chr(code) for code in range(33, 127) if chr(code) not in '="]')
    tags: dict[str, Tag] = {name[start : start + 32]: 1.5 for start in range(0, len(name), 32)}
    assert parse(form(tags).message(entry_of(CREATE))).sd["tags@32473"] == dict.fromkeys(tags, "1.5")


def test_a_line_that_cannot_be_decoded_is_an_error() -> None:
    with pytest.raises(CorruptEntry):
        form().message(entry_of(b'{"event_type":}'))


# ---------------------------------------------------------------------- whatever the fields hold

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"]', "\\", "\n1 <", "@cee: {"])
long_texts = st.builds(lambda text, times: text * times, texts, st.sampled_from([1, 20, 700]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
sessions = st.fixed_dictionaries({}, optional={"email": long_texts | values, "ip_address": texts})
audits = st.fixed_dictionaries(
    {}, optional={"outcome": st.sampled_from(["denied", "failed"]), "lost": values}
)
datas = st.fixed_dictionaries(
    {},
    optional={
        "session": sessions | values,
        "audit": audits | values,
        "cluster": st.fixed_dictionaries({"id": long_texts}) | values,
        "own": values,
        "long": long_texts,
    },
)
records = st.fixed_dictionaries(
    {},
    optional={
        "event_type": st.sampled_from(["create", "gap", "access_denied"]) | values,
        "resource_type": values,
        "resource_id": long_texts | values,
        "event_ts": st.integers(0, 2**42) | values,
        "event_data": datas | values,
        "msg": values,
    },
)
tag_names = st.from_regex(f"^{NAME}\\Z")
tags = st.dictionaries(tag_names, long_texts | st.booleans() | st.integers(-100, 100), max_size=3)
LONG_HEADER: dict[str, Any] = {"source": "s" * 255, "service": "a" * 48}


@given(st.lists(records, min_size=1, max_size=3), tags)
def test_every_message_parses_back_and_stays_in_its_frame(
    several: list[dict[str, Any]], tags: dict[str, Tag]
) -> None:
    syslog = form(tags)
    entries = [entry_of(record) for record in several]
    messages = unframed(b"".join(syslog.framed(syslog.message(entry)) for entry in entries))
    for record, entry, raw in zip(several, entries, messages, strict=True):
        message = parse(raw)
        assert message.msg == "@cee: " + entry.line[:-1].decode()
        assert message.record == orjson.loads(orjson.dumps(record))
        assert message.facts["position"] == "2024-08-12:10234"
        assert message.facts["sha256"] == sha256(entry.line).hexdigest()[:8]
        shown = [value for element in message.sd.values() for value in element.values()]
        assert not re.search("[\x00-\x1f\x7f-\x9f]", "".join(shown))
        assert message.sd.get("tags@32473", {}).keys() == tags.keys()
        plain = re.compile("[ -~]{1,1024}").fullmatch
        for name in ("resource_type", "resource_id"):
            value = record.get(name)
            if isinstance(value, str) and plain(value):
                assert message.facts[name] == value


limits = st.integers(512, 3000) | st.integers(3000, 70_000)


@given(records, tags, limits, st.sampled_from([{}, LONG_HEADER]))
@example({"event_type": "e" * 32, "event_ts": 1}, {"t": "x" * 400}, 512, LONG_HEADER)
def test_a_cut_message_fits_and_parses(
    record: dict[str, Any], tags: dict[str, Tag], limit: int, header: dict[str, Any]
) -> None:
    entry = entry_of(record)
    raw = form(tags, **header).cut(entry, limit)
    assert len(raw) <= limit
    message = parse(raw)
    assert message.facts["position"] == "2024-08-12:10234"
    assert message.facts["sha256"] == sha256(entry.line).hexdigest()[:8]
    assert message.facts["cut"] == str(len(entry.line))
    if message.record != orjson.loads(entry.line):
        assert re.search(r'"truncated":\{"bytes":\d+|…\[cut: \d+ bytes', message.msg)


# ---------------------------------------------------------------------- what is too long for a packet

LONG_DATA = CREATE | {"event_data": CREATE["event_data"] | {"own": {"id": "o", "text": "ü" * 40_000}}}


def whole_facts(record: dict[str, Any]) -> dict[str, str]:
    return parse(form().message(entry_of(record))).facts


def test_a_message_that_is_too_long_keeps_all_but_its_longest_text() -> None:
    message = parse(form({"rack": "7"}).cut(entry_of(LONG_DATA), 8192))
    data = message.record["event_data"]
    assert data["own"]["text"].startswith("üü")
    digest = sha256(("ü" * 40_000).encode()).hexdigest()
    assert data["own"]["text"].endswith(f"…[cut: 80000 bytes, sha256 {digest}]")
    assert data["session"] == LONG_DATA["event_data"]["session"]
    assert message.facts == whole_facts(LONG_DATA) | {"cut": str(len(entry_of(LONG_DATA).line))}
    assert message.sd["tags@32473"] == {"rack": "7"}


def test_data_that_cannot_be_cut_goes_whole_and_the_event_stays() -> None:
    record = {**CREATE, "event_data": {"audit": {"action": "a" * 5000}}}
    entry = entry_of(record)
    kept = {name: value for name, value in record.items() if name != "event_data"}
    mark = {"truncated": {"bytes": len(entry.line), "sha256": sha256(entry.line).hexdigest()}}
    assert parse(form().cut(entry, 1024)).record == kept | mark


def test_tags_go_before_the_structured_data_is_cut() -> None:
    message = parse(form({"note": "n" * 3000}).cut(entry_of(CREATE), 2048))
    assert set(message.sd) == {"auditlog@32473"}
    assert message.facts == whole_facts(CREATE) | {"cut": str(len(entry_of(CREATE).line))}
    assert message.record == CREATE


def test_long_values_are_cut_shorter_and_short_ones_stay() -> None:
    record = CREATE | {"resource_id": "ü" * 1000}
    message = parse(form().cut(entry_of(record), 900))
    assert re.fullmatch(r"ü+…\[cut: 2000 bytes\]", message.facts["resource_id"])
    assert message.facts["actor"] == "user@example.com"
    assert set(message.record) == {"truncated"}


def test_the_longest_header_leaves_room_for_what_identifies_the_event() -> None:
    entry = entry_of({"event_type": "e" * 32, "event_ts": 1, "event_data": {"own": "x" * 1000}})
    message = parse(form(**LONG_HEADER).cut(entry, 512))
    assert message.facts.keys() == {"position", "sha256", "cut"}
    assert message.record == {"truncated": {"bytes": len(entry.line)}}


@pytest.mark.parametrize("where", ["event_data", "own"])
def test_a_line_nested_deeper_than_can_be_written_is_cut_to_its_mark(where: str) -> None:
    entry = entry_of(b'{"event_type":"x","%b":{"deep":%b}}' % (where.encode(), b"[" * 400 + b"]" * 400))
    message = parse(form().cut(entry, 600))
    assert message.record == {
        "truncated": {"bytes": len(entry.line), "sha256": sha256(entry.line).hexdigest()}
    }
