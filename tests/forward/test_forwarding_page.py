"""docs/forwarding.md says what is so: its destinations load, its messages are ours, its receivers run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from auditlog import AuditLogger, Entry, Session, denied
from auditlog.forward import Destination, Forwarder, load_destinations
from auditlog.forward.apis import Elasticsearch, Loki, SplunkHec
from auditlog.forward.forwarder import channel_for
from auditlog.forward.otlp import Otlp
from auditlog.forward.syslog import Syslog
from auditlog.storage.progress import Progress
from auditlog.testing import FixedClock
from tests.conftest import ROOT
from tests.forward.receivers import Receiver, Rsyslog, SyslogNg, Transport
from tests.helpers import Reading, until

PAGE = (ROOT / "docs" / "forwarding.md").read_text()
TAGS = {"rack": "07"}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The language and the content of each."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"^###? {title}\n(.*?)(?=^###? |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def block(title: str, language: str) -> str:
    """The first block of a language in a section."""
    return next(content for name, content in blocks(section(title)) if name == language)


def destinations_of(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Destination]:
    for name in re.findall(r"\$\{(\w+)\}", text):
        monkeypatch.setenv(name, "from-the-environment")
    path = tmp_path / "forward.yaml"
    path.write_text(text)
    return load_destinations(path)


# As they stand in the logging document of Talos.
OF_THE_DOCUMENT = [
    """\
machine:
  logging:
    destinations:
      - endpoint: "udp://127.0.0.1:12345/"
        format: "json_lines"
      - endpoint: "tcp://host:5044/"
        format: "json_lines"
""",
    """\
machine:
  logging:
    destinations:
      - endpoint: "udp://127.0.0.1:12345/"
        format: "json_lines"
        extraTags:
          server: s03-rack07
""",
    """\
machine:
  logging:
    destinations:
      - endpoint: "tcp://10.200.0.138:5170"
        format: "json_lines"
