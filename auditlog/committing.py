"""Events that wait together are written together: in one append, and one sync where it is asked for.

Threads take turns at leading (GroupCommit). Tasks of event loops have one thread that waits for
them (Committer).
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from .errors import AuditLogError, LockTimeout, LoggerClosed, ReentrantWrite, SyncFailed, WriteFailed
from .events.codec import Encoded
from .storage.layout import Position

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

MOST_EVENTS = 1024  # of a batch, unless one caller alone has more
MOST_BYTES = 1 << 20

Append = Callable[[Sequence[Encoded]], list[Position]]


class _Result(NamedTuple):
    """What became of a batch: the lines that are whole in the file, and why that is not all."""

    positions: Sequence[Position]
    failure: AuditLogError | None

    def share(self, start: int, count: int) -> list[Position]:
        """The positions of `count` events from `start` on; raises where they are not acknowledged."""
        mine = list(self.positions[start : start + count])
        failure = self.failure
        if not mine and isinstance(failure, SyncFailed) and isinstance(failure.__cause__, WriteFailed):
            failure = failure.__cause__  # why they did not even get into the file
        if failure is None or (len(mine) == count and not isinstance(failure, SyncFailed)):
            return mine
        if isinstance(failure, WriteFailed):
            raise type(failure)(failure.path, failure.reason, tuple(mine))
        raise type(failure)(*failure.args)  # for each a traceback of its own


def _result_of(append: Append, events: Sequence[Encoded]) -> _Result:
    try:
        return _Result(append(events), None)
    except WriteFailed as error:
        return _Result(error.positions, error)
    except AuditLogError as error:
        return _Result((), error)


class _Waiter:
    __slots__ = ("events", "gate", "leads", "result", "start")

    def __init__(self, events: Sequence[Encoded]) -> None:
        self.events = events
        self.gate = threading.Lock()
        self.gate.acquire()
        self.leads = False
        self.result: _Result | None = None  # of the batch in which its events begin at `start`
        self.start = 0


class GroupCommit:
    """Lets one thread append, and sync, for all that wait.

    Whoever comes while nobody does it leads, and appends its own events. All who come meanwhile
    wait, each at a lock of its own; the first of them leads next, and appends for all.

    `refuse_sync` raises ReentrantWrite in a thread that is inside a sync: behind it, others lead
    in vain. `timeout` is in seconds: how long to wait for those who lead.

    `_mutex` protects the fields below it, is held for moments only, and nothing is taken inside. A
    signal handler never waits for it: from inside `append` it is refused before.
    """

    def __init__(self, path: str, append: Append, refuse_sync: Callable[[], None], timeout: float) -> None:
        self._path = path
        self._append = append
        self._refuse_sync = refuse_sync
        self._timeout = timeout
        self._inside: set[int] = set()  # the threads that are in `append`
        self._mutex = threading.Lock()
        self._waiters: deque[_Waiter] = deque()
        self._led = False  # is there a leader?

    def append(self, events: Sequence[Encoded]) -> list[Position]:
        """Append events, and return their positions.

        Raises what appending raises, ReentrantWrite, or LockTimeout.
        """
        self.refuse_reentry()
        me = threading.get_ident()
        leads = False
        self._inside.add(me)
        try:
            with self._mutex:
                if not self._led:
                    self._led = leads = True
                else:
                    waiter = _Waiter(events)
                    self._waiters.append(waiter)
            return self._append(events) if leads else self._wait(waiter)
        finally:
            if leads:
                with self._mutex:
                    self._hand_over()
            self._inside.discard(me)

    def refuse_reentry(self) -> None:
        """Raise ReentrantWrite in a signal handler that interrupted a write or sync of its own thread."""
        if threading.get_ident() in self._inside:
            raise ReentrantWrite(self._path, "the log was written or closed from inside a write")
        self._refuse_sync()

    def _wait(self, waiter: _Waiter) -> list[Position]:
        try:
            if not waiter.gate.acquire(timeout=self._timeout):
                self._give_up(waiter)
            if waiter.leads:
                self._lead(waiter)
        except BaseException:  # Ctrl-C: whoever is not there must not keep the lead
            with self._mutex:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                if waiter.leads:
                    self._hand_over()
            raise
        assert waiter.result is not None
        return waiter.result.share(waiter.start, len(waiter.events))

    def _give_up(self, waiter: _Waiter) -> None:
        """Raise LockTimeout, unless the waiter's turn has come after all."""
        with self._mutex:
            if waiter.leads or waiter.result is not None:
                return
            waits = waiter in self._waiters
        what = (
            "other threads wrote and synced"
            if waits
            else "it was being written and synced, and may be there,"
        )
        raise LockTimeout(self._path, f"{what} for {self._timeout:g} s")

    def _lead(self, leader: _Waiter) -> None:
        """Append what waits, the leader's own events first, and give the lead to the next."""
        batch: list[_Waiter] = []
        events: list[Encoded] = []
        result = _Result((), WriteFailed(self._path, "the write was interrupted"))
        try:
            with self._mutex:
                size = 0
                while self._waiters and len(events) < MOST_EVENTS and size < MOST_BYTES:
                    waiter = self._waiters.popleft()
                    waiter.start = len(events)
                    events += waiter.events
                    size += sum(len(tail) for _, _, tail in waiter.events)
                    batch.append(waiter)
            result = _result_of(self._append, events)
        finally:
            with self._mutex:
                leader.leads = False
                self._hand_over()
                for waiter in batch:
                    waiter.result = result
                    waiter.gate.release()

    def _hand_over(self) -> None:
        """Let the next one lead, or nobody. The caller holds the mutex."""
        if self._waiters:
            self._waiters[0].leads = True
            self._waiters[0].gate.release()
        else:
            self._led = False


# An event, the loop and the future of the task that waits for it, and whom to tell where it does not.
_Task = tuple[Encoded, "AbstractEventLoop", "Future[Position]", Callable[[WriteFailed], None]]


class Committer:
    """Appends the events that tasks hand over, in a thread, many at a time.

    While a batch is written, the next one gathers. `_lock` protects the fields below it, is held
    for moments only, and nothing is taken inside. It is re-entrant for a signal handler that closes.
    """

    def __init__(self, path: str, append: Append) -> None:
        self._path = path
        self._append = append
        self._lock = threading.RLock()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()  # None: nothing comes any more
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, event: Encoded, unheard: Callable[[WriteFailed], None]) -> Future[Position]:
        """Hand an event over; the future gives its position, or raises what appending raises.

        `unheard` is called with a failure that nobody awaits any more, in the loop. To be called
        in a running event loop. Raises LoggerClosed, and WriteFailed where there is no thread.
        """
        import asyncio  # slow to load, and loaded where somebody awaits

        loop = asyncio.get_running_loop()
        future: Future[Position] = loop.create_future()
        with self._lock:
            if self._closed:
                raise LoggerClosed(self._path)
            if self._thread is None:
                self._thread = self._started()
            self._tasks.put((event, loop, future, unheard))
        return future

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="auditlog-commit", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise WriteFailed(self._path, f"no thread could be started: {error}") from error
        return thread

    def close(self) -> None:
        """Return when all that was handed over is written; nothing more is accepted."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._tasks.put(None)
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            batch = self._gather(task)
            try:
                result = _result_of(self._append, [task[0] for task in batch])
            except Exception as error:  # a clock or file layer of the user's own
                result = _Result((), WriteFailed(self._path, f"{type(error).__name__}: {error}"))
            self._tell(batch, result)

    def _gather(self, first: _Task) -> list[_Task]:
        """The first task and those that wait behind it, as many as make a good batch."""
        batch = [first]
        size = len(first[0][2])
        with suppress(Empty):
            while len(batch) < MOST_EVENTS and size < MOST_BYTES:
                task = self._tasks.get_nowait()
                if task is None:
                    self._tasks.put(None)  # nothing comes behind it, so it stays the last
                    break
                batch.append(task)
                size += len(task[0][2])
        return batch

    def _tell(self, batch: list[_Task], result: _Result) -> None:
        by_loop: defaultdict[AbstractEventLoop, list[tuple[_Task, int]]] = defaultdict(list)
        for number, task in enumerate(batch):
            by_loop[task[1]].append((task, number))
        for loop, tasks in by_loop.items():
            try:
                loop.call_soon_threadsafe(_resolve, tasks, result)
            except RuntimeError:  # the loop is closed, and nobody waits there any more
                _resolve(tasks, result, loop_closed=True)


def _resolve(tasks: list[tuple[_Task, int]], result: _Result, *, loop_closed: bool = False) -> None:
    for (_, _, future, unheard), number in tasks:
        heard = not (loop_closed or future.done())
        if result.failure is None:  # as nearly always: a share of a success takes longer to make
            if heard:
                future.set_result(result.positions[number])
            continue
        try:
            (position,) = result.share(number, 1)
            if heard:
                future.set_result(position)
        except AuditLogError as error:
            if heard:
                future.set_exception(error)
            elif isinstance(error, WriteFailed):
                unheard(error)
