"""`auditlog sweep`: the retention, now and by hand."""

from __future__ import annotations

import click

from ..storage.retention import Retention, RetentionSweeper, SweepReport
from .app import Ended, directory_option


@click.command()
@directory_option
@click.option(
    "--days", type=int, default=30, show_default=True, metavar="N", help="Days to keep, today included."
)
@click.option(
    "--max-bytes", type=int, metavar="N", help="Remove whole oldest days until the log is no larger."
)
@click.option(
    "--hold-for-destinations",
    is_flag=True,
    help="Keep what a destination was not sent yet, for as many days again.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option(
    "--allow-shared-directory", is_flag=True, help="Others may write there, too; see docs/security.md."
)
def command(
    directory: str,
    days: int,
    max_bytes: int | None,
    hold_for_destinations: bool,
    dry_run: bool,
    allow_shared_directory: bool,
) -> None:
    """Remove the day files that are older than the retention allows.

    The newest file, today's and files ahead of the clock are never removed. A server that has the
    log open does this by itself every night.
    """
    retention = Retention(days, max_bytes, hold_for_destinations)
    sweeper = RetentionSweeper(directory, retention, allow_shared_directory=allow_shared_directory)
    report = sweeper.plan() if dry_run else sweeper.sweep()
    _print(report)
    if report.failed:
        names = "; ".join(f"{day}: {reason}" for day, reason in report.failed)
        raise Ended(f"could not be removed: {names}", 1)


def _print(report: SweepReport) -> None:
    for day in report.removed:
        click.echo(f"{'would remove' if report.dry_run else 'removed'} {day}.jsonlog")
    verb = "would be removed" if report.dry_run else "removed"
    click.echo(f"{_days(len(report.removed))} ({report.removed_bytes:,} bytes) {verb}")
    if report.kept:
        kept = f"{_days(len(report.kept))} ({report.kept_bytes:,} bytes) kept"
        click.echo(f"{kept}, from {report.oldest_kept} on")
    if report.held:
        click.echo(f"{_days(len(report.held))} of them for destinations that were not sent them yet")
    if report.next_due is not None:
        click.echo(f"the next falls due at {report.next_due.isoformat()}")


def _days(count: int) -> str:
    return "1 day" if count == 1 else f"{count} days"