""",
]
CONFIGURATIONS = [
    content for language, content in blocks(PAGE) if language == "yaml" and "destinations:" in content
]


@pytest.mark.parametrize("text", OF_THE_DOCUMENT + CONFIGURATIONS)
def test_the_destinations_of_the_page_can_be_used(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for destination in destinations_of(text, tmp_path, monkeypatch):
        own = replace(destination, ca_file="")  # which is not on this machine
        channel_for(own, Progress()).close()


def test_each_receiver_of_the_page_has_a_destination() -> None:
    receivers = re.findall(r"^### (.+)\n", PAGE[PAGE.index("\n## Receivers\n") :], re.MULTILINE)
    assert len(receivers) == 9
    for title in receivers:
        assert "destinations:" in block(title, "yaml"), title


def test_links_within_the_page_lead_to_a_heading() -> None:
    headings = re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= set(anchors)


def test_the_page_has_every_option_of_a_destination() -> None:
    table = section("Options")
    listed = [
        key for row in re.findall(r"^\|([^|]+)\|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
    ]
    names = [each.name.split("_") for each in fields(Destination) if each.init]
    assert listed == [head + "".join(part.capitalize() for part in rest) for head, *rest in names]


# ---------------------------------------------------------------------- messages


@pytest.fixture
def entry(directory: Path) -> Entry:
    """The event that the page shows in every format."""
    clock = FixedClock(datetime(2024, 8, 12, 12, tzinfo=UTC))
    alice = Session(email="alice@example.com", role="Admin", ip_address="10.1.2.3")
    with AuditLogger(directory, clock=clock, retention=None) as audit, audit.session(alice):
        audit.create("Clusters.omni.sidero.dev", "talos-default", cluster={"kubernetes_version": "1.30.1"})
    return Reading(directory).entries[0]


def shown_as(name: str, scheme: str) -> Destination:
    return Destination(endpoint=f"{scheme}://127.0.0.1:1/", format=name, source="cp-1", extra_tags=TAGS)  # type: ignore[arg-type]


def is_shown(shown: Any, real: Any) -> bool:
    """Is that what is shown? There `…` stands for any text, for other keys, or for other elements."""
    if isinstance(shown, str) and isinstance(real, str):
        return bool(re.fullmatch(".*".join(map(re.escape, shown.split("…"))), real, re.DOTALL))
    if isinstance(shown, dict) and isinstance(real, dict):
        names = shown.keys() - {"…"}
        return (names == real.keys() or (names < real.keys() and "…" in shown)) and all(
            is_shown(shown[name], real[name]) for name in names
        )
    if isinstance(shown, list) and isinstance(real, list):
        gaps = [
            index for index, each in enumerate(shown) if isinstance(each, dict) and each.get("key") == "…"
        ]
        for index in gaps:
            after = len(shown) - index - 1
            real = [*real[:index], shown[index], *real[len(real) - after :]]
        return len(shown) == len(real) and all(map(is_shown, shown, real))
    return bool(shown == real)


def values_of(text: str) -> list[Any]:
    """The JSON values that stand behind each other."""
    found, text = [], text.strip()
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    return found


@pytest.mark.parametrize(
    ("name", "api"),
    [("loki", Loki), ("splunk_hec", SplunkHec), ("elasticsearch", Elasticsearch), ("otlp", Otlp)],
)
def test_a_body_is_as_the_page_shows_it(name: str, api: Callable[[Destination], Any], entry: Entry) -> None:
    real = api(shown_as(name, "http"))
    shown = values_of(block(name, "json"))
    assert is_shown(shown, values_of(real.body([entry]).decode())), real.body([entry])
    assert f"`POST {real.path}`" in section(name)


def test_a_message_of_syslog_is_as_the_page_shows_it(entry: Entry) -> None:
    shown = " ".join(block("syslog", "").splitlines())
    real = Syslog(shown_as("syslog", "tcp")).message(entry).decode()
    assert is_shown(shown, real), real


# ---------------------------------------------------------------------- receivers that run


class RsyslogOfThePage(Rsyslog):
    """rsyslog, as the page configures it, in its own place."""

    def _config(self) -> str:
        own = 'global(abortOnUncleanConfig="on" workDirectory="HERE")\n'
        return own + in_its_place(self, block("rsyslog", ""), r'type="im(udp|tcp)" port="(\d+)"')


class SyslogNgOfThePage(SyslogNg):
    """syslog-ng, the same."""

    def _config(self) -> str:
        return in_its_place(self, block("syslog-ng", ""), r'transport\("(udp|tcp|tls)"\) port\((\d+)\)')


def in_its_place(receiver: Receiver, config: str, inputs: str) -> str:
    """A configuration with the receiver's own ports and directory; it listens at no others."""
    ports = {}

    def with_port(found: re.Match[str]) -> str:
        transport: Transport = "tls" if found[2] == "6514" else "udp" if found[1] == "udp" else "tcp"
        ports[transport, "syslog"] = port = receiver._ports[transport, "syslog"]
        return found[0].replace(found[2], str(port))

    config = re.sub(inputs, with_port, config)
    assert len(ports) == 3
    receiver._ports = ports
    return config.replace("/etc/ssl/auditlog", "HERE").replace("/var/log", "HERE")


@pytest.mark.parametrize(("title", "kind"), [("rsyslog", RsyslogOfThePage), ("syslog-ng", SyslogNgOfThePage)])
def test_the_configuration_of_the_page_receives_every_event(
    title: str,
    kind: type[Receiver],
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with AuditLogger(directory, retention=None) as audit:
        audit.create("Clusters", 'a "b" \\ ] \x1b[2J\x7f ü\n', cluster={"notes": "x" * 900_000})
        with audit.session(Session(email="eve@example.com")):
            audit.write(denied(action="update", resource_type="Clusters", resource_id="b"))
    entries = Reading(directory).entries
    (of_page,) = destinations_of(block(title, "yaml"), tmp_path, monkeypatch)
    with kind(tmp_path) as receiver:
        received, chosen = (receiver.directory / f"audit-{name}.jsonl" for name in ("events", "denied"))
        transports: tuple[Transport, ...] = ("tls", "tcp", "udp")
        for count, transport in enumerate(transports, 1):
            destination = replace(
                of_page,
                name=transport,
                endpoint=receiver.endpoint(transport),
                ca_file=receiver.ca_file if transport == "tls" else "",
            )
            Forwarder(directory, destination).run(once=True)
            until(lambda: received.exists() and received.read_bytes().count(b"\n") == 2 * count)  # noqa: B023
        until(lambda: chosen.exists() and chosen.read_bytes().count(b"\n") == len(transports))
    got = received.read_bytes().splitlines(keepends=True)
    assert got[:4] == [entry.line for entry in entries] * 2
    cut, short = map(json.loads, got[4:])  # the long one fits into no packet
    assert "sha256" in cut["event_data"]["cluster"]["notes"]
    assert short == entries[1].record
