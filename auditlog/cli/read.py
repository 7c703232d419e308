"""`auditlog read`: a range of the log, or what is written just now."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import click

from ..errors import CorruptEntry
from ..events.visible import visible
from ..query.filters import Filter
from ..query.reader import AuditReader
from ..storage.days import load_zone
from ..storage.entry import CorruptLine, Entry
from ..storage.layout import Position
from . import fields
from .app import (
    Ended,
    TimesCommand,
    directory_option,
    end_argument,
    ended_by_signal,
    parse_bounds,
    start_argument,
)
from .output import CSV_FIELDS, TABLE_FIELDS, Csv, Json, Lines, Output, Table
from .position_file import PositionFile

MOST_ORDERED = 1_000_000
FLUSH_SECONDS = 0.1
ORDERS = ("time", "event_type", "resource_type", "resource_id", "cluster_id", "actor", "address")


@click.command(cls=TimesCommand)
@start_argument
@end_argument
@directory_option
@click.option("--since", default="", metavar="TIME", help="The same as START.")
@click.option("--until", default="", metavar="TIME", help="The same as END.")
@click.option("--search", metavar="TEXT", help="In any value, whatever its case.")
@click.option("--event-type", multiple=True, metavar="TYPE", help="May be given several times.")
@click.option("--resource-type", metavar="TYPE")
@click.option("--resource-id", metavar="ID")
@click.option("--cluster-id", metavar="ID")
@click.option("--actor", metavar="EMAIL")
@click.option("-n", "--limit", type=click.IntRange(min=0), metavar="N", help="At most so many entries.")
@click.option("--reverse", is_flag=True, help="The newest first.")
@click.option("--order-by-field", "order", type=click.Choice(ORDERS), default="time", show_default=True)
@click.option(
    "--order-by-dir", "direction", type=click.Choice(["asc", "desc"]), help="asc, unless --reverse."
)
@click.option("-f", "--follow", is_flag=True, help="Go on as entries are written, from now or START on.")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "jsonl", "json", "csv"]),
    help="[terminal: table, else jsonl]",
)
@click.option(
    "--fields",
    "names",
    metavar="A,B,…",
    help="Columns of table and csv: "
    + ", ".join(fields.NAMES)
    + ", or a path such as event_data.cluster.id.",
)
@click.option(
    "--position-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Resume where the last run stopped.",
)
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)
@click.option("--utc", is_flag=True, help="Show times in UTC, not in this machine's zone.")
def command(directory: str, **options: Any) -> None:
    """Print the entries from START to END, each a day or an instant.

    A day (2024-08-12, today, yesterday) is meant whole; an instant is 2h, "2 hours ago" or
    2024-08-12T10:30:00Z. Into a pipe go the stored lines as they are.

    \b
      auditlog read 2024-08-01 2024-08-07 --event-type destroy
      auditlog read 2h --search kubectl
      auditlog read --follow -o jsonl --position-file /var/lib/shipper/position
    """
    _Reading(directory, **options).run()


class _Reading:
    """One run of the command."""

    def __init__(self, directory: str, **options: Any) -> None:
        self.options = options
        self.out = sys.stdout.buffer
        self.reader = AuditReader(directory, on_corrupt=self._note_damage)
        self.damaged = 0
        self.where = _filter(options)
        self.start, self.end = self._bounds()
        self.reverse = _reverse(options)
        path: Path | None = options["position_file"]
        self.positions = None if path is None else PositionFile(path)
        self.after = self.positions.read() if self.positions else None
        self._check()
        self.output = self._output()
        if self.where is None and (not isinstance(self.output, Lines) or options["order"] != "time"):
            self.where = Filter()  # each entry is decoded, and told where it cannot be

    def _check(self) -> None:
        order, follow = self.options["order"], self.options["follow"]
        if order != "time" and (follow or self.positions):
            raise click.UsageError(
                "--order-by-field orders what was read, and --follow or a position goes on from there"
            )
        if follow and (self.reverse or self.end is not None):
            raise click.UsageError("--follow goes on forward and without an end")
        if self.positions and self.reverse:
            raise click.UsageError("--position-file resumes forward: leave out --reverse")
        if self.after is not None:
            self.start = None  # what came before it was printed by the run that wrote the file

    def run(self) -> None:
        """Print what is asked for."""
        if self.options["follow"]:
            self._follow()
        elif self._is_raw():
            self._copy()
        else:
            self._print(self._entries())
        self.output.end()
        self.out.flush()
        if self.positions:
            self.positions.write()
        if self.damaged:
            click.echo(f"auditlog: {self.damaged} damaged lines were left out", err=True)

    def _is_raw(self) -> bool:
        """Are the stored lines wanted as they stand in the files, all of them?"""
        by_time = isinstance(self.start, datetime) or isinstance(self.end, datetime)
        return self.where is None and not by_time and self.options["limit"] is None and not self.reverse

    def _copy(self) -> None:
        assert isinstance(self.output, Lines)
        for run in self.reader.read_runs(self.start, self.end, after=self.after):
            self.output.write_run(run)
            if self.positions:
                self.out.flush()
                self.positions.reached(run.last_position())

    def _entries(self) -> Iterable[Entry]:
        limit, order = self.options["limit"], self.options["order"]
        if self.positions:  # it moves with what is passed over, too: see _is_wanted
            return self.reader.read(self.start, self.end, after=self.after)
        if order == "time":
            return self.reader.read(
                self.start, self.end, where=self.where, newest_first=self.reverse, limit=limit
            )
        return self._ordered(self.reader.read(self.start, self.end, where=self.where), order, limit)

    def _ordered(self, entries: Iterator[Entry], order: str, limit: int | None) -> Iterable[Entry]:
        give = fields.field(order)
        assert give is not None

        def key(entry: Entry) -> tuple[str, Position]:
            value = str(give(entry))
            entry._record = None  # many entries are held, and decoded they are larger
            return value, entry.position

        if limit is not None:
            choose = heapq.nlargest if self.reverse else heapq.nsmallest
            return choose(limit, entries, key=key)
        ordered = list(islice(entries, MOST_ORDERED + 1))
        if len(ordered) > MOST_ORDERED:
            raise Ended(f"there are over {MOST_ORDERED:,} entries to order; say with -n how many you want", 1)
        return sorted(ordered, key=key, reverse=self.reverse)

    def _is_wanted(self, entry: Entry) -> bool:
        """Does the filter choose it, where the reader did not ask?"""
        if not self.positions or self.where is None:
            return True
        try:
            return self.where.matches(entry.record)
        except CorruptEntry as error:
            self._note_damage(CorruptLine(entry.position, b"", len(entry.line), error.reason))
            return False

    def _printed(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Print those that are wanted, up to the limit; gives each entry that is passed by then."""
        left = self.options["limit"]
        for entry in entries if left != 0 else ():
            if self._is_wanted(entry):
                self.output.write(entry)
                left = None if left is None else left - 1
            yield entry
            if left == 0:
                return

    def _print(self, entries: Iterable[Entry]) -> None:
        flushed = time.monotonic()
        for entry in self._printed(entries):
            if self.positions:
                self.positions.reached(entry.position, written=False)
                if time.monotonic() > flushed + FLUSH_SECONDS:
                    self.out.flush()
                    self.positions.write()
                    flushed = time.monotonic()

    def _follow(self) -> None:
        where = None if self.positions else self.where
        follower = self.reader.follow(self.start, after=self.after, where=where)
        with follower, ended_by_signal(follower.close):
            if self.positions:
                self.positions.reached(follower.position)
            for entry in self._printed(follower):
                self.out.flush()
                if self.positions:
                    # All that is at hand is printed first: writing the file takes longer.
                    self.positions.reached(entry.position, written=not follower.at_hand)

    def _bounds(self) -> tuple[date | datetime | None, date | datetime | None]:
        options = self.options
        for name, option in (("start", "since"), ("end", "until")):
            if options[name] and options[option]:
                raise click.UsageError(f"{name.upper()} and --{option} are the same: give one of them")
        return parse_bounds(
            self.reader, options["start"] or options["since"], options["end"] or options["until"]
        )

    def _output(self) -> Output:
        options = self.options
        terminal = self.out.isatty()
        names = options["names"]
        form = options["form"] or ("table" if terminal or names else "jsonl")
        if names is not None and form in ("jsonl", "json"):
            raise click.UsageError("--fields are the columns of table and csv; with jq you choose among JSON")
        if form == "jsonl":
            return Lines(self.out)
        if form == "json":
            return Json(self.out)
        chosen: Sequence[str] = CSV_FIELDS if form == "csv" else TABLE_FIELDS
        if names:
            chosen = [name.strip() for name in names.split(",")]
        zone = load_zone("UTC")[1] if options["utc"] else None
        give = []
        for name in chosen:
            found = fields.field(name, zone)
            if found is None:
                known = ", ".join(fields.NAMES)
                raise click.UsageError(f"{visible(name)!r} is no field; there are {known}, and paths")
            give.append(found)
        if form == "csv":
            return Csv(self.out, chosen, give)
        colour = options["color"] == "always" or (options["color"] == "auto" and terminal)
        return Table(self.out, chosen, give, zone, colour)

    def _note_damage(self, line: CorruptLine) -> None:
        self.damaged += 1
        if self.damaged <= 3:
            click.echo(f"auditlog: the line at {line.position} is damaged: {line.reason}", err=True)


def _reverse(options: dict[str, Any]) -> bool:
    direction = options["direction"]
    if direction and options["reverse"]:
        raise click.UsageError("--reverse is --order-by-dir desc: give one of them")
    return bool(options["reverse"] or direction == "desc")


def _filter(options: dict[str, Any]) -> Filter | None:
    names = ("search", "resource_type", "resource_id", "cluster_id", "actor")
    given = {name: options[name] for name in names if options[name] is not None}
    types = options["event_type"]
    if types:
        given["event_type"] = types[0] if len(types) == 1 else frozenset(types)
    return Filter(**given) if given else None
