"""What must happen around `os.fork` to everything that holds a lock or a descriptor of its own."""

from __future__ import annotations

import os
import threading
import weakref


class Forkable:
    """Something that a fork must find at rest, and that a child must not share."""

    def before_fork(self) -> None:
        """Come to rest; the forking thread holds whatever this takes until after the fork."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Leave what is the parent's. Only the forking thread exists here."""


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()
_lock = threading.Lock()  # protects _registered; at a fork it is taken before all other locks
_forking = threading.local()  # those that came to rest for the fork of this thread


def register(forkable: Forkable) -> None:
    """Take part in every fork from now on, for as long as somebody else refers to it."""
    with _lock:
        _registered.add(forkable)


def forget(forkable: Forkable) -> None:
    """Take part in no fork any more."""
    with _lock:
        _registered.discard(forkable)


def _before() -> None:
    _lock.acquire()
    _forking.all = list(_registered)
    for forkable in _forking.all:
        forkable.before_fork()


def _after_in_parent() -> None:
    for forkable in _forking.all:
        forkable.after_fork_in_parent()
    _forking.all = []
    _lock.release()


def _after_in_child() -> None:
    global _lock
    for forkable in _forking.all:
        forkable.after_fork_in_child()
    _forking.all = []
    _lock = threading.Lock()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
