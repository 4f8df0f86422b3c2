"""Where the user's code called the model whose forward is under way, and from where in it a layer is called."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Final

from torch import nn
from torch.optim.swa_utils import update_bn

from bnguard._callsite import CallSite, origin_of
from bnguard._tree import WRAPPERS

__all__ = ["ModelCall", "model_call"]

# torch calls each module through it, once.
_CALL: Final = nn.Module.__call__.__code__
_CALIBRATES: Final = update_bn.__code__


@dataclass(frozen=True, slots=True)
class ModelCall:
    """How a forward of a layer has come about.

    Attributes:
        site: The user's line that called the outermost module, wrappers such as ``DistributedDataParallel`` aside; of a
            forward that backward recomputes, the line that called ``backward()`` where that is known.
        place: The instruction that called the layer, in whatever code.
        calibrates: Whether that is a part of ``torch.optim.swa_utils.update_bn``.
    """

    site: str
    place: tuple[CodeType, int] | None
    calibrates: bool


_sites: Final[dict[tuple[CodeType, int], str]] = {}
_MOST_SITES: Final = 4096


def model_call() -> ModelCall:
    """Finds the calls that have led to the forward pre-hook that asks. Nothing is read but the stack."""
    frame: FrameType | None = sys._getframe(1)
    calls: list[FrameType] = []
    calibrates = False
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            calls.append(frame)
        elif code is _CALIBRATES:
            calibrates = True
        frame = frame.f_back
    if not calls:
        return ModelCall(_user_line(sys._getframe(1)), None, calibrates)
    outermost = next((call for call in reversed(calls) if not _is_wrapper(call)), calls[0])
    layer_caller = calls[0].f_back
    place = None if layer_caller is None else (layer_caller.f_code, layer_caller.f_lasti)
    return ModelCall(_user_line(outermost), place, calibrates)


def _is_wrapper(call: FrameType) -> bool:
    module: Any = call.f_locals.get("self")
    return type(module).__name__ in WRAPPERS


def _user_line(frame: FrameType) -> str:
    """The innermost line of the user outside of a frame; else that of an installed package."""
    fallback: FrameType | None = None
    current = frame.f_back
    while current is not None:
        origin = origin_of(current.f_code.co_filename)
        if origin == "user":
            return _line_of(current)
        if origin == "library" and fallback is None:
            fallback = current
        current = current.f_back
    return "<unknown>" if fallback is None else _line_of(fallback)


def _line_of(frame: FrameType) -> str:
    key = (frame.f_code, frame.f_lasti)
    text = _sites.get(key)
    if text is None:
        if len(_sites) >= _MOST_SITES:  # code that is made again and again
            _sites.clear()
        _sites[key] = text = str(CallSite(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, 0))
    return text
