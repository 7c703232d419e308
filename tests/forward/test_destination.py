"""Which destinations there are, and what is refused before anything is sent."""

from __future__ import annotations

import pickle
import socket
from itertools import product
from typing import Any

import pytest

from auditlog import InvalidSetting
from auditlog.forward import Destination
from auditlog.forward.destination import Endpoint, checked


@pytest.mark.parametrize(
    ("endpoint", "url", "name"),
    [
        ("udp://127.0.0.1:12345/", ("udp", "127.0.0.1", 12345, ""), "udp-127.0.0.1-12345"),
        ("tcp://host:5044/", ("tcp", "host", 5044, ""), "tcp-host-5044"),
        ("tcp://10.200.0.138:5170", ("tcp", "10.200.0.138", 5170, ""), "tcp-10.200.0.138-5170"),
        ("tls://logs.example.com:6514", ("tls", "logs.example.com", 6514, ""), "tls-logs.example.com-6514"),
        ("tcp://[fd00::1]:5044/", ("tcp", "fd00::1", 5044, ""), "tcp-fd00__1-5044"),
        ("TCP://Host:5044", ("tcp", "host", 5044, ""), "tcp-host-5044"),
        ("https://loki:3100", ("https", "loki", 3100, ""), "https-loki-3100"),
        ("http://siem/in?x=1", ("http", "siem", 0, "/in?x=1"), "http-siem"),
        ("https://a-0b.example.com/", ("https", "a-0b.example.com", 0, ""), "https-a-0b.example.com"),
    ],
)
def test_an_endpoint_is_taken_apart_and_names_its_destination(
    endpoint: str, url: tuple[str, str, int, str], name: str
) -> None:
    destination = Destination(endpoint=endpoint)
    assert destination.url == Endpoint(*url)
    assert destination.name == name
    assert destination.source == socket.gethostname()


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "host:5044",
        "tcp://",
        "tcp://host",
        "tcp://host:0",
        "tcp://host:99999",
        "tcp://host:x/",
        "tcp://:5044/",
        "tcp://host:5044/path",
        "udp://host:1/?a=b",
        "unix:///run/log",
        "tcp://ho st:5044",
        "tcp://host:5044/\n",
        "tcp://[::1:5044",
        "https://",
        "tcp://siem..example.com:5044/",
        "tcp://.example.com:5044/",
        f"https://{'a' * 64}.example.com/",
        "udp://h\ud800:1/",
    ],
)
def test_what_is_no_endpoint_is_refused_with_an_example(endpoint: str) -> None:
    with pytest.raises(InvalidSetting, match="endpoint=") as caught:
        Destination(endpoint=endpoint)
    assert "tcp://host:5044/" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("endpoint", {"endpoint": 5}),
        ("endpoint", {"endpoint": "https://me:secret@host/"}),
        ("format", {"format": "json"}),
        ("format", {"format": "loki"}),
        ("format", {"endpoint": "https://host", "format": "syslog"}),
        ("name", {"name": "../state"}),
        ("name", {"name": "a/b"}),
        ("name", {"name": ".hidden"}),
        ("name", {"name": "x.lock"}),
        ("name", {"name": "x" * 101}),
        ("service", {"service": "my audit"}),
        ("service", {"service": "x" * 49}),
        ("source", {"source": "ho\nst"}),
        ("begin", {"begin": "yesterday"}),
        ("extra_tags", {"extra_tags": ["a"]}),
        ("extra_tags", {"extra_tags": {7: "a"}}),
        ("extra_tags.a", {"extra_tags": {"a": {"b": "c"}}}),
        ("extra_tags.a", {"extra_tags": {"a": None}}),
        ("extra_tags.a", {"extra_tags": {"a": float("nan")}}),
        ("extra_tags.a", {"extra_tags": {"a": 1 << 70}}),
        ("extra_tags.a", {"extra_tags": {"a": "\ud800"}}),
        ("headers", {"headers": {"Authorization": "secret"}}),
        ("headers", {"endpoint": "https://host", "headers": {"Authorization": "secret\r\nX: y"}}),
        ("headers", {"endpoint": "https://host", "headers": {"Authorization": 5}}),
        ("headers.Authorization", {"endpoint": "https://host", "headers": {"Authorization": ""}}),
        ("headers.Authorization", {"endpoint": "https://host", "headers": {"Authorization": " "}}),
        ("labels", {"labels": {"job": "audit"}}),
        ("ca_file", {"ca_file": "ca.pem"}),
        ("cert_file", {"endpoint": "tls://host:1", "cert_file": "cert.pem"}),
        ("server_name", {"endpoint": "tls://host:1", "server_name": "siem..example.com"}),
        ("server_name", {"endpoint": "tls://host:1", "server_name": "a\0b"}),
        ("max_message_bytes", {"max_message_bytes": 511}),
        ("max_message_bytes", {"max_message_bytes": True}),
        ("max_message_bytes", {"endpoint": "udp://host:1", "max_message_bytes": 65508}),
        ("max_message_bytes", {"endpoint": "https://host", "max_message_bytes": 65507}),
        ("gzip", {"gzip": "yes"}),
        ("connect_timeout", {"connect_timeout": 0}),
        ("send_timeout", {"send_timeout": "5"}),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(setting: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Destination(**({"endpoint": "tcp://host:5044/"} | options))
    assert caught.value.setting == setting
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("option", ["ca_file", "cert_file"])
def test_a_file_that_cannot_be_used_for_tls_is_refused_when_forwarding_begins(
    option: str, tmp_path: Any
) -> None:
    from auditlog.forward.forwarder import channel_for
    from auditlog.storage.progress import Progress

    (tmp_path / "empty.pem").write_text("")
    for name in ("none.pem", "empty.pem"):
        files = {option: str(tmp_path / name)}
        if option == "cert_file":
            files["key_file"] = files["cert_file"]
        with pytest.raises(InvalidSetting, match=option):
            channel_for(Destination(endpoint="tls://host:1/", **files), Progress())  # type: ignore[arg-type]


def test_secrets_do_not_show() -> None:
    destination = Destination(
        endpoint="https://host/in?token=secret", headers={"Authorization": "Bearer secret"}
    )
    assert destination.shown_endpoint == "https://host/in"
    assert destination.url.path == "/in?token=secret"
    assert "shown_endpoint='https://host/in'" in repr(destination)
    assert "secret" not in repr(destination)


@pytest.mark.parametrize("mark", [*"/#?[] :@%", "\n", ""])
def test_a_password_in_an_endpoint_does_not_show(mark: str) -> None:
    for scheme, port in product(("https://", "tcp://", "ftp://", ""), ("", ":1", ":99999", ":x")):
        with pytest.raises(InvalidSetting) as caught:
            Destination(endpoint=f"{scheme}admin:12{mark}hunter2@host{port}/")
        assert str(caught.value) == (
            "endpoint='[redacted]': credentials belong into headers, not into the URL; "
            "elsewhere in it, @ is %40"
        )


@pytest.mark.parametrize(
    "endpoint",
    [
        "ftp://host/?token=secret",
        "http://host/a b?token=secret",
        "https://host:x/?token=secret",
        "https://host:99999/#secret",
        "tcp://host?token=secret",
        "tcp://host:1/?token=secret",
        "tcp://host:1/#secret",
    ],
)
def test_the_query_of_an_endpoint_that_is_refused_does_not_show(endpoint: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Destination(endpoint=endpoint)
    assert "host" in caught.value.value  # type: ignore[operator]
    assert "secret" not in str(caught.value)


def test_two_of_one_name_are_refused() -> None:
    one, other = Destination(endpoint="tcp://host:1"), Destination(endpoint="tcp://host:1", format="syslog")
    with pytest.raises(InvalidSetting, match="name='tcp-host-1'"):
        checked([one, other])
    named = Destination(endpoint="tcp://host:1", format="syslog", name="second")
    assert checked([one, named]) == (one, named)
    one, other = (
        Destination(endpoint="http://host/?token=secret"),
        Destination(endpoint="http://host/?secret"),
    )
    with pytest.raises(InvalidSetting, match=r"\(http://host/\); give"):
        checked([one, other])


def test_what_is_no_destination_is_refused_and_not_shown() -> None:
    wrong: dict[str, Any] = {"endpoint": "https://me:secret@host", "headers": {"Authorization": "secret"}}
    for given in ("https://me:secret@host", ["https://me:secret@host"], wrong, [wrong]):
        with pytest.raises(InvalidSetting, match="Destination") as caught:
            checked(given)
        assert "secret" not in str(caught.value)


def test_a_destination_survives_pickling() -> None:
    destination = Destination(endpoint="tcp://host:1", extra_tags={"rack": 7})
    assert pickle.loads(pickle.dumps(destination)) == destination
