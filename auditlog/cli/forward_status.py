"""What is shown of destinations: a block for each, JSON, Prometheus text, and the words for a line."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime

import click
import orjson

from ..events.visible import visible
from ..forward.status import DestinationStatus, Lag, prometheus
from .text import visible_json

_INDENT = 14
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def print_status(statuses: list[DestinationStatus], form: str) -> None:
    """Print how far destinations are, in the form that was asked for."""
    if form == "json":
        found = [status.as_json() for status in statuses]
        click.echo(visible_json(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode()))
    elif form == "prometheus":
        click.echo(prometheus(statuses), nl=False)
    else:
        if not statuses:
            click.echo("nothing was forwarded from here yet")
        columns = max(40, shutil.get_terminal_size().columns)
        for number, status in enumerate(statuses):
            if number:
                click.echo()
            _print_block(status, columns)


def _print_block(status: DestinationStatus, columns: int) -> None:
    click.echo(f"{click.style(visible(status.name), bold=True)}  {visible(status.endpoint)}")
    for name, text in _rows(status):
        lines = textwrap.wrap(visible(text), columns - _INDENT) or [""]
        colour = "red" if text.startswith(("failing", "not running, and")) else None
        for line in lines:
            click.echo(f"  {name:{_INDENT - 2}}{click.style(line, fg=colour) if colour else line}")
            name = ""


def _rows(status: DestinationStatus) -> Iterator[tuple[str, str]]:
    yield "state", status.state
    yield "position", str(status.sent_through)
    if status.position != status.sent_through:
        yield "resumes", f"behind {status.position}: what was sent since is sent again by a new run"
    lag = Lag(status.lag_events, status.lag_seconds)
    yield "lag", in_words(lag) if lag.events else "none"
    counts = ("sent", "cut", "rejected", "lost") + ("damaged",) * bool(status.damaged)
    yield "messages", ", ".join(f"{getattr(status, name):,} {name}" for name in counts)
    yield "reconnects", f"{status.reconnects:,}"
    for first, last in status.swept:
        yield "swept", f"what was written from {first} up to {last}, before it was sent"
    if status.last_error_at is not None:
        age = span((datetime.now(UTC) - status.last_error_at).total_seconds())
        at = status.last_error_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        yield "last error", f"{at} ({age} ago): {status.last_error}"


def in_words(lag: Lag) -> str:
    """A lag that there is: how many events, and the age of the oldest."""
    over = "" if lag.is_exact else "over "
    events = "1 event" if lag.events == 1 else f"{lag.events:,} events"
    return f"{over}{events} ({span(lag.seconds)})"


def span(seconds: float) -> str:
    """A duration in one unit."""
    for unit, name in _UNITS:
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
