"""See that a script has put back the statistics from before a forward.

Note [Put back by hand]
~~~~~~~~~~~~~~~~~~~~~~~
Scripts save statistics, run forwards that should not count, and put them back. Such forwards are no updates. A
forward in train mode leaves the version and the place of the running mean alone, so whether somebody else has
written is seen at the next forward for nothing. Only then is the value compared with copies; these are taken before
forwards that may be put back: those without gradients, and those after the first of a step. Without success, copies
are taken of the first few only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from bnguard.findings.events import Update
from bnguard.layers.bits import holds

_MOST_COPIES: Final = 16


@dataclass(slots=True, eq=False, repr=False)
class _Copied:
    """Copies of the statistics from before a forward.

    Attributes:
        tick: How many steps all optimizers had made.
        values: The copies, by name.
        update: The update by the forward; None until it is over.
    """

    tick: int
    values: dict[str, Tensor]
    update: Update | None = None


class CopiesBefore:
    """Copies of the statistics of one layer from before forwards since the last step of any optimizer.

    Attributes:
        kept: The copies.
        left: How many more are to be taken.
    """

    __slots__ = ("kept", "left")

    def __init__(self) -> None:
        self.kept: list[_Copied] = []
        self.left = _MOST_COPIES

    def add(self, tick: int, values: dict[str, Tensor]) -> None:
        """Adds copies from right before a forward, after so many steps of all optimizers."""
        self.left -= 1
        self.kept.append(_Copied(tick, values))

    def updated(self, update: Update) -> None:
        """The forward is over."""
        if self.kept and self.kept[-1].update is None:
            self.kept[-1].update = update

    def step(self, tick: int) -> None:
        """Forgets what is from before so many steps."""
        self.kept = [copied for copied in self.kept if copied.tick >= tick]

    def clear(self) -> None:
        """Forgets all."""
        self.kept.clear()

    def undone_by(self, now: dict[str, Tensor]) -> list[Update] | None:
        """The updates that have come to nothing if these are the statistics now; None if they are not from before one.

        Forgets their copies.
        """
        for position, copied in enumerate(self.kept):
            if all([name in now and holds(now[name], value) for name, value in copied.values.items()]):
                later = [one.update for one in self.kept[position:]]
                del self.kept[position:]
                self.left = _MOST_COPIES
                return [update for update in later if update is not None and not update.is_undone]
        return None
