"""A store whose changes are recorded: a wrapper around the one that a control plane has."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections.abc import Callable, Collection, Generator
from contextlib import suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..errors import AuditLogError, InvalidEvent, InvalidSetting
from ..events.model import Event, EventType
from .hooks import Hooks, Resource, intent_of, refuse_closed, without_details
from .session import Bound, binding, bound

if TYPE_CHECKING:
    from ..logger import AuditLogger

R = TypeVar("R")

_Ref = tuple[str, str]  # a resource's type and id
_Step = Callable[[], Any]
_Steps = Generator[_Step, Any, Any]
_Write = Callable[[Event], Any]

_METHODS = ("get", "create", "update", "update_with_conflicts", "teardown", "destroy")

log = logging.getLogger("auditlog")


class Store(Protocol[R]):
    """What AuditedStore wraps. The methods of an async store are coroutine functions.

    A method that is given a resource may return it as it was stored; what else the methods return
    is theirs. They raise whatever they do where the change was not made. They may take
    further arguments, which are passed on.
    """

    def get(self, resource_type: str, resource_id: str, /) -> Any:
        """A resource as it is now: a copy, which shares nothing that somebody could alter in place.

        A change to what it shares with the store goes unseen.
        """

    def create(self, resource: R, /) -> Any:
        """Create a resource. Where its id is "" before, the store may give it one."""

    def update(self, resource: R, /) -> Any:
        """Put a resource in the place of the one with its type and id."""

    def update_with_conflicts(
        self, resource_type: str, resource_id: str, change: Callable[[R], R | None], /
    ) -> Any:
        """Change a resource as `change` says, again where somebody else was faster.

        `change` alters what it is given, or returns another.
        """

    def teardown(self, resource_type: str, resource_id: str, /) -> Any:
        """Announce that a resource will be destroyed."""

    def destroy(self, resource_type: str, resource_id: str, /) -> Any:
        """Destroy a resource."""


class AuditedStore(Generic[R]):
    """A store that records each change that it makes, as the hooks say.

    store: has the methods of Store. `unaudited` gives it back: what goes there is not recorded.
    audit: where the events go. While it is disabled, the store is called and nothing else is done.
    hooks: which resource types are recorded, and how.
    reads: names of further methods that only read, to be called through this one.

    A change that fails, or changes nothing, is not recorded. A change that was made and cannot be
    recorded raises what AuditLogger.write raises, after the fact; where that must not be, register
    its type with `before=True`: an `intent` event is then brought to the disk before the change, and
    if that fails the change is not made, whatever `on_failure` says. (With `fsync="never"` it is the
    kernel that has it.) What comes after it names its position (`audit.intent`): the event of the
    change, or an `intent` with the outcome "failed", "unchanged", "declined" (by a hook), or
    "unknown" (a task was cancelled, a thread interrupted).

    Raises InvalidSetting. A resource whose type or id is no string raises InvalidEvent, and is not
    changed.
    """

    _awaits = False

    def __init__(
        self, store: Store[R], audit: AuditLogger, hooks: Hooks, *, reads: Collection[str] = ("list",)
    ) -> None:
        methods = {name: getattr(store, name, None) for name in _METHODS}
        missing = [name for name, method in methods.items() if not callable(method)]
        if missing:
            raise InvalidSetting("store", store, f"lacks {', '.join(missing)}")
        if not self._awaits and any(map(inspect.iscoroutinefunction, methods.values())):
            raise InvalidSetting("store", store, "has coroutine functions; use AsyncAuditedStore")
        if not isinstance(hooks, Hooks):
            raise InvalidSetting("hooks", hooks, "must be Hooks, such as omni.hooks()")
        if isinstance(reads, str):
            raise InvalidSetting("reads", reads, "must be a collection of names")
        self.unaudited = store
        self.audit = audit
        self.hooks = hooks
        self._reads = frozenset({"get", *reads})

    def create(self, resource: R, *args: Any, **kwargs: Any) -> Any:
        """Store.create, recorded as `create`."""
        return self._run(self._change(EventType.CREATE, (resource, *args), kwargs))

    def update(self, resource: R, *args: Any, **kwargs: Any) -> Any:
        """Store.update, recorded as `update`, or as `teardown` where it begins one."""
        return self._run(self._change(EventType.UPDATE, (resource, *args), kwargs))

    def update_with_conflicts(
        self,
        resource_type: str,
        resource_id: str,
        change: Callable[[R], R | None],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Store.update_with_conflicts, recorded as such, or as `teardown` where it begins one."""
        given = (resource_type, resource_id, change, *args)
        return self._run(self._change(EventType.UPDATE_WITH_CONFLICTS, given, kwargs))

    def teardown(self, resource_type: str, resource_id: str, *args: Any, **kwargs: Any) -> Any:
        """Store.teardown, recorded as `teardown`, unless that had begun."""
        return self._run(self._change(EventType.TEARDOWN, (resource_type, resource_id, *args), kwargs))

    def destroy(self, resource_type: str, resource_id: str, *args: Any, **kwargs: Any) -> Any:
        """Store.destroy, recorded as `destroy`."""
        return self._run(self._change(EventType.DESTROY, (resource_type, resource_id, *args), kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._reads:
            reason = f"{type(self).__name__} does not record {name!r}; name it in `reads` if it only reads"
            raise AttributeError(f"{reason}, or call it on `unaudited`")
        return getattr(self.unaudited, name)

    def _change(self, action: EventType, given: tuple[Any, ...], kwargs: dict[str, Any]) -> _Steps:
        """A change, for stores of both kinds: yields each call that may have to be awaited."""
        method = getattr(self.unaudited, action)
        if not self.audit.enabled:
            return (yield partial(method, *given, **kwargs))
        refuse_closed(self.audit)
        puts = action in (EventType.CREATE, EventType.UPDATE)
        ref = _ref_of(self.hooks.describe(given[0])) if puts else _ref_of(Resource(*given[:2]))
        rule = self.hooks.rule(ref[0])
        here = bound() if rule.recorded == "record" else None
        if not rule.records(internal=here is None):
            return (yield partial(method, *given, **kwargs))
        write = partial(self._write_as, here)
        conflicts = action == EventType.UPDATE_WITH_CONFLICTS
        seen = _Seen(given[0] if puts else None, ran=not conflicts)
        if conflicts:
            given = (*ref, seen.watched(given[2]), *given[3:])
        elif action != EventType.CREATE:
            seen.old = yield from self._get(ref, seen.new)
        announced: list[str] = []
        called = False
        try:
            if rule.before:
                yield partial(self._announce, here, intent_of(action, *ref), announced)
                yield self._flush
            called = True
            result = yield partial(method, *given, **kwargs)
        except BaseException as error:
            if announced and not isinstance(error, GeneratorExit):  # in which nothing can be awaited
                outcome = "unknown" if called and not isinstance(error, Exception) else "failed"
                yield from self._tell(write, action, ref, outcome, announced[0])
            raise
        intent = announced[0] if announced else ""
        ref = self._stored(ref, seen, result)
        event = self.hooks.event(action, *ref, seen.old, seen.new, intent) if seen.ran else "unchanged"
        if isinstance(event, Event):
            try:
                yield partial(write, event)
            except InvalidEvent as error:
                yield partial(write, without_details(event, error))
        elif intent:
            yield partial(write, intent_of(action, *ref, outcome=event, intent=intent))
        return result

    def _get(self, ref: _Ref, new: R | None) -> _Steps:
        try:
            old = yield partial(self.unaudited.get, *ref)
        except Exception as error:  # the change will say whether it is possible
            log.debug("%s %s cannot be read before its change: %s", *ref, type(error).__name__)
            return None
        # The caller has altered the store's own object: what it was before, nobody knows.
        return None if old is new else _copy_of(old)

    def _tell(self, write: _Write, action: EventType, ref: _Ref, outcome: str, intent: str) -> _Steps:
        try:
            yield partial(write, intent_of(action, *ref, outcome=outcome, intent=intent))
        except AuditLogError as error:  # the store's own error is what the caller must hear of
            log.error("the outcome %r of the intent at %s is not recorded: %s", outcome, intent, error)

    def _stored(self, ref: _Ref, seen: _Seen, result: Any) -> _Ref:
        """Find the resource as it was stored, and its id, which the store may have given it."""
        new = seen.new
        for resource in (result, new):
            if new is not None and isinstance(resource, type(new)):
                with suppress(Exception):  # what else the store gives is its own business
                    resource_type, resource_id = _ref_of(self.hooks.describe(resource))
                    if resource_type == ref[0] and ref[1] in ("", resource_id):
                        seen.new = resource
                        return resource_type, resource_id
        return ref

    def _run(self, steps: _Steps) -> Any:
        try:
            step = next(steps)
            while True:
                try:
                    result = step()
                    if inspect.isawaitable(result):
                        _forget(result)
                        raise InvalidSetting(
                            "store", self.unaudited, "is asynchronous; use AsyncAuditedStore"
                        )
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as done:
            return done.value

    def _write_as(self, who: Bound | None, event: Event, may_drop: bool = True) -> Any:
        with binding(who):
            return self.audit.write(event, may_drop=may_drop)

    def _announce(self, who: Bound | None, event: Event, announced: list[str]) -> Any:
        """Write an intent, and say where it is, whatever happens then."""
        announced.append(str(self._write_as(who, event, may_drop=False)))

    def _flush(self) -> Any:
        self.audit.flush()


class AsyncAuditedStore(AuditedStore[R]):
    """AuditedStore for a store whose methods are coroutine functions; its own give coroutines, too."""

    _awaits = True

    async def _run(self, steps: _Steps) -> Any:
        try:
            step = next(steps)
            while True:
                try:
                    result = step()
                    if inspect.isawaitable(result):
                        result = await result
                except BaseException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as done:
            return done.value

    async def _write_as(self, who: Bound | None, event: Event, may_drop: bool = True) -> Any:
        with binding(who):
            return await self.audit.awrite(event, may_drop=may_drop)

    async def _announce(self, who: Bound | None, event: Event, announced: list[str]) -> Any:
        writing = asyncio.ensure_future(self._write_as(who, event, may_drop=False))
        cancelled: asyncio.CancelledError | None = None
        while not writing.done():
            try:
                await asyncio.wait([writing])
            except asyncio.CancelledError as error:  # perhaps again and again: where it is, must be known
                cancelled = error
        announced.append(str(writing.result()))
        if cancelled is not None:
            raise cancelled

    async def _flush(self) -> Any:
        await asyncio.to_thread(self.audit.flush)


class _Seen:
    """A resource before and after its change; None where that is not known, or there is none."""

    def __init__(self, new: Any, *, ran: bool) -> None:
        self.old: Any = None
        self.new = new
        self.ran = ran  # else nothing was changed

    def watched(self, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`change`, of which the last run is seen."""

        def done(current: Any, result: Any) -> Any:
            self.new = current if result is None else result
            return result

        async def awaited(current: Any, result: Any) -> Any:
            return done(current, await result)

        @wraps(change)
        def watch(current: Any) -> Any:
            self.old, self.ran = _copy_of(current), True
            result = change(current)
            return awaited(current, result) if inspect.isawaitable(result) else done(current, result)

        @wraps(change)
        async def watch_async(current: Any) -> Any:
            return await watch(current)

        return watch_async if inspect.iscoroutinefunction(change) else watch


def _forget(awaitable: Any) -> None:
    with suppress(AttributeError):
        awaitable.close()  # else Python warns that nobody awaited it


def _copy_of(resource: Any) -> Any:
    try:
        return copy.deepcopy(resource)
    except Exception as error:
        reason = type(error).__name__
        log.warning("a resource cannot be copied, so what it was before its change is unknown: %s", reason)
        return None


def _ref_of(resource: Resource) -> _Ref:
    ref = resource.resource_type, resource.resource_id
    for name, value in zip(("resource_type", "resource_id"), ref, strict=True):
        if not isinstance(value, str):
            raise InvalidEvent(name, f"must be a string, not {type(value).__name__}")
    return ref
