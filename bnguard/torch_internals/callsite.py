"""Find the line of the user's code that led to a call.

Note [The user's line]
~~~~~~~~~~~~~~~~~~~~~~
A layer is called from the ``forward`` of its model, and the model from a loop. Who asks which line moved statistics
means the loop. So the line is that of the outermost call of a module that the user's code makes itself, other than of
a wrapper such as ``DistributedDataParallel``; the line in the model that calls the layer comes second. What a library
calls, a trainer say, is no line of the user's: then it is the outermost one inside of that. Without a call of a module
it is the innermost line of the user's code. A watch adds the line of the library in brackets.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from contextlib import suppress
from types import CodeType, FrameType, TracebackType
from typing import Final, Literal, NamedTuple

import torch
from torch import nn

from bnguard.torch_internals.wrappers import WRAPPERS
from bnguard.words import roots

Origin = Literal["machinery", "library", "user"]
_MOST: Final = 2**15  # frames, in all stacks that are known at once


class CallSite(NamedTuple):
    """One line of the user's code.

    Attributes:
        filename: Path as in the code object.
        lineno: Line number, from 1.
        function: Name of the function, ``"<module>"`` at top level; a comprehension belongs to its function.
        stacklevel: The ``stacklevel`` for ``warnings.warn``, called from the caller of ``call_site``, to point here.
        offset: Offset of the instruction in the function's bytecode, which distinguishes calls on one line.
        inside: The innermost line of the user's code, if it is another one.
    """

    filename: str
    lineno: int
    function: str
    stacklevel: int
    offset: int = 0
    inside: CallSite | None = None

    def __str__(self) -> str:
        return f"{place_text(self.filename, self.lineno)} in {self.function}"


def call_site() -> CallSite:
    """Finds the user's line. See Note [The user's line].

    The user's code is what is outside torch, bnguard, the standard library and all installed packages. If there is
    none, as in a command-line tool of an installed package, it is what is outside torch and bnguard.
    """
    frame: FrameType | None = sys._getframe(1)
    stacklevel = 1
    innermost: dict[Origin, tuple[FrameType, int]] = {}
    calling: dict[Origin, tuple[FrameType, int]] = {}
    is_called = False  # whether the next frame that is no machinery calls a module
    outermost = sys._getframe(1), 1
    while frame is not None:
        if frame.f_code is MODULE_CALL:
            is_called = is_called or type(frame.f_locals.get("self")).__name__ not in WRAPPERS
        origin = "machinery" if _is_made_by_a_tracer(frame) else origin_of(frame.f_code.co_filename)
        outermost = frame, stacklevel
        if origin != "machinery":
            innermost.setdefault(origin, outermost)
            if is_called:
                calling[origin] = outermost
                is_called = False
        frame = frame.f_back
        stacklevel += 1
    for origin in _PREFERRED:
        if origin in innermost:
            inside = _site(*innermost[origin])
            site = _site(*calling.get(origin, innermost[origin]))
            return site if site == inside else site._replace(inside=inside)
    return _site(*outermost)


class CallSites:
    """Finds the user's line again and again, for calls that mostly come from the same one.

    Names are looked up once a caller: for the same instructions on the stack the answer is the same. No frame is kept,
    which would keep what is in its variables alive.
    """

    __slots__ = ("_frames", "_known")

    def __init__(self) -> None:
        self._frames = 0
        # By ids of code objects and offsets of instructions, from the innermost frame on. The code is kept, so that no
        # other has its id.
        self._known: dict[tuple[int, ...], tuple[CallSite, list[CodeType]]] = {}

    def find(self) -> CallSite:
        """The line of the user's code that is running, as ``call_site()`` finds it."""
        frame: FrameType | None = sys._getframe(1)
        codes, key = [], []
        while frame is not None:
            code = frame.f_code
            codes.append(code)
            key.append(id(code))
            key.append(frame.f_lasti)
            frame = frame.f_back
        known = self._known.get(stack := tuple(key))
        if known is not None:
            return known[0]
        site = _one_further_out(call_site())
        self._frames += len(codes)
        if self._frames > _MOST:  # code that is compiled again and again, or a deep recursion
            self._known.clear()
            self._frames = len(codes)
        self._known[stack] = site, codes
        return site


def _one_further_out(site: CallSite) -> CallSite:
    inside = None if site.inside is None else _one_further_out(site.inside)
    return site._replace(stacklevel=site.stacklevel - 1, inside=inside)


