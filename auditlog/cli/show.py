"""`auditlog show`: one entry, whole, and what is around it."""

from __future__ import annotations

import sys
from itertools import islice

import click
import orjson

from ..errors import CorruptEntry
from ..events.visible import visible
from ..query.reader import AuditReader
from ..storage.entry import Entry
from ..storage.layout import Position
from .app import INVALID, Ended, directory_option
from .text import visible_json


@click.command()
@click.argument("position")
@directory_option
@click.option(
    "-C",
    "--context",
    type=click.IntRange(0, 1000),
    default=0,
    metavar="N",
    help="So many entries around it, too.",
)
def command(directory: str, position: str, context: int) -> None:
    """Print the entry at POSITION (such as 2024-08-12:10234), indented.

    A position stands in `auditlog read --fields time,summary,position`, in --output csv, and in
    messages about damaged lines; a damaged line is shown as it is.
    """
    try:
        at = Position.parse(position)
    except ValueError as error:
        raise Ended(str(error), INVALID) from None
    reader = AuditReader(directory, on_corrupt=lambda line: None)  # it is no news in a context
    before = list(islice(reader.read(after=at, newest_first=True), context))
    entry = reader.at(at)
    for earlier in reversed(before):
        _print_line(earlier)
    if isinstance(entry, Entry):
        _print_whole(entry)
    else:
        click.echo(f"{at}  damaged: {entry.reason}\n{visible(entry.raw.decode(errors='replace'))}")
    for later in islice(reader.read(after=at), context):
        _print_line(later)
    if not isinstance(entry, Entry):
        raise Ended(f"the line at {at} is damaged: {entry.reason}", 1)


def _print_line(entry: Entry) -> None:
    text = entry.line.decode(errors="replace").rstrip("\n")
    click.echo(f"{entry.position}  {visible_json(text) if sys.stdout.isatty() else text}")


def _print_whole(entry: Entry) -> None:
    try:
        text = _indented(entry)
    except CorruptEntry as error:
        raise Ended(f"{error}\n{entry.line!r}", 1) from None
    click.echo(f"{entry.position}\n{visible_json(text) if sys.stdout.isatty() else text}")


def _indented(entry: Entry) -> str:
    try:
        return orjson.dumps(entry.record, option=orjson.OPT_INDENT_2).decode()
    except TypeError:  # nested deeper than anybody writes
        return entry.line.decode(errors="replace").rstrip("\n")
