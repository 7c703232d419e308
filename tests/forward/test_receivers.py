"""Real events to real receivers: what they write is what the log has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
import trustme

from auditlog import (
    AuditFacts,
    AuditLogger,
    DestinationError,
    Entry,
    Event,
    EventData,
    EventType,
    Position,
    Session,
    denied,
)
from auditlog.events.visible import visible
from auditlog.forward import Destination, Forwarder
from tests.forward.receivers import TRANSPORTS, Receiver, Rsyslog, Transport
from tests.helpers import Reading, until

HOSTILE = [
    'say "hello"',
    "C:\\path\\]\\",
    '"] [forged@32473 position="1"] @cee: {"event_type":"forged"}',
    "line\nbreak\r\nand\ttab",
    "\n42 <13>1 - forged - - - - forged",
    "<0>1 2000-01-01T00:00:00Z forged",
    "\x1b[2J\x07\x7f\x85",
    "cut\x00short",
    "Übergröße, 日本語, \U0001f600, e\u0301",
    "\ufeffmark \u202egnol\u2028lines\u2029",
    "%s %n $(id) ${HOST} `id` $!all-json",
    "",
    " ",
    "x" * 3000,
]
VALUES = {"text": '\\"', "none": None, "yes": True, "big": 2**53 + 1, "part": -1.25, "list": [1, [{"a": 2}]]}
MOST_BYTES = {"udp": 50_000, "tcp": 1_000_000, "tls": 1_000_000, "mutual": 1_000_000}
TAGS = {"rack": 'r "7"]', "slot": 3, "spare": False}


Messages = dict[str, dict[str, Any]]  # by position, as one may come twice


def syslog_of(receiver: Receiver) -> Messages:
    return {message["sd"]["auditlog@32473"]["position"]: message for message in receiver.syslog()}


def json_of(receiver: Receiver) -> Messages:
    messages = map(orjson.loads, receiver.lines())
    return {message["position"]: message for message in messages}


def write_and_forward(
    directory: Path, destination: Destination, arrived: Callable[[], Messages], most_bytes: int
) -> list[Entry]:
    """Write some 50 events in steps; each is forwarded before the next, so that UDP loses none."""
    written = 0

    def forward() -> None:
        nonlocal written
        written = len(Reading(directory).entries)
        Forwarder(directory, destination).run(once=True)
        until(lambda: len(arrived()) == written)

    with AuditLogger(directory, retention=None) as log:
        for text in HOSTILE:
            with log.session(Session(email=text, ip_address=text, user_agent=text)):
                log.create(text, text, own={"name": text} | VALUES, cluster={"id": text})
                log.k8s_access(full_method_name=text, command=text, cluster_name=text)
                log.write(denied(text, resource_type=text, resource_id=text))
            forward()
        log.destroy("Clusters.omni.sidero.dev", "long", own={"patch": "ü]" * (most_bytes // 3)})
        for event_type in (*EventType, "of_a_name_that_is_longer_than_a_msgid"):
            facts = AuditFacts(lost=7, outcome="failed")
            log.write(Event(event_type=event_type, event_data=EventData(audit=facts)))
        forward()
    return Reading(directory).entries


def destination(
    receiver: Receiver, transport: Transport, form: Literal["syslog", "json_lines"], **settings: Any
) -> Destination:
    if transport in ("tls", "mutual"):
        settings = {"ca_file": receiver.ca_file} | settings
    if transport == "mutual":
        settings |= {"cert_file": receiver.cert_file, "key_file": receiver.key_file}
    endpoint = receiver.endpoint(transport, form)
    return Destination(endpoint=endpoint, format=form, source="cp-1.example.com", **settings)


def facts_of(entry: Entry, msg: str) -> dict[str, str]:
    """What the structured data must say of an entry; its summary is tested elsewhere."""
    record = entry.record
    data = record["event_data"]
    facts = {
        "event_type": record["event_type"],
        "resource_type": record.get("resource_type"),
        "resource_id": record.get("resource_id"),
        "cluster_id": data.get("cluster", {}).get("id") or data.get("k8s_access", {}).get("cluster_name"),
        "actor": data["session"].get("email"),
        "address": data["session"].get("ip_address"),
        "position": str(entry.position),
        "sha256": sha256(entry.line).hexdigest()[:8],
    }
    mark = "…[cut: 3000 bytes]"
    shown = {name: visible(value) for name, value in facts.items() if value}
    return {
        name: value if len(value) < 3000 else value[: 1024 - len(mark.encode())] + mark
        for name, value in shown.items()
    } | {"msg": msg}


def time_of(entry: Entry) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=entry.record["event_ts"])


def priority_of(entry: Entry) -> int:
    outcome = entry.record["event_data"].get("audit", {}).get("outcome")
    severity = 3 if entry.record["event_type"] == "gap" else 4 if outcome in ("denied", "failed") else 6
    return 13 * 8 + severity


def same_values(parsed: Any, stored: Any) -> bool:
    """Has a receiver's JSON library understood a value? Its texts end at a NUL."""
    if isinstance(stored, dict):
        return all(same_values(parsed.get(name), value) for name, value in stored.items())
    return bool(parsed == (stored.partition("\0")[0] if isinstance(stored, str) else stored))


