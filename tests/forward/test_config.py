"""Destinations from a YAML file: what Talos takes, and clear words for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from auditlog import InvalidSetting
from auditlog.forward import Destination
from auditlog.forward.config import load_destinations

TALOS = """\
version: v1alpha1
debug: false
machine:
  type: controlplane
  token: 328hom.uqjzh6jnn2eie9oi
  install:
    disk: /dev/sda
    extraKernelArgs:
      - talos.logging.kernel=tcp://host:5044/
  logging:
    destinations:
      - endpoint: "udp://127.0.0.1:12345/"
        format: "json_lines"
        extraTags:
          server: s03-rack07
      - endpoint: "tcp://10.200.0.138:5170"
        format: "json_lines"
cluster:
  id: null
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: remote-log
url: tcp://host:5044/
"""


def load(tmp_path: Path, text: str | bytes) -> list[Destination]:
    path = tmp_path / "forward.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_destinations(path)


def load_items(tmp_path: Path, *items: str) -> list[Destination]:
    return load(tmp_path, f"machine: {{logging: {{destinations: [{', '.join(items)}]}}}}")


def refusal(tmp_path: Path, text: str | bytes) -> str:
    """What a file is refused with, from its own name on."""
    with pytest.raises(InvalidSetting) as raised:
        load(tmp_path, text)
    return str(raised.value).replace(f"{tmp_path}/", "")


def refusal_of(tmp_path: Path, *items: str) -> str:
    """What destinations are refused with, from the list's own number on."""
    text = refusal(tmp_path, f"machine: {{logging: {{destinations: [{', '.join(items)}]}}}}")
    return text.removeprefix("forward.yaml: machine.logging.destinations")


