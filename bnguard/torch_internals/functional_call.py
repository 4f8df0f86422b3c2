"""Detect from the stack that torch calls the current code, as in ``functional_call`` or a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Final

from torch import nn
from torch.nn.utils import stateless
from torch.utils.checkpoint import CheckpointFunction

_FUNCTIONAL_CALL: Final = stateless._functional_call.__code__
_CHECKPOINT: Final = CheckpointFunction.forward.__code__


def is_below(code: CodeType) -> bool:
    """Whether a frame of ``code`` is on the stack of this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def in_functional_call() -> bool:
    """Whether ``torch.func.functional_call`` is running a model with other parameters and buffers."""
    return is_below(_FUNCTIONAL_CALL)


def has_lent_buffers(modules: Iterable[nn.Module]) -> bool:
    """Whether the innermost ``functional_call`` has lent one of the modules a buffer in place of its own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FUNCTIONAL_CALL:
        frame = frame.f_back
    lent = {} if frame is None else frame.f_locals.get("parameters_and_buffers")
    dicts = lent if isinstance(lent, (list, tuple)) else [lent]
    ids = {id(tensor) for tensors in dicts if isinstance(tensors, dict) for tensor in tensors.values()}
    return bool(ids) and any([id(buffer) in ids for module in modules for buffer in module._buffers.values()])


def in_reentrant_checkpoint() -> bool:
    """Whether ``checkpoint(use_reentrant=True)`` runs the first forward of a region, for which autograd is disabled."""
    return is_below(_CHECKPOINT)


_CALLS: Final = (nn.Module._call_impl.__code__, nn.Module._slow_forward.__code__)


def calling_module() -> nn.Module | None:
    """The module whose ``__call__`` called the caller of this function's caller; None if it was other code."""
    frame = sys._getframe(3)
    if frame.f_code not in _CALLS and frame.f_code.co_name != "inner":  # with hooks, a function of _call_impl
        return None
    module = frame.f_locals.get("self")
    return module if isinstance(module, nn.Module) else None


def modules_on_stack() -> Iterator[list[nn.Module]]:
    """Yields the modules among the local variables of each frame of this thread, those of the innermost frame first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield [value for value in frame.f_locals.values() if issubclass(type(value), nn.Module)]
        frame = frame.f_back
