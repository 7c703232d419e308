"""Which changes of resources are recorded, and what their events say."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InvalidEvent, InvalidSetting, LoggerClosed
from ..events.model import Event, EventData, EventType
from ..events.payloads import AuditFacts
from ..events.values import canonical
from .changes import changes

if TYPE_CHECKING:
    from ..logger import AuditLogger

log = logging.getLogger("auditlog")

Choice = Literal["record", "skip"]
_OWN_FIELDS = ("audit", "session")
_UPDATES = (EventType.UPDATE, EventType.UPDATE_WITH_CONFLICTS)


class SkipEvent(Exception):
    """Raised by a hook: this change is not to be recorded."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource, as far as the audit log wants to know it.

    `content` is everything else that a user may change (compared with `==`); what the system keeps
    to itself, a version or a time of change, does not belong there.
    """

    resource_type: str
    resource_id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    content: Any = None
    tearing_down: bool = False
    phase: str = ""


def describe(resource: Any) -> Resource:
    """A resource with attributes `type` and `id`, and as it has them `labels`, `spec` and `phase`.

    Where it has no `spec`, the whole resource is its content.
    Its phase is "running" or "tearing down", in whatever spelling (`tearingDown`).
    """
    phase = getattr(resource, "phase", "")
    phase = str(getattr(phase, "name", phase))  # of an Enum
    return Resource(
        resource.type,
        resource.id,
        dict(getattr(resource, "labels", None) or {}),
        getattr(resource, "spec", resource),
        phase.replace(" ", "").replace("_", "").lower().endswith("tearingdown"),
        phase,
    )


@dataclass(frozen=True, slots=True)
class Change:
    """What a hook is told: a resource before and after, None where there was or is none.

    `old` and `new` are the store's own objects, `old` a copy from before the change. `labels` and
    `content` are those of `resource` as Hooks.describe gives them.
    """

    event_type: str
    resource_type: str
    resource_id: str
    old: Any
    new: Any
    labels: Mapping[str, str]
    content: Any

    @property
    def resource(self) -> Any:
        """The resource as it is now, or was before it was destroyed."""
        return self.old if self.new is None else self.new


Hook = Callable[[Change], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Rule:
    """How changes of a resource type are recorded: see Hooks.on."""

    hook: Hook | None = None
    recorded: Choice = "record"
    internal: Choice = "record"
    before: bool = False
    diff: str | None = None

    def records(self, *, internal: bool) -> bool:
        """Is a change recorded, that a session makes or none does (internal)?"""
        return self.recorded == "record" and not (internal and self.internal == "skip")


class Hooks:
    """What is recorded of each resource type.

    others: the resource types that nobody has registered: "record" (default) writes their events
        with id and session only, "skip" none.
    before: the default of `on` and `plain`.
    describe: how to look at a resource of your store (default: `describe`).

    Raises InvalidSetting, as do its methods.
    """

    def __init__(
        self,
        *,
        others: Choice = "record",
        before: bool = False,
        describe: Callable[[Any], Resource] = describe,
    ) -> None:
        if not callable(describe):
            raise InvalidSetting("describe", describe, "must be a function that gives a Resource")
        self.describe = describe
        self._before = before
        self._others = Rule(recorded=_choice("others", others), before=before)
        self._rules: dict[str, Rule] = {}

    def on(
        self,
        *resource_types: str,
        internal: Choice = "record",
        before: bool | None = None,
        diff: str | None = None,
    ) -> Callable[[Hook], Hook]:
        """Register a hook for resource types; of several for one type, the last counts.

            @hooks.on("Clusters.omni.sidero.dev")
            def cluster(change):
                return {"cluster": {"id": change.resource_id, "labels": change.labels}}

        The hook gives the details of the event of a change, as AuditLogger.create takes them. It may
        raise SkipEvent. When it fails otherwise, or gives what cannot be written, that is logged,
        and the event is written without details: the change has been made.

        internal: whether a change is recorded while no session is bound.
        before: whether an `intent` event is on the disk before the change is made.
        diff: add to updates what they changed (`changes`), with paths that begin with this name;
            give the payload's, so that `AuditLogger(redact=...)` finds secrets by the same paths.
        """
        _named(resource_types)  # `@hooks.on` without types would register nothing
        if diff is not None and not isinstance(diff, str):
            raise InvalidSetting("diff", diff, "must be the name that paths begin with, or None")

        def register(hook: Hook) -> Hook:
            if not callable(hook) or inspect.iscoroutinefunction(hook):
                raise InvalidSetting(
                    "hook", hook, "must be a function of a Change, and no coroutine function"
                )
            self._register(resource_types, Rule(hook, "record", internal, self._is_before(before), diff))
            return hook

        return register

    def plain(self, *resource_types: str, internal: Choice = "record", before: bool | None = None) -> None:
        """Record changes of resource types with id and session only. Arguments as in `on`."""
        self._register(resource_types, Rule(None, "record", internal, self._is_before(before)))

    def skip(self, *resource_types: str) -> None:
        """Record no change of resource types."""
        self._register(resource_types, Rule(recorded="skip"))

    def rule(self, resource_type: str) -> Rule:
        """How a resource type is recorded."""
        return self._rules.get(resource_type, self._others)

    def event(
        self, action: str, resource_type: str, resource_id: str, old: Any, new: Any, intent: str = ""
    ) -> Event | Literal["unchanged", "declined"]:
        """The event of a change that was made; where there is none, why.

        old, new: the resource before and after, as the store has it or as a Resource; None where it
            is not known, or there is none.
        intent: the position of the event that announced the change.
        """
        rule = self.rule(resource_type)
        details: dict[str, Any] = {}
        try:
            before, after = map(self._described, (old, new))
            if _is_unchanged(action, before, after):
                return "unchanged"
            if action in _UPDATES and before and after and after.tearing_down and not before.tearing_down:
                action = EventType.TEARDOWN
            if rule.hook is not None:
                known = after or before or Resource(resource_type, resource_id)
                about = (action, resource_type, resource_id)
                details |= rule.hook(Change(*about, old, new, known.labels, known.content))
            if rule.diff is not None and before and after:
                details |= changes(_content(before, rule.diff), _content(after, rule.diff), rule.diff)
            return event_of(action, resource_type, resource_id, details, intent=intent)
        except SkipEvent:
            return "declined"
        except Exception as error:  # of the hook, or a resource's own: the change has been made all the same
            _log_failure(error, resource_type)
            return event_of(action, resource_type, resource_id, intent=intent)

    def _described(self, state: Any) -> Resource | None:
        return state if state is None or isinstance(state, Resource) else self.describe(state)

    def _is_before(self, before: bool | None) -> bool:
        return self._before if before is None else before

    def _register(self, resource_types: tuple[str, ...], rule: Rule) -> None:
        _choice("internal", rule.internal)
        self._rules |= dict.fromkeys(_named(resource_types), rule)


def refuse_closed(audit: AuditLogger) -> None:
    """Raise LoggerClosed before a change, which would be made, and its event refused."""
    if audit.closed:
        raise LoggerClosed(audit.stats().directory)


def without_details(event: Event, error: InvalidEvent) -> Event:
    """What is left of the event of a change that was made, where its hook gave what cannot be written."""
    _log_failure(error, event.resource_type)
    facts = EventData(audit=event.event_data.audit)
    return event.model_copy(update={"event_data": facts})


def intent_of(
    action: str, resource_type: str, resource_id: str, *, outcome: str = "", intent: str = ""
) -> Event:
    """The event that announces a change; or what became of the one that stands at `intent`."""
    return event_of(
        EventType.INTENT, resource_type, resource_id, action=action, outcome=outcome, intent=intent
    )


def _log_failure(error: Exception, resource_type: str) -> None:
    """Log that a hook failed, without what its error says, which may be a value of the resource."""
    where = "".join(traceback.format_tb(error.__traceback__))
    text = "the hook for %s failed (%s), or gave what cannot be written; its event has no details\n%s"
    log.error(text, resource_type, type(error).__name__, where)


def _is_unchanged(action: str, before: Resource | None, after: Resource | None) -> bool:
    if action == EventType.TEARDOWN:
        return before is not None and before.tearing_down
    return action in _UPDATES and before is not None and before == after


def _content(resource: Resource, root: str) -> dict[str, Any]:
    """All that a user may change, as JSON has it."""
    content = canonical(resource.content, root)
    fields = content if isinstance(content, dict) and "labels" not in content else {"spec": content}
    return {**fields, "labels": canonical(dict(resource.labels), f"{root}.labels")}


def event_of(
    event_type: str,
    resource_type: str,
    resource_id: str,
    details: Mapping[str, Any] | None = None,
    **facts: str,
) -> Event:
    """An event about a resource; `facts` are our own about it (docs/format.md, `audit`)."""
    details = details or {}
    for name in _OWN_FIELDS:
        if name in details:
            raise InvalidEvent(f"event_data.{name}", "is not for a hook to give")
    given: dict[str, Any] = {name: fact for name, fact in facts.items() if fact}
    own = {"audit": AuditFacts(**given)} if given else {}
    data = EventData(**{**details, **own})
    return Event(event_type=event_type, resource_type=resource_type, resource_id=resource_id, event_data=data)


def _named(resource_types: tuple[str, ...]) -> tuple[str, ...]:
    if not resource_types or not all(isinstance(each, str) and each for each in resource_types):
        raise InvalidSetting("resource_types", resource_types, "must be names of resource types")
    return resource_types


def _choice(setting: str, value: Choice) -> Choice:
    if value not in ("record", "skip"):
        raise InvalidSetting(setting, value, 'must be "record" or "skip"')
    return value
