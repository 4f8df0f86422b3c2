"""What a watch has noted and not recorded yet.

Note [Two parts of a record]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Between two operations of torch little Python is in the caches of the processor, so that each line costs several times
as much as in a loop. So what happens is noted in a few lines, with all that later lines could no longer read, and
recorded later, many entries one after the other, in the order in which they were noted.

An entry can wait, over many steps, if recording it reads nothing but what was noted: not the modules, which may have
changed by then. That holds for an update from the same line in the same mode as the last one of its layer, as long as
the optimizers are the same. All other entries make the journal due: it is worked up when the call of the model is over,
before the next backward pass or optimizer step, and before anything else that counts, as an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_MOST: Final = 1024  # entries that wait: the longer they do, the more of them find the code in the caches


class Journal:
    """Calls that are to be made later. See Note [Two parts of a record].

    Args:
        lock: Held while they are made.

    Attributes:
        entries: For each call the function and its arguments.
        is_due: Whether some of them cannot wait longer than to the next ``catch_up()``.
    """

    __slots__ = ("_lock", "entries", "is_due")

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.entries: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.is_due = False

    def catch_up(self) -> None:
        """Makes the calls if they are due, or many."""
        if self.is_due or len(self.entries) >= _MOST:
            self.work_up()

    def work_up(self) -> None:
        """Makes all calls. One that is interrupted is the only one that is lost."""
        if not self.entries:
            return
        with self._lock:
            self.is_due = False
            while True:
                try:
                    record, arguments = self.entries.pop(0)
                except IndexError:  # also where a reader has come in between, as a signal handler may
                    return
                record(*arguments)
