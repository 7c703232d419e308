"""The ten resource types that Omni's audit log documents, each as the format says."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel

from auditlog import Session
from auditlog.capture import bind, omni
from auditlog.capture.store import AuditedStore
from auditlog.testing import RecordedLog, recorded_log
from examples.control_plane.store import Resource, ResourceStore
from tests.conftest import ROOT

VECTORS = json.loads((ROOT / "tests" / "vectors" / "omni.json").read_text())
LINES = {event["name"]: event for event in VECTORS["events"]}
LABELS = {omni.CLUSTER_LABEL: "talos-default", "team": "x"}

# The payload of each type, and a content with all that the payload has, and something that it has not.
CONTENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "AccessPolicies": (
        "access_policy",
        {
            "cluster_groups": {"g": {"clusters": [{"name": "c"}]}},
            "user_groups": {"u": {"users": [{"name": "a"}]}},
            "rules": [{"users": ["group/u"], "role": "Operator"}],
            "tests": [{"name": "t"}],
        },
    ),
    "Clusters": (
        "cluster",
        {
            "backup_configuration": {"enabled": False},
            "features": {},
            "kubernetes_version": "1.30.1",
            "talos_version": "1.7.4",
        },
    ),
    "ConfigPatches": ("config_patch", {"data": "machine: {}\n"}),
    "Identities": ("new_user", {"email": "bob@example.com", "is_service_account": True}),
    "MachineLabels": ("machine_labels", {}),
    "MachineSetNodes": ("machine_set_node", {}),
    "MachineSets": (
        "machine_set",
        {
            "machine_allocation": {"name": "class", "machine_count": 3},
            "bootstrap_spec": {"cluster_uuid": "u"},
            "update_strategy_config": {},
            "delete_strategy_config": {},
            "update_strategy": 1,
            "delete_strategy": "Rolling",
        },
    ),
    "Machines": ("machine", {"management_address": "fdae::1", "is_connected": True}),
    "PublicKeys": ("", {"public_key": "PGP", "expiration": 5}),
    "Users": ("new_user", {"role": "Admin"}),
}
HAVE_CLUSTER = {"config_patch", "machine_set", "machine_set_node"}


def by_order(payload: str, fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """The fields as the format orders them."""
    return [(name, fields[name]) for name in VECTORS["key_order"][payload] if name in fields]


def data_of(log: RecordedLog) -> list[dict[str, Any]]:
    return [record["event_data"] for record in log.records]


@pytest.mark.parametrize("name", CONTENTS)
def test_the_events_of_a_documented_type_are_as_the_format_says(name: str, alice: Session) -> None:
    kind, (payload, content) = f"{name}.omni.sidero.dev", CONTENTS[name]
    resource = Resource(kind, "1", LABELS, content | {"not_in_the_payload": "x"})
    has = VECTORS["key_order"].get(payload, [])
    expected: dict[str, Any] = content | {"id": "1"}
    if "labels" in has:
        expected["labels"] = LABELS
    if payload in HAVE_CLUSTER:
        expected["cluster_id"] = "talos-default"
    with recorded_log() as log, bind(alice):
        store = AuditedStore(ResourceStore(), log.audit, omni.hooks())
        store.create(resource)
        store.update(dataclasses.replace(resource, labels=LABELS | {"team": "y"}))
        store.update(dataclasses.replace(resource, labels=LABELS))
        store.update_with_conflicts(kind, "1", lambda it: it.spec.update(own=1))
        store.teardown(kind, "1")
        store.destroy(kind, "1")
        found = log.records
    assert [record["event_type"] for record in found] == [
        "create",
        "update",
        "update",
        "update_with_conflicts",
        "teardown",
        "destroy",
    ]
    for record in found:
        assert list(record) == VECTORS["key_order"]["event"]
        assert (record["resource_type"], record["resource_id"]) == (kind, "1")
        assert list(record["event_data"]) == ([payload] if payload else []) + ["session"]
        assert record["event_data"]["session"]["email"] == "alice@example.com"
    if payload:
        for record in found[:1] + found[2:]:
            assert list(record["event_data"][payload].items()) == by_order(payload, expected)
        if "labels" in has:
            assert found[1]["event_data"][payload]["labels"]["team"] == "y"


def test_all_documented_types_have_a_hook_and_others_have_none() -> None:
    hooks = omni.hooks()
    assert {f"{name}.omni.sidero.dev" for name in CONTENTS} == set(omni.PAYLOAD_OF)
    for name in omni.PAYLOAD_OF:
        assert hooks.rule(name).records(internal=True)
        assert not hooks.rule(name).before
        assert hooks.rule(name).diff is None
    assert not hooks.rule("Links.omni.sidero.dev").records(internal=False)


def test_options_are_those_of_all_types() -> None:
    hooks = omni.hooks(others="record", internal="skip", before=True, diff=True)
    for name, payload in omni.PAYLOAD_OF.items():
        rule = hooks.rule(name)
        assert rule.records(internal=False)
        assert not rule.records(internal=True)
        assert rule.before
        assert rule.diff == (payload or None)
    assert hooks.rule("Links").records(internal=True)
    assert hooks.rule("Links").before


@pytest.mark.parametrize(
    "name", ["docs_cluster_create", "internal_agent_empty_session_fields", "public_key_create"]
)
def test_the_line_is_that_of_omni_but_for_the_time_and_the_id(name: str) -> None:
    event = LINES[name]["event"]
    data = dict(event["event_data"])
    session = Session(**data.pop("session"))
    fields: dict[str, Any] = next(iter(data.values()), {})
    spec = {name: value for name, value in fields.items() if name != "id"}
    with recorded_log() as log:
        inner = ResourceStore()
        store = AuditedStore(inner, log.audit, omni.hooks())
        resource = Resource(event["resource_type"], fields.get("id", "k1"), {}, spec)
        if event["event_type"] == "create":
            with bind(session):
                store.create(resource)
        else:  # nobody is bound: the internal agent does it
            inner.create(resource)
            store.teardown(resource.type, resource.id)
        (entry,) = log.entries
    line, record = entry.line, entry.record
    time, identity = b'"event_ts":%d' % record["event_ts"], b'"resource_id":"%s",' % resource.id.encode()
    assert line.count(identity) == 1
    if "resource_id" not in event:  # Omni wrote it from v1.4 on
        line = line.replace(identity, b"")
    line = line.replace(time, b'"event_ts":%d' % event["event_ts"])
    assert line == LINES[name]["line"].encode()


class Patch(BaseModel):
    data: str
    cluster_id: str | None = None


@dataclass
class Plainly:
    data: str
    unwritable: Any = None


class Slotted:
    __slots__ = ("data",)

    def __init__(self, data: str) -> None:
        self.data = data


@pytest.mark.parametrize(
    "content",
    [{"data": "x"}, Patch(data="x"), Plainly("x", object()), Slotted("x"), {"data": "x", "labels": None}],
)
def test_content_may_be_of_any_shape(content: Any) -> None:
    with recorded_log() as log:
        kind = "ConfigPatches.omni.sidero.dev"
        store = AuditedStore(ResourceStore(), log.audit, omni.hooks())
        store.create(Resource(kind, "p", {omni.CLUSTER_LABEL: "c"}, content))
        assert data_of(log)[0]["config_patch"] == {
            "labels": {omni.CLUSTER_LABEL: "c"},
            "id": "p",
            "data": "x",
            "cluster_id": "c",
        }


@pytest.mark.parametrize("content", [None, "text", 5, b"x", [1], ("a",), object()])
def test_content_without_fields_leaves_the_id_and_the_labels(content: Any) -> None:
    with recorded_log() as log:
        store = AuditedStore(ResourceStore(), log.audit, omni.hooks())
        store.create(Resource("MachineLabels.omni.sidero.dev", "m", {"a": "b"}, content))
        assert data_of(log)[0]["machine_labels"] == {"labels": {"a": "b"}, "id": "m"}


def test_labels_that_only_the_content_has_are_recorded() -> None:
    with recorded_log() as log:
        store = AuditedStore(ResourceStore(), log.audit, omni.hooks())
        store.create(Resource("MachineLabels.omni.sidero.dev", "m", {}, {"labels": {"a": "b"}}))
        assert data_of(log)[0]["machine_labels"] == {"labels": {"a": "b"}, "id": "m"}


def test_the_cluster_that_the_content_names_is_the_one() -> None:
    with recorded_log() as log:
        store = AuditedStore(ResourceStore(), log.audit, omni.hooks())
        store.create(Resource("MachineSets.omni.sidero.dev", "m", LABELS, {"cluster_id": "other"}))
        store.create(Resource("MachineSets.omni.sidero.dev", "n"))
        assert [data["machine_set"].get("cluster_id") for data in data_of(log)] == ["other", None]


def test_a_diff_hides_what_is_hidden_in_the_payload() -> None:
    with recorded_log(redact=["config_patch.data"]) as log:
        store = AuditedStore(ResourceStore(), log.audit, omni.hooks(diff=True))
        patch = Resource(
            "ConfigPatches.omni.sidero.dev", "p", {}, {"data": "canary: 1", "x": {"token": "canary"}}
        )
        store.create(patch)
        store.update(dataclasses.replace(patch, labels={"a": "b"}, spec={"data": "canary: 2", "x": {}}))
        path = next(Path(log.directory).glob("*.jsonlog"))
        assert b"canary" not in path.read_bytes()
        assert data_of(log)[1]["changes"] == [
            {"path": "config_patch.data", "old": "[redacted]", "new": "[redacted]"},
            {"path": "config_patch.labels.a", "new": "b"},
            {"path": "config_patch.x.token", "old": "[redacted]"},
        ]


def test_more_types_can_be_added_and_one_replaced() -> None:
    hooks = omni.hooks()
    hooks.plain("Links")
    hooks.on("Clusters.omni.sidero.dev")(lambda change: {"mine": change.resource_id})
    with recorded_log() as log:
        store = AuditedStore(ResourceStore(), log.audit, hooks)
        store.create(Resource("Links", "l"))
        store.create(Resource("Clusters.omni.sidero.dev", "c"))
        lines = [orjson.dumps(data) for data in data_of(log)]
    assert b'"mine":"c"' in lines[1]
    assert lines[0] == b'{"session":{"user_agent":"Omni-Internal-Agent"}}'
