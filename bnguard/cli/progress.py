"""Say now and then on stderr how far a long run has come."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from torch import nn

from bnguard.recording.watch import watch
from bnguard.torch_internals import global_hook as _every_forward
from bnguard.words import count_text

__all__ = ["Progress"]

_EVERY: Final = 64  # forwards of modules between two looks at the clock


class Progress:
    """A line on stderr every so many seconds, as long as a watch records.

    Args:
        record: The watch.
        seconds: How often.
    """

    def __init__(self, record: watch, seconds: float) -> None:
        self._record = record
        self._seconds = seconds
        self._start = self._last = time.monotonic()
        self._forwards = 0
        self.wants_results = False

    def __enter__(self) -> None:
        _every_forward.listen(self)

    def __exit__(self, *_: object) -> None:
        _every_forward.unlisten(self)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Looks at the clock, now and then."""
        self._forwards += 1
        if self._forwards % _EVERY == 0:
            now = time.monotonic()
            if now - self._last >= self._seconds:
                self._last = now
                print(self._line(now - self._start), file=sys.stderr, flush=True)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Is not asked for."""

    def traced(self, key: int) -> None:
        """Does not matter."""

    def _line(self, seconds: float) -> str:
        steps, updates, layers = self._record.counts
        time_text = f"{int(seconds) // 60}:{int(seconds) % 60:02}"
        return (
            f"bnguard: {time_text}, {count_text(steps, 'optimizer step')}, {count_text(updates, 'update')} of "
            f"{count_text(layers, 'layer')}"
        )
