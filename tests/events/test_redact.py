"""No secret reaches a file, an error or a log."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from auditlog import AuditLogger, ConfigPatch, Event, EventData, InvalidEvent, InvalidSetting, Session
from auditlog.events.secrets import SecretNames
from auditlog.testing import recorded_log

CANARY = "canary-5f1d"
KEY = b"0123456789abcdef"


def written(redact: list[str] | tuple[str, ...] = (), *, data: Any = None, **options: Any) -> dict[str, Any]:
    """The details of an event as they were written, the session left out."""
    with recorded_log(redact=redact, **options) as log:
        log.audit.create("T", "1", **data)
        (record,) = log.records
    details: dict[str, Any] = record["event_data"]
    details.pop("session")
    return details


@dataclasses.dataclass
class Login:
    name: str
    password: str


class Credentials(BaseModel):
    api_token: str = CANARY


class Named(StrEnum):
    PASSWORD = "password"


SECRETS: dict[str, Any] = {
    "at the top": {"password": CANARY},
    "nested": {"a": {"b": {"c": {"secret": CANARY}}}},
    "in a list": {"a": [1, [{"token": CANARY}]]},
    "in a tuple": {"a": ({"token": CANARY},)},
    "a whole object": {"authorization": {"scheme": CANARY, CANARY: [CANARY]}},
    "a whole list": {"cookies": [], "cookie": [CANARY, {"x": CANARY}]},
    "a number": {"a": {"password": 12345678}},
    "bytes of a header name": {"headers": {"Proxy-Authorization": CANARY, "X-Api-Key": CANARY}},
    "camel case": {"clientSecret": CANARY, "accessToken": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY},
    "a dataclass": {"login": Login("alice", CANARY)},
    "dataclasses in a list": {"logins": [Login("alice", CANARY)]},
    "a model": {"x": Credentials()},
    "a subclass of dict": {"x": OrderedDict(passphrase=CANARY)},
    "an enum for a key": {"x": {Named.PASSWORD: CANARY}},
    "an unknown field of a payload": {"cluster": {"id": "c", "private_key": CANARY}},
    "below a payload's field": {"cluster": {"features": {"db_password": CANARY}}},
}


@pytest.mark.parametrize("data", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize("hmac_key", [None, KEY])
def test_no_secret_of_a_usual_name_is_written(data: dict[str, Any], hmac_key: bytes | None) -> None:
    text = str(written(data=data, hmac_key=hmac_key))
    assert CANARY not in text
    assert "12345678" not in text
    assert ("[redacted]" if hmac_key is None else "hmac-sha256:") in text
    assert "12345678" in (off := str(written(data=data, redact_defaults=False))) or CANARY in off


@given(
    st.recursive(st.just(CANARY), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner))
)
def test_nothing_below_a_secret_is_written(inner: Any) -> None:
    assert CANARY not in str(written(data={"a": {"secret": inner}, "b": [{"token": inner}]}))


def test_everything_else_is_written_as_it_is() -> None:
    data = {
        "cluster": {"id": "c", "labels": {"team": "a"}},
        "token_count": 3,
        "public_key": "k",
        "secretary": "Ada",
        "automount_service_account_token": False,
        "secret": None,
        "own": [1, {"x": [True, 0.5]}],
    }
    assert written(data=data) == data


def test_the_callers_own_data_is_left_alone() -> None:
    data = {"a": {"password": CANARY, "list": [{"token": CANARY}]}}
    written(data=data)
    assert data == {"a": {"password": CANARY, "list": [{"token": CANARY}]}}


@pytest.mark.parametrize(
    ("pattern", "data", "expected"),
    [
        ("ssn", {"a": [{"SSN": "1"}], "ssn_kind": "x"}, {"a": [{"SSN": "[redacted]"}], "ssn_kind": "x"}),
        ("a.b", {"a": {"b": "1", "c": "2"}, "b": "3"}, {"a": {"b": "[redacted]", "c": "2"}, "b": "3"}),
        ("a.b", {"x": {"a": {"b": "1"}}}, {"x": {"a": {"b": "1"}}}),
        ("a.b", {"a": [[{"b": "1"}]]}, {"a": [[{"b": "[redacted]"}]]}),
        ("*.pin", {"pin": "1", "a": {"pin": "2", "b": {"pin": "3"}}}, None),
        (
            "a.*.k",
            {"a": {"x": {"y": {"k": "1"}}, "k": "2"}},
            {"a": {"x": {"y": {"k": "[redacted]"}}, "k": "2"}},
        ),
        ("a.*", {"a": {"x": {"y": 1}, "z": 2}}, {"a": {"x": "[redacted]", "z": "[redacted]"}}),
        ("cluster.id", {"cluster": {"id": "c"}}, {"cluster": {"id": "[redacted]"}}),
        (
            "cluster.labels",
            {"cluster": {"labels": {"a": "b"}}},
            {"cluster": {"labels": {"redacted": "[redacted]"}}},
        ),
        ("cluster", {"cluster": {"id": "c"}}, {"cluster": {"redacted": "[redacted]"}}),
        (
            "access_policy.rules",
            {"access_policy": {"rules": [1]}},
            {"access_policy": {"rules": ["[redacted]"]}},
        ),
        ("audit.lost", {"audit": {"lost": 3, "action": "x"}}, {"audit": {"action": "x"}}),
    ],
)
def test_a_pattern_means_these_fields(pattern: str, data: Any, expected: Any) -> None:
    if expected is None:
        expected = {"pin": "1", "a": {"pin": "[redacted]", "b": {"pin": "[redacted]"}}}
    with recorded_log(redact=[pattern], redact_defaults=False) as log:
        log.audit.create("T", "1", **data)
        (entry,) = log.entries
        assert entry.record["event_data"] | {"session": 0} == expected | {"session": 0}
        assert entry.event.event_type == "create"  # what is redacted can be read as a typed event


def test_typed_events_and_their_sessions_are_redacted(alice: Session) -> None:
    session = Session.model_validate({"email": "a@example.com", "access_token": CANARY})
    own = alice.model_copy(update={"fingerprint": CANARY})
    with recorded_log(redact=["config_patch.data", "session.fingerprint"]) as log:
        event = Event.model_validate(
            {"event_type": "create", "event_data": {"config_patch": {"data": CANARY}}, "x_token": CANARY}
        )
        with log.audit.session(session):
            log.audit.write(event)
            log.audit.create("T", "2")
        with log.audit.session(own):
            log.audit.create("T", "3")
        log.audit.write(Event(event_type="create", event_data=EventData(session=own)))
        log.audit.create("T", "4", config_patch=ConfigPatch(id="p", data=CANARY))
        lines = b"".join(entry.line for entry in log.entries)
        sessions = [entry.record["event_data"]["session"] for entry in log.entries]
    assert CANARY.encode() not in lines
    assert sessions[0] == sessions[1] == {"email": "a@example.com", "access_token": "[redacted]"}
    assert sessions[2] == sessions[3]
    assert sessions[2]["fingerprint"] == "[redacted]"


def test_an_hmac_recognizes_equal_secrets_and_is_that_of_the_text() -> None:
    details = written(
        data={"password": "grün", "a": {"password": "grün"}, "token": {"b": 1, "a": [2]}}, hmac_key=KEY
    )
    assert (
        details["password"]
        == details["a"]["password"]
        == "hmac-sha256:" + hmac.new(KEY, "grün".encode(), hashlib.sha256).hexdigest()
    )
    assert details["token"] == "hmac-sha256:" + hmac.new(KEY, b'{"a":[2],"b":1}', hashlib.sha256).hexdigest()


class Unruly:
    def __repr__(self) -> str:
        return CANARY


class UnrulyModel(BaseModel):
    x: int = 1

    def model_dump(self, **_options: Any) -> Any:
        raise RuntimeError(CANARY)


@contextmanager
def told() -> Iterator[None]:
    """Logs what is raised, as servers do, with all that led to it."""
    try:
        yield
    except Exception:
        logging.getLogger("server").exception("a request failed")
        raise


@pytest.mark.parametrize(
    "data",
    [
        {"password": Unruly()},
        {"a": {"password": CANARY, "b": Unruly()}},
        {"a": {"password": CANARY, "b": float("nan")}},
        {"a": UnrulyModel()},
        {"cluster": {"id": 5, "token": CANARY}},
        {"cluster": CANARY},
        {"config_patch": {"labels": {"a": [CANARY]}}},
        {"a": {1: CANARY}},
    ],
)
@pytest.mark.parametrize("hmac_key", [None, KEY])
def test_no_secret_reaches_an_error_or_a_log(
    data: dict[str, Any], hmac_key: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded_log(hmac_key=hmac_key) as log, caplog.at_level(logging.DEBUG):
        with suppress(InvalidEvent), told():
            log.audit.create("T", "1", **data)
        stored = b"".join(path.read_bytes() for path in Path(log.directory).glob("*.jsonlog"))
        assert CANARY.encode() not in stored
    assert CANARY not in caplog.text


def test_a_cycle_is_refused(directory: Path) -> None:
    cycle: dict[str, Any] = {}
    cycle |= {"a": cycle, "b": cycle}
    with recorded_log() as log, pytest.raises(InvalidEvent, match="deeper than 64 levels"):
        log.audit.create("T", "1", x=cycle)


@pytest.mark.parametrize(
    "pattern", ["", "*", ".", "a.", ".a", "a..b", "a b", "a.*b", "*.*", "event_data.a", "-", "a.-", 5, None]
)
def test_what_is_no_pattern_is_refused(directory: Path, pattern: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"^redact="):
        AuditLogger(directory, redact=[pattern])
    with pytest.raises(InvalidSetting, match="must be a list"):
        AuditLogger(directory, redact="password")
    assert not directory.exists()


@pytest.mark.parametrize("key", [b"short", "a text of many letters", 5])
def test_a_key_that_is_none_is_refused_and_not_shown(directory: Path, key: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"^hmac_key='\[redacted\]': must be at least 16") as caught:
        AuditLogger(directory, hmac_key=key)
    assert str(key) not in str(caught.value)


def test_names_that_an_attacker_brings_are_not_all_remembered() -> None:
    names = SecretNames((), defaults=True)
    assert not any(names.match("", f"name{number}") for number in range(10_000))
    assert len(names.harmless) < 5000
    assert names.match("", "password")


class KeyedSession(Session):
    api_token: str = ""


def test_fields_of_a_subclass_of_session_are_redacted_too() -> None:
    with recorded_log() as log:
        with log.audit.session(KeyedSession(email="a", api_token=CANARY)):
            log.audit.create("T", "1")
        assert log.records[0]["event_data"]["session"] == {"email": "a", "api_token": "[redacted]"}


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("fragment", [b'{"password":"x"}', b'{}}\n{"event_type":"create"', b"no json"])
def test_what_orjson_would_embed_unseen_is_refused(fragment: bytes, defaults: bool) -> None:
    with recorded_log(redact_defaults=defaults) as log:
        for data in ({"x": orjson.Fragment(fragment)}, {"x": [{"y": orjson.Fragment(fragment)}]}):
            with pytest.raises(InvalidEvent, match=r"event_data\.x.*type Fragment cannot be written"):
                log.audit.create("T", "1", **data)
        assert log.entries == []


def test_dots_within_a_name_are_like_those_between_names() -> None:
    data = {"metadata": {"annotations": {"kubectl.kubernetes.io/last-applied": CANARY, "other": "x"}}}
    pattern = "metadata.annotations.kubectl.kubernetes.io/last-applied"
    assert written([pattern], data=data)["metadata"]["annotations"] == {
        "kubectl.kubernetes.io/last-applied": "[redacted]",
        "other": "x",
    }


def test_names_that_an_attacker_brings_take_neither_time_nor_memory() -> None:
    names = SecretNames(["*.x.*.y.key"], defaults=True)
    assert not any(names.match("", f"{number}" * 1000) for number in range(1000))
    assert not names.harmless
    started = time.process_time()
    assert not names.match(".".join("xy" * 200_000 + "z"), "key")
    assert names.match(".".join("ax" + "b" * 1000 + "y"), "key")
    assert time.process_time() - started < 10  # seconds; a search that goes back takes hours