# Every call of a module runs this function once.
MODULE_CALL: Final = nn.Module.__call__.__code__
# Code of functions that run a model to learn its statistics anew; ``recalibrate`` adds its own.
CALIBRATES: Final[set[CodeType]] = set()
_PREFERRED: Final[tuple[Origin, ...]] = ("user", "library")


def _site(frame: FrameType, stacklevel: int) -> CallSite:
    code = frame.f_code
    return CallSite(code.co_filename, frame.f_lineno, function_of(code), stacklevel, frame.f_lasti)


_COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>")


def function_of(code: CodeType) -> str:
    """The name of the function that a code object belongs to; comprehensions belong to the function around them."""
    path = [part for part in code.co_qualname.split(".") if part != "<locals>" and part not in _COMPREHENSIONS]
    return path[-1] if path else "<module>"


def is_machinery(filename: str) -> bool:
    """Whether a file belongs to torch, wrapt or bnguard."""
    return origin_of(filename) == "machinery"


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path)) + os.sep


_BNGUARD = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the package folder, not this one
_DEMO = os.path.join(_BNGUARD, "cli", "demo", "finetune.py")  # the demo counts as a user's script
_PACKAGES: Final = ("purelib", "platlib")


@functools.cache
def _machinery() -> tuple[str, ...]:
    """The folders of torch, bnguard and wrapt, which is not imported for this."""
    wrapt = importlib.util.find_spec("wrapt")
    return _folder(torch.__file__), _BNGUARD, *([_folder(wrapt.origin)] if wrapt and wrapt.origin else [])


@functools.cache
def _folders(*kinds: str) -> tuple[str, ...]:
    """The folders with the installed packages, or with the standard library."""
    import sysconfig  # takes long

    paths = sysconfig.get_paths()
    return tuple({os.path.join(paths[kind], "") for kind in kinds})


def _is_made_by_a_tracer(frame: FrameType) -> bool:
    """Whether this is the lambda in which ``make_fx`` and ``torch.export`` wrap a function, without file or module."""
    code = frame.f_code
    return code.co_filename == "<string>" and code.co_name == "<lambda>" and "__name__" not in frame.f_globals


@functools.lru_cache(maxsize=4096)
def origin_of(filename: str) -> Origin:
    """Classifies a file: torch, wrapt or bnguard ("machinery"), another installed package ("library"), or "user"."""
    path = os.path.abspath(filename) if not filename.startswith("<") else filename
    if path == _DEMO:
        return "user"
    if path.startswith(_machinery()) or filename.startswith("<eval_with_key>"):
        return "machinery"
    if path.startswith(_folders("stdlib", "platstdlib", *_PACKAGES)) or filename.startswith("<frozen "):
        return "library"
    return "user"


def place_text(filename: str, lineno: int) -> str:
    """``"train.py:42"``."""
    return f"{_short(filename)}:{lineno}"


def path_in_packages(filename: str) -> str:
    """The path of a file inside the folder of installed packages, ``trainer/loop.py``; empty if it is elsewhere."""
    return next((filename.removeprefix(folder) for folder in _folders(*_PACKAGES) if filename.startswith(folder)), "")


def _short(filename: str) -> str:
    """The path relative to the working directory or to the last of ``roots`` if it is inside, else unchanged."""
    if filename.startswith("<"):
        return filename
    short = filename
    with suppress(OSError):  # the working directory was removed
        short = _relative(filename, os.getcwd())
    return _relative(filename, roots[-1]) if short == filename and roots else short


@functools.lru_cache(maxsize=64)
def _relative(filename: str, folder: str) -> str:
    try:
        relative = os.path.relpath(filename, folder)
    except (OSError, ValueError):  # it was removed, or is on another drive
        return filename
    return filename if relative.startswith(os.pardir) else relative


def end_in_users_line(error: BaseException) -> None:
    """Cuts the traceback of a bnguard error so that it ends at the user's line, without frames of torch and bnguard."""
    last: TracebackType | None = None
    trace = error.__traceback__
    while trace is not None:
        if not is_machinery(trace.tb_frame.f_code.co_filename):
            last = trace
        trace = trace.tb_next
    if last is not None:
        last.tb_next = None


def causes_of(error: BaseException) -> list[BaseException | None]:
    """The cause and context of an exception, and the exceptions that a group or doctest's wrapper contains."""
    causes = [error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        causes += error.exceptions
    held = getattr(error, "exc_info", None)  # doctest.UnexpectedException
    if isinstance(held, tuple) and len(held) == 3 and isinstance(held[1], BaseException):
        causes.append(held[1])
    return causes
