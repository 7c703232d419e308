"""The `auditlog` command."""

from auditlog.cli import main

main()
