"""Run somebody's script or module as Python itself does, and see how it ends."""

from __future__ import annotations

import io
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["Ending", "run_module", "run_script"]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a script has ended.

    Attributes:
        exit_code: What Python would have exited with.
        error: The exception that nobody caught; None also where the script has called ``sys.exit()``.
    """

    exit_code: int
    error: BaseException | None = None

    def show(self) -> None:
        """Prints the traceback as Python does: the script's own frames."""
        if self.error is not None:
            own = _own_traceback(self.error.__traceback__)
            traceback.print_exception(type(self.error), self.error, own)


def run_script(path: str, args: Sequence[str]) -> Ending:
    """Runs ``python path args...`` in this process, with ``__main__``, ``sys.argv`` and ``sys.path`` of its own.

    Raises:
        OSError: The file cannot be read.
        SyntaxError: It is no Python.
    """
    full_path = os.path.abspath(path)
    with io.open_code(full_path) as file:
        code = compile(file.read(), full_path, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    main.__file__ = full_path
    main.__dict__["__builtins__"] = __builtins__
    with _surroundings([path, *args], os.path.dirname(os.path.realpath(path)), main):
        return _ending_of(lambda: exec(code, main.__dict__))


def run_module(name: str, args: Sequence[str]) -> Ending:
    """Runs ``python -m name args...`` in this process.

    Raises:
        ImportError: There is no such module.
    """
    runpy._get_module_details(name)  # type: ignore[attr-defined]  # before anything of it runs
    with _surroundings([name, *args], os.getcwd(), None):
        return _ending_of(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _ending_of(run: Any) -> Ending:
    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return Ending(end.code or 0)
        print(end.code, file=sys.stderr)
        return Ending(1)
    except KeyboardInterrupt as error:
        return Ending(130, error)
    except BaseException as error:
        return Ending(1, error)
    return Ending(0)


@contextmanager
def _surroundings(argv: list[str], folder: str, main: ModuleType | None) -> Iterator[None]:
    """What the script finds in ``sys``; put back afterwards."""
    argv_before, path_before, main_before = sys.argv, sys.path[:], sys.modules["__main__"]
    try:
        sys.argv = argv
        sys.path[0:1] = [folder]
        if main is not None:
            sys.modules["__main__"] = main
        yield
    finally:
        sys.argv, sys.path[:] = argv_before, path_before
        sys.modules["__main__"] = main_before


def _own_traceback(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that have started the script."""
    starters = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in starters:
        trace = trace.tb_next
    return trace
