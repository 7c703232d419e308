"""`auditlog forward`: the log to other systems, as long as it runs, or once."""

from __future__ import annotations

import logging
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import click

from ..errors import AuditLogError, DestinationBusy, DestinationError, DirectoryError, InvalidSetting
from ..forward.config import at_place, destinations_by_place
from ..forward.destination import Destination
from ..forward.forwarder import Forwarder
from ..forward.status import lag_behind, read_status
from ..query.reader import AuditReader
from ..storage.days import SystemClock
from ..storage.directory import Directory
from ..storage.entry import pass_over
from ..storage.files import Files
from ..storage.layout import Position
from ..storage.progress import is_locked
from .app import INTERRUPTED, Ended, directory_option, ended_by_signal
from .forward_status import in_words, print_status
from .live import StatusLine

FIRST_TICK_SECONDS = 0.1
TICK_SECONDS = 1.0  # between two drawings of the status line, and two looks for a log that is to come
LAST_SECONDS = 1.0  # for what a thread does when it is told to end
_MOST_MIB = 16  # of the log that are counted for the status line

log = logging.getLogger("auditlog")


@click.command()
@directory_option
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="The destinations, in YAML.")
@click.option("--once", is_flag=True, help="Send what the log has by now, and end.")
@click.option("--status", is_flag=True, help="Say how far each destination is, and end.")
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json", "prometheus"]),
    help="Of --status.  [default: table]",
)
@click.option(
    "--allow-shared-directory", is_flag=True, help="Others may write there, too; see docs/security.md."
)
def command(
    directory: str,
    config: Path | None,
    once: bool,
    status: bool,
    form: str | None,
    allow_shared_directory: bool,
) -> int:
    """Send the log to other systems, and go on as it grows.

    FILE names them as a Talos machine configuration does: machine.logging.destinations. Each is sent
    what it did not have yet, by itself. Ctrl-C or TERM ends it; a later run goes on from there.

    \b
      auditlog forward --config forward.yaml           as long as it runs
      auditlog forward --config forward.yaml --once    what there is, for a cron job
      auditlog forward --status -o prometheus          for a collector of text files
    """
    if status:
        if once or config:
            raise click.UsageError("--status only looks: leave out --once and --config")
        print_status(read_status(directory), form or "table")
        return 0
    if form:
        raise click.UsageError("--output is of --status")
    if config is None:
        raise click.UsageError("--config FILE names the destinations; docs/forwarding.md says how")
    run = _Run(directory, destinations_by_place(config), once=once, allow_shared=allow_shared_directory)
    return run.run()


class _Forwarding:
    """A destination, and the thread that forwards to it."""

    def __init__(self, forwarder: Forwarder, once: bool, ended: SimpleQueue[_Forwarding | None]) -> None:
        self.forwarder = forwarder
        self.name = forwarder.destination.name
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=f"forward-{self.name}", daemon=True)
        self._once = once
        self._ended = ended
        self._before: tuple[float, int] | None = None  # when `rate` was asked for last, and what was sent

    def _run(self) -> None:
        try:
            self.forwarder.run(once=self._once, stand_by=False)
        except Exception as error:
            self.error = error
        finally:
            self._ended.put(self)

    def rate(self) -> float:
        """Messages a second since the last call; 0.0 where that is not known."""
        if not self.forwarder.active:
            return 0.0  # what earlier runs sent is still to be loaded
        at, sent = time.monotonic(), self.forwarder.progress.sent
        before, self._before = self._before or (at, sent), (at, sent)
        return (sent - before[1]) / max(at - before[0], 0.001)


