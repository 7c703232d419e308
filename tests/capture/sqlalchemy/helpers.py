"""Mapped classes, and a database in a file whose sessions are recorded."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Engine, ForeignKey, Table, create_engine, event
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    sessionmaker,
)
from sqlalchemy.types import JSON

from auditlog.capture.hooks import Change, Hooks
from auditlog.capture.sqlalchemy import record_changes
from auditlog.testing import RecordedLog


class Base(DeclarativeBase):
    pass


tagging = Table(
    "tagging",
    Base.metadata,
    Column("cluster_id", ForeignKey("clusters.id"), primary_key=True),
    Column("tag_id", ForeignKey("tags.id"), primary_key=True),
)


class Cluster(Base):
    __tablename__ = "clusters"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    size: Mapped[int] = mapped_column(default=1)
    changed: Mapped[int] = mapped_column(default=0, onupdate=lambda: 7)
    machines: Mapped[list[Machine]] = relationship(back_populates="cluster", cascade="all, delete-orphan")
    tags: Mapped[list[Tag]] = relationship(secondary=tagging, back_populates="clusters")


class Tag(Base):
    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True)
    clusters: Mapped[list[Cluster]] = relationship(secondary=tagging, back_populates="tags")


class Machine(Base):
    __tablename__ = "machines"
    __audit_type__ = "Machines.example.com"
    rack: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    cluster_id: Mapped[int | None] = mapped_column(
        ForeignKey("clusters.id", deferrable=True, initially="DEFERRED")
    )
    cluster: Mapped[Cluster | None] = relationship(back_populates="machines")


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "user"}  # noqa: RUF012


class Admin(User):
    __tablename__ = "admins"
    id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    level: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "admin"}  # noqa: RUF012


class Color(Enum):
    RED = "red"


class Odd(Base):
    __tablename__ = "odds"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[Decimal]
    at: Mapped[datetime]
    raw: Mapped[bytes]
    color: Mapped[Color]
    nested: Mapped[Any] = mapped_column(JSON)
    span: Mapped[timedelta]


class Versioned(Base):
    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


TYPES = ("clusters", "tags", "Machines.example.com", "users", "admins", "odds", "versioned")


def with_rows(**options: Any) -> Hooks:
    """Hooks whose events tell all that is known of a row."""
    hooks = Hooks()

    @hooks.on(*TYPES, **options)
    def row(change: Change) -> dict[str, Any]:
        return {side: getattr(change, side).content for side in ("old", "new") if getattr(change, side)}

    return hooks


class Site:
    """A database in a file, sessions that are recorded, and the log."""

    def __init__(self, engine: Engine, log: RecordedLog, hooks: Hooks | None = None, **options: Any) -> None:
        self.engine = engine
        self.log = log
        self.make = sessionmaker(engine)
        record_changes(self.make, log.audit, with_rows() if hooks is None else hooks, **options)

    @property
    def told(self) -> list[tuple[str, str, str]]:
        """What the events since the last look say."""
        return [
            (record["event_type"], record["resource_type"], record.get("resource_id", ""))
            for record in self.seen()
        ]

    def seen(self) -> list[dict[str, Any]]:
        found = self.log.records[getattr(self, "_seen", 0) :]
        self._seen = getattr(self, "_seen", 0) + len(found)
        return found

    def details(self) -> list[dict[str, Any]]:
        """The details of the events since the last look, without the session."""
        return [
            {name: value for name, value in record["event_data"].items() if name != "session"}
            for record in self.seen()
        ]


def engine_for(path: Path) -> Engine:
    """An engine with transactions as other databases have them: SAVEPOINT works, and foreign keys hold."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    Base.metadata.create_all(engine)
    return engine
