"""Which processes that a script starts have updated running statistics, where the watch of their parent sees nothing.

Note [Child processes]
~~~~~~~~~~~~~~~~~~~~~~
A gate that is green because the training ran in another process is worse than none, and a data loader has worker
processes in every script. So what counts is an update: a child leaves a line in a file of its parent at its first one.
A fork has the hooks already. A process that ``multiprocessing`` starts anew gets the listener with the data that it is
prepared with. Of a Python that ``subprocess`` starts nothing is known; it counts if no model ran in this process, as in
that of a launcher.
"""

from __future__ import annotations

import functools
import multiprocessing.spawn
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Self

from bnguard.cli.child_process import Start
from bnguard.cli.first_update import tell_updates
from bnguard.torch_internals.fork import call_in_children
from bnguard.torch_internals.patching import AttributePatch


class Children:
    """The processes that are started inside a ``with`` block."""

    def __init__(self) -> None:
        self._path = ""
        self._process = os.getpid()
        self._pythons = 0  # started by subprocess

    def __enter__(self) -> Self:
        handle, self._path = tempfile.mkstemp(prefix="bnguard-")
        os.close(handle)
        _preparation.add(self)
        _popen.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _popen.remove(self)
        _preparation.remove(self)
        if os.getpid() == self._process:
            with suppress(OSError):
                os.remove(self._path)

    def note(self, *, has_run_models: bool) -> str:
        """What was not watched; empty if that is nothing."""
        try:
            with open(self._path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except OSError:  # the script has emptied the folder of temporary files
            lines = []
        if lines:
            were = "were" if len(lines) > 1 else "was"
            return (
                f"{_processes(len(lines), 'child')} updated running statistics, first at {lines[0]}, and {were} not "
                "watched: this report is without them. bnguard.watch() in the function that they run records them."
            )
        if self._pythons and not has_run_models:
            return (
                f"No model ran in this process. {_processes(self._pythons, 'Python')} started by it "
                f"{'were' if self._pythons > 1 else 'was'} not watched: have them run 'bnguard run SCRIPT'; with "
                "torchrun 'torchrun --no-python bnguard run SCRIPT'."
            )
        return ""

    def started(self, command: Any) -> None:
        """Counts a command that is a Python."""
        first = command[0] if isinstance(command, (list, tuple)) and command else command
        if isinstance(first, (str, bytes, os.PathLike)):
            program = os.fsdecode(first)
            self._pythons += program == sys.executable or os.path.basename(program).startswith("python")

    def forked(self) -> None:
        """Listens in a child of this process."""
        tell_updates(self._path)


def _processes(number: int, kind: str) -> str:
    return f"{number} {kind} process{'es' if number > 1 else ''}"


def _with_start(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        data = prepare(*args, **kwargs)
        for children in _preparation.users:
            data["bnguard"] = Start(children._path)
        return data

    return prepared


def _counting(init: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init)
    def counted(popen: Any, *args: Any, **options: Any) -> None:
        for children in _popen.users:
            children.started(args[0] if args else options.get("args"))
        init(popen, *args, **options)

    return counted


_preparation: Final[AttributePatch[Children]] = AttributePatch(
    multiprocessing.spawn, "get_preparation_data", _with_start
)
_popen: Final[AttributePatch[Children]] = AttributePatch(subprocess.Popen, "__init__", _counting)


def _after_fork() -> None:
    for children in _preparation.users:
        children.forked()


call_in_children(_after_fork)
