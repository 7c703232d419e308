"""What is recorded of a change, and what its event says."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from auditlog import Event, InvalidEvent, InvalidSetting
from auditlog.capture import omni
from auditlog.capture.hooks import Change, Hooks, Resource, SkipEvent, describe, event_of


@dataclass
class Thing:
    """A resource whose user may change its labels, its spec and its phase."""

    labels: dict[str, str] = field(default_factory=dict)
    spec: Any = None
    phase: str = "running"
    type: str = "Things"
    id: str = "1"


def told(hooks: Hooks, action: str, old: Any, new: Any, **given: str) -> dict[str, Any]:
    """The event of a change, which there must be, without what is not set."""
    event = hooks.event(action, "Things", "1", old, new, **given)
    assert isinstance(event, Event), event
    return event.model_dump(exclude_defaults=True)


def echo(hooks: Hooks, **options: Any) -> list[Change]:
    """Register a hook that notes what it is told."""
    changes: list[Change] = []

    @hooks.on("Things", **options)
    def hook(change: Change) -> dict[str, Any]:
        changes.append(change)
        return {"thing": {"labels": change.labels, "content": change.content}}

    return changes


@pytest.mark.parametrize("others", ["record", "skip"])
@pytest.mark.parametrize("internal", [True, False])
def test_a_type_without_a_hook_is_recorded_with_its_id_alone_or_not_at_all(
    others: Any, internal: bool
) -> None:
    hooks = Hooks(others=others)
    assert hooks.rule("Things").records(internal=internal) == (others == "record")
    assert told(hooks, "create", None, Thing({"a": "b"}, 5)) == {
        "event_type": "create",
        "resource_type": "Things",
        "resource_id": "1",
    }


def test_each_type_has_its_own_rule_and_the_last_one_counts() -> None:
    hooks = Hooks(others="skip", before=True)
    hooks.plain("A", "B", internal="skip")
    hooks.plain("C", before=False)
    hooks.skip("B")
    assert hooks.rule("A").records(internal=False)
    assert not hooks.rule("A").records(internal=True)
    assert not hooks.rule("B").records(internal=False)
    assert [hooks.rule(name).before for name in "ACX"] == [True, False, True]
    hooks.plain("B")
    assert hooks.rule("B").records(internal=True)


def test_a_hook_may_serve_several_types_and_stays_what_it_was() -> None:
    hooks = Hooks()

    @hooks.on("A")
    @hooks.on("B", internal="skip")
    def hook(change: Change) -> dict[str, Any]:
        return {"type": change.resource_type}

    assert hook(Change("create", "X", "", None, None, {}, None)) == {"type": "X"}
    assert hooks.rule("A").hook is hooks.rule("B").hook is hook


def test_a_hook_is_told_both_sides_of_a_change() -> None:
    hooks = Hooks()
    changes = echo(hooks)
    old, new = Thing({"a": "1"}, {"x": 1}), Thing({"a": "2"}, {"x": 2})
    assert told(hooks, "create", None, new)["event_data"] == {
        "thing": {"labels": {"a": "2"}, "content": {"x": 2}}
    }
    assert told(hooks, "update", old, new)["event_data"] == {
        "thing": {"labels": {"a": "2"}, "content": {"x": 2}}
    }
    assert told(hooks, "destroy", old, None)["event_data"] == {
        "thing": {"labels": {"a": "1"}, "content": {"x": 1}}
    }
    assert [(change.event_type, change.old, change.new) for change in changes] == [
        ("create", None, new),
        ("update", old, new),
        ("destroy", old, None),
    ]
    assert [change.resource for change in changes] == [new, new, old]


def test_a_destroy_of_what_nobody_knows_still_has_an_event() -> None:
    hooks = Hooks()
    echo(hooks)
    assert told(hooks, "destroy", None, None)["event_data"] == {"thing": {"labels": {}, "content": None}}


class Phase(Enum):
    RUNNING = 0
    TEARING_DOWN = 1


@pytest.mark.parametrize("phase", ["tearing down", "tearingDown", "TEARING_DOWN", Phase.TEARING_DOWN])
@pytest.mark.parametrize("action", ["update", "update_with_conflicts"])
def test_an_update_that_begins_a_teardown_is_one(phase: Any, action: str) -> None:
    hooks = Hooks()
    changes = echo(hooks)
    running, tearing_down = Thing(phase="running"), Thing(phase=phase)
    assert told(hooks, action, running, tearing_down)["event_type"] == "teardown"
    assert changes[0].event_type == "teardown"
    assert hooks.event(action, "Things", "1", tearing_down, tearing_down) == "unchanged"
    assert told(hooks, action, tearing_down, replace(tearing_down, labels={"a": "b"}))["event_type"] == action
    assert told(hooks, action, tearing_down, running)["event_type"] == action
    assert hooks.event("teardown", "Things", "1", tearing_down, None) == "unchanged"
    assert told(hooks, "teardown", running, None)["event_type"] == "teardown"
    assert told(hooks, "teardown", None, None)["event_type"] == "teardown"


@pytest.mark.parametrize("action", ["update", "update_with_conflicts"])
def test_only_what_changes_something_has_an_event(action: str) -> None:
    hooks = Hooks()
    changes = echo(hooks)
    assert hooks.event(
        action, "Things", "1", Thing({"a": "1"}, {"x": [1]}), Thing({"a": "1"}, {"x": [1]})
    ) == ("unchanged")
    assert changes == []
    told(hooks, action, Thing({"a": "1"}), Thing({"a": "2"}))  # a label alone
    told(hooks, action, Thing({}, {"x": [1]}), Thing({}, {"x": [2]}))
    told(hooks, action, None, Thing())  # nobody knows
    told(hooks, "create", None, Thing())
    assert len(changes) == 4


def test_a_hook_can_decline() -> None:
    hooks = Hooks()

    @hooks.on("Things")
    def hook(change: Change) -> dict[str, Any]:
        raise SkipEvent

    assert hooks.event("create", "Things", "1", None, Thing()) == "declined"


@dataclass
class Flat:
    """A resource without a spec of its own."""

    type: str
    id: str
    version: str


class Unequal:
    """A resource that is equal to nothing but itself."""

    __slots__ = ("id", "labels", "type")

    def __init__(self) -> None:
        self.type, self.id, self.labels = "Things", "1", None


def test_a_resource_without_a_spec_is_compared_as_a_whole() -> None:
    hooks = Hooks()
    assert (
        hooks.event("update", "Things", "1", Flat("Things", "1", "a"), Flat("Things", "1", "a"))
        == "unchanged"
    )
    told(hooks, "update", Flat("Things", "1", "a"), Flat("Things", "1", "b"))
    told(hooks, "update", Unequal(), Unequal())  # rather one event too many
    assert describe(Unequal()).labels == {}


def test_the_diff_of_a_resource_without_a_spec_names_its_fields() -> None:
    hooks = Hooks()
    hooks.on("Things", diff="thing")(lambda _: {})
    data = told(hooks, "update", Flat("Things", "1", "a"), Flat("Things", "1", "b"))["event_data"]
    assert data == {"changes": [{"path": "thing.version", "old": "a", "new": "b"}]}


def test_stores_may_have_resources_of_any_shape() -> None:
    hooks = Hooks(
        describe=lambda it: Resource(it["kind"], it["name"], content={"size": it["size"]}),
    )
    changes = echo(hooks, diff="thing")
    old = {"kind": "Things", "name": "1", "size": 1, "version": 1}
    assert hooks.event("update", "Things", "1", old, old | {"version": 2}) == "unchanged"
    data = told(hooks, "update", old, old | {"version": 2, "size": 2})["event_data"]
    assert data["changes"] == [{"path": "thing.size", "old": 1, "new": 2}]
    assert changes[0].new["version"] == 2


class Model(BaseModel):
    size: int


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"x": 1}, {"x": 2}, {"path": "t.x", "old": 1, "new": 2}),
        (Model(size=1), Model(size=2), {"path": "t.size", "old": 1, "new": 2}),
        ("a", "b", {"path": "t.spec", "old": "a", "new": "b"}),
        ([1], None, {"path": "t.spec", "old": [1], "new": None}),
        ({"x": (1,)}, {"x": (2,)}, {"path": "t.x[0]", "old": 1, "new": 2}),
        ({"x": "\udc80"}, {"x": ""}, {"path": "t.x", "old": "\ufffd", "new": ""}),
    ],
)
def test_a_diff_tells_what_an_update_changed(old: Any, new: Any, expected: Any) -> None:
    hooks = Hooks()
    hooks.on("Things", diff="t")(lambda _: {"own": 1})
    assert told(hooks, "update", Thing(spec=old), Thing(spec=new))["event_data"] == {
        "own": 1,
        "changes": [expected],
    }
    for action, before, after in (
        ("create", None, Thing(spec=new)),
        ("destroy", Thing(spec=old), None),
        ("update", None, Thing(spec=new)),
    ):
        assert told(hooks, action, before, after)["event_data"] == {"own": 1}


def test_a_diff_tells_of_labels_too() -> None:
    hooks = Hooks()
    hooks.on("Things", diff="t")(lambda _: {})
    data = told(hooks, "update", Thing({"a.b/c": "1"}), Thing({"d": "\udc80"}))["event_data"]
    assert data["changes"] == [
        {"path": 't.labels["a.b/c"]', "old": "1"},
        {"path": "t.labels.d", "new": "\ufffd"},
    ]


def failing(_change: Change) -> Any:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "hook",
    [
        failing,
        lambda _: None,
        lambda _: 5,
        lambda _: {1: 2},
        lambda _: {"cluster": {"id": 5}},
        lambda _: {"audit": {"action": "x"}},
        lambda _: {"session": {"email": "mallory@example.com"}},
        lambda change: {"x": change.resource.nothing},
    ],
)
def test_a_hook_that_fails_is_logged_and_costs_no_more_than_the_details(
    hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks()
    hooks.on("Things")(hook)
    event = told(hooks, "update", Thing({"a": "1"}), Thing({"a": "2"}), intent="2024-08-12:0")
    assert event["event_type"] == "update"
    assert event["event_data"] == {"audit": {"intent": "2024-08-12:0"}}
    assert "the hook for Things failed" in caplog.text


def test_a_hook_that_fails_leaves_a_teardown_a_teardown() -> None:
    hooks = Hooks()
    hooks.on("Things")(failing)
    assert told(hooks, "update", Thing(), Thing(phase="tearing down"))["event_type"] == "teardown"


def test_content_that_cannot_be_compared_or_written_costs_no_more_than_the_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

    hooks = Hooks()
    hooks.on("Things", diff="t")(lambda _: {})
    assert "event_data" not in told(hooks, "update", Thing(spec=Broken()), Thing(spec=Broken()))
    assert "event_data" not in told(hooks, "update", Thing(spec={"x": {1}}), Thing(spec={"x": {2}}))
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR]


def test_what_a_hook_gives_is_not_kept() -> None:
    hooks = Hooks()
    shared = {"thing": {"n": 1}}
    hooks.on("Things", diff="t")(lambda _: shared)
    told(hooks, "update", Thing(spec=1), Thing(spec=2), intent="2024-08-12:0")
    assert shared == {"thing": {"n": 1}}
    assert told(hooks, "create", None, Thing())["event_data"] == shared


async def coroutine(_change: Change) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("call", "setting"),
    [
        (lambda: Hooks(others="none"), "others"),  # type: ignore[arg-type]
        (lambda: Hooks(describe=None), "describe"),  # type: ignore[arg-type]
        (lambda: Hooks().on(), "resource_types"),
        (lambda: Hooks().on(failing), "resource_types"),  # type: ignore[arg-type]
        (lambda: Hooks().on(""), "resource_types"),
        (lambda: Hooks().on("A", internal="no")(failing), "internal"),  # type: ignore[arg-type]
        (lambda: Hooks().on("A", diff=True), "diff"),  # type: ignore[arg-type]
        (lambda: Hooks().on("A")(None), "hook"),  # type: ignore[arg-type]
        (lambda: Hooks().on("A")(coroutine), "hook"),  # type: ignore[arg-type]
        (lambda: Hooks().plain(), "resource_types"),
        (lambda: Hooks().plain("A", internal="no"), "internal"),  # type: ignore[arg-type]
        (lambda: Hooks().skip(["A"]), "resource_types"),  # type: ignore[arg-type]
        (lambda: omni.hooks(others="x"), "others"),  # type: ignore[arg-type]
        (lambda: omni.hooks(internal="x"), "internal"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(call: Any, setting: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        call()
    assert caught.value.setting == setting


def test_our_own_facts_are_not_for_a_hook_to_give() -> None:
    with pytest.raises(InvalidEvent, match=r"event_data\.audit: is not for a hook"):
        event_of("create", "A", "1", {"audit": {}}, intent="x")
    assert event_of("create", "A", "1", intent="").event_data.audit is None


def test_a_resource_is_known_by_what_it_has() -> None:
    bare = SimpleNamespace(type="A", id="1")
    assert describe(bare) == Resource("A", "1", {}, bare, False)
    full = SimpleNamespace(type="A", id="1", labels={"a": "b"}, spec=None, phase="Running", version=3)
    assert describe(full) == Resource("A", "1", {"a": "b"}, None, False, "Running")


def test_labels_of_a_resource_are_not_hidden_by_labels_in_its_content() -> None:
    hooks = Hooks()
    hooks.on("Things", diff="row")(lambda _: {})
    old, new = (
        Resource("Things", "1", {"owner": owner}, {"labels": {"x": 1}}) for owner in ("alice", "mallory")
    )
    assert told(hooks, "update", old, new)["event_data"]["changes"] == [
        {"path": "row.labels.owner", "old": "alice", "new": "mallory"}
    ]
