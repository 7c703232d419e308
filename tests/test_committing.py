"""Group commit by itself: who leads, and what becomes of those behind one that fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest

from auditlog import (
    DiskFull,
    LockTimeout,
    LoggerClosed,
    Position,
    ReentrantWrite,
    SyncFailed,
    WriteFailed,
)
from auditlog.committing import GroupCommit
from auditlog.events.codec import Encoded
from tests.helpers import until

DAY = date(2024, 8, 12)


def event(number: int) -> Encoded:
    return b"", number, b""


class Appender:
    """An append that waits, from the first on, until it may go on; then it raises `error`, if any.

    `batches` are the events that it was called with; the first `whole` of them are written.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go_on = threading.Event()
        self.errors: list[BaseException | None] = []
        self.whole = 0

    def __call__(self, events: Sequence[Encoded]) -> list[Position]:
        self.batches.append([number for _, number, _ in events])
        assert self.go_on.wait(10)
        positions = [Position(DAY, number) for _, number, _ in events]
        error = self.errors.pop(0) if self.errors else None
        if error is None:
            return positions
        if isinstance(error, WriteFailed):
            error = type(error)(error.path, error.reason, tuple(positions[: self.whole]))
        raise error


class Callers:
    """Threads that append an event each; `outcomes` says what became of it."""

    def __init__(self, group: GroupCommit) -> None:
        self._group = group
        self._threads: list[threading.Thread] = []
        self.outcomes: dict[int, Position | BaseException] = {}

    def start(self, number: int) -> None:
        """Let a thread append event `number`, and return when it leads or waits."""
        waiting = len(self._group._waiters)
        thread = threading.Thread(target=self._append, args=(number,))
        thread.start()
        self._threads.append(thread)
        until(lambda: len(self._group._waiters) > waiting or (not waiting and self._group._led))

    def _append(self, number: int) -> None:
        try:
            (self.outcomes[number],) = self._group.append((event(number),))
        except BaseException as error:
            self.outcomes[number] = error

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.fixture
def append() -> Appender:
    return Appender()


@pytest.fixture
def group(append: Appender) -> GroupCommit:
    return GroupCommit("/log", append, lambda: None, 10)


@pytest.fixture
def callers(group: GroupCommit, append: Appender) -> Callers:
    """One that leads, and three that wait behind it."""
    callers = Callers(group)
    callers.start(0)
    until(lambda: append.batches)
    for number in (1, 2, 3):
        callers.start(number)
    return callers


def test_those_who_wait_are_written_together_in_their_order(append: Appender, callers: Callers) -> None:
    append.go_on.set()
    callers.join()
    assert append.batches == [[0], [1, 2, 3]]
    assert callers.outcomes == {number: Position(DAY, number) for number in range(4)}


def test_each_has_its_own_share_of_a_failure(append: Appender, callers: Callers) -> None:
    append.errors = [None, DiskFull("/log", "full")]
    append.whole = 2
    append.go_on.set()
    callers.join()
    failure = callers.outcomes.pop(3)
    assert callers.outcomes == {number: Position(DAY, number) for number in range(3)}
    assert isinstance(failure, DiskFull)
    assert failure.positions == ()


def test_another_error_is_everybodys(append: Appender, callers: Callers) -> None:
    append.errors = [None, LoggerClosed("/log")]
    append.go_on.set()
    callers.join()
    raised = [callers.outcomes[number] for number in (1, 2, 3)]
    assert {type(each) for each in raised} == {LoggerClosed}
    assert len({id(each) for each in raised}) == 3  # each with a traceback of its own


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a soft time limit")])
def test_an_interrupted_leader_leaves_nobody_waiting(
    append: Appender, group: GroupCommit, callers: Callers, error: BaseException
) -> None:
    append.errors = [None, error]
    append.go_on.set()
    callers.join()
    assert callers.outcomes[1] is error  # a handler's, in the leader's thread: it is nobody else's
    for number in (2, 3):
        assert str(callers.outcomes[number]).startswith("audit log /log: the write was interrupted")
    assert group.append((event(4),)) == [Position(DAY, 4)]


def test_an_interrupted_first_leader_hands_over(append: Appender, callers: Callers) -> None:
    append.errors = [KeyboardInterrupt()]
    append.go_on.set()
    callers.join()
    assert isinstance(callers.outcomes[0], KeyboardInterrupt)
    assert callers.outcomes[3] == Position(DAY, 3)


def test_a_batch_has_an_end(append: Appender, group: GroupCommit, callers: Callers) -> None:
    many = threading.Thread(target=group.append, args=([event(number) for number in range(10, 2000)],))
    many.start()
    until(lambda: len(group._waiters) == 4)
    callers.start(5)
    append.go_on.set()
    many.join()
    callers.join()
    assert [len(batch) for batch in append.batches] == [1, 3 + 1990, 1]


def test_a_handler_that_writes_or_closes_inside_an_append_is_refused() -> None:
    def reenter(events: Sequence[Encoded]) -> list[Position]:
        for call in (lambda: reentrant.append(events), reentrant.refuse_reentry):
            with pytest.raises(ReentrantWrite):
                call()
        return [Position(DAY, 0)]

    reentrant = GroupCommit("/log", reenter, lambda: None, 10)
    assert reentrant.append((event(0),)) == [Position(DAY, 0)]
    reentrant.refuse_reentry()


def test_nobody_waits_longer_than_the_timeout(append: Appender) -> None:
    group = GroupCommit("/log", append, lambda: None, 0.05)
    callers = Callers(group)
    callers.start(0)
    until(lambda: append.batches)
    with pytest.raises(LockTimeout, match=r"other threads wrote and synced for 0\.05 s"):
        group.append((event(1),))
    append.go_on.set()
    callers.join()
    assert append.batches == [[0]]
    assert group.append((event(2),)) == [Position(DAY, 2)]


def test_after_a_failed_sync_each_is_told_what_became_of_its_own_event(
    append: Appender, callers: Callers
) -> None:
    class Error(SyncFailed):
        """Raised as the engine does, because of the failure of the rest."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.__cause__ = DiskFull("/log", "full")

    append.errors = [None, Error("/log", "a sync failed")]
    append.whole = 2
    append.go_on.set()
    callers.join()
    assert [type(callers.outcomes[number]) for number in (1, 2, 3)] == [Error, Error, DiskFull]
