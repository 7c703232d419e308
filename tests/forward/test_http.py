"""Forwarding by HTTP: what each API is told, what its answers mean, and that nothing is lost by them."""

from __future__ import annotations

import logging
import re
import select
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import orjson
import pytest
import trustme

from auditlog import AuditLogger, AuditReader, Entry, InvalidSetting, Session
from auditlog.errors import DestinationError
from auditlog.forward import Destination, Forwarder
from auditlog.forward.http import HttpChannel
from auditlog.forward.message import Messages, time_ns_of
from auditlog.forward.secrecy import Secrecy
from auditlog.storage.progress import Progress
from tests.forward.http_server import Answer, ApiServer
from tests.helpers import until, write_day

FORMATS = ("json_lines", "raw", "loki", "splunk_hec", "elasticsearch", "otlp")
APIS = ("loki", "splunk_hec", "elasticsearch", "otlp")
HOSTILE = (
    'x"}}\n{"delete":{"_id":"a"}}\r\n{"create":{}}\n',
    "\x1b[2J\x00\u2028\u202e</script>\ud800é𝄞",
    '{"text":"Success","code":0}\n<165>1 2024-08-12T00:00:00Z h a - - - forged',
)
SECRET = "Bearer s3cret-t0ken-0123456789"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def written(directory: Path, count: int, *, first: int = 0, **data: Any) -> list[Entry]:
    """The entries of so many events, about resources named r0, r1, ..., or from another number on."""
    with AuditLogger(directory, fsync="never", retention=None) as audit:
        for number in range(first, first + count):
            text = HOSTILE[number % len(HOSTILE)]
            with audit.session(Session(email=f"u{number}@example.com", user_agent=text)):
                audit.update("Clusters.omni.sidero.dev", f"r{number}", cluster={"id": f"r{number}"}, **data)
    return list(AuditReader(directory).read())


class Way(HttpChannel):
    """An open channel to a server, and what it counts."""

    def __init__(self, server: ApiServer, **settings: Any) -> None:
        endpoint = settings.pop("endpoint", server.url)
        self.destination = Destination(
            endpoint=endpoint,
            format=settings.pop("format", server.api),
            name="siem",
            source="cp-1",
            **settings,
        )
        self.progress = Progress()
        super().__init__(self.destination, self.progress)


@contextmanager
def way(server: ApiServer, **settings: Any) -> Iterator[Way]:
    channel = Way(server, **settings)
    channel.open()
    try:
        yield channel
    finally:
        channel.close()


@contextmanager
def connected(api: str, **settings: Any) -> Iterator[tuple[ApiServer, Way]]:
    with ApiServer(api) as server, way(server, **settings) as channel:
        yield server, channel


# ---------------------------------------------------------------------- what is told


@pytest.mark.parametrize("gzip", [True, False])
@pytest.mark.parametrize("api", FORMATS)
def test_every_event_arrives_once_in_order_and_whole(api: str, gzip: bool, directory: Path) -> None:
    entries = written(
        directory, 500, big=2**63 - 1, small=-1.5, none=None, yes=True, many=[1, "a", {"b": []}]
    )
    with connected(api, gzip=gzip, extra_tags={"env": "prod", "nr": 7}) as (server, channel):
        for start in range(0, 500, 100):
            channel.send(entries[start : start + 100])
        assert channel.finish()
    assert server.ids == [f"r{number}" for number in range(500)]
    messages = Messages(channel.destination)
    for entry, message in zip(entries, server.accepted, strict=True):
        expected = messages.fields(entry)
        at = message.fields.pop("@timestamp", expected["talos-time"])
        assert at == expected["talos-time"]
        if api == "raw":
            assert message.key.encode() + b"\n" == entry.line
            continue
        assert message.key == messages.key(entry)
        assert message.ns in (0, time_ns_of(entry.record))
        if api == "otlp":
            resource = {"service.name": "audit", "host.name": "cp-1", "env": "prod", "nr": 7}
            ours = {"msg": expected["msg"], "resource": resource, "log.record.uid": message.key}
            position = {name: expected[name] for name in ("position", "sha256")}
            assert message.fields == entry.record | ours | position
        else:
            assert message.fields == expected
    assert channel.progress.rejected == channel.progress.cut == 0


@pytest.mark.parametrize("api", FORMATS)
def test_a_forwarder_brings_the_log_to_an_api_and_goes_on_where_it_was(api: str, directory: Path) -> None:
    written(directory, 500)
    with ApiServer(api) as server:
        destination = Destination(endpoint=server.url, format=api, name="siem")  # type: ignore[arg-type]
        Forwarder(directory, destination).run(once=True)
        assert server.ids == [f"r{number}" for number in range(500)]
        Forwarder(directory, destination).run(once=True)
        assert len(server.accepted) == 500
        written(directory, 1)
        Forwarder(directory, destination).run(once=True)
        assert server.ids[500:] == ["r0"]


def test_what_elasticsearch_has_already_is_not_written_twice(directory: Path) -> None:
    entries = written(directory, 20)
    with connected("elasticsearch") as (server, channel):
        channel.send(entries[:12])
        channel.send(entries)
        assert server.ids == [f"r{number}" for number in range(20)]
    assert channel.progress.rejected == 0


