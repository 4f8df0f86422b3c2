"""A reentrant lock that Ctrl-C never leaves locked.

From Python 3.14 on ``with lock:`` may be interrupted after the lock was taken and before Python knows that it is to be
released: other threads then wait for ever.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Final


class _Exit:
    """``__exit__`` of the lock inside, which is not in Python: it cannot be interrupted in its first line.

    ``with`` looks it up before it enters. An ``ExitStack`` takes it from the class, and calls it with the lock.
    """

    def __get__(self, lock: _ReentrantLock | None, owner: type[_ReentrantLock]) -> Callable[..., None]:
        if lock is None:
            return lambda lock, *exception: lock._lock.__exit__(*exception)
        leave: Callable[..., None] = lock._lock.__exit__
        return leave


class _ReentrantLock:
    __slots__ = ("_at_fork_reinit", "_is_owned", "_lock")

    def __init__(self) -> None:
        lock: Any = threading.RLock()
        self._lock = lock
        self._is_owned = lock._is_owned
        self._at_fork_reinit = lock._at_fork_reinit

    def __enter__(self) -> None:
        lock = self._lock
        depth = lock._recursion_count()
        try:
            lock.acquire()
        except BaseException:
            if lock._recursion_count() > depth:
                lock.release()
            raise

    __exit__ = _Exit()


RLock: Final[Callable[[], Any]] = threading.RLock if sys.version_info < (3, 14) else _ReentrantLock
