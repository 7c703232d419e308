"""A Celery worker whose tasks write events.

    python -m tests.programs.celery_app DIRECTORY POOL [MAX_AGE]

Its broker is in DIRECTORY, and so is the audit log. POOL is one of Celery's, "spawn", or "snippet" for
the app of the documentation.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu.transport import filesystem
from kombu.utils import json

from auditlog import AuditLogger, Session
from auditlog.capture import bind
from auditlog.capture.celery import carry_sessions
from auditlog.capture.session import binding
from tests.capture.helpers import snippet

OLD_KEY = "the key that is going"
KEY = b"the key that is coming"


def put_whole(channel: Any, queue: str, payload: Any, **_options: Any) -> None:
    """Put a message into the broker's directory.

    kombu's own opens the file there and then writes it: a worker that looks in between takes a
    message that is empty, and dies of it.
    """
    path = Path(channel.data_folder_out, f"{time.monotonic_ns():020}_{uuid4()}.{queue}.msg")
    part = path.with_suffix(".part")
    part.write_text(json.dumps(payload))
    part.rename(path)


filesystem.Channel._put = put_whole  # type: ignore[method-assign, assignment]


def make_app(directory: Path, **settings: Any) -> Celery:
    """An app whose tasks are those below; it carries no sessions yet."""
    app = Celery("tests", set_as_current=False)
    configure(app, directory)
    app.conf.update(settings)
    return app


def configure(app: Celery, directory: Path) -> None:
    """Let an app have its broker in a directory."""
    for name in ("queue", "control", "results"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    app.conf.update(
        broker_url="filesystem://",
        broker_transport_options={
            "data_folder_in": str(directory / "queue"),
            "data_folder_out": str(directory / "queue"),
            "control_folder": str(directory / "control"),
            "polling_interval": 0.02,
        },
        result_backend=f"file://{directory / 'results'}",
        result_chord_retry_interval=0.05,
        worker_enable_remote_control=False,
        task_retry_on_worker_lost=True,
        worker_lost_wait=0.1,
        audit_log=str(directory / "audit-log"),
    )


@cache
def logger(directory: str) -> AuditLogger:
    return AuditLogger(directory, fsync="never", retention=None)


def record(task: Any, name: str) -> None:
    logger(task.app.conf["audit_log"]).create("Task", name, pid=os.getpid())


@shared_task(name="write", bind=True)
def write(self: Any, *names: str) -> None:
    record(self, names[-1])  # what a chain or a chord hands on stands before it


@shared_task(name="fail", bind=True)
def fail(self: Any, name: str, how: str) -> None:
    record(self, name)
    raise {"error": ValueError, "ignore": Ignore, "reject": Reject}[how]


@shared_task(name="retry", bind=True, max_retries=2)
def retry(self: Any, name: str) -> None:
    record(self, f"{name}-{self.request.retries}")
    if self.request.retries < 2:
        with bind(Session(email="task@example.com")):
            raise self.retry(countdown=0)


@shared_task(name="send", bind=True)
def send(self: Any, name: str) -> None:
    self.app.tasks["write"].delay(name)


@shared_task(name="send_for_nobody", bind=True)
def send_for_nobody(self: Any, name: str) -> None:
    with binding(None):
        self.app.tasks["write"].apply_async([name], headers=self.request.headers)


@shared_task(name="die_once", bind=True, default_retry_delay=0)
def die_once(self: Any, name: str) -> None:
    record(self, f"{name}-{self.request.retries}")
    if not self.request.retries:
        time.sleep(60)  # to be killed


together = threading.Barrier(2)


@shared_task(name="meet", bind=True)
def meet(self: Any, name: str) -> None:
    together.wait(30)
    record(self, name)
    together.wait(30)


@shared_task(name="hurry", bind=True, soft_time_limit=1)
def hurry(self: Any, name: str) -> None:
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        record(self, name)
        raise


class Base(Task):  # type: ignore[type-arg]
    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        record(self, f"{args[0]}-before")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record(self, f"{args[0]}-call")
        return super().__call__(*args, **kwargs)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        record(self, f"{args[0]}-failure")


@shared_task(name="based", bind=True, base=Base)
def based(self: Any, name: str) -> None:
    record(self, name)
    raise ValueError


def main() -> None:
    directory, pool = Path(sys.argv[1]), sys.argv[2]
    if pool == "snippet":
        os.chdir(directory)
        app, pool = snippet("Celery")["app"], "solo"
        configure(app, directory)
    else:
        app = make_app(directory)
        carry_sessions(app, key=[OLD_KEY, KEY], max_age=float(sys.argv[3]) if sys.argv[3:] else None)
        logger(app.conf["audit_log"])  # before the pool forks
    if pool == "spawn":
        app.conf["worker_pool_start_method"], pool = "spawn", "prefork"
    logging.getLogger("celery.worker.request").setLevel(logging.DEBUG)  # what a process has accepted
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"]
    with bind(Session(email="worker@example.com")):  # which is no task's session
        app.worker_main(["worker", f"--pool={pool}", "--concurrency=2", *quiet])


if __name__ == "__main__":
    main()
