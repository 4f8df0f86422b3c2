"""Where the user's code called the models whose forwards are under way, and from where in them layers are called."""

from __future__ import annotations

import inspect
from types import CodeType, FrameType
from typing import Final, NamedTuple

from torch import nn
from torch.optim.swa_utils import update_bn

from bnguard.layers.tree import WRAPPERS
from bnguard.torch_internals.callsite import CallSite, function_of, origin_of

__all__ = ["ModelCall", "ModelCalls"]

# torch calls each module through it, once.
_CALL: Final = nn.Module.__call__.__code__
# Not of the decorator, whose code all functions under no_grad() share.
_CALIBRATES: Final = inspect.unwrap(update_bn).__code__
_MOST: Final = 4096


class ModelCall(NamedTuple):
    """How a forward has come about.

    Attributes:
        site: The user's line that called the outermost module, wrappers such as ``DistributedDataParallel`` aside; of a
            forward that backward recomputes, the line that called ``backward()`` where that is known.
        place: The instruction that called this module, in whatever code.
        calibrates: Whether that is a part of ``torch.optim.swa_utils.update_bn``.
        wraps: Whether the module is such a wrapper.
        number: Of the outermost call, in the order in which those began.
    """

    site: str
    place: tuple[CodeType, int] | None
    calibrates: bool
    wraps: bool
    number: int = 0


_new_call: Final = tuple.__new__  # in half the time of the class itself


class ModelCalls:
    """The calls of modules that are under way. To be told of each as it begins, so that a few frames tell its line.

    A frame is known by its id: whoever has that later has told so before it runs anything.
    """

    def __init__(self) -> None:
        self._by_frame: dict[int, ModelCall] = {}
        self._lines: dict[tuple[CodeType, int], str] = {}
        self._begun = 0

    def begin(self, module: nn.Module, frame: FrameType | None) -> ModelCall:
        """Takes in the call of a module. ``frame`` is one that it runs, or that of torch's call itself."""
        frame = _call_at(frame)
        wraps = type(module).__name__ in WRAPPERS
        if frame is None:
            return ModelCall("<unknown>", None, calibrates=False, wraps=wraps)
        caller = frame.f_back
        parent = _call_at(caller)
        outer = None if parent is None else self._by_frame.get(id(parent))
        place = None if caller is None else (caller.f_code, caller.f_lasti)
        if outer is None or outer.wraps:
            site, calibrates = self._user_line(frame) if parent is None or outer is not None else self._search(frame)
            self._begun += 1
            call = ModelCall(site, place, calibrates, wraps, self._begun)
        else:
            call = _new_call(ModelCall, (outer.site, place, outer.calibrates, wraps, outer.number))
        if len(self._by_frame) >= _MOST:
            self._by_frame.clear()
        self._by_frame[id(frame)] = call
        return call

    def under_way(self, frame: FrameType | None) -> ModelCall | None:
        """The call that ``begin`` has taken in and whose end is near; None if there was none."""
        frame = _call_at(frame)
        return None if frame is None else self._by_frame.get(id(frame))

    def _search(self, frame: FrameType) -> tuple[str, bool]:
        """The same for a call inside calls that began before anybody was told."""
        outermost, current = frame, _call_at(frame.f_back)
        while current is not None:
            if type(current.f_locals.get("self")).__name__ not in WRAPPERS:
                outermost = current
            current = _call_at(current.f_back)
        return self._user_line(outermost)

    def _user_line(self, frame: FrameType) -> tuple[str, bool]:
        """The innermost line of the user outside of a frame, else of a package; whether update_bn is on the way."""
        found: FrameType | None = None
        fallback: FrameType | None = None
        calibrates = False
        current = frame.f_back
        while current is not None:
            code = current.f_code
            if code is _CALIBRATES:
                calibrates = True
            origin = origin_of(code.co_filename)
            if origin == "user":
                found = current
                break
            if origin == "library" and fallback is None:
                fallback = current
            current = current.f_back
        found = found or fallback
        return "<unknown>" if found is None else self._text(found), calibrates

    def _text(self, frame: FrameType) -> str:
        key = (frame.f_code, frame.f_lasti)
        text = self._lines.get(key)
        if text is None:
            if len(self._lines) >= _MOST:  # code that is made again and again
                self._lines.clear()
            self._lines[key] = text = str(
                CallSite(frame.f_code.co_filename, frame.f_lineno, function_of(frame.f_code), 0)
            )
        return text


def _call_at(frame: FrameType | None) -> FrameType | None:
    """The innermost call of a module at or outside of a frame."""
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame
