"""Capture for Celery: a task acts for whoever had it sent.

The session travels in a header of the task's message. The header is signed, as whoever may write to
the broker may write a header; it is not encrypted.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import orjson
from celery import Celery, Task
from celery.signals import before_task_publish
from itsdangerous import BadData, URLSafeTimedSerializer

from ..errors import InvalidSetting
from ..events.model import Session
from .request import clean, text_of
from .session import Bound, binding, bound

log = logging.getLogger("auditlog")

HEADER = "auditlog_session"
UNVERIFIED = Session(user_agent="Celery, unverified sender")
SHORTEST_KEY = 16  # bytes

Key = str | bytes
Trace = Callable[..., object]  # of an id, the arguments and the request: runs a task in a worker


def carry_sessions(
    app: Celery, *, key: Key | Sequence[Key], max_age: float | timedelta | None = None
) -> None:
    """Let the tasks of an app run with the session, and the request id, of the code that sends them.

    Call it once for each app, in the programs that send tasks and in the workers. What a task sends in
    its turn (a retry, the rest of its chain, the body of its chord) carries the session on. A task that
    comes without a session, as from beat, runs without one. Where the header was not signed for
    this very task with one of our keys, or is too old, the session is UNVERIFIED, and the logger
    "auditlog" warns of it. An eager task runs with the session of the code that calls it.

    app: a Celery app.
    key: a secret of at least 16 bytes that senders and workers share; or a list of such keys, of
        which the last one signs and all verify, so that a key can be changed.
    max_age: how long (seconds or a timedelta) after it was sent a task may start, or start again, and
        still be taken for its sender's. Default None, for ever: a task may wait or be retried for days.

    Raises InvalidSetting. Sending a task then raises what `session_from` of the request raises.
    """
    if not isinstance(app, Celery):
        raise InvalidSetting("app", app, "must be a Celery app")
    if _courier_of(app) is not None:
        raise InvalidSetting("app", app, "carries sessions already; call this once")
    courier = _Courier(_keys(key), _age(max_age))
    courier(app)
    # A worker that spawns its processes, as on macOS, sends them a pickled app: its fix-ups run there.
    vars(app)["fixups"] = [*vars(app)["fixups"], courier]


class _Courier:
    """Signs the sessions that leave with an app's tasks, and binds those that arrive."""

    def __init__(self, keys: list[bytes], max_age: timedelta | None) -> None:
        self._keys, self._max_age = keys, max_age
        self._serializer = URLSafeTimedSerializer(
            keys,
            salt="auditlog.capture.celery",
            serializer=orjson,
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _Courier, (self._keys, self._max_age)

    def __call__(self, app: Celery) -> None:
        """Carry the sessions of an app's tasks from now on."""
        vars(app)["auditlog_courier"] = self
        vars(app)["send_task"] = partial(self._send, app.send_task)
        Task.__trace__ = _Traced()

    def _send(self, send_task: Callable[..., object], *args: object, **options: object) -> object:
        # Asked for here: what a receiver of a signal raises, Celery logs, and sends the task all the same.
        sending = _sending.set((self, bound()))
        try:
            return send_task(*args, **options)
        finally:
            _sending.reset(sending)

    def sign(self, name: str, task_id: str, who: Bound) -> str:
        """The header for a task."""
        content = [name, task_id, orjson.Fragment(who.encoded), who.request_id]
        return text_of(self._serializer.dumps(content))  # bytes, as the serializer within gives bytes

    def run(
        self,
        task: Task[..., object],
        trace: Trace,
        task_id: str,
        args: object,
        kwargs: object,
        request: Mapping[str, object] | None = None,
    ) -> object:
        """Run a task that has arrived in a worker."""
        who = None  # is bound as well: what the worker itself may have bound is not the task's
        header = (request or {}).get(HEADER)
        if header is not None:
            who = self._open(task.name, task_id, header)
            if who is None:
                who = Bound(UNVERIFIED)
                log.warning(
                    "the session that came with the task %s[%s] does not verify: another key, another "
                    "task's session, or too old a one; the task runs without it",
                    clean(task.name),
                    clean(str(task_id)),
                )
        with binding(who):
            return trace(task_id, args, kwargs, request)

    def _open(self, name: str, task_id: str, header: object) -> Bound | None:
        try:
            content, sent = self._serializer.loads(str(header), return_timestamp=True)
            signed_name, signed_id, session, request_id = content
            who = Bound(Session.model_validate(session), request_id)
        except (BadData, ValueError):
            return None
        # Not left to the serializer, to which a sender whose clock is ahead of ours is too old.
        too_old = self._max_age is not None and datetime.now(UTC) - sent > self._max_age
        return who if (signed_name, signed_id) == (name, task_id) and not too_old else None


class _Traced:
    """`Task.__trace__`: what runs a task in a worker, here with its session, if its app carries them.

    Celery makes one for each task, whatever its base class, and all that belongs to a run happens in
    it: the task's own hooks, its retry, its errbacks, the sending of what follows in a chain.
    """

    def __get__(self, task: Any, owner: object = None) -> Trace | None:
        if task is None:
            return None
        trace: Trace | None = vars(task).get("__trace__")
        courier = _courier_of(task.app)
        return trace if trace is None or courier is None else partial(courier.run, task, trace)

    def __set__(self, task: Any, trace: Trace | None) -> None:
        vars(task)["__trace__"] = trace


_sending: ContextVar[tuple[_Courier, Bound | None] | None] = ContextVar("auditlog.sending", default=None)


@before_task_publish.connect
def _add_header(sender: str, headers: MutableMapping[str, object], body: Any, **details: object) -> None:
    sending = _sending.get()
    if sending is None:  # a task of an app that carries no sessions
        return
    courier, who = sending
    message: Mapping[str, Any] = headers if "id" in headers else body  # as the task's protocol has it
    if message["retries"]:  # the same task once more, perhaps by a worker that lost a process
        return
    headers.pop(HEADER, None)  # of the task that sends this one
    if who is not None:
        headers[HEADER] = courier.sign(sender, message["id"], who)


def _courier_of(app: Celery) -> _Courier | None:
    return vars(app).get("auditlog_courier")


def _keys(key: Key | Sequence[Key]) -> list[bytes]:
    given: list[object] = list(key) if isinstance(key, list | tuple) else [key]
    keys = [each.encode() if isinstance(each, str) else each for each in given]
    sound = [each for each in keys if isinstance(each, bytes) and len(each) >= SHORTEST_KEY]
    if not sound or len(sound) < len(keys):
        reason = f"must be a secret of at least {SHORTEST_KEY} bytes, or a list of such"
        raise InvalidSetting("key", "…", reason)  # errors are logged
    return sound


def _age(max_age: float | timedelta | None) -> timedelta | None:
    if max_age is None:
        return None
    try:
        age = max_age if isinstance(max_age, timedelta) else timedelta(seconds=max_age)
    except (TypeError, ValueError, OverflowError):
        age = timedelta()
    if age <= timedelta():
        raise InvalidSetting("max_age", max_age, "must be a positive number of seconds, or a timedelta")
    return age
