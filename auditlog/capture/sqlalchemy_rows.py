"""Rows of SQLAlchemy's mapped classes, as resources: what they are called, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import date, time
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, inspect, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import LoaderCallableStatus, PassiveFlag
from sqlalchemy.sql import ClauseElement

from ..errors import InvalidEvent
from ..events.values import canonical
from .hooks import Resource

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState, Mapper

_NO_VALUE = (ClauseElement, LoaderCallableStatus)
_PENDING_TOO = PassiveFlag.PASSIVE_NO_INITIALIZE | PassiveFlag.INCLUDE_PENDING_MUTATIONS


class Table:
    """What is to be known of a mapped class."""

    def __init__(self, mapper: Mapper[Any]) -> None:
        self.mapper = mapper
        name = getattr(mapper.class_, "__audit_type__", None) or getattr(mapper.local_table, "name", None)
        self.resource_type = str(name or mapper.class_.__name__)
        mapped = {prop.key: prop.columns[0] for prop in mapper.column_attrs}
        self.columns = {name: column for name, column in mapped.items() if isinstance(column, Column)}
        self.key_names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        self.is_whole = list(mapper.primary_key) == list(mapper.local_table.primary_key)
        kind = mapper.polymorphic_on
        self.kind = "" if kind is None else mapper.get_property_by_column(kind).key
        relations = [prop for prop in mapper.relationships if not prop.viewonly]
        self.collections = [prop.key for prop in relations if prop.secondary is not None]
        # A flush sets these by itself, and forgets what they were.
        version, columns = mapper.version_id_col, self.columns.items()
        self._volatile = {n for n, c in columns if c.onupdate or c.server_onupdate or c is version}

    def before(self, state: InstanceState[Any], *, flushed: bool) -> tuple[dict[str, Any], set[str]]:
        """The columns of a row as the database had them, as far as they are loaded; which change."""
        known = {**state.dict, **state.committed_state}
        lost = self._volatile - state.committed_state.keys() if flushed else set()
        touched = self.columns.keys() & state.committed_state.keys()
        changed = {name for name in touched if state.attrs[name].history.has_changes()}
        return {name: known[name] for name in self.columns if name in known and name not in lost}, changed

    def moved(self, state: InstanceState[Any]) -> dict[str, Any]:
        """Which rows came into many-to-many collections, and which went."""
        histories = {name: state.get_history(name, _PENDING_TOO) for name in self.collections}
        return {
            name: {"added": sorted(map(id_of, each.added)), "removed": sorted(map(id_of, each.deleted))}
            for name, each in histories.items()
            if each.added or each.deleted
        }

    def load(self, state: InstanceState[Any], names: set[str]) -> None:
        """Load what the database has computed, as far as that may be loaded."""
        for name in names - state.dict.keys():
            with suppress(InvalidRequestError):  # raiseload
                getattr(state.obj(), name)

    def sets_key(self, statement: Any) -> bool:
        """May a statement give rows other keys, so that nobody can say which row is which?"""
        values = dict(
            getattr(statement, "_ordered_values", None) or getattr(statement, "_values", None) or {}
        )
        names = {getattr(column, "key", column) for column in dict(values)}
        return not names.isdisjoint({*self.key_names, *(column.key for column in self.mapper.primary_key)})

    def having(self, keys: Iterable[Iterable[Any]], entity: Any) -> list[Any]:
        """Criteria for rows with these keys, which others may fulfil, too, where keys are composite."""
        values = map(set, zip(*keys, strict=True))
        return [getattr(entity, name).in_(each) for name, each in zip(self.key_names, values, strict=True)]

    def resource(self, row_id: str, values: Mapping[str, Any], /, **moved: Any) -> Resource:
        """A row as hooks see it."""
        known = {name: values[name] for name in self.columns if name in values}
        content = {name: _plain(value) for name, value in known.items() if not isinstance(value, _NO_VALUE)}
        return Resource(self.resource_type, row_id, content=content | moved)


table_of = cache(Table)
Rows = dict[tuple[Any, ...], tuple[Table, dict[str, Any]]]


def read_rows(
    db: Any, entity: Any, where: list[Any], given: Any = None, most: int | None = None
) -> tuple[Rows, int]:
    """Rows as the database has them, by their keys; and how many it gave, some of them twice in a join."""
    mapper = inspect(entity).mapper
    table = table_of(mapper)
    query = select(*(getattr(entity, name) for name in table.columns)).where(*where).limit(most)
    if db.dialect.name in ("postgresql", "mysql", "mariadb"):  # that nobody changes them in between
        query = query.with_for_update(of=entity)
    found: Rows = {}
    rows = db.execute(query, given).all()
    for row in rows:
        values = dict(zip(table.columns, row, strict=True))
        own = mapper.polymorphic_map.get(values.get(table.kind), mapper)
        found[tuple(values[name] for name in table.key_names)] = table_of(own), values
    return found, len(rows)


def id_of(row: Any) -> str:
    state: InstanceState[Any] = inspect(row)
    return joined(state.identity or state.mapper.primary_key_from_instance(state.obj()))


def joined(key: Iterable[Any]) -> str:
    plain = (each.hex() if isinstance(each, bytes) else _plain(each) for each in key)
    return ",".join("" if each is None else str(each) for each in plain)


def _plain(value: Any) -> Any:
    """A column's value, as JSON can have it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    try:
        return canonical(value, "")
    except InvalidEvent:
        return value.isoformat() if isinstance(value, date | time) else str(value)
