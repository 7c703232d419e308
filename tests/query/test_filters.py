from __future__ import annotations

import json
from typing import Any

import pytest

from auditlog import Filter, InvalidSetting

RECORD: dict[str, Any] = {
    "event_type": "update",
    "resource_type": "Clusters.omni.sidero.dev",
    "resource_id": "talos-default",
    "event_data": {
        "cluster": {"id": "talos-default", "labels": {"owner": "Straße"}},
        "own": [{"deep": ["NEEDLE in hay"]}, 42, None, True],
        "session": {"email": "alice@example.com"},
    },
}


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ({}, True),
        ({"event_type": "update"}, True),
        ({"event_type": "create"}, False),
        ({"event_type": "updat"}, False),
        ({"event_type": ["create", "update"]}, True),
        ({"event_type": ("create", "destroy")}, False),
        ({"event_type": []}, False),
        ({"resource_type": "Clusters.omni.sidero.dev"}, True),
        ({"resource_type": "clusters.omni.sidero.dev"}, False),
        ({"resource_id": "talos-default"}, True),
        ({"resource_id": "talos"}, False),
        ({"cluster_id": "talos-default"}, True),
        ({"cluster_id": "other"}, False),
        ({"actor": "alice@example.com"}, True),
        ({"actor": "Alice@example.com"}, False),
        ({"search": "needle IN"}, True),
        ({"search": "STRASSE"}, True),
        ({"search": "deep"}, False),  # a key, no value
        ({"search": "42"}, False),
        ({"search": "default alice"}, False),  # two values
        ({"search": ""}, True),
        ({"event_type": "update", "actor": "alice@example.com", "search": "hay"}, True),
        ({"event_type": "update", "actor": "bob@example.com", "search": "hay"}, False),
    ],
    ids=json.dumps,
)
def test_all_given_conditions_must_hold(conditions: dict[str, Any], holds: bool) -> None:
    assert Filter(**conditions).matches(RECORD) is holds


@pytest.mark.parametrize(
    "data",
    [
        {"cluster": {"id": "c"}},
        {"k8s_access": {"cluster_name": "c"}},
        {"talos_access": {"cluster_name": "c"}},
        {"audit_log_access": {"cluster_id": "c"}},
        {"machine_set": {"cluster_id": "c"}},
        {"machine_set_node": {"cluster_id": "c"}},
        {"config_patch": {"cluster_id": "c"}},
        {"machine_config_diff": {"cluster_id": "c"}},
        {"cluster": {"labels": {}}, "k8s_access": {"cluster_name": "c"}},
        {"config_patch": {"cluster_id": "other"}, "machine_set": {"cluster_id": "c"}},
    ],
    ids=json.dumps,
)
def test_a_cluster_is_found_wherever_the_event_names_it(data: dict[str, Any]) -> None:
    assert Filter(cluster_id="c").matches({"event_data": data})
    assert not Filter(cluster_id="d").matches({"event_data": data})


def test_the_actor_of_omnis_oldest_format_is_found() -> None:
    assert Filter(actor="a@example.com").matches({"event_data": {"email": "a@example.com"}})


def test_an_internal_event_has_an_empty_actor_and_cluster() -> None:
    records: list[dict[str, Any]] = [{}, {"event_data": {}}, {"event_data": {"session": {"user_agent": "x"}}}]
    for record in records:
        assert Filter(actor="", cluster_id="").matches(record)
        assert not Filter(actor="a").matches(record)


@pytest.mark.parametrize(
    "record", [{"event_type": ["x"]}, {"event_data": []}, {"event_data": {"session": 5, "cluster": 5}}]
)
def test_a_record_of_any_shape_is_no_error(record: dict[str, Any]) -> None:
    everything = Filter(event_type=["x"], resource_type="x", cluster_id="x", actor="x", search="x")
    assert not everything.matches(record)
    assert not Filter(cluster_id="x").matches(record)
    assert not Filter(actor="x").matches(record)


@pytest.mark.parametrize(
    "conditions", [{"actor": 5}, {"search": b"x"}, {"event_type": 5}, {"resource_id": ["a"]}]
)
def test_conditions_of_other_types_are_refused(conditions: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        Filter(**conditions)
