"""The `auditlog` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say what it needs."""
    try:
        import click  # noqa: F401
    except ImportError:
        sys.exit("the auditlog command needs its extra: pip install 'auditlog-jsonl[cli]'")
    try:
        from .app import run

        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit(130)