def test_the_event_of_splunk_says_where_it_is_from(directory: Path) -> None:
    with connected("splunk_hec", service="omni", gzip=False) as (server, channel):
        channel.send(written(directory, 1))
    facts = b'"host":"cp-1","source":"omni","sourcetype":"auditlog:json","event":{'
    assert facts in server.requests[0].body


def test_a_stream_of_loki_has_few_labels_or_the_given_ones(directory: Path) -> None:
    entries = written(directory, 2)
    with connected("loki", gzip=False) as (server, channel):
        channel.send(entries)
        assert b'"stream":{"service_name":"audit","source":"cp-1"}' in server.requests[0].body
        with way(server, gzip=False, labels={"job": "audit"}) as labelled:
            labelled.send(entries)
        assert b'"stream":{"job":"audit"}' in server.requests[1].body


def test_values_that_otlp_has_no_type_for_are_told_all_the_same(directory: Path) -> None:
    deep: Any = "bottom"
    for _ in range(40):
        deep = {"a": deep}
    with connected("otlp") as (server, channel):
        channel.send(written(directory, 1, huge=2**64 - 1, deep=deep, none=[None]))
    data = server.accepted[0].fields["event_data"]
    assert data["huge"] == str(2**64 - 1)
    assert data["none"] == [None]
    told = data["deep"]
    while isinstance(told, dict):
        told = told["a"]
    assert told.endswith('"bottom"' + "}" * told.count("{"))


def test_an_event_without_a_time_gets_its_day(directory: Path) -> None:
    write_day(directory, "2024-08-12", b'{"event_type":"create","resource_id":"r0","event_data":{}}\n')
    [entry] = AuditReader(directory).read()
    midnight = datetime(2024, 8, 12, tzinfo=UTC)
    for api in ("loki", "splunk_hec", "otlp"):
        with connected(api) as (server, channel):
            channel.send([entry])
        assert server.accepted[0].ns == midnight.timestamp() * 10**9


def test_a_path_and_a_query_of_the_endpoint_are_kept(directory: Path) -> None:
    entries = written(directory, 1)
    with ApiServer("elasticsearch") as server:
        for endpoint in (server.url, server.url + "/auditlog/_bulk?pipeline=x", server.url + "?pipeline=x"):
            with way(server, endpoint=endpoint) as channel:
                channel.send(entries)
    paths = ["/auditlog/_bulk", "/auditlog/_bulk?pipeline=x", "/auditlog/_bulk?pipeline=x"]
    assert [request.path for request in server.requests] == paths


def test_headers_are_sent_and_win(directory: Path) -> None:
    headers = {"Authorization": SECRET, "X-Scope-OrgID": "t", "content-type": "application/x-ndjson"}
    with ApiServer("json_lines", required=headers) as server, way(server, headers=headers) as channel:
        channel.send(written(directory, 1))
        assert server.ids == ["r0"]


