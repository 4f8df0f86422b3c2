"""Run a script or a module as Python itself does, and return how it ended."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import NamedTuple

from bnguard.errors import StatsChangedError
from bnguard.torch_internals.callsite import end_in_users_line


class Ending(NamedTuple):
    """How a script ended.

    Attributes:
        exit_code: The exit code that Python would have.
        error: The uncaught exception; None if there is none, or if the script called ``sys.exit()``.
    """

    exit_code: int
    error: BaseException | None = None

    @property
    def is_interrupt(self) -> bool:
        """Whether Ctrl-C ended it."""
        return isinstance(self.error, KeyboardInterrupt)

    def show(self) -> None:
        """Prints the exception as Python does, with the script's ``sys.excepthook`` and the script's frames only."""
        if self.error is not None:
            error = self.error.with_traceback(_own_traceback(self.error.__traceback__))
            if isinstance(error, StatsChangedError):
                end_in_users_line(error)
            sys.excepthook(type(error), error, error.__traceback__)


class NotFoundError(ImportError):
    """There is no such module."""


def run_script(path: str, args: Sequence[str]) -> Ending:
    """Runs ``python path args...`` in this process, with its own ``__main__``, ``sys.argv`` and ``sys.path``.

    ``__main__`` remains the script's afterwards: threads, exit handlers and pickles look for its classes there.

    Raises:
        OSError: The file cannot be read.
        SyntaxError: The file is not valid Python.
    """
    full_path = os.path.abspath(path)
    with io.open_code(full_path) as file:
        code = compile(file.read(), full_path, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    main.__file__ = full_path
    main.__loader__ = SourceFileLoader("__main__", full_path)
    main.__dict__.update(__builtins__=builtins, __cached__=None)
    _set_up([path, *args], os.path.dirname(os.path.realpath(path)))
    sys.modules["__main__"] = main
    return _ending_of(lambda: exec(code, main.__dict__))


def run_module(name: str, args: Sequence[str]) -> Ending:
    """Runs ``python -m name args...`` in this process.

    Raises:
        NotFoundError: There is no such module.
    """
    _set_up(["-m", *args], os.getcwd())
    try:
        # This imports the packages that contain the module, as Python does before it runs the module.
        runpy._get_module_details(name, NotFoundError)  # type: ignore[attr-defined]  # private
    except NotFoundError:
        raise
    except BaseException as error:
        return Ending(1, error)
    return _ending_of(lambda: _run_as_main(name))


def _run_as_main(name: str) -> None:
    """Runs a module as ``runpy.run_module()`` does, but ``__main__`` remains the module's afterwards."""
    name, spec, code = runpy._get_module_details(name)  # type: ignore[attr-defined]  # private
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv[0] = spec.origin
    main.__dict__.update(
        __builtins__=builtins,
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )
    exec(code, main.__dict__)


def _ending_of(run: Callable[[], None]) -> Ending:
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


def wait_for_threads(ending: Ending) -> Ending:
    """Waits for pools and for threads that are not daemons, as Python does when the process ends.

    Returns:
        How the script ended: by Ctrl-C, if that interrupts the wait.
    """
    # concurrent.futures and joblib use these to end the threads of their pools, which otherwise wait for work forever.
    last_calls: list[Callable[[], object]] = getattr(threading, "_threading_atexits", [])
    try:
        while last_calls:
            last_calls[-1]()
            del last_calls[-1]  # not twice
        while others := [thread for thread in threading.enumerate() if _is_waited_for(thread)]:
            for thread in others:
                thread.join()
    except KeyboardInterrupt as error:
        return ending if ending.error is not None else Ending(130, error.with_traceback(None))
    except Exception:
        return ending  # Python calls the failing function again, reports it, and does not wait any longer either
    return ending


def _is_waited_for(thread: threading.Thread) -> bool:
    return not thread.daemon and thread is not threading.current_thread()


def _set_up(argv: list[str], folder: str) -> None:
    """Sets what the script finds in ``sys``."""
    sys.argv = argv
    if not sys.flags.safe_path:
        sys.path[0:1] = [folder]


def _own_traceback(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that started the script."""
    starters = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in starters:
        trace = trace.tb_next
    return trace
