"""`python -m auditlog` is the `auditlog` command."""

from .cli import main

main()
