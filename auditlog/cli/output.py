"""How entries are printed: as they are stored, as a table, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from datetime import tzinfo
from typing import Any, BinaryIO, Protocol

import click
import orjson

from ..events.visible import visible
from ..storage.blocks import Run
from ..storage.entry import Entry
from . import fields
from .text import fit, visible_json

_COLOURS = {
    "create": "green",
    "destroy": "red",
    "teardown": "red",
    "gap": "red",
    "access_denied": "yellow",
    "k8s_access": "cyan",
    "talos_access": "cyan",
    "audit_log_access": "magenta",
}
# How wide a column is, and how narrow it may be in a narrow terminal.
_WIDTHS = {
    "time": (23, 19),
    "type": (14, 10),
    "resource": (30, 16),
    "actor": (24, 12),
    "address": (15, 7),
    "summary": (20, 6),
}
_ANY_WIDTH = (20, 8)
CSV_FIELDS = ("time", "type", "resource_type", "resource_id", "cluster_id", "actor", "address", "position")
TABLE_FIELDS = ("time", "type", "resource", "actor", "address", "summary")


class Output(Protocol):
    """Where entries go."""

    def write(self, entry: Entry) -> None:
        """Print an entry."""

    def end(self) -> None:
        """There are no more."""


class Lines:
    """The stored lines, byte for byte; on a terminal, what it would obey or not show is escaped."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._on_terminal = out.isatty()

    def write(self, entry: Entry) -> None:
        """Print an entry."""
        self._out.write(_shown(entry.line) if self._on_terminal else entry.line)

    def write_run(self, run: Run) -> None:
        """Print entries that stand behind each other."""
        lines = memoryview(run.buffer)[run.start : run.end]
        self._out.write(_shown(bytes(lines)) if self._on_terminal else lines)

    def end(self) -> None:
        """There are no more."""


class Json:
    """One JSON array of all records."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._on_terminal = out.isatty()
        self._before = b"[\n"

    def write(self, entry: Entry) -> None:
        """Print an entry."""
        line = _shown(entry.line) if self._on_terminal else entry.line
        self._out.write(self._before + line[:-1])
        self._before = b",\n"

    def end(self) -> None:
        """There are no more."""
        self._out.write(b"[]\n" if self._before == b"[\n" else b"\n]\n")


class Csv:
    """A row for each entry. What a spreadsheet would take for a formula begins with an apostrophe."""

    def __init__(self, out: BinaryIO, names: Sequence[str], give: Sequence[fields.Field]) -> None:
        self._text = io.StringIO()
        self._rows = csv.writer(self._text)
        self._out = out
        self._give = give
        self._write([visible(name) for name in names])

    def write(self, entry: Entry) -> None:
        """Print an entry."""
        self._write([_cell(give(entry)) for give in self._give])

    def _write(self, row: Sequence[str]) -> None:
        self._rows.writerow(row)
        self._out.write(self._text.getvalue().encode())
        self._text.seek(0)
        self._text.truncate()

    def end(self) -> None:
        """There are no more."""


class Table:
    """A row of columns for each entry, for eyes; nothing in it can speak to the terminal."""

    def __init__(
        self,
        out: BinaryIO,
        names: Sequence[str],
        give: Sequence[fields.Field],
        zone: tzinfo | None,
        colour: bool,
    ) -> None:
        self._out = out
        self._names = names
        self._give = give
        self._zone = zone
        self._colour = colour
        self._widths = _widths(names, shutil.get_terminal_size().columns)
        self._zone_name: str | None = None

    def write(self, entry: Entry) -> None:
        """Print an entry."""
        moment = fields.moment_of(entry.record, self._zone)
        zone_name = (moment.tzname() if moment else self._zone_name) or ""
        if zone_name != self._zone_name:  # at first, and where summer time begins or ends
            self._zone_name = zone_name
            titles = [f"TIME ({zone_name})" if name == "time" else name.upper() for name in self._names]
            self._print(titles, "bold")
        cells = [_plain(give(entry)) for give in self._give]
        cells = [
            # The zone stands in the title.
            cell.replace("T", " ")[: min(23, width)] if name == "time" else cell
            for name, cell, width in zip(self._names, cells, self._widths, strict=True)
        ]
        self._print(cells, str(entry.record.get("event_type", "")))

    def _print(self, cells: list[str], kind: str) -> None:
        shown = [fit(visible(cell), columns) for cell, columns in zip(cells, self._widths, strict=True)]
        if self._colour:
            style: dict[str, Any] = {"bold": True} if kind == "bold" else {"fg": _COLOURS.get(kind)}
            shown = [
                click.style(cell, **style) if kind == "bold" or name == "type" else cell
                for name, cell in zip(self._names, shown, strict=True)
            ]
        self._out.write("  ".join(shown).rstrip().encode() + b"\n")

    def end(self) -> None:
        """There are no more."""


def _widths(names: Sequence[str], terminal: int) -> list[int]:
    """How wide the columns are: the last ones narrower where the terminal is, the last one the rest."""
    wide, narrow = zip(*(_WIDTHS.get(name, _ANY_WIDTH) for name in names), strict=True)
    widths = list(wide)
    excess = sum(widths) + 2 * (len(names) - 1) - terminal
    for place in reversed(range(len(names))):
        less = max(0, min(excess, widths[place] - narrow[place]))
        widths[place] -= less
        excess -= less
    widths[-1] -= min(excess, 0)
    return widths


def _shown(lines: bytes) -> bytes:
    return visible_json(lines.decode(errors="replace")).encode()


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | list):
        return str(value)
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # nested deeper than anybody writes
        return "{…}"


def _cell(value: Any) -> str:
    text = visible(_plain(value))
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and text.strip() else text
