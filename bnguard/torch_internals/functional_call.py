"""Whether certain code of torch is running further out."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Final

from torch.nn.utils import stateless
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["in_functional_call", "in_reentrant_checkpoint", "is_below", "lent_tensors"]

_FUNCTIONAL_CALL: Final = stateless._functional_call.__code__
_CHECKPOINT: Final = CheckpointFunction.forward.__code__


def is_below(code: CodeType) -> bool:
    """Whether a frame of this code is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def in_functional_call() -> bool:
    """Whether ``torch.func.functional_call`` has lent a model other tensors."""
    return is_below(_FUNCTIONAL_CALL)


def lent_tensors() -> frozenset[int]:
    """The ids of the tensors that ``functional_call`` has lent a model; empty outside of one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FUNCTIONAL_CALL:
        frame = frame.f_back
    lent = {} if frame is None else frame.f_locals.get("parameters_and_buffers")
    dicts = lent if isinstance(lent, (list, tuple)) else [lent]
    return frozenset([id(tensor) for tensors in dicts if isinstance(tensors, dict) for tensor in tensors.values()])


def in_reentrant_checkpoint() -> bool:
    """Whether this is the first forward of a region under ``checkpoint(use_reentrant=True)``, which records nothing."""
    return is_below(_CHECKPOINT)