class TestTaken:
    def test_a_talos_machine_configuration_works_unchanged(self, tmp_path: Path) -> None:
        assert load(tmp_path, TALOS) == [
            Destination(endpoint="udp://127.0.0.1:12345/", extra_tags={"server": "s03-rack07"}),
            Destination(endpoint="tcp://10.200.0.138:5170"),
        ]

    def test_every_field_of_a_destination_has_its_key(self, tmp_path: Path) -> None:
        text = """\
machine:
  logging:
    destinations:
      - endpoint: https://logs.example.com/push
        format: loki
        extraTags: {rack: s03}
        name: loki
        service: control-plane
        source: server-1
        begin: now
        caFile: ca.pem
        certFile: cert.pem
        keyFile: key.pem
        serverName: loki.example.com
        headers: {X-Scope-OrgID: 1}
        labels: {cluster: c}
        gzip: no
        connectTimeout: 2.5
        sendTimeout: 60
      - {endpoint: "udp://[::1]:514", maxMessageBytes: 1432}
"""
        assert load(tmp_path, text) == [
            Destination(
                endpoint="https://logs.example.com/push",
                format="loki",
                extra_tags={"rack": "s03"},
                name="loki",
                service="control-plane",
                source="server-1",
                begin="now",
                ca_file="ca.pem",
                cert_file="cert.pem",
                key_file="key.pem",
                server_name="loki.example.com",
                headers={"X-Scope-OrgID": "1"},
                labels={"cluster": "c"},
                gzip=False,
                connect_timeout=2.5,
                send_timeout=60.0,
            ),
            Destination(endpoint="udp://[::1]:514", max_message_bytes=1432),
        ]

    def test_tags_are_what_was_written(self, tmp_path: Path) -> None:
        tags = {
            "rack": "07",
            "version": "1.10",
            "day": "2024-08-12",
            "switch": "on",
            "time": "12:30",
            "yes": "no",
            "hex": "0x1F",
            "unit": "µs",
            "empty": "",
        }
        written = ", ".join(f"{name}: {value}" for name, value in tags.items() if value)
        found = load_items(tmp_path, f"{{endpoint: 'tcp://h:1', extraTags: {{{written}, empty: ''}}}}")
        assert found[0].extra_tags == tags

    def test_a_key_without_a_value_is_as_none(self, tmp_path: Path) -> None:
        found = load_items(tmp_path, "{endpoint: 'tcp://h:1', name: , extraTags: ~, caFile: null}")
        assert found == [Destination(endpoint="tcp://h:1")]

    def test_destinations_may_share_what_they_have_in_common(self, tmp_path: Path) -> None:
        common = "&common {endpoint: 'tcp://h:1', service: plane}"
        found = load_items(tmp_path, common, "{<<: *common, endpoint: 'tcp://h:2'}")
        assert [each.service for each in found] == ["plane", "plane"]
        assert [each.endpoint for each in found] == ["tcp://h:1", "tcp://h:2"]

    def test_documents_each_may_have_destinations(self, tmp_path: Path) -> None:
        one = "machine: {logging: {destinations: [{endpoint: 'tcp://h:1'}]}}"
        found = load(tmp_path, f"{one}\n---\n- another\n---\n\n---\n{one.replace(':1', ':2')}")
        assert [each.endpoint for each in found] == ["tcp://h:1", "tcp://h:2"]

    def test_what_is_tagged_elsewhere_is_passed_over(self, tmp_path: Path) -> None:
        text = """\
a: !vault |
  6162
b: !!int 3
c: [!!python/object/apply:os.system ['id'], !!binary aGk=, !!set {d}, <<]
!key e: !map {!key f: !list [1]}
machine: {logging: {destinations: [{endpoint: !!str "tcp://h:1", extraTags: {rack: !!int 07}}]}}
"""
        assert load(tmp_path, text) == [Destination(endpoint="tcp://h:1", extra_tags={"rack": "07"})]

    def test_headers_are_filled_from_the_environment_and_nothing_else_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HEC_TOKEN", "s3cret ${HOME}")
        found = load_items(
            tmp_path,
            "{endpoint: 'http://h:1', source: '${HEC_TOKEN}', extraTags: {tag: '${HEC_TOKEN}'},"
            " headers: {Authorization: 'Splunk ${HEC_TOKEN}!', X: '$HEC_TOKEN ${} ${1}'}}",
        )
        assert found[0].headers == {"Authorization": "Splunk s3cret ${HOME}!", "X": "$HEC_TOKEN ${} ${1}"}
        assert found[0].extra_tags == {"tag": "${HEC_TOKEN}"}
        assert found[0].source == "${HEC_TOKEN}"


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "has no machine.logging.destinations"),
            ("- endpoint: tcp://h:1", "has no machine.logging.destinations"),
            ("destinations: [{endpoint: 'tcp://h:1'}]", "has no machine.logging.destinations"),
            ("machine: {logging: {destinations: []}}", "has no machine.logging.destinations"),
            ("machine: {logging: }", "has no machine.logging.destinations"),
            ("machine: [", "is no YAML: line 1, column 11: "),
            ("a: b\nc: d: e", "is no YAML: line 2, column 5: mapping values are not allowed here"),
            ("machine: *x", "is no YAML: line 1, column 10: found undefined alias"),
            ("machine: {}\nmachine: {}", "is no YAML: line 2, column 1: the key machine stands"),
            ("? [a]\n: b", "is no YAML: line 1, column 3: found unhashable key"),
            (b"machine: \xff", "is no YAML: unacceptable character #x00ff"),
            ("a: \x01", "is no YAML: unacceptable character #x0001"),
            ("[" * 5000, "is no YAML: it is nested too deeply"),
        ],
    )
    def test_a_file_without_destinations(self, tmp_path: Path, text: str | bytes, reason: str) -> None:
        assert refusal(tmp_path, text).startswith(f"config='forward.yaml': {reason}")

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        for path, reason in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a directory")):
            with pytest.raises(InvalidSetting, match=f"{path}': cannot be read: {reason}"):
                load_destinations(path)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("machine: secret", "machine='[redacted]': must be a mapping, and is a single value"),
            (
                "machine: !secret x",
                "machine='[redacted]': must be a mapping, and is a value with a tag (!)",
            ),
            ("a: b\n---\nmachine: []", "document 2: machine='[redacted]': must be a mapping, and is a list"),
            (
                "machine: {logging: [secret]}",
                "machine.logging='[redacted]': must be a mapping, and is a list",
            ),
            (
                "machine: {logging: {destinations: {headers: secret}}}",
                "machine.logging.destinations='[redacted]': must be a list, and is a mapping",
            ),
        ],
    )
    def test_a_wrong_shape_around_destinations(self, tmp_path: Path, text: str, said: str) -> None:
        assert refusal(tmp_path, text) == f"forward.yaml: {said}"

    @pytest.mark.parametrize(
        ("item", "said"),
        [
            ("secret", "='[redacted]': must be a mapping, and is a single value"),
            ("", "='[redacted]': must be a mapping, and is empty"),
            ("{}", ".endpoint='': is missing; "),
            ("{endpoint: 'ftp://h:1'}", ".endpoint='ftp://h:1': must be like "),
            ("{endpoint: 'tcp://u:secret@h:1'}", ".endpoint='[redacted]': credentials belong into "),
            ("{endpoint: ['tcp://h:1']}", ".endpoint='[redacted]': must be a single value, and is a list"),
            ("{endpoint: 'tcp://h:1', format: loki}", ".format='loki': tcp has the formats "),
            (
                "{endpoint: 'tcp://h:1', extraTags: a}",
                ".extraTags='[redacted]': must be a mapping, and is a ",
            ),
            ("{endpoint: 'tcp://h:1', extraTags: {rack: [7]}}", ".extraTags.rack=['7']: must be a string"),
            (
                "{endpoint: 'tcp://h:1', extraTags: {caFile: [7]}}",
                ".extraTags.caFile=['7']: must be a string",
            ),
            ("{endpoint: 'tcp://h:1', extraTags: {rack: ~}}", ".extraTags.rack=None: must be a string"),
            ("{endpoint: 'tcp://h:1', name: 'a/b'}", ".name='a/b': must be letters, digits"),
            ("{endpoint: 'tcp://h:1', begin: later}", '.begin=\'later\': must be "oldest" or "now"'),
            ("{endpoint: 'tls://h:1', certFile: c}", ".certFile='c': takes keyFile, and keyFile takes it"),
            ("{endpoint: 'tcp://h:1', caFile: c}", ".caFile='c': tcp is not encrypted"),
            ("{endpoint: 'tcp://h:1', labels: {a: b}}", ".labels={'a': 'b'}: are Loki's; give extraTags"),
            ("{endpoint: 'tcp://h:1', gzip: maybe}", ".gzip='maybe': must be true or false"),
            ("{endpoint: 'tcp://h:1', maxMessageBytes: 1.5}", ".maxMessageBytes='1.5': must be a number of "),
            ("{endpoint: 'tcp://h:1', maxMessageBytes: 9}", ".maxMessageBytes=9: must be a number of bytes "),
            ("{endpoint: 'tcp://h:1', sendTimeout: soon}", ".sendTimeout='soon': must be a positive number"),
            ("{endpoint: 'tcp://h:1', sendTimeout: nan}", ".sendTimeout=nan: must be a positive number"),
            ("{endpoint: 'tcp://h:1', headers: {A: secret}}", ".headers='[redacted]': tcp has none"),
            ("{endpoint: 'http://h', headers: {A: [secret]}}", ".headers='[redacted]': must be names with"),
            ("{endpoint: 'http://h', headers: {A: !secret x}}", ".headers='[redacted]': must be names with"),
            ("{endpoint: 'http://h', headers: {A: ''}}", ".headers.A='': is empty"),
            (
                "{endpoint: 'tcp://h:1', name: !vault x}",
                ".name='[redacted]': must be a single value, and is ",
            ),
            ("{endpoint: 'tcp://h:1', extraTags: {a: !vault x}}", ".extraTags.a=[tagged]: must be a string"),
        ],
    )
    def test_a_wrong_destination_with_its_place(self, tmp_path: Path, item: str, said: str) -> None:
        refused = refusal_of(tmp_path, "{endpoint: 'tcp://other:1'}", item or "~")
        assert refused.startswith(f"[1]{said}")
        assert "secret" not in refused

    @pytest.mark.parametrize(
        ("key", "near"),
        [
            ("extratags", "; is it extraTags?"),
            ("extra_tags", "; is it extraTags?"),
            ("endpont", "; is it endpoint?"),
            ("header", "; is it headers?"),
            ("password", "."),
        ],
    )
    def test_an_unknown_key_with_those_that_there_are(self, tmp_path: Path, key: str, near: str) -> None:
        refused = refusal_of(tmp_path, f"{{endpoint: 'tcp://h:1', {key}: secret}}")
        assert refused.startswith(
            f"[0].{key}='[redacted]': a destination has no such key{near} There are end"
        )
        assert refused.endswith("maxMessageBytes, connectTimeout, sendTimeout")

    def test_two_destinations_of_one_name(self, tmp_path: Path) -> None:
        for items in (
            ["{endpoint: 'tcp://h:1'}", "{endpoint: 'tcp://h:1/', format: syslog}"],
            ["{endpoint: 'tcp://h:1', name: a}", "{endpoint: 'tcp://h:2', name: a}"],
        ):
            refused = refusal(tmp_path, f"machine: {{logging: {{destinations: [{', '.join(items)}]}}}}")
            assert refused.startswith("forward.yaml: machine.logging.destinations[1].name=")
            assert "give each a name of its own" in refused

    def test_the_document_is_told_where_there_are_several(self, tmp_path: Path) -> None:
        good = "machine: {logging: {destinations: [{endpoint: 'tcp://h:1'}]}}"
        for bad, said in (
            (good.replace("tcp", "ftp"), "endpoint='ftp://h:1': must be like "),
            (good, "name='tcp-h-1': is the name of two destinations"),
            (good.replace("endpoint", "endpont"), "endpont='[redacted]': a destination has no such key"),
        ):
            refused = refusal(tmp_path, f"{good}\n---\n---\n{bad}")
            assert refused.startswith(f"forward.yaml: document 3: machine.logging.destinations[0].{said}")

    @pytest.mark.parametrize(("value", "is_now"), [(None, "not set"), ("", "empty")])
    def test_a_header_that_the_environment_does_not_have(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, is_now: str
    ) -> None:
        if value is not None:
            monkeypatch.setenv("AUDITLOG_NO_SUCH", value)
        item = "{endpoint: 'http://h', headers: {Authorization: 'secret ${AUDITLOG_NO_SUCH}'}}"
        assert refusal_of(tmp_path, item) == (
            "[0].headers.Authorization='${AUDITLOG_NO_SUCH}': the environment variable AUDITLOG_NO_SUCH "
            f"is {is_now}; set it, or correct its name"
        )

    def test_a_value_of_the_environment_that_would_break_a_header(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HEC_TOKEN", "secret\r\nX-Other: 1")
        refused = refusal_of(tmp_path, "{endpoint: 'http://h', headers: {A: '${HEC_TOKEN}'}}")
        assert refused == "[0].headers='[redacted]': must have no line breaks"


def without_yaml(statement: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys\nsys.modules['yaml'] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_missing_pyyaml_says_what_to_install() -> None:
    done = without_yaml("from auditlog.forward.config import load_destinations; load_destinations('f.yaml')")
    assert "reading it takes PyYAML: pip install 'auditlog-jsonl[forward]'" in done.stderr


def test_destinations_in_code_need_no_pyyaml() -> None:
    statement = "from auditlog.forward import Destination, Forwarder; Destination(endpoint='tcp://h:1')"
    assert without_yaml(statement).returncode == 0
