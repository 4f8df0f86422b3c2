"""One thread at a time, and one thing at a time in a thread.

Between any two lines the garbage collector may close a generator with a block open, and a signal handler may do
anything. A lock does not keep these out: they run in the thread that holds it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from bnguard.torch_internals.fork import renew_after_fork

__all__ = ["Turn", "finish"]


class Turn:
    """A lock; what is to end while this thread has it ends right afterwards."""

    __slots__ = ("_depth", "_later", "_lock", "_owner")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = 0
        self._depth = 0
        self._later: deque[Callable[[], None]] = deque()
        renew_after_fork(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        try:
            if self._later:
                self._catch_up()
        finally:
            self._lock.release()

    def end(self, ending: Callable[[], None]) -> None:
        """Takes a turn to end something; in the middle of this thread's own, puts it off until that is over.

        Args:
            ending: Does it. Put off, it is called once more if it fails, because of Ctrl-C say.
        """
        if self._depth and self._owner == threading.get_ident():
            self._later.append(ending)
            return
        with self:
            ending()

    def _catch_up(self) -> None:
        failure: BaseException | None = None
        while self._later and not self._depth:
            self._depth += 1
            try:
                finish(self._later[0])
            except BaseException as error:
                failure = failure or error
            finally:
                self._later.popleft()
                self._depth -= 1
        if failure is not None:
            raise failure

    def _at_fork_reinit(self) -> None:
        if self._depth and self._owner == threading.get_ident():
            return  # what has forked is in the middle of its turn, and goes on
        self._lock = threading.RLock()
        self._depth = 0
        self._later.clear()


def finish(ending: Callable[[], None]) -> None:
    """Runs what may be run again, once more if it was interrupted, by Ctrl-C say."""
    try:
        ending()
    except BaseException:
        ending()
        raise
