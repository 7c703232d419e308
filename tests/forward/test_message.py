"""The message of the Talos logging document, and its forms on a socket."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auditlog import AuditLogger, AuditReader, Entry, Session, denied
from auditlog.forward import Destination
from auditlog.forward.forms import JsonLines, Raw
from auditlog.forward.message import Messages
from auditlog.forward.summary import level_of, summary_of
from auditlog.testing import FixedClock
from tests.helpers import write_day

SESSION = Session(
    user_agent="Mozilla/5.0", ip_address="10.1.2.3", user_id="u", role="Admin", email="user@example.com"
)
CLOCK = FixedClock(datetime(2024, 8, 12, 12, 0, 0, 123_000, tzinfo=UTC))


def destination(**options: Any) -> Destination:
    return Destination(**({"endpoint": "udp://127.0.0.1:12345/", "source": "cp-1"} | options))


def stored(directory: Path, line: bytes) -> Entry:
    write_day(directory, "2024-08-12", line)
    (entry,) = AuditReader(directory).read()
    return entry


def entry_of(directory: Path, **record: Any) -> Entry:
    return stored(directory, orjson.dumps(record) + b"\n")


def test_it_is_the_documents_with_the_event_its_key_and_the_tags_in_that_order(directory: Path) -> None:
    with AuditLogger(directory, retention=None, clock=CLOCK) as log, log.session(SESSION):
        log.create("Clusters.omni.sidero.dev", "talos-default", cluster={"id": "talos-default"})
    (entry,) = AuditReader(directory).read()
    message = JsonLines(destination(extra_tags={"server": "s03-rack07"})).message(entry)
    digest = hashlib.sha256(entry.line).hexdigest()[:8]
    assert message == (
        b'{"msg":"user@example.com created Clusters/talos-default from 10.1.2.3",'
        b'"talos-level":"info","talos-service":"audit","talos-time":"2024-08-12T12:00:00.123000000Z",'
        + entry.line[1:-2]
        + b',"source":"cp-1","position":"2024-08-12:0","sha256":"'
        + digest.encode()
        + b'","server":"s03-rack07"}'
    )
    assert Messages(destination()).key(entry) == f"cp-1:2024-08-12:0:{digest}"


def test_a_tag_wins_over_ours_and_ours_over_the_events(directory: Path) -> None:
    entry = entry_of(directory, event_type="create", event_ts=0, msg="forged", source="forged", site="forged")
    forms = [destination(), destination(extra_tags={"source": "tag", "site": "a"})]
    plain, tagged = (orjson.loads(JsonLines(each).message(entry)) for each in forms)
    assert (plain["msg"], plain["source"], plain["site"]) == ("somebody created", "cp-1", "forged")
    assert (tagged["msg"], tagged["source"], tagged["site"]) == ("somebody created", "tag", "a")
    for each in forms:  # and never twice in one message, whatever a receiver makes of that
        pairs = orjson.loads(JsonLines(each).message(entry))
        assert JsonLines(each).message(entry).count(b'"source":') == 1
        assert {"msg", "talos-level", "talos-service", "talos-time"} <= pairs.keys()


@pytest.mark.parametrize("event_ts", [None, "soon", -1, True, 1 << 62, 253_402_300_800_000])
def test_a_time_that_is_none_is_the_epoch(directory: Path, event_ts: object) -> None:
    entry = entry_of(directory, event_type="create", event_ts=event_ts)
    assert orjson.loads(JsonLines(destination()).message(entry))["talos-time"] == (
        "1970-01-01T00:00:00.000000000Z"
    )


def test_an_empty_object_has_a_message(directory: Path) -> None:
    message = orjson.loads(JsonLines(destination()).message(stored(directory, b"{}\n")))
    assert message["msg"] == "somebody"
    assert message["position"] == "2024-08-12:0"


def test_raw_is_the_stored_line(directory: Path) -> None:
    entry = entry_of(directory, event_type="create", note="<&>")
    assert Raw().framed(Raw().message(entry)) == entry.line


def of(event_type: str, resource_type: str = "", resource_id: str = "", **data: Any) -> dict[str, Any]:
    ref = {"resource_type": resource_type, "resource_id": resource_id}
    return {"event_type": event_type, **ref, "event_data": data}


@pytest.mark.parametrize(
    ("record", "summary", "level"),
    [
        (of("destroy", resource_type="Machines.x", resource_id="m"), "destroyed Machines/m", "info"),
        (
            of("k8s_access", k8s_access={"full_method_name": "POST /api", "command": "kubectl create ns"}),
            "called Kubernetes POST /api (kubectl create ns)",
            "info",
        ),
        (of("k8s_access", k8s_access={"cluster_name": "c"}), "called Kubernetes of cluster c", "info"),
        (
            of("talos_access", talos_access={"full_method_name": "M/Reboot"}, audit={"count": 3}),
            "called Talos M/Reboot (3 times)",
            "info",
        ),
        (
            of("access_denied", audit={"action": "destroy", "outcome": "denied"}),
            "was denied destroy [denied]",
            "warn",
        ),
        (of("intent", resource_id="x", audit={"outcome": "failed"}), "is about to change x [failed]", "warn"),
        ({"event_type": "something_new", "resource_id": "x"}, "something_new x", "info"),
        ({}, "", "info"),
        ({"event_type": 5, "event_data": [], "resource_id": {}}, "", "info"),
    ],
)
def test_a_summary_says_who_did_what(record: dict[str, Any], summary: str, level: str) -> None:
    assert summary_of(record) == f"somebody {summary}".strip()
    assert level_of(record) == level


def test_a_gap_is_an_error() -> None:
    record = {"event_type": "gap", "event_data": {"audit": {"lost": 7}}}
    assert (summary_of(record), level_of(record)) == ("7 events could not be written", "error")


def test_a_real_denial_is_a_warning(directory: Path) -> None:
    with AuditLogger(directory, retention=None) as log:
        log.write(denied("destroy"))
    (entry,) = AuditReader(directory).read()
    assert level_of(entry.record) == "warn"


HOSTILE = '\x1b[31m\r\n{"msg":"forged"}\u202e\u2028 \U0001f600' + "x" * 1000


def test_a_summary_is_one_line_that_speaks_to_no_terminal() -> None:
    session = {"email": HOSTILE, "ip_address": HOSTILE}
    record = {"event_type": HOSTILE, "resource_type": HOSTILE, "resource_id": HOSTILE}
    summary = summary_of(record | {"event_data": {"session": session}})
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202e]", summary)
    assert len(summary) <= 400


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=3000)
KEYS = st.text(max_size=20).filter(str.isascii)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(["event_type", "resource_id", "event_ts", "event_data", "own", "msg"])
TAGS = st.sampled_from(["server", "msg", "source", "truncated"])


@settings(max_examples=150, deadline=None)
@given(
    record=st.dictionaries(FIELDS, DATA),
    tags=st.dictionaries(TAGS, TEXTS, max_size=2),
    limit=st.integers(512, 4000),
)
def test_whatever_an_event_holds_a_message_is_json_and_a_cut_one_fits(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any], tags: dict[str, str], limit: int
) -> None:
    entry = entry_of(tmp_path_factory.mktemp("log") / "log", **record)
    wanted = destination(extra_tags=tags, source="s" * 255, service="a" * 48)
    form = JsonLines(wanted)
    message = form.message(entry)
    assert b"\n" not in message
    assert orjson.loads(message) == Messages(wanted).fields(entry)
    assert orjson.loads(message).items() >= tags.items()
    cut = form.cut(entry, limit)
    assert len(cut) <= limit
    assert {"msg", "talos-level", "talos-service", "talos-time", "position", "sha256"} <= orjson.loads(
        cut
    ).keys()
    raw = Raw().cut(entry, limit)
    assert len(raw) <= limit
    assert raw.decode().endswith("]")


def test_a_cut_keeps_as_much_as_fits_and_says_what_is_missing(directory: Path) -> None:
    long = "y" * 10_000
    entry = entry_of(directory, event_type="create", event_data={"note": long, "cluster": {"id": "c"}})
    form = JsonLines(destination(extra_tags={"server": "a"}))
    digest = hashlib.sha256(long.encode()).hexdigest()
    near = orjson.loads(form.cut(entry, 8000))
    assert near["event_data"]["cluster"] == {"id": "c"}
    assert near["event_data"]["note"].startswith("yyy")
    assert near["event_data"]["note"].endswith(f"…[cut: 10000 bytes, sha256 {digest}]")
    small = orjson.loads(form.cut(entry, 600))
    assert "note" not in small.get("event_data", {}) or "truncated" in str(small["event_data"])
    assert small["server"] == "a"
    line = hashlib.sha256(entry.line).hexdigest()
    assert Raw().cut(entry, 600).decode().endswith(f"…[cut: {len(entry.line)} bytes, sha256 {line}]")
