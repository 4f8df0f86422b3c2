"""From which line the user's code called the models that are running, and from where in them layers are called."""

from __future__ import annotations

import inspect
from types import CodeType, FrameType
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bnguard.torch_internals.callsite import (
    CALIBRATES,
    MODULE_CALL,
    function_of,
    origin_of,
    path_in_packages,
    place_text,
)
from bnguard.torch_internals.functional_call import in_reentrant_checkpoint
from bnguard.torch_internals.wrappers import WRAPPERS, runs_a_step

# Unwrapped: all functions decorated with no_grad() share the code of the wrapper.
CALIBRATES.add(inspect.unwrap(update_bn).__code__)
_MOST: Final = 4096


class ModelCall(NamedTuple):
    """How a module was called.

    Attributes:
        site: The user's line that called the outermost module other than a wrapper such as
            ``DistributedDataParallel``, and in brackets that of an installed package in between; for a forward that
            backward recomputes, the line that called ``backward()`` if it is known.
        calibrates: Whether the call is part of ``torch.optim.swa_utils.update_bn`` or of ``recalibrate``.
        wraps: Whether the module is such a wrapper.
        number: The number of the outermost call, in the order in which they began.
        own: The number of this call.
        parent: The number of the call of the module that called this one; 0 for the outermost.
        has_grad: Whether autograd was recording when the outermost call began.
        part: The line in the model that called the part to which the module belongs, if that runs without gradients
            and the rest of the model with them; else empty.
    """

    site: str
    calibrates: bool
    wraps: bool
    number: int = 0
    own: int = 0
    parent: int = 0
    has_grad: bool = True
    part: str = ""


_new_call: Final = tuple.__new__  # takes half the time of calling the class

# What is known of a running call: all of it, or, to be completed if somebody asks, the call of the module around it.
Begun: TypeAlias = ModelCall | tuple[ModelCall, ...]


class ModelCalls:
    """The calls of modules that are running.

    Every call must be announced with ``begin``, so that only a few frames have to be searched for its line, or, of a
    module without modules in it, by removing what is known of its frame. A frame is known by its id: a later frame with
    the same id is announced before it calls anything.

    Attributes:
        by_frame: What is known of the calls, by the id of the frame of ``MODULE_CALL``. In place of ``begin``, the call
            of a layer may be announced by ``(call,)`` with that of the module around it, if that is no wrapper, and
            autograd is recording.
    """

    __slots__ = ("_begun", "_direct", "_lines", "by_frame")

    def __init__(self) -> None:
        self.by_frame: dict[int, Begun] = {}
        self._lines: dict[tuple[int, int, str], tuple[str, CodeType]] = {}
        self._direct: dict[tuple[int, int], tuple[str, CodeType]] = {}  # of user code
        self._begun = 0

    def begin(self, module: nn.Module, frame: FrameType | None) -> ModelCall:
        """Announces a call of a module with this frame of ``MODULE_CALL``."""
        wraps = type(module).__name__ in WRAPPERS
        if frame is None:
            return ModelCall("<unknown>", calibrates=False, wraps=wraps)
        is_outermost, outer, around = True, None, frame.f_back
        while around is not None:
            if around.f_code is MODULE_CALL:
                is_outermost = False
                outer = self.at(around)
                if outer is not None:
                    break
            around = around.f_back
        if outer is None or outer.wraps:
            wraps = wraps or (outer is not None and runs_a_step(module))
            site, calibrates = self._user_line(frame) if is_outermost or outer is not None else self._search(frame)
            self._begun += 1
            call = ModelCall(site, calibrates, wraps, self._begun, self._begun, 0, torch.is_grad_enabled())
        else:
            self._begun += 1
            site, calibrates, _, number, parent, _, has_grad, part = outer
            if has_grad and not part and not torch.is_grad_enabled() and not in_reentrant_checkpoint():
                part, _ = self._user_line(frame)
            call = _new_call(ModelCall, (site, calibrates, wraps, number, self._begun, parent, has_grad, part))
        if is_outermost and len(self.by_frame) >= _MOST:
            self.by_frame.clear()
        self.by_frame[id(frame)] = call
        return call

    def at(self, frame: FrameType) -> ModelCall | None:
        """The call with this frame, if it was announced."""
        begun = self.by_frame.get(id(frame))
        if begun is None or isinstance(begun, ModelCall):
            return begun
        around, call = begun[0], begun[-1]
        if call is around:
            self._begun += 1
            call = around._replace(own=self._begun, parent=around.own)
            self.by_frame[id(frame)] = around, call
        return call

    def under_way(self, frame: FrameType | None) -> ModelCall | None:
        """The innermost announced call that contains ``frame``; None if there is none."""
        frame = call_at(frame)
        return None if frame is None else self.at(frame)

    def _search(self, frame: FrameType) -> tuple[str, bool]:
        """The user's line of a call inside calls that began before the watch."""
        outermost, current = frame, call_at(frame.f_back)
        while current is not None:
            if type(current.f_locals.get("self")).__name__ not in WRAPPERS:
                outermost = current
            current = call_at(current.f_back)
        return self._user_line(outermost)

    def _user_line(self, frame: FrameType) -> tuple[str, bool]:
        """The innermost line of user code outside of a frame, else of a package; whether it calibrates in between.

        Where it is a package that calls the model, a trainer say, its line follows in brackets.
        """
        current = frame.f_back
        if current is not None:
            code = current.f_code
            direct = self._direct.get((id(code), current.f_lasti))
            if direct is not None:
                return direct[0], False
            if origin_of(code.co_filename) == "user":
                line = self._text(current)
                if len(self._direct) < _MOST:
                    self._direct[id(code), current.f_lasti] = line, code  # so that no other code gets its id
                return line, False
        found: FrameType | None = None
        fallback: FrameType | None = None
        called_in = ""
        calibrates = False
        while current is not None:
            code = current.f_code
            if code in CALIBRATES:
                calibrates = True
            origin = origin_of(code.co_filename)
            if origin == "user":
                found = current
                break
            if origin == "library":
                fallback = fallback or current
                path = "" if called_in else path_in_packages(code.co_filename)
                called_in = called_in or (path and f" ({self._text(current, path)})")
            current = current.f_back
        if found is None:
            return "<unknown>" if fallback is None else self._text(fallback), calibrates
        return self._text(found) + called_in, calibrates

    def _text(self, frame: FrameType, path: str = "") -> str:
        code = frame.f_code
        key = (id(code), frame.f_lasti, path)  # the hash of a code object is that of all its instructions
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= _MOST:  # code that is compiled again and again
                self._lines.clear()
            place = place_text(path or code.co_filename, frame.f_lineno)
            self._lines[key] = line = f"{place} in {function_of(code)}", code  # so that no other code gets its id
        return line[0]


def call_at(frame: FrameType | None) -> FrameType | None:
    """The innermost call of a module at or outside of a frame."""
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    return frame