def test_the_proxy_of_the_environment_is_used(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ApiServer("json_lines") as server:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        with way(server, endpoint="http://siem.invalid") as channel:
            channel.send(written(directory, 1))
        assert server.requests[0].path == "http://siem.invalid/"


def test_a_server_name_that_a_proxy_leaves_without_effect_is_told_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = written(directory, 1)
    with ApiServer("json_lines") as server, ApiServer("json_lines") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        settings = {"endpoint": server.url.replace("http", "https"), "server_name": "siem.example.com"}
        with way(server, **settings) as channel:
            for _ in range(2):
                with pytest.raises(DestinationError, match=r"serverName has no effect .* set NO_PROXY"):
                    channel.send(entries)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with way(server, **settings) as channel, pytest.raises(DestinationError, match="TLS: "):
            channel.send(entries)


@pytest.mark.parametrize("tags", [{}, {"msg": "a tag that wins"}])
@pytest.mark.parametrize("api", FORMATS)
def test_a_line_that_is_nested_deeper_than_can_be_written_holds_nothing_up(
    api: str, tags: dict[str, str], directory: Path
) -> None:
    lines = b""
    for depth in (250, 300, 900, 1000):
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        for text in (b"short", b"x" * 100_000):
            lines += b'{"event_type":"create","event_data":{"deep":%b,"text":"%b"}}\n' % (deep, text)
    write_day(directory, "2024-08-12", lines)
    entries = list(AuditReader(directory).read())
    with connected(api, extra_tags=tags) as (server, channel):
        server.largest_bytes = 90_000  # every second one is cut
        channel.send(entries)
        assert len(server.accepted) == 8
        if api != "raw":
            assert server.keys == [Messages(channel.destination).key(entry) for entry in entries]
    assert channel.progress.rejected == 0


# ---------------------------------------------------------------------- what answers mean


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_receiver_that_is_busy_gets_everything_later(status: int, directory: Path) -> None:
    entries = written(directory, 3)
    with connected("json_lines") as (server, channel):
        server.planned.append(Answer(status, b"later,\nplease \x1b[2J", {"Retry-After": "7"}))
        with pytest.raises(DestinationError) as caught:
            channel.send(entries)
        assert caught.value.retry_after == 7
        assert caught.value.name == "siem"
        assert caught.value.reason.startswith(f"{status} ")
        assert caught.value.reason.endswith(": later, please \\x1b[2J")
        assert len(server.requests) == 1
        channel.send(entries)
        assert server.ids == ["r0", "r1", "r2"]
    assert channel.progress.rejected == 0


def test_how_long_to_wait_is_bounded_and_may_be_left_out(directory: Path) -> None:
    entries = written(directory, 1)
    cases = {"0": 0, "100000": 300, "-1": None, "soon": None, "\xb2": None, "": None}
    with connected("json_lines") as (server, channel):
        for value, seconds in cases.items():
            server.planned.append(Answer(503, headers={"Retry-After": value}))
            with pytest.raises(DestinationError) as caught:
                channel.send(entries)
            assert caught.value.retry_after == seconds


def test_a_date_to_try_again_at_is_understood(directory: Path) -> None:
    at = datetime.now(UTC) + timedelta(seconds=100)
    with connected("json_lines") as (server, channel):
        server.planned.append(Answer(503, headers={"Retry-After": format_datetime(at, usegmt=True)}))
        with pytest.raises(DestinationError) as caught:
            channel.send(written(directory, 1))
    assert caught.value.retry_after == pytest.approx(99, abs=2)


def test_what_a_person_must_mend_loses_nothing(directory: Path) -> None:
    entries = written(directory, 3)
    with connected("json_lines") as (server, channel):
        for status in (304, 401, 403, 404, 405, 409, 415, 451):
            server.planned.append(Answer(status))
            server.requests.clear()
            with pytest.raises(DestinationError, match=f"siem: {status} "):
                channel.send(entries)
            assert len(server.requests) == 1
        assert channel.progress.rejected == 0
        channel.send(entries)
        assert server.ids == ["r0", "r1", "r2"]


def test_a_redirect_is_not_followed_but_told(directory: Path) -> None:
    with connected("json_lines") as (server, channel):
        target = f"{server.url}/new?token=abc"
        server.planned.append(Answer(308, headers={"Location": target}))
        with pytest.raises(
            DestinationError, match=r"redirects to .*/new; give that as the endpoint"
        ) as caught:
            channel.send(written(directory, 1))
        assert "abc" not in str(caught.value)
        assert len(server.requests) == 1


def test_a_batch_that_is_too_large_is_sent_in_parts(directory: Path) -> None:
    entries = written(directory, 64)
    with connected("json_lines") as (server, channel):
        server.largest_bytes = 5000
        channel.send(entries)
        assert server.ids == [f"r{number}" for number in range(64)]
    assert channel.progress.cut == channel.progress.rejected == 0


@pytest.mark.parametrize("api", FORMATS)
def test_a_message_that_is_too_large_is_cut_visibly(api: str, directory: Path) -> None:
    entries = [*written(directory, 1), *written(directory, 1, text="x" * 500_000)[1:]]
    entries += written(directory, 1)[2:]
    with connected(api) as (server, channel):
        server.largest_bytes = 200_000
        channel.send(entries)
        assert len(server.accepted) == 3
        if api == "raw":
            assert f"…[cut: {len(entries[1].line)} bytes, sha256 " in server.accepted[1].key
        else:
            assert server.keys == [Messages(channel.destination).key(entry) for entry in entries]
            assert "…[cut: 500000 bytes, sha256 " in server.accepted[1].fields["event_data"]["text"]
    assert channel.progress.cut == 1
    assert channel.progress.rejected == 0


def test_a_message_that_is_too_large_even_when_cut_is_passed_over(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [*written(directory, 1), *written(directory, 1, text="x" * 500_000)[1:]]
    entries += written(directory, 1)[2:]
    with connected("json_lines") as (server, channel):
        server.largest_bytes = 5000
        channel.send(entries)
        assert server.keys == [Messages(channel.destination).key(entry) for entry in (entries[0], entries[2])]
    assert channel.progress.rejected == 1
    assert channel.progress.cut == 0
    assert f"1 of the messages at {entries[1].position}: 413 " in caplog.text


@pytest.mark.parametrize("api", FORMATS)
def test_a_message_that_is_refused_for_good_does_not_block_the_others(
    api: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = written(directory, 64)
    for poison in ({0}, {17}, {63}, {0, 1, 62, 63}, set(range(1, 63))):
        caplog.clear()
        with connected(api) as (server, channel):
            server.poison = {f"r{number}" for number in poison}
            channel.send(entries)
            expected = [f"r{number}" for number in range(64) if number not in poison]
            assert list(dict.fromkeys(server.ids)) == expected
            if api != "splunk_hec":  # it took what precedes a message that it refused
                assert server.ids == expected
        assert channel.progress.rejected == len(poison)
        ours = [record for record in caplog.records if record.name == "auditlog"]
        assert {record.levelno for record in ours} == {logging.ERROR}
        if api != "otlp":  # it does not say which
            assert f" {entries[min(poison)].position}" in caplog.text


@pytest.mark.parametrize("api", FORMATS)
def test_a_receiver_that_takes_nothing_loses_nothing(api: str, directory: Path) -> None:
    entries = written(directory, 20)
    with connected(api) as (server, channel):
        server.poison = {f"r{number}" for number in range(20)}
        for _ in range(2):
            with pytest.raises(DestinationError, match="no other message was taken"):
                channel.send(entries)
        assert server.accepted == []
        assert channel.progress.rejected == 0
        server.poison = set()
        channel.send(entries)
        assert server.ids == [f"r{number}" for number in range(20)]


@pytest.mark.parametrize("api", FORMATS)
def test_a_message_alone_is_passed_over_only_where_the_receiver_still_takes_another(
    api: str, directory: Path
) -> None:
    entries = written(directory, 3)
    with connected(api) as (server, channel):
        channel.send(entries[:1])
        server.poison = {"r0", "r1"}
        for _ in range(2):
            with pytest.raises(DestinationError):
                channel.send(entries[1:2])
            channel.open()
        assert channel.progress.rejected == 0
        server.poison = {"r1"}
        channel.send(entries[1:2])
        channel.send(entries[2:])
        assert list(dict.fromkeys(server.ids)) == ["r0", "r2"]
    assert channel.progress.rejected == 1


def test_what_was_taken_before_a_restart_is_known_by_the_next_run(directory: Path) -> None:
    entries = written(directory, 3)
    with connected("json_lines") as (server, channel):
        channel.send(entries[:1])
        server.poison = {"r1"}
        with way(server) as unknowing, pytest.raises(DestinationError):
            unknowing.send(entries[1:2])
        again = Way(server)
        again.open(entries[0])
        again.send(entries[1:2])
        assert again.progress.rejected == 1
        again.send(entries[2:])
        again.open(entries[1])  # what it knows itself was taken for certain
        server.poison = {"r0", "r1"}
        again.send(entries[1:2])
        assert again.progress.rejected == 2
        again.close()


def test_refused_messages_one_after_the_other_block_no_run_that_ends(directory: Path) -> None:
    with ApiServer("json_lines") as server, AuditLogger(directory, retention=None) as log:
        server.poison = {"bad"}
        for name in ("good", "bad", "bad", "bad", "last"):
            log.create("T", name)
            Forwarder(directory, Destination(endpoint=server.url)).run(once=True)
        assert [name for name in server.ids if name != "good"] == ["last"]


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_forwarder_passes_over_more_refused_messages_than_a_batch_has(size: int, directory: Path) -> None:
    count = 300 if size == 10 else 2
    written(directory, 3)
    with ApiServer("elasticsearch") as server:
        destination = Destination(endpoint=server.url, format="elasticsearch")
        Forwarder(directory, destination).run(once=True)
        server.poison = {f"r{number}" for number in range(3, 3 + count)}
        with AuditLogger(directory, fsync="never", retention=None, max_line_bytes=2 << 20) as audit:
            for number in range(3, 3 + count + 3):
                audit.create("Clusters.omni.sidero.dev", f"r{number}", cluster={"text": "x" * size})
        forwarder = Forwarder(directory, destination)
        forwarder.run(once=True)
        assert forwarder.progress.rejected == count
        assert server.ids == [f"r{number}" for number in (0, 1, 2, 3 + count, 4 + count, 5 + count)]


def test_what_fails_in_the_middle_is_counted_when_it_is_done(directory: Path) -> None:
    entries = written(directory, 4)
    with connected("json_lines") as (server, channel):
        server.poison = {"r0"}
        server.planned += [Answer(422), Answer(422), Answer(422), Answer(503)]
        with pytest.raises(DestinationError, match="503"):
            channel.send(entries)
        assert channel.progress.rejected == 0
        channel.send(entries)
        assert server.ids == ["r1", "r2", "r3"]
    assert channel.progress.rejected == 1


def test_a_forwarder_passes_a_refused_message_over(directory: Path) -> None:
    written(directory, 5)
    with ApiServer("json_lines") as server:
        server.poison = {"r3"}
        forwarder = Forwarder(directory, Destination(endpoint=server.url))
        forwarder.run(once=True)
        assert server.ids == ["r0", "r1", "r2", "r4"]
        assert forwarder.progress.rejected == 1


# ---------------------------------------------------------------------- what only one API says


def test_what_is_too_old_for_loki_is_passed_over_at_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with connected("loki") as (server, channel):
        server.oldest_ns = int(datetime(2024, 8, 12, tzinfo=UTC).timestamp()) * 10**9
        days = [b"", b""]
        for number in range(200):
            ns = server.oldest_ns + (number - 120) * 60 * 10**9
            days[number >= 120] += (
                b'{"event_type":"create","resource_id":"r%d","event_ts":%d,"event_data":{}}\n'
                % (number, ns // 10**6)
            )
        write_day(directory, "2024-08-11", days[0])
        write_day(directory, "2024-08-12", days[1])
        entries = list(AuditReader(directory).read())
        channel.send(entries[:100])
        assert len(server.requests) == 1
        channel.send(entries[100:])
        assert len(server.requests) == 4
        assert server.ids == [f"r{number}" for number in range(120, 200)]
    assert channel.progress.rejected == 120
    assert f"from {entries[0].position} to {entries[99].position}: 400 Bad Request: 1 errors" in caplog.text
    assert f"from {entries[100].position} to {entries[119].position}: 400" in caplog.text


LOKI_TOO_OLD = (
    "entry for stream '{source=\"a}' b\"}' has timestamp too old: OLD, oldest acceptable timestamp is: NEW",
    "entry with timestamp 2024-08-11 13:25:44.5 +0000 UTC ignored, reason: 'entry too far behind, entry "
    "timestamp is: OLD, oldest acceptable timestamp is: NEW',\nuser 'fake', total ignored: 1 out of 2 for "
    "stream: {}",
    "entry with timestamp 2024-08-11 13:25:44.5 +0000 UTC ignored, reason: 'entry too far behind, oldest "
    "acceptable timestamp is: NEW',\nuser 'fake', total ignored: 1 out of 2 for stream: {}",
)
AT_NOON = (
    b'{"event_type":"create","resource_id":"r0","event_ts":1723377600000,"event_data":{}}\n'
    b'{"event_type":"create","resource_id":"r1","event_ts":1723377601000,"event_data":{}}\n'
)


def test_loki_says_in_several_ways_that_entries_are_too_old(directory: Path) -> None:
    write_day(directory, "2024-08-11", AT_NOON)
    entries = list(AuditReader(directory).read())
    with connected("loki") as (server, channel):
        for said, several, zone in product(
            LOKI_TOO_OLD, ("", "2 errors: ", "12 errors like: "), ("Z", "+02:00")
        ):
            said = said.replace("OLD", f"2024-08-11T12:00:00{zone}")
            said = said.replace("NEW", f"2024-09-11T12:00:00{zone}")
            server.planned.append(Answer(400, f"{several}{said}\n".encode()))
            server.requests.clear()
            channel.progress.rejected = 0
            channel.send(entries)
            assert len(server.requests) == 1
            assert channel.progress.rejected == 2


def test_an_event_that_an_answer_repeats_does_not_speak_for_loki(directory: Path) -> None:
    write_day(directory, "2024-08-11", AT_NOON)
    entries = list(AuditReader(directory).read())
    with connected("loki") as (server, channel):
        for said, before in product(LOKI_TOO_OLD, ("cannot parse: ", '{"values":[["1","', "x\n", " ")):
            repeated = before + said.replace("OLD", "2024-08-11T12:00:00Z").replace(
                "NEW", "2024-08-11T12:00:01Z"
            )
            server.planned.append(Answer(400, repeated.encode()))
            server.accepted.clear()
            channel.send(entries)
            assert server.ids == ["r0", "r1"]
    assert channel.progress.rejected == 0


def test_what_loki_is_said_to_find_too_old_is_passed_over_only_if_it_says_so_again(directory: Path) -> None:
    write_day(directory, "2024-08-11", AT_NOON)
    with connected("loki") as (server, channel):
        said = LOKI_TOO_OLD[0].replace("OLD", "2024-08-11T12:00:00Z").replace("NEW", "2024-08-11T12:00:01Z")
        server.planned.append(Answer(400, said.encode()))
        channel.send(list(AuditReader(directory).read()))
        assert server.ids == ["r0", "r1"]
        assert len(server.requests) == 3
    assert channel.progress.rejected == 0


def test_a_clock_of_loki_that_is_ahead_loses_nothing(directory: Path) -> None:
    entries = written(directory, 4)
    with connected("loki") as (server, channel):
        server.oldest_ns = time.time_ns() + 86400 * 10**9
        with pytest.raises(DestinationError, match="too old"):
            channel.send(entries)
        assert channel.progress.rejected == 0


def test_an_answer_that_repeats_what_was_sent_is_read_to_its_end(directory: Path) -> None:
    entries = written(directory, 2, text="x" * 900_000)
    with connected("elasticsearch") as (server, channel):
        cause = {"type": "illegal_argument_exception", "reason": f"For input string: {'x' * 900_000}"}
        error = {"type": "document_parsing_exception", "reason": "x" * 900_000, "caused_by": cause}
        items = [{"create": {"status": 201}}, {"create": {"status": 400, "error": error}}]
        server.planned.append(Answer(200, orjson.dumps({"errors": True, "items": items}), takes=True))
        channel.send(entries)
        assert len(server.requests) == 1
    assert channel.progress.rejected == 1


def test_documents_that_elasticsearch_has_no_time_for_are_sent_again(directory: Path) -> None:
    entries = written(directory, 10)
    with connected("elasticsearch") as (server, channel):
        server.busy, server.poison = {"r3", "r7"}, {"r5"}
        with pytest.raises(DestinationError, match="429 es_rejected_execution_exception"):
            channel.send(entries)
        assert channel.progress.rejected == 0
        server.busy = set()
        channel.send(entries)
        assert sorted(server.ids) == sorted({f"r{number}" for number in range(10)} - {"r5"})
    assert channel.progress.rejected == 1


def test_an_answer_of_elasticsearch_that_does_not_account_for_all_is_no_success(directory: Path) -> None:
    entries = written(directory, 2)
    good = b'{"create":{"status":201}}'
    failing = (
        b"",
        b"7",
        b"{}",
        b'{"index":{"status":201}}',
        b'{"create":{}}',
        b'{"create":{"status":"201"}}',
    )
    gone = b'{"create":{"status":404,"error":{"type":"index_not_found_exception","reason":"no such index"}}}'
    busy = b'{"create":{"status":503,"error":"unavailable"}}'
    items = [b"", good, *(good + b"," + other for other in (*failing, gone, busy))]
    contents = [b"", b"[]", b"{}", b'{"items":7}', *(b'{"items":[%b]}' % each for each in items)]
    with connected("elasticsearch") as (server, channel):
        for content in contents:
            server.planned.append(Answer(200, content))
            with pytest.raises(DestinationError, match="siem: 200 OK: "):
                channel.send(entries)
        assert channel.progress.rejected == 0
        channel.send(entries)
        assert server.ids == ["r0", "r1"]


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (400, b'{"text":"Incorrect index","code":7,"invalid-event-number":1}'),
        (400, b'{"text":"Data channel is missing","code":10}'),
        (401, b'{"text":"Token is required","code":2}'),
        (403, b'{"text":"Invalid token","code":4}'),
        (503, b'{"text":"Server is busy","code":9,"invalid-event-number":1}'),
        (200, b'{"text":"Server is busy","code":9}'),
        (200, b'{"text":"Success","code":[0]}'),
    ],
)
def test_an_answer_of_splunk_about_its_setup_loses_nothing(
    status: int, content: bytes, directory: Path
) -> None:
    with connected("splunk_hec") as (server, channel):
        server.planned.append(Answer(status, content))
        with pytest.raises(DestinationError) as caught:
            channel.send(written(directory, 3))
        assert content.decode() in caught.value.reason
        assert len(server.requests) == 1
        assert channel.progress.rejected == 0


def test_a_wrong_number_of_an_invalid_event_blames_nobody_else(directory: Path) -> None:
    entries = written(directory, 64)
    with connected("splunk_hec") as (server, channel):
        server.poison = {"r18"}
        for number in (b"-1", b"64", b"17", b"19", b"1.5", b'"18"', b"null"):
            said = b'{"text":"Invalid data format","code":6,"invalid-event-number":%b}' % number
            server.planned.append(Answer(400, said))
            server.accepted.clear()
            channel.progress.rejected = 0
            channel.send(entries)
            assert list(dict.fromkeys(server.ids)) == [f"r{n}" for n in range(64) if n != 18]
            assert channel.progress.rejected == 1


@pytest.mark.parametrize(
    ("api", "content"),
    [
        ("splunk_hec", b'{"text":"Queue is approaching capacity","code":24}'),
        ("splunk_hec", b'"OK"'),
        ("otlp", b""),
        ("otlp", b"{}"),
        ("otlp", b'{"partialSuccess":{"rejectedLogRecords":0,"errorMessage":"mind the load"}}'),
        ("otlp", b'{"partialSuccess":{"rejectedLogRecords":"no number"}}'),
        ("loki", b"{}"),
        ("json_lines", b"<html>thanks</html>"),
    ],
)
def test_what_compatible_receivers_answer_is_a_success(api: str, content: bytes, directory: Path) -> None:
    with connected(api) as (server, channel):
        server.planned.append(Answer(200, content, takes=True))
        channel.send(written(directory, 2))
        assert server.ids == ["r0", "r1"]
        assert len(server.requests) == 1
    assert channel.progress.rejected == 0


@pytest.mark.parametrize("api", APIS)
def test_a_page_for_people_is_no_answer_of_an_api(api: str, directory: Path) -> None:
    with connected(api) as (server, channel):
        server.planned.append(Answer(200, b"\n<!doctype html><title>Sign in</title>"))
        with pytest.raises(DestinationError, match="200 OK: not understood: <!doctype html><title>Sign in"):
            channel.send(written(directory, 2))


def test_records_that_otlp_refused_are_counted_with_its_reason(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = written(directory, 10)
    with connected("otlp") as (server, channel):
        server.planned.append(
            Answer(200, b'{"partialSuccess":{"rejectedLogRecords":"2","errorMessage":"no"}}')
        )
        channel.send(entries)
        assert len(server.requests) == 1  # a client must not try again
    assert channel.progress.rejected == 2
    where = f"from {entries[0].position} to {entries[9].position}"
    assert f"refused for good: 2 of the messages {where}: 200 OK: no" in caplog.text


# ---------------------------------------------------------------------- connections that fail


@pytest.mark.parametrize("how", ["dribble_headers", "dribble_body", "torn", "nothing", "silence"])
@pytest.mark.parametrize("status", [200, 400, 503])
def test_an_answer_that_never_ends_or_breaks_off_does_not_hold(
    how: Any, status: int, directory: Path
) -> None:
    entries = written(directory, 2)
    with connected("json_lines", connect_timeout=0.2, send_timeout=0.2) as (server, channel):
        server.planned.append(Answer(status, b"x", how=how))
        began = time.monotonic()
        with pytest.raises(DestinationError) as caught:
            channel.send(entries)
        assert time.monotonic() - began < 5
        if how in ("dribble_headers", "dribble_body", "silence"):
            assert "no answer within 0." in caught.value.reason
        channel.close()
        channel.open()
        channel.send(entries)
        assert server.ids == ["r0", "r1"]
    assert channel.progress.rejected == 0


def test_a_connection_that_was_closed_meanwhile_is_made_again(directory: Path) -> None:
    entries = written(directory, 2)
    with connected("json_lines") as (server, channel):
        server.planned.append(Answer(how="last", takes=True))
        channel.send(entries[:1])
        idle = channel._socket
        assert idle
        until(lambda: idle.fileno() < 0 or select.select([idle], [], [], 0)[0])
        channel.send(entries[1:])
        assert server.ids == ["r0", "r1"]


def test_an_answer_without_bounds_is_not_read_to_its_end(directory: Path) -> None:
    entries = written(directory, 2)
    with connected("json_lines") as (server, channel):
        server.planned.append(Answer(503, b"x" * (8 << 20)))
        with pytest.raises(DestinationError) as caught:
            channel.send(entries)
        assert len(caught.value.reason) < 300
        channel.send(entries)
        assert server.ids == ["r0", "r1"]


def test_an_abort_ends_a_request_that_waits(directory: Path) -> None:
    failed: list[DestinationError] = []
    entries = written(directory, 1)
    with connected("json_lines") as (server, channel):
        server.planned.append(Answer(how="silence"))

        def send() -> None:
            try:
                channel.send(entries)
            except DestinationError as error:
                failed.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        until(lambda: server.requests)
        channel.abort()
        thread.join(10)
        assert not thread.is_alive()
        assert failed[0].reason == "ended"
        with pytest.raises(DestinationError):
            channel.send(entries)
        channel.open()
        channel.send(entries)
        assert server.ids == ["r0"]


def test_a_receiver_that_is_not_there_is_told_plainly(directory: Path) -> None:
    entries = written(directory, 1)
    with ApiServer("json_lines") as server:
        gone = server.url
    with way(server, endpoint=gone) as channel, pytest.raises(DestinationError, match="connection refused"):
        channel.send(entries)
    with pytest.raises(DestinationError, match="closed"):
        channel.send(entries)
    channel.close()


# ---------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def _context(authority: trustme.CA, *names: str, client: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    if client is not None:
        client.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _file(directory: Path, name: str, *blobs: trustme.Blob) -> str:
    path = directory / name
    for blob in blobs:
        blob.write_to_path(path, append=True)
    return str(path)


def test_https_brings_events_to_whom_the_authority_vouches_for(
    authority: trustme.CA, directory: Path, tmp_path: Path
) -> None:
    entries = written(directory, 50)
    ca_file = _file(tmp_path, "ca.pem", authority.cert_pem)
    with (
        ApiServer("loki", context=_context(authority, "127.0.0.1")) as server,
        way(server, ca_file=ca_file) as channel,
    ):
        channel.send(entries)
        assert len(server.accepted) == 50


def test_a_certificate_of_nobody_we_trust_is_refused(
    authority: trustme.CA, directory: Path, tmp_path: Path
) -> None:
    entries = written(directory, 1)
    other = _file(tmp_path, "other.pem", trustme.CA().cert_pem)
    with ApiServer("loki", context=_context(authority, "127.0.0.1")) as server:
        for settings in ({}, {"ca_file": other}):
            with (
                way(server, **settings) as channel,
                pytest.raises(DestinationError, match=r"TLS: .*local issuer"),
            ):
                channel.send(entries)
        assert server.requests == []


def test_a_certificate_must_have_the_name_of_the_host_or_the_given_one(
    authority: trustme.CA, directory: Path, tmp_path: Path
) -> None:
    entries = written(directory, 1)
    ca_file = _file(tmp_path, "ca.pem", authority.cert_pem)
    with ApiServer("loki", context=_context(authority, "loki.example.com")) as server:
        with (
            way(server, ca_file=ca_file) as channel,
            pytest.raises(DestinationError, match=r"TLS: .*mismatch"),
        ):
            channel.send(entries)
        with way(server, ca_file=ca_file, server_name="loki.example.com") as channel:
            channel.send(entries)
        assert server.ids == ["r0"]


def test_a_receiver_that_asks_for_a_certificate_gets_it(
    authority: trustme.CA, directory: Path, tmp_path: Path
) -> None:
    entries = written(directory, 1)
    ours = authority.issue_cert("cp-1.example.com")
    settings = {
        "ca_file": _file(tmp_path, "ca.pem", authority.cert_pem),
        "cert_file": _file(tmp_path, "cert.pem", *ours.cert_chain_pems),
        "key_file": _file(tmp_path, "key.pem", ours.private_key_pem),
    }
    with ApiServer("loki", context=_context(authority, "127.0.0.1", client=authority)) as server:
        with way(server, ca_file=settings["ca_file"]) as channel, pytest.raises(DestinationError):
            channel.send(entries)
        with way(server, **settings) as channel:
            channel.send(entries)
        assert server.ids == ["r0"]


# ---------------------------------------------------------------------- secrets and settings


@pytest.mark.parametrize("status", [200, 308, 400, 401, 500])
def test_what_a_header_holds_is_never_shown(
    status: int, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    entries = written(directory, 2)
    headers = {"Authorization": SECRET}
    token = SECRET.split()[1]
    with ApiServer("splunk_hec") as server, way(server, headers=headers) as channel:
        said = f'{{"text":"no {SECRET}, that is {token}","code":7,"more":"{"." * 130}{token}"}}'
        server.planned.append(Answer(status, said.encode(), {"Location": f"/{token}"}))
        with pytest.raises(DestinationError) as caught:
            channel.send(entries)
    shown = f"{caught.value} {caught.value!r} {channel.destination!r} {caplog.text}"
    shown += "".join(str(record.args) for record in caplog.records if record.name == "auditlog")
    assert "s3cret" not in shown
    assert "[redacted]" in str(caught.value)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "other case": str.upper,
    "JSON": lambda text: orjson.dumps(text).decode(),
    "JSON of PHP": lambda text: orjson.dumps(text).decode().replace("/", "\\/"),
    "JSON of Go": lambda text: orjson.dumps(text).decode().replace("&", "\\u0026").replace("<", "\\u003C"),
    "JSON in JSON": lambda text: orjson.dumps(orjson.dumps(text).decode().replace("/", "\\/")).decode(),
    "URL": lambda text: quote(text, safe=""),
    "URL in lower case": lambda text: quote(text, safe="").lower(),
    "form": quote_plus,
    "words apart": lambda text: text.replace(" ", "  "),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_secret_is_not_shown_in_another_spelling(spelling: str, directory: Path) -> None:
    entries = written(directory, 1)
    key, token = 'Bearer abc/de"f&g<h\\i=', "q+uery/t0ken&more%25%2520m0re"
    query = f"token={quote_plus(token)}&short=x&empty=%20%20%20%20%20%20%20"
    with (
        ApiServer("json_lines") as server,
        way(server, endpoint=f"{server.url}?{query}", headers={"X-Key": key}) as channel,
    ):
        for secret in (key, key.split()[1], token, query):
            said = f"no {SPELLINGS[spelling](secret)} here"
            answers = [Answer(status, said.encode()) for status in (400, 401, 503)]
            answers += [Answer(status, reason=said) for status in (302, 400, 401, 503)]
            answers += [Answer(302, headers={"Location": f"/{said}"})]
            for answer in answers:
                server.planned.append(answer)
                with pytest.raises(DestinationError) as caught:
                    channel.send(entries)
                reason = caught.value.reason
                assert reason.count("[redacted]") == 1
                assert not re.search("abc|uery|t0ken|m[o0]re", reason, re.IGNORECASE)


def test_an_answer_that_looks_like_a_secret_all_over_is_searched_soon() -> None:
    headers = {"A": "Bearer abcd" + "\\" * 9 + "efgh", "B": "\\" * 12 + "xy", "C": "a" * 40 + "b"}
    endpoint = "https://siem/?a=" + "%25" * 20 + "&b=" + "%20" * 10 + "x"
    shown = Secrecy(Destination(endpoint=endpoint, headers=headers)).shown
    began = time.monotonic()
    for part in ("\\", "%25", "%", "Bearer ", "%2525252525", "\\u005c", "a", "%5c", "+", "x"):
        shown("Bearer abcd" + part * 30_000)
    assert time.monotonic() - began < 20  # and not for ever


def test_a_reason_phrase_is_shown_shortened(directory: Path) -> None:
    with connected("json_lines") as (server, channel):
        server.planned.append(Answer(503, b"later", reason="x" * 5000))
        with pytest.raises(DestinationError, match=r"503 x{200}: later;") as caught:
            channel.send(written(directory, 1))
        assert len(caught.value.reason) < 250


def test_requests_are_no_matter_of_the_log_of_the_application(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    entries = written(directory, 1)

    def http_records() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name.startswith("http")]

    with ApiServer("json_lines") as server, way(server, endpoint=f"{server.url}?token=s3cret") as channel:
        channel.send(entries)
        server.planned.append(Answer(how="silence"))

        def send() -> None:
            with pytest.raises(DestinationError):
                channel.send(entries)

        waiting = threading.Thread(target=send)
        waiting.start()
        until(lambda: len(server.requests) == 2)
        assert http_records() == []
        httpx.get(server.url)  # by the application, meanwhile
        assert {"httpx", "httpcore.http11"} <= {record.name for record in http_records()}
        channel.abort()
        waiting.join()
    assert server.ids == ["r0"]
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer s3cret-é"},
        {"Authorization": " Bearer s3cret"},
        {"Author ization": "s3cret"},
        {"Authorization:": "s3cret"},
        {"X": ""},
        {"Content-Length": "s3cret"},
        {"transfer-encoding": "s3cret"},
    ],
)
def test_headers_that_http_cannot_say_are_refused_without_showing_them(headers: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting, match="headers") as caught:
        HttpChannel(Destination(endpoint="https://siem", headers=headers), Progress())
    assert "s3cret" not in f"{caught.value} {caught.value!r}"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"format": "loki", "labels": {"app.name": "x"}}, "labels="),
        ({"format": "loki", "labels": {"1st": "x"}}, "labels="),
        ({"format": "elasticsearch", "endpoint": "https://es:9200/my-index"}, "endpoint="),
        ({"format": "json_lines", "endpoint": "https://ex\u0000ample"}, "endpoint="),
        ({"format": "json_lines", "ca_file": "/nowhere.pem"}, "ca_file="),
    ],
)
def test_what_an_api_cannot_take_is_refused_at_once(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        HttpChannel(Destination(**{"endpoint": "https://siem"} | settings), Progress())
