"""See that a forward is part of a checkpointed region, and whether its backward pass is still to come."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Final

import torch
from torch.utils import checkpoint

__all__ = ["Region", "current_region", "recomputed_held"]

_DEPTH: Final = 60  # frames between a layer and the checkpoint around it, generously
_FORWARD: Final = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD: Final = checkpoint.CheckpointFunction.backward.__code__
_recomputed_held: Final = ContextVar("bnguard_recomputed_held", default=False)


class Region:
    """One run of a checkpointed region, by whichever implementation of ``torch.utils.checkpoint``.

    Args:
        owner: What lives as long as the region's graph: the frame of the non-reentrant implementation, the autograd
            context of the reentrant one.

    Attributes:
        key: The same for all forwards of one run.
        is_recomputed: Whether this forward is the recomputation.
        is_recomputed_held: Whether the recomputation will update nothing, wherever it takes place.
    """

    __slots__ = ("_owner", "is_recomputed", "is_recomputed_held", "key")

    def __init__(self, owner: Any) -> None:
        self.key = id(owner)
        self._owner = weakref.ref(owner)
        self.is_recomputed = False
        self.is_recomputed_held = _recomputed_held.get()

    def is_pending(self) -> bool:
        """Whether a backward pass may still recompute the region: its graph lives, and none has done so."""
        owner = self._owner()
        if owner is None or self.is_recomputed:
            return False
        holders = getattr(owner, "weak_holders", None)
        if holders is None:
            return True
        return any(holder() is not None for holder in holders) and not any(owner.is_recomputed.values())


@contextmanager
def recomputed_held() -> Iterator[None]:
    """Around the forward of a region whose recomputation is going to be held."""
    token = _recomputed_held.set(True)
    try:
        yield
    finally:
        _recomputed_held.reset(token)


def current_region() -> Region | None:
    """The checkpointed region that this thread runs, in the forward or again in the backward pass; None outside.

    Of the non-reentrant implementation only the forward is told: its frame knows itself whether it was recomputed.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003  # takes no keyword
    if hooks is not None:
        for cell in hooks[0].__closure__ or ():
            if isinstance(cell.cell_contents, checkpoint._CheckpointFrame):
                return Region(cell.cell_contents)
        return None
    in_backward = torch._C._current_graph_task_id() != -1
    if torch.is_grad_enabled() != in_backward:
        return None  # the reentrant forward runs without gradients, its recomputation with them
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if frame.f_code is _FORWARD or frame.f_code is _BACKWARD:
            region = Region(frame.f_locals["ctx"])
            region.is_recomputed = frame.f_code is _BACKWARD
            return region
        frame = frame.f_back
    return None
