"""The beginning of a process that ``multiprocessing`` starts anew in a watched run. Importing this imports no torch."""

from __future__ import annotations

import sys
from multiprocessing.process import BaseProcess
from typing import Any, Final

_CODE: Final = """
try:
    from bnguard.cli.child_process import follow
except ImportError:
    pass
else:
    follow({path!r})
"""


class Start:
    """What a new process gets from its parent. Unpickling it calls ``follow()``, if bnguard can be imported there.

    Args:
        path: The file in which the process is to leave a line.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (_CODE.format(path=self._path), {})


def follow(path: str) -> None:
    """Lets this process say whether it updates running statistics, once it has imported the script."""
    run = BaseProcess._bootstrap  # type: ignore[attr-defined]  # private

    def run_followed(process: BaseProcess, *args: Any, **kwargs: Any) -> Any:
        if "torch" in sys.modules:
            from bnguard.cli.first_update import tell_updates

            tell_updates(path)
        return run(process, *args, **kwargs)

    BaseProcess._bootstrap = run_followed  # type: ignore[attr-defined]  # private
