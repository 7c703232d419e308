"""Ready hooks for the ten resource types that Omni's audit log documents.

    hooks = omni.hooks()
    store = AuditedStore(store, audit, hooks)

Each fills the payload of its type with the resource's id, its labels, and the fields of the
payload that its content has (items of a dict, attributes of anything else). The cluster of a
machine set, a machine set node and a config patch is the label `omni.sidero.dev/cluster`, where the
content does not name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..events.model import PAYLOADS
from ..events.values import canonical
from .hooks import Change, Choice, Hooks, Resource, describe

CLUSTER_LABEL = "omni.sidero.dev/cluster"

PAYLOAD_OF: Mapping[str, str] = {
    "AccessPolicies.omni.sidero.dev": "access_policy",
    "Clusters.omni.sidero.dev": "cluster",
    "ConfigPatches.omni.sidero.dev": "config_patch",
    "Identities.omni.sidero.dev": "new_user",
    "MachineLabels.omni.sidero.dev": "machine_labels",
    "MachineSetNodes.omni.sidero.dev": "machine_set_node",
    "MachineSets.omni.sidero.dev": "machine_set",
    "Machines.omni.sidero.dev": "machine",
    "PublicKeys.omni.sidero.dev": "",
    "Users.omni.sidero.dev": "new_user",
}
"""The payload of each resource type; of a public key nothing but its owner is recorded, the session."""


def hooks(
    *,
    others: Choice = "skip",
    internal: Choice = "record",
    before: bool = False,
    diff: bool = False,
    describe: Callable[[Any], Resource] = describe,
) -> Hooks:
    """Hooks for the documented resource types, to which more can be added.

    others: whether types that are not registered are recorded (default "skip", as in Omni).
    internal, before: as in Hooks.on, for all of them.
    diff: whether updates tell what they changed.
    describe: as in Hooks.

    Raises InvalidSetting.
    """
    found = Hooks(others=others, before=before, describe=describe)
    for resource_type, payload in PAYLOAD_OF.items():
        if payload:
            root = payload if diff else None
            found.on(resource_type, internal=internal, diff=root)(partial(_details, payload))
        else:
            found.plain(resource_type, internal=internal)
    return found


def _details(payload: str, change: Change) -> Mapping[str, Any]:
    fields, content = PAYLOADS[payload].model_fields, change.content
    if not isinstance(content, Mapping):
        content = {name: getattr(content, name, None) for name in fields}
    given = {name: content[name] for name in fields if content.get(name) is not None}
    details = {name: canonical(value, f"{payload}.{name}") for name, value in given.items()}
    details["id"] = change.resource_id
    if "labels" in fields and change.labels:
        details["labels"] = dict(change.labels)
    if "cluster_id" in fields and not details.get("cluster_id"):
        details["cluster_id"] = change.labels.get(CLUSTER_LABEL, "")
    return {payload: details}
