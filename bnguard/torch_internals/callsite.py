"""The user's line: where, in code that is neither torch's nor ours, something was called."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from dataclasses import dataclass, field
from types import CodeType, FrameType, TracebackType
from typing import Literal

import torch
import wrapt

__all__ = [
    "CallSite",
    "Origin",
    "call_site",
    "causes_of",
    "end_in_users_line",
    "function_of",
    "is_machinery",
    "origin_of",
]

Origin = Literal["machinery", "library", "user"]


@dataclass(frozen=True, slots=True)
class CallSite:
    """One line of the user's code.

    Attributes:
        filename: Path as the interpreter knows it.
        lineno: Line number, from 1.
        function: Name of the function, ``"<module>"`` at top level; a comprehension belongs to its function.
        stacklevel: What ``warnings.warn`` needs, when called from the caller of ``call_site``, to point here.
        offset: Of the instruction in the function's code, in bytes: tells places on one line apart.
    """

    filename: str
    lineno: int
    function: str
    stacklevel: int
    offset: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{_short(self.filename)}:{self.lineno} in {self.function}"


def call_site() -> CallSite:
    """Finds the innermost frame of the user's code.

    That is the innermost frame outside torch, bnguard, the standard library and every installed package; where there
    is none (a command-line tool of an installed package), the innermost one outside torch and bnguard.
    """
    frame: FrameType | None = sys._getframe(1)
    stacklevel = 1
    fallback: CallSite | None = None
    outermost = CallSite("<unknown>", 0, "<unknown>", 1)
    while frame is not None:
        origin = "machinery" if _is_made_by_a_tracer(frame) else origin_of(frame.f_code.co_filename)
        if origin != "machinery":
            site = _site(frame, stacklevel)
            if origin == "user":
                return site
            fallback = fallback or site
        outermost = _site(frame, stacklevel)
        frame = frame.f_back
        stacklevel += 1
    return fallback or outermost


def _site(frame: FrameType, stacklevel: int) -> CallSite:
    code = frame.f_code
    return CallSite(code.co_filename, frame.f_lineno, function_of(code), stacklevel, frame.f_lasti)


_COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>")


def function_of(code: CodeType) -> str:
    """The name of the function that code is part of."""
    path = [part for part in code.co_qualname.split(".") if part != "<locals>" and part not in _COMPREHENSIONS]
    return path[-1] if path else "<module>"


def is_machinery(filename: str) -> bool:
    """Whether the code of a file is torch's or bnguard's."""
    return origin_of(filename) == "machinery"


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path)) + os.sep


_BNGUARD = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the package: two floors up
_DEMO = os.path.join(_BNGUARD, "cli", "demo", "__init__.py")  # plays the user
_MACHINERY = (_folder(torch.__file__), _BNGUARD, _folder(wrapt.__file__))
_LIBRARIES = tuple(
    {os.path.join(sysconfig.get_paths()[key], "") for key in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def _is_made_by_a_tracer(frame: FrameType) -> bool:
    """Whether this is the lambda, in no file or module, in which ``make_fx`` and ``torch.export`` wrap a function."""
    code = frame.f_code
    return code.co_filename == "<string>" and code.co_name == "<lambda>" and "__name__" not in frame.f_globals


@functools.lru_cache(maxsize=4096)
def origin_of(filename: str) -> Origin:
    """Whose code a file is: torch's and bnguard's, that of another installed package, or the user's."""
    path = os.path.abspath(filename) if not filename.startswith("<") else filename
    if path == _DEMO:
        return "user"
    if path.startswith(_MACHINERY) or filename.startswith("<eval_with_key>"):
        return "machinery"
    if path.startswith(_LIBRARIES) or filename.startswith("<frozen "):
        return "library"
    return "user"


def _short(filename: str) -> str:
    """The path relative to the working directory where it lies below it."""
    if filename.startswith("<"):
        return filename
    try:
        relative = os.path.relpath(filename)
    except (OSError, ValueError):  # the working directory is gone, or another drive
        return filename
    return filename if relative.startswith(os.pardir) else relative


def end_in_users_line(error: BaseException) -> None:
    """Has the traceback of an error of ours end in the user's line, where torch called the layer."""
    last: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None:
        if not is_machinery(trace.tb_frame.f_code.co_filename):
            last = trace
        trace = trace.tb_next
    if last is not None:
        last.tb_next = None


def causes_of(error: BaseException) -> list[BaseException | None]:
    """The exceptions that one was raised from, while handling, or that it holds: groups, and doctest's wrapper."""
    causes = [error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        causes += error.exceptions
    held = getattr(error, "exc_info", None)  # doctest.UnexpectedException
    if isinstance(held, tuple) and len(held) == 3 and isinstance(held[1], BaseException):
        causes.append(held[1])
    return causes
