"""Accesses a cluster in three ways, again and again, until it is killed."""

from __future__ import annotations

import sys

from auditlog import AuditLogger

audit = AuditLogger(sys.argv[1], coalesce=3600)
for turn in range(1_000_000_000):
    audit.k8s_access(full_method_name=f"POST /{turn % 3}")
    if turn == 1000:
        print("repeating", flush=True)
