"""Changes that SQLAlchemy's ORM makes to rows, as events.

What a flush or a bulk statement does is noted at once, with the session that is bound there, under
the innermost savepoint, which hands its notes to the one around it when it is released. The events
are written when the transaction has been committed and its connections are given back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.event import listen
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from ..errors import AuditLogError, InvalidEvent, InvalidSetting
from ..events.model import Event, EventType
from .hooks import Hooks, Resource, event_of, intent_of, refuse_closed, without_details
from .session import Bound, Pending, acting, binding
from .sqlalchemy_rows import Rows, Table, id_of, joined, read_rows, table_of

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, ORMExecuteState, SessionTransaction

    from ..logger import AuditLogger

_ACTIONS = (EventType.DESTROY, EventType.CREATE, EventType.UPDATE)  # as a flush has them in its events
_LONGEST_STATEMENT = 2000  # characters

_ALL = Hooks()
log = logging.getLogger("auditlog")


def record_changes(target: Any, audit: AuditLogger, hooks: Hooks = _ALL, *, most_rows: int = 1000) -> None:
    """Record what sessions create, update and destroy, when their transactions have been committed.

    target: whose sessions: a Session, a sessionmaker, a scoped_session or a class of sessions, or
        their like of sqlalchemy.ext.asyncio. An async_sessionmaker is given a sync session class of
        its own, for the sessions that it makes from now on.
    audit: where the events go. While it is disabled, nothing is done.
    hooks: which resource types are recorded, and how (default: all, with id and session only). A
        row's resource type is the `__audit_type__` of its class, else the name of its table; its id
        is the primary key, several columns joined by commas. `old` and `new` of a Change are of the
        class Resource, with a dict of column values by attribute, as far as they are loaded.
    most_rows: up to how many rows an `insert`, `update` or `delete` of a mapped class has an event
        for each (default 1000). One of more rows has a single event, with its text and their count.

    The events are those of the session that is bound at the flush or statement, which fails where
    that cannot be found, or an `intent` (`before=True`) not be brought to the disk. What
    AuditLogger.write_many raises comes out of the commit: the change has been made.

    Raises InvalidSetting.
    """
    if not isinstance(hooks, Hooks):
        raise InvalidSetting("hooks", hooks, "must be a Hooks")
    if type(most_rows) is not int or most_rows < 0:
        raise InvalidSetting("most_rows", most_rows, "must be a number of rows")
    listened_to = _sessions_of(target, make=audit.enabled)
    if audit.enabled:
        recorder = _Recorder(audit, hooks, most_rows)
        for name in (name for name in vars(_Recorder) if not name.startswith("_")):
            listen(listened_to, name, getattr(recorder, name))


def _sessions_of(target: Any, *, make: bool) -> Any:
    """What SQLAlchemy lets us listen to."""
    found = getattr(target, "session_factory", target)  # of a scoped session
    found = getattr(found, "sync_session", found)
    if isinstance(found, type) and issubclass(found, AsyncSession):
        found = found.sync_session_class
    elif isinstance(found, async_sessionmaker):
        maker, found = found, found.kw.get("sync_session_class") or found.class_.sync_session_class
        if isinstance(found, type) and make:  # else the sessions of all makers are recorded
            found = type(found.__name__, (found,), {})
            maker.configure(sync_session_class=found)
    if isinstance(found, Session | sessionmaker) or (isinstance(found, type) and issubclass(found, Session)):
        return found
    raise InvalidSetting("target", target, "must be a session, a maker of sessions or a class of them")


@dataclass(slots=True)
class _Change:
    """What happened to a row; or by a statement, whose rows are not known."""

    action: str
    resource_type: str
    resource_id: str = ""
    old: Resource | None = None
    new: Resource | None = None
    statement: str = ""
    count: int = 0  # of rows, 0 where it is not known
    who: Bound | Pending | None = None
    intent: str = ""

    def intent_event(self, outcome: str = "") -> Event:
        """The intent; or what became of it, where it is not this change."""
        ref = (self.resource_type, self.resource_id)
        return intent_of(self.action, *ref, outcome=outcome, intent=self.intent)


@dataclass(slots=True)
class _Pending:
    """What a session has done and not committed yet."""

    changes: dict[SessionTransaction, list[_Change]] = field(default_factory=dict)
    outcome: str = "failed"  # or "unknown", or "committed"
    # Of rows that are being flushed: what they were, and which columns change.
    before: dict[InstanceState[Any], tuple[dict[str, Any], set[str]]] = field(default_factory=dict)


_Done = tuple[Any, list[_Change]]


class _Recorder:
    """The listeners of one `record_changes`; their names are those of SQLAlchemy's events."""

    def __init__(self, audit: AuditLogger, hooks: Hooks, most_rows: int) -> None:
        self._audit, self._hooks, self._too_many = audit, hooks, most_rows + 1  # rows

    def before_flush(self, session: Session, context: Any, instances: Any) -> None:
        """Remember what a flush forgets: SQL expressions, versions, times of change."""
        refuse_closed(self._audit)
        dirty = [(row, table_of(row.mapper)) for row in map(inspect, session.dirty)]
        before = {row: table.before(row, flushed=False) for row, table in dirty if self._may_record(table)}
        if before or self in session.info:
            self._pending(session).before = before

    def after_flush(self, session: Session, context: Any) -> None:
        """Note what a flush did, while the histories of its rows are still there."""
        rows = []
        for state, (is_destroyed, is_only_listed) in context.states.items():
            # Only listed is also what was destroyed to be replaced by a new row with its key.
            if (is_destroyed or not is_only_listed) and self._may_record(table_of(state.mapper)):
                rank = 0 if is_destroyed else 1 if state.key is None else 2
                rows.append((rank, state.insert_order or 0, id_of(state), state))
        before = self._pending(session).before if rows else {}
        changes = []
        for rank, _, row_id, state in sorted(rows, key=lambda row: row[:3]):
            table = table_of(state.mapper)
            was, changed = table.before(state, flushed=rank > 0)
            old, changed_before = before.get(state, (was, set()))
            changed |= changed_before
            moved = table.moved(state) if rank > 0 else {}
            if rank == 2 and not changed and not moved:
                continue
            if rank == 2:
                if self._is_told(table):
                    table.load(state, changed)
                moved |= dict.fromkeys(changed - state.dict.keys(), "[not loaded]")
                # What became known or unknown meanwhile is no change.
                old = {n: was[n] for n in was.keys() - changed} | old
                old = {n: old[n] for n in old.keys() & state.dict.keys()}
            change = _Change(_ACTIONS[rank], table.resource_type, row_id)
            change.old = None if rank == 1 else table.resource(row_id, old)
            change.new = None if rank == 0 else table.resource(row_id, state.dict, **moved)
            changes.append(change)
        if changes:
            self._note(session, acting(), changes)

    def do_orm_execute(self, state: ORMExecuteState) -> Any:
        """Note what an `insert`, `update` or `delete` of a mapped class does."""
        statement: Any = state.statement
        if not state.is_orm_statement or not statement.is_dml:
            return None
        statement = statement.element if state.is_from_statement else statement
        known = statement.table._annotations.get("parententity")  # None of a table, which is Core's
        tables = [] if known is None else [table_of(each) for each in known.mapper.self_and_descendants]
        if not any(map(self._may_record, tables)):
            return None
        refuse_closed(self._audit)
        who = acting()  # now: where it cannot be found, nothing is to be done
        step = self._insert if statement.is_insert else self._change
        result, changes = step(state, statement, known.entity, tables[0])
        try:
            self._note(state.session, who, changes)
        except BaseException:  # as after a flush that fails
            state.session.rollback()
            raise
        return result

    def _insert(self, state: ORMExecuteState, statement: Any, entity: Any, table: Table) -> _Done:
        result: Any = state.invoke_statement()
        given: Any = state.parameters or ()
        rows = [given] if isinstance(given, Mapping) else list(given)
        made = () if statement._returning else getattr(result, "inserted_primary_key_rows", ())
        if made and not rows and not statement._multi_values and statement.select is None:
            values = result.last_inserted_params()
            rows = [{name: values[c.key] for name, c in table.columns.items() if c.key in values}]
        may_change = statement._post_values_clause is not None or bool(statement._prefixes)
        if may_change or not rows or len(rows) >= self._too_many:
            text = str(statement._annotate({"dml_strategy": "raw"}))  # as it would be in Core
            count = 0 if may_change else len(rows) or max(getattr(result, "rowcount", 0), 0)
            action = "upsert" if may_change else EventType.CREATE
            return result, [_Change(action, table.resource_type, statement=text, count=count)]
        if len(made) != len(rows) or not table.is_whole:  # those of some, or of one table
            made = [[row.get(name) for name in table.key_names] for row in rows]
        new = [table.resource(joined(key), row) for key, row in zip(made, rows, strict=True)]
        return result, [_Change(EventType.CREATE, row.resource_type, row.resource_id, new=row) for row in new]

    def _change(self, state: ORMExecuteState, statement: Any, entity: Any, table: Table) -> _Done:
        given: Any = state.parameters
        if state.session.autoflush and state.execution_options.get("autoflush", True):
            state.session.flush()
        db = state.session.connection(bind_arguments=dict(state.bind_arguments))
        where = [] if statement.whereclause is None else [statement.whereclause]
        if is_keyed := bool(given) and isinstance(given, list):  # an update by primary keys
            where = table.having([[row.get(name) for name in table.key_names] for row in given], entity)
        is_known = not is_keyed or len(given) < self._too_many
        before: Rows = {}
        if is_known:
            before, count = read_rows(db, entity, where, None if is_keyed else given, self._too_many)
            is_known = count < self._too_many and not table.sets_key(statement)
        result: Any = state.invoke_statement()
        after = read_rows(db, entity, table.having(before, entity))[0] if before and is_known else {}
        action = EventType.DESTROY if statement.is_delete else EventType.UPDATE
        changes = []
        for key, (kind, values) in before.items() if is_known else ():
            old, now = kind.resource(joined(key), values), after[key][1] if key in after else {}
            new = None if statement.is_delete else kind.resource(old.resource_id, now)
            if not statement.is_delete or key not in after:
                changes.append(_Change(action, kind.resource_type, old.resource_id, old, new))
        is_counted = db.dialect.supports_sane_rowcount and not statement._returning  # once it is fetched
        count = getattr(result, "rowcount", -1) if is_counted else -1
        # They differ where others changed rows in between, or other listeners the statement.
        if count == 0:
            return result, []
        if not is_known or count not in (-1, len(changes)):
            changes = [_Change(action, table.resource_type, statement=str(statement), count=max(count, 0))]
        return result, changes

    def before_commit(self, session: Session) -> None:
        """From here on nobody knows, until the commit returns, whether the changes are made."""
        session.flush()  # what fails in here has failed
        if self in session.info:
            self._pending(session).outcome = "unknown"

    def after_commit(self, session: Session) -> None:
        """A transaction was committed, or a savepoint released."""
        pending: _Pending | None = session.info.get(self)
        if pending is not None and (savepoint := session.get_nested_transaction()) is not None:
            around: Any = savepoint.parent
            while around.parent is not None and not around.nested:
                around = around.parent
            pending.changes.setdefault(around, []).extend(pending.changes.pop(savepoint, []))
            pending.outcome = "failed"
        elif pending is not None:
            pending.outcome = "committed"

    def after_transaction_create(self, session: Session, transaction: SessionTransaction) -> None:
        """Write what the transaction before has left: its end was interrupted."""
        if transaction.parent is None and self in session.info:
            try:
                self._end(session)
            except AuditLogError as error:  # of which this transaction is innocent
                log.error("what a transaction has changed is not recorded: %s", error)

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        """Write the events, or forget them. The session is ready for its next transaction."""
        if self not in session.info:
            return
        if transaction.parent is None:
            self._end(session)
        else:
            self._close_intents(self._pending(session).changes.pop(transaction, []), "failed")

    def _end(self, session: Session) -> None:
        pending: _Pending = session.info.pop(self)
        changes = list(chain.from_iterable(pending.changes.values()))
        if pending.outcome == "committed":
            self._write(changes, self._event)
        else:
            self._close_intents(changes, pending.outcome)

    def _close_intents(self, changes: list[_Change], outcome: str) -> None:
        try:
            noted = [change for change in changes if change.intent]
            self._write(noted, lambda change: change.intent_event(outcome))
        except AuditLogError as error:  # why it was rolled back is what the caller must hear of
            log.error("the outcome %r of intents is not recorded: %s", outcome, error)

    def _note(self, session: Session, who: Bound | Pending | None, changes: list[_Change]) -> None:
        rule_of = self._hooks.rule
        noted = [each for each in changes if rule_of(each.resource_type).records(internal=who is None)]
        transaction = session.get_nested_transaction() or session.get_transaction()
        if not noted or transaction is None:
            return
        for change in noted:
            change.who = who
        self._pending(session).changes.setdefault(transaction, []).extend(noted)
        if announced := [change for change in noted if rule_of(change.resource_type).before]:
            with binding(who):
                events = [change.intent_event() for change in announced]
                positions = self._audit.write_many(events, may_drop=False)
            for change, position in zip(announced, positions, strict=True):
                change.intent = str(position)
            self._audit.flush()

    def _event(self, change: _Change) -> Event | None:
        about = (change.action, change.resource_type, change.resource_id)
        if change.statement:
            facts: dict[str, Any] = {"count": change.count, "intent": change.intent}
            return event_of(*about, {"statement": change.statement[:_LONGEST_STATEMENT]}, **facts)
        made = self._hooks.event(*about, change.old, change.new, change.intent)
        if isinstance(made, str):  # there is none
            return change.intent_event(made) if change.intent else None
        return made

    def _write(self, changes: list[_Change], event_from: Callable[[_Change], Event | None]) -> None:
        failure: AuditLogError | None = None
        for who, group in groupby(changes, key=lambda change: change.who):
            with binding(who):
                events = [event for change in group if (event := event_from(change))]
                try:
                    self._write_all(events)
                except AuditLogError as error:  # the events of all others are still to be tried
                    failure = failure or error
        if failure is not None:
            raise failure

    def _write_all(self, events: list[Event]) -> None:
        try:
            self._audit.write_many(events)
        except InvalidEvent:
            for event in events:
                self._write_one(event)

    def _write_one(self, event: Event) -> None:
        try:
            self._audit.write(event)
        except InvalidEvent as error:
            self._audit.write(without_details(event, error))

    def _pending(self, session: Session) -> _Pending:
        pending: _Pending = session.info.setdefault(self, _Pending())
        return pending

    def _is_told(self, table: Table) -> bool:
        """Does an event tell what a row of this table holds?"""
        rule = self._hooks.rule(table.resource_type)
        return rule.hook is not None or rule.diff is not None

    def _may_record(self, table: Table) -> bool:
        return self._hooks.rule(table.resource_type).recorded == "record"
