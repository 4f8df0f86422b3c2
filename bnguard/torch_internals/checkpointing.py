"""Detect whether a forward is part of a checkpointed region, and whether its backward pass is still pending."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Final

import torch
from torch.utils import checkpoint

_DEPTH: Final = 60  # upper bound for the frames between a layer and the checkpoint() around it
_FORWARD: Final = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD: Final = checkpoint.CheckpointFunction.backward.__code__
_CHECKPOINT: Final = inspect.unwrap(checkpoint.checkpoint).__code__
_recomputed_held: Final = ContextVar("bnguard_recomputed_held", default=False)


class Region:
    """One run of a checkpointed region, under either implementation of ``torch.utils.checkpoint``.

    Args:
        owner: An object that lives as long as the region's graph: the ``_CheckpointFrame`` of the non-reentrant
            implementation, the autograd context of the reentrant one.

    Attributes:
        key: Identifies the run; equal for all forwards in it.
        is_recomputed: Whether this forward is the recomputation.
        is_recomputed_held: Whether the recomputation will not update any statistics, even after the block.
    """

    __slots__ = ("_owner", "is_recomputed", "is_recomputed_held", "key")

    def __init__(self, owner: Any) -> None:
        self.key = id(owner)
        self._owner = weakref.ref(owner)
        self.is_recomputed = False
        self.is_recomputed_held = _recomputed_held.get()

    def is_pending(self) -> bool:
        """Whether a backward pass may still recompute the region: its graph is alive, and none has done so yet."""
        owner = self._owner()
        if owner is None or self.is_recomputed:
            return False
        holders = getattr(owner, "weak_holders", None)
        if holders is None:
            return True
        return any(holder() is not None for holder in holders) and not any(owner.is_recomputed.values())


# The number of the backward pass that this thread runs; -1 outside of one. Not a function of ours: forwards ask.
running_backward: Final[Callable[[], int]] = torch._C._current_graph_task_id


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass, in which a forward is a recomputation."""
    return running_backward() != -1


@contextmanager
def recomputed_held() -> Iterator[None]:
    """Marks regions that run in this context as ones whose recomputation will not update any statistics."""
    token = _recomputed_held.set(True)
    try:
        yield
    finally:
        _recomputed_held.reset(token)


def _owners_by_hooks() -> list[Any] | None:
    """What the innermost hooks on saved tensors refer to; None without such hooks.

    A non-reentrant region runs under hooks that refer to its frame.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003  # takes no keyword
    return None if hooks is None else [cell.cell_contents for cell in hooks[0].__closure__ or ()]


def _owners_by_stack() -> list[Any] | None:
    """The frame of the non-reentrant region that this thread runs, from the stack; None outside of one."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code is _FORWARD or frame.f_code is _BACKWARD:
            return None
        if frame.f_code is _CHECKPOINT:
            generator = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            owner = None if generator is None else generator.f_locals.get("new_frame")
            return None if owner is None else [owner]
        frame = frame.f_back
    return None


# Before torch 2.8 the hooks cannot be asked for.
_can_see_hooks: Final = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
_possible_owners: Final = _owners_by_hooks if _can_see_hooks else _owners_by_stack


def current_region() -> Region | None:
    """The checkpointed region that this thread runs or recomputes; None outside of a region.

    A recomputation by the non-reentrant implementation gives None; the region's frame records that it took place.
    """
    owners = _possible_owners()
    if owners is not None:
        return next((Region(owner) for owner in owners if isinstance(owner, checkpoint._CheckpointFrame)), None)
    if torch.is_grad_enabled() != is_in_backward():
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
