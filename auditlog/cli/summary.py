"""`auditlog summary`: how much of what, by whom."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import date, datetime
from typing import Any

import click
import orjson

from ..errors import CorruptEntry
from ..events.records import session_of, text_of
from ..events.visible import visible
from ..query.reader import AuditReader
from .app import TimesCommand, directory_option, end_argument, parse_bounds, start_argument
from .text import fit, visible_json

_BAR_COLUMNS = 30
_TICK = 10_000  # entries between two looks at the progress bar
_EIGHTHS = " ▏▎▍▌▋▊▉"


@click.command(cls=TimesCommand)
@start_argument
@end_argument
@directory_option
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Rows of each list but the days."
)
@click.option(
    "-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", show_default=True
)
def command(directory: str, start: str, end: str, top: int, form: str) -> None:
    """Count the entries from START to END by day, type, actor and resource type.

    \b
      auditlog summary                      all that is kept
      auditlog summary 2024-08-01 yesterday
      auditlog summary -o json 24h          everything counted, and no list cut
    """
    counted = _Counted()
    reader = AuditReader(directory, on_corrupt=counted.note_damage)
    first, last = parse_bounds(reader, start, end)
    _count(counted, reader, first, last)
    damaged = counted.damaged
    if form == "json":
        text = orjson.dumps(counted.as_json(), option=orjson.OPT_INDENT_2).decode()
        click.echo(visible_json(text) if sys.stdout.isatty() else text)
    else:
        counted.print(top)
    if damaged:
        click.echo(f"auditlog: {damaged} damaged lines were left out; auditlog doctor names them", err=True)


class _Counted:
    """What was counted, by each of the things that one asks for."""

    def __init__(self) -> None:
        self.days: Counter[str] = Counter()
        self.types: Counter[str] = Counter()
        self.actors: Counter[str] = Counter()
        self.resource_types: Counter[str] = Counter()
        self.damaged = 0

    def note_damage(self, _line: object) -> None:
        """A line could not be counted."""
        self.damaged += 1

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "entries": self.days.total(),
            "damaged": self.damaged,
            "by_day": dict(sorted(self.days.items())),
            "by_type": dict(self.types.most_common()),
            "by_actor": dict(self.actors.most_common()),
            "by_resource_type": dict(self.resource_types.most_common()),
        }

    def print(self, top: int) -> None:
        """A list with bars for each."""
        click.echo(f"{self.days.total():,} entries")
        _print_list("by day", sorted(self.days.items()), None)
        _print_list("by type", self.types.most_common(), top)
        _print_list("by actor", self.actors.most_common(), top)
        _print_list("by resource type", self.resource_types.most_common(), top)


def _count(
    counted: _Counted, reader: AuditReader, start: date | datetime | None, end: date | datetime | None
) -> None:
    days, types, actors, resource_types = counted.days, counted.types, counted.actors, counted.resource_types
    hidden = not sys.stderr.isatty()
    with click.progressbar(
        length=reader.size(start, end), file=sys.stderr, hidden=hidden, label="counting"
    ) as bar:
        read = 0
        for number, entry in enumerate(reader.read(start, end)):
            try:
                record = entry.record
            except CorruptEntry:
                counted.damaged += 1
                continue
            days[str(entry.day)] += 1
            types[text_of(record.get("event_type"))] += 1
            actors[text_of(session_of(record).get("email"))] += 1
            resource_types[text_of(record.get("resource_type"))] += 1
            read += len(entry.line)
            if number % _TICK == 0:
                bar.update(read)
                read = 0
        bar.update(read)


def _print_list(title: str, rows: list[tuple[str, int]], top: int | None) -> None:
    click.echo(f"\n{title}")
    most = max((count for _, count in rows), default=1)
    for name, count in rows[:top]:
        click.echo(f"  {fit(visible(name) or '(none)', 40)}  {count:>12,}  {_bar(count / most)}".rstrip())
    if top is not None and len(rows) > top:
        click.echo(f"  and {len(rows) - top:,} more (--top)")


def _bar(share: float) -> str:
    eighths = round(share * _BAR_COLUMNS * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
