"""Is killed with SIGKILL while its store makes a change that is announced.

    python -m tests.programs.change_and_die DIRECTORY ACTION

Its first change, a create, is made. The second, ACTION, prints what is durable, and never ends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from auditlog import AuditLogger, Session
from auditlog.capture import omni
from auditlog.capture.store import AuditedStore
from examples.control_plane.store import Resource, ResourceStore

CLUSTERS = "Clusters.omni.sidero.dev"


class DyingStore(ResourceStore):
    """Dies in each method but `create`; `audit` says what is on the disk by then."""

    audit: AuditLogger

    def die(self, *_given: Any) -> Any:
        print(self.audit.durable_through(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    update: Any = die
    update_with_conflicts: Any = die
    teardown: Any = die
    destroy: Any = die


def main() -> None:
    directory, action = sys.argv[1:]
    inner = DyingStore()
    inner.audit = AuditLogger(directory, fsync_interval=3600)
    store = AuditedStore(inner, inner.audit, omni.hooks(before=True))
    with inner.audit.session(Session(email="alice@example.com")):
        store.create(Resource(CLUSTERS, "c"))
        if action == "update":
            store.update(Resource(CLUSTERS, "c", {"a": "b"}))
        elif action == "update_with_conflicts":
            store.update_with_conflicts(CLUSTERS, "c", lambda resource: resource)
        else:
            getattr(store, action)(CLUSTERS, "c")


if __name__ == "__main__":
    main()
