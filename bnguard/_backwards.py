"""Count backward passes, while somebody wants to know whether one lies between two forwards."""

from __future__ import annotations

import threading
from typing import Any, Final

from torch import autograd

__all__ = ["BackwardCounter"]

_NAME: Final = "_engine_run_backward"  # what torch.autograd.backward() and grad() call, once each
_lock: Final = threading.Lock()
_open: tuple[BackwardCounter, ...] = ()
_engine: Any = None  # torch's own, while ours is in its place


class BackwardCounter:
    """The backward passes of this process while it is open. Opening or closing twice does nothing.

    Attributes:
        count: How many have begun.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def open(self) -> None:
        """Counts from now on."""
        global _open, _engine
        with _lock:
            if self not in _open:
                _open = (*_open, self)
            if _engine is None:
                _engine = getattr(autograd, _NAME)
                setattr(autograd, _NAME, _run_backward)

    def close(self) -> None:
        """Counts no more."""
        global _open, _engine
        with _lock:
            _open = tuple([counter for counter in _open if counter is not self])
            if not _open and getattr(autograd, _NAME) is _run_backward:
                setattr(autograd, _NAME, _engine)
                _engine = None


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    for counter in _open:
        counter.count += 1
    return _engine(*args, **kwargs)
