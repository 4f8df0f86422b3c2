"""Print the progress of a long run to stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from torch import nn

from bnguard.recording.watch import watch
from bnguard.torch_internals import global_hook
from bnguard.words import count_text

_EVERY: Final = 64  # forwards of modules between two readings of the clock


class Progress(global_hook.Listener):
    """Prints a line to stderr every ``seconds`` seconds while a watch records.

    Args:
        record: The watch.
        seconds: The time between two lines.
    """

    def __init__(self, record: watch, seconds: float) -> None:
        self._record = record
        self._seconds = seconds
        self._start = self._last = time.monotonic()
        self._forwards = 0

    def __enter__(self) -> None:
        global_hook.listen(self)

    def __exit__(self, *_: object) -> None:
        global_hook.unlisten(self)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Prints a line if it is time."""
        self._forwards += 1
        if self._forwards % _EVERY == 0:
            now = time.monotonic()
            if now - self._last >= self._seconds:
                self._last = now
                print(self._line(now - self._start), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        steps, updates, layers = self._record.counts
        minutes, rest = divmod(int(seconds), 60)
        return (
            f"bnguard: {minutes}:{rest:02}, {count_text(steps, 'optimizer step')}, {count_text(updates, 'update')} of "
            f"{count_text(layers, 'layer')}"
        )