class _Run:
    """One run of the command: a thread for each destination, and what is shown of them."""

    def __init__(
        self, directory: str, destinations: dict[str, Destination], *, once: bool, allow_shared: bool
    ) -> None:
        self._path = directory
        self._destinations = destinations  # by their places in the file
        self._once = once
        self._allow_shared = allow_shared
        self._line = StatusLine(sys.stderr)
        # What ends by itself, or None when a signal came: its `put` may be called by a signal handler.
        self._ended: SimpleQueue[_Forwarding | None] = SimpleQueue()
        self._forwardings: list[_Forwarding] = []

    def run(self) -> int:
        """Forward until that is done, or until a signal comes; return the exit code."""
        with self._line.listening(), ended_by_signal(lambda: self._ended.put(None)):
            if not self._log_is_there():
                return 0
            self._reader = AuditReader(self._path, on_corrupt=pass_over)
            self._start()
            was_interrupted = self._wait()
            # What fails because it was interrupted is no failure.
            failed = {each.name: each.error for each in self._forwardings if each.error}
            self._stop()
            self._show()
            if not self._once:
                for each in self._forwardings:
                    log.info(
                        "stopped forwarding to %s, at %s", each.name, each.forwarder.progress.sent_through
                    )
        _complain(failed, len(self._forwardings))
        return INTERRUPTED if was_interrupted and self._once else 0

    def _log_is_there(self) -> bool:
        """Wait until there is a log to forward; False where a signal came before that."""
        told = False
        while True:
            try:
                Directory(self._path, Files()).close()
                return True
            except DirectoryError as error:
                if self._once or not isinstance(error.__cause__, FileNotFoundError):
                    raise
                if not told:
                    told = True
                    log.warning("there is no log at %s yet; waiting for it", error.path)
            self._line.show(f"waiting for {self._path}")
            with suppress(Empty):
                self._ended.get(timeout=TICK_SECONDS)
                return False

    def _start(self) -> None:
        files = Files()
        # What we put there would else be another's, and in its owner's way.
        Directory(self._path, files, create=True, allow_shared=self._allow_shared).close()
        for place, each in self._destinations.items():
            if is_locked(self._path, each.name, files):
                raise DestinationBusy(each.name)
            try:
                forwarder = Forwarder(self._path, each)
            except InvalidSetting as error:
                raise at_place(place, error) from None
            self._forwardings.append(_Forwarding(forwarder, self._once, self._ended))
        for forwarding in self._forwardings:
            if not self._once:
                endpoint = forwarding.forwarder.destination.shown_endpoint
                log.info("forwarding to %s (%s)", forwarding.name, endpoint)
            forwarding.thread.start()

    def _wait(self) -> bool:
        """Until all is done; or a signal came, and True."""
        running = len(self._forwardings)
        pause = FIRST_TICK_SECONDS
        while running:
            self._show()
            try:
                ended = self._ended.get(timeout=pause)
            except Empty:
                pause = min(2 * pause, TICK_SECONDS)
                continue
            if ended is None:
                return True
            running -= 1
            if isinstance(ended.error, DestinationBusy):
                return False  # it was not when we looked
            # A receiver's failure was told by whoever forwards.
            if ended.error is not None and not isinstance(ended.error, DestinationError):
                unexpected = None if isinstance(ended.error, AuditLogError) else ended.error
                log.error("%s is given up: %s", ended.name, ended.error, exc_info=unexpected)
        return False

    def _stop(self) -> None:
        """End all of them, side by side; one that hangs is left to itself after some seconds."""
        for each in self._forwardings:
            each.forwarder.stop(wait=False)
        for each in self._forwardings:
            each.forwarder.stop()
            each.thread.join(LAST_SECONDS)

    def _show(self) -> None:
        """Say on the line how each destination fares: as much of it as there is room for."""
        if not self._line.is_terminal:
            return
        told = [self._told(each) for each in self._forwardings]
        for count in range(max(map(len, told)), 0, -1):
            text = " | ".join(", ".join(words[:count]) for words in told)
            if len(text) <= self._line.columns:
                break
        else:  # what is cut off at the end had better be well
            text = " | ".join(words[0] for words in sorted(told, key=_is_well))
        self._line.show(text)

    def _told(self, forwarding: _Forwarding) -> list[str]:
        """What there is to say of a destination, the most important first."""
        progress = forwarding.forwarder.progress
        reason = ""
        if forwarding.error:
            state, reason = "failed", _reason_of(forwarding.error)
        elif progress.failing:
            state, reason = "failing", progress.last_error
        elif not forwarding.forwarder.active and forwarding.thread.is_alive():
            state = "starting"
        else:
            state, reason = self._lag(progress.sent_through)
        rate = forwarding.rate()
        words = [reason, f"{rate:,.0f}/s" if rate >= 1 else "", f"{progress.sent:,} sent"]
        return [f"{forwarding.name}: {state}", *filter(None, words), f"at {progress.sent_through}"]

    def _lag(self, position: Position) -> tuple[str, str]:
        try:
            lag = lag_behind(self._reader, position, SystemClock(), _MOST_MIB)
        except (AuditLogError, OSError) as error:
            return "failing", str(error)  # which whoever forwards meets, too
        return (f"{in_words(lag)} behind" if lag.events else "up to date"), ""


def _is_well(words: list[str]) -> bool:
    return not words[0].endswith((": failing", ": failed"))


def _complain(failed: dict[str, Exception], of: int) -> None:
    """Raise what says which destinations failed, and why."""
    for error in failed.values():
        if isinstance(error, DestinationBusy):
            raise error
    if failed:
        why = "; ".join(f"{name} ({_reason_of(error)})" for name, error in failed.items())
        raise Ended(f"{len(failed)} of {of} destinations did not take everything: {why}", 1)


def _reason_of(error: Exception) -> str:
    return error.reason if isinstance(error, DestinationError) else str(error)