def same_texts(parsed: Any, stored: Any) -> bool:
    """The same for syslog-ng, which makes text of the rest, and nothing of what is empty."""
    if isinstance(stored, dict):
        return all(same_texts((parsed or {}).get(name), value) for name, value in stored.items())
    return not isinstance(stored, str) or (parsed or "") == stored.partition("\0")[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_syslog_arrives_with_every_field_as_it_was(
    receiver: Receiver, transport: Transport, directory: Path
) -> None:
    to = destination(receiver, transport, "syslog", extra_tags=TAGS)
    entries = write_and_forward(directory, to, lambda: syslog_of(receiver), MOST_BYTES[transport])
    for entry, message in zip(entries, syslog_of(receiver).values(), strict=True):
        assert message["pri"] == priority_of(entry)
        assert message["time"] == time_of(entry)
        assert (message["host"], message["app"]) == ("cp-1.example.com", "audit")
        event_type = entry.record["event_type"]
        assert message["msgid"] in ([event_type] if len(event_type) <= 32 else ["-", ""])
        facts = message["sd"]["auditlog@32473"]
        assert facts == facts_of(entry, facts["msg"])
        assert message["sd"]["tags@32473"] == {"rack": 'r "7"]', "slot": "3", "spare": "false"}
        assert message["msg"] == "@cee: " + entry.line[:-1].decode()
        same = same_values if isinstance(receiver, Rsyslog) else same_texts
        assert same(message["event"], entry.record)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_json_lines_arrive_as_they_are(receiver: Receiver, transport: Transport, directory: Path) -> None:
    to = destination(receiver, transport, "json_lines", extra_tags=TAGS)
    entries = write_and_forward(directory, to, lambda: json_of(receiver), MOST_BYTES[transport])
    for entry, message in zip(entries, json_of(receiver).values(), strict=True):
        level = {110: "info", 108: "warn", 107: "error"}[priority_of(entry)]
        time = time_of(entry).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
        assert message == {
            **entry.record,
            "msg": message["msg"],
            "talos-level": level,
            "talos-service": "audit",
            "talos-time": time,
            "source": "cp-1.example.com",
            "position": str(entry.position),
            "sha256": sha256(entry.line).hexdigest()[:8],
            **TAGS,
        }


def test_what_is_too_long_for_a_packet_is_cut_and_still_parsed(receiver: Receiver, directory: Path) -> None:
    to = destination(receiver, "udp", "syslog", max_message_bytes=2048, extra_tags=TAGS)
    with AuditLogger(directory, retention=None) as log:
        log.create("Clusters.omni.sidero.dev", "c", own={"id": "o", "text": 'ü"]\n' * 10_000})
        log.create("Clusters.omni.sidero.dev", "d", own={"all": "small"})
        log.create("x" * 3000, "e")
    forwarder = Forwarder(directory, to)
    forwarder.run(once=True)
    assert forwarder.progress.cut == 2
    until(lambda: len(receiver.syslog()) == 3)
    entries = Reading(directory).entries
    long, small, other = receiver.syslog()
    facts = long["sd"]["auditlog@32473"]
    assert facts == facts_of(entries[0], facts["msg"]) | {"cut": str(len(entries[0].line))}
    assert long["event"]["event_data"]["own"]["id"] == "o"
    assert "…[cut: 50000 bytes, sha256 " in long["event"]["event_data"]["own"]["text"]
    assert small["msg"] == "@cee: " + entries[1].line[:-1].decode()
    assert other["sd"]["auditlog@32473"]["cut"] == str(len(entries[2].line))
    assert other["event"]["truncated"]


def test_an_event_nested_deeper_than_a_receiver_parses_arrives_all_the_same(
    receiver: Receiver, directory: Path
) -> None:
    deep: Any = "bottom"
    for _ in range(50):
        deep = [deep]
    with AuditLogger(directory, retention=None) as log:
        log.create("Type", "deep", own=deep)
        log.create("Type", "after")
    Forwarder(directory, destination(receiver, "tcp", "syslog")).run(once=True)
    until(lambda: len(receiver.syslog()) == 2)
    for entry, message in zip(Reading(directory).entries, receiver.syslog(), strict=True):
        assert message["msg"] == "@cee: " + entry.line[:-1].decode()
        assert message["sd"]["auditlog@32473"]["position"] == str(entry.position)


def test_a_receiver_that_was_away_or_stood_still_gets_the_rest(receiver: Receiver, directory: Path) -> None:
    to = destination(receiver, "tls", "json_lines")
    written: list[str] = []

    def arrived() -> list[str]:
        return [message["resource_id"] for message in json_of(receiver).values()]

    with AuditLogger(directory, retention=None) as log:
        forwarder = Forwarder(directory, to)
        for end in (receiver.kill, receiver.terminate):
            end()
            written.append(str(len(written)))
            log.create("Type", written[-1])
            with pytest.raises(DestinationError, match="connection refused"):
                forwarder.run(once=True)
            receiver.start()
            forwarder.run(once=True)
            until(lambda: arrived() == written)
        receiver.pause()
        written.append(str(len(written)))
        log.create("Type", written[-1])
        forwarding = threading.Thread(target=forwarder.run, kwargs={"once": True})
        forwarding.start()
        forwarding.join(0.1)
        assert forwarding.is_alive()
        receiver.resume()
        forwarding.join()
        until(lambda: arrived() == written)


def test_a_receiver_of_another_authority_gets_nothing(
    receiver: Receiver, directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    to = destination(receiver, "tls", "syslog", ca_file=str(other))
    with AuditLogger(directory, retention=None) as log:
        log.create("Type", "a")
    with pytest.raises(DestinationError, match="certificate"):
        Forwarder(directory, to).run(once=True)
    assert receiver.syslog() == []


def test_nothing_counts_as_sent_that_a_receiver_refused_for_want_of_a_certificate(
    receiver: Receiver, directory: Path
) -> None:
    endpoint = receiver.endpoint("mutual", "syslog")
    to = Destination(endpoint=endpoint, format="syslog", ca_file=receiver.ca_file)
    with AuditLogger(directory, retention=None) as log:
        log.create("Type", "a")
    forwarder = Forwarder(directory, to)
    with pytest.raises(DestinationError):  # the refusal may come when all is written
        forwarder.run(once=True)
    assert forwarder.progress.position == Position.START
    assert receiver.syslog() == []
