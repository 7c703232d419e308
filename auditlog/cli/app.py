"""The command with its subcommands, what they share, and how they end.

Exit codes: 0 all is well, also where nothing was found; 1 another error; 2 wrong usage; 3 no
permission; 4 damage was found (doctor); 10 a position has expired; 11 a position is none; 12 the
position file cannot be used; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

import click

from ..errors import (
    AuditLogError,
    DirectoryError,
    InvalidRange,
    InvalidSetting,
    PositionExpired,
    PositionInvalid,
)
from ..events.visible import visible
from ..query.reader import AuditReader
from .times import Time, parse_time

USAGE, NO_PERMISSION, DAMAGE, EXPIRED, INVALID, POSITION_FILE, INTERRUPTED = 2, 3, 4, 10, 11, 12, 130

_CODES: list[tuple[type[AuditLogError], int]] = [
    (PositionExpired, EXPIRED),
    (PositionInvalid, INVALID),
    (InvalidRange, USAGE),
    (InvalidSetting, USAGE),
]
_COMMANDS = {
    "read": "Print entries, or follow the log.",
    "summary": "Count entries by day, type, actor and resource type.",
    "show": "Print one entry, and what is around it.",
    "doctor": "Look for all that may be wrong with a log.",
    "sweep": "Remove the day files that are older than the retention allows.",
    "forward": "Send the log to other systems, and go on as it grows.",
}


def _not_empty(_ctx: click.Context, _param: click.Parameter, directory: str) -> str:
    if not directory:  # a variable of the shell that is not set; it would mean the current directory
        raise click.BadParameter("it is empty; name the directory of the log")
    return directory


directory_option = click.option(
    "--audit-log-dir",
    "directory",
    envvar="AUDITLOG_DIR",
    required=True,
    metavar="DIR",
    callback=_not_empty,
    help="The directory of the log (or AUDITLOG_DIR).",
)


start_argument = click.argument("start", default="", metavar="[START]")
end_argument = click.argument("end", default="", metavar="[END]")

_relative = re.compile(r"-\d+[smhdw]", re.ASCII).fullmatch


class TimesCommand(click.Command):
    """A command with START and END."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # "-2h" is a time, unless it is an option's value; there is no option that is a number.
        taking = {
            name
            for param in self.params
            if isinstance(param, click.Option) and not param.is_flag
            for name in param.opts
        }
        before = ["", *args]
        times = [
            f"{arg[1:]} ago" if _relative(arg) and previous not in taking else arg
            for previous, arg in zip(before, args, strict=False)
        ]
        return super().parse_args(ctx, times)


def parse_bounds(reader: AuditReader, start: str, end: str) -> tuple[Time | None, Time | None]:
    """What START and END mean for a log; "" is no bound. Raises click.UsageError."""
    now = datetime.now(UTC)
    zone = reader.zone
    try:
        return parse_time(start, now, zone) if start else None, parse_time(end, now, zone) if end else None
    except ValueError as error:
        raise click.UsageError(visible(str(error))) from None


class Ended(click.ClickException):
    """The command ends with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def ended_by_signal(end: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C and TERM call `end`, so that what is at hand is completed; a second one interrupts that."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    before = {each: handler for each, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    def on_signal(*_: object) -> None:
        restore()
        end()

    for each in before:
        signal.signal(each, on_signal)
    try:
        yield
    finally:
        restore()


class _Commands(click.Group):
    """Loads a subcommand when it is called: a command line has no time to load the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __package__).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # `| head -1` has what it wanted; click would call that a failure
            _forget_output()
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.version_option(package_name="auditlog-jsonl", message="%(version)s")
def command() -> None:
    """Read and look after an audit log.

    \b
      auditlog read yesterday                        what happened since yesterday
      auditlog read --follow --actor a@example.com   what somebody does just now
      auditlog read -n 20 --reverse                  the newest 20 entries
      auditlog show 2024-08-12:10234                 one entry, whole
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code; no error leaves it as a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no bars gets question marks
    try:
        result: Any = command.main(arguments, prog_name="auditlog", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        _complain(error.message)
        return error.code if isinstance(error, Ended) else error.exit_code
    except AuditLogError as error:
        _complain(str(error))
        return _code_of(error)
    except OSError as error:
        _complain(str(error))
        return NO_PERMISSION if isinstance(error, PermissionError) else 1


def _code_of(error: AuditLogError) -> int:
    if isinstance(error, InvalidSetting) and error.setting == "timezone":
        return 1  # of the log, not of the command line
    if isinstance(error, DirectoryError) and isinstance(error.__cause__, PermissionError):
        return NO_PERMISSION
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def _complain(message: str) -> None:
    click.echo(f"auditlog: {visible(message)}", err=True)


def _forget_output() -> None:
    """Nobody reads it any more, and the interpreter must not complain of that when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
