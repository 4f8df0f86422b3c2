"""Count backward passes, while somebody wants to know whether one lies between two forwards."""

from __future__ import annotations

from typing import Any, Final

from torch import autograd

from bnguard.torch_internals.turns import Turn

__all__ = ["BackwardCounter"]

_NAME: Final = "_engine_run_backward"  # what torch.autograd.backward() and grad() call, once each
_turn: Final = Turn()
_open: tuple[BackwardCounter, ...] = ()
_is_in_place = False  # ours
_engine: Any = None  # torch's own; stays, for a pass that has begun


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
        global _open, _engine, _is_in_place
        with _turn:
            if self not in _open:
                _open = (*_open, self)
            if not _is_in_place:
                _engine = getattr(autograd, _NAME)
                setattr(autograd, _NAME, _run_backward)
                _is_in_place = True

    def close(self) -> None:
        """Counts no more."""
        _turn.end(self._close)

    def _close(self) -> None:
        global _open, _is_in_place
        _open = tuple([counter for counter in _open if counter is not self])
        if not _open and getattr(autograd, _NAME) is _run_backward:
            setattr(autograd, _NAME, _engine)
            _is_in_place = False


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    for counter in _open:
        counter.count += 1
    return _engine(*args, **kwargs)
