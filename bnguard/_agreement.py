"""The end of a block in a distributed run: all ranks raise, one warns for all, or nothing happens."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from bnguard._changes import StatsChange
from bnguard._ranks import Ranks, Told, UnansweredError
from bnguard._report import Wording, missing_ranks_text, others_text, unreachable_text
from bnguard.errors import BNGuardError, StatsChangedError

__all__ = ["Agreement"]


class Agreement:
    """What the ranks make of what each has found at the end of its block.

    Args:
        ranks: The ranks.
        place: The user's line where the block began, the same in all of them.
        wording: What messages call the block.
        raises: Whether what was found is an error.
    """

    __slots__ = ("_place", "_raises", "_ranks", "_wording")

    def __init__(self, ranks: Ranks, place: str, wording: Wording, raises: bool) -> None:
        self._ranks = ranks
        self._place = place
        self._wording = wording
        self._raises = raises

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that warns for all."""
        return self._ranks.speaks

    def reach(
        self,
        text: str,
        changes: Sequence[StatsChange],
        error: BaseException | None,
        told_already: Sequence[StatsChange],
    ) -> tuple[str, str]:
        """Tells the other ranks what was found here, and hears from them.

        Does not wait for them where an exception is on its way: they are told, and it goes on.

        Args:
            text: What was found; empty for nothing.
            changes: The layers concerned.
            error: The exception that ends the block here.
            told_already: Layers of which this rank has warned.

        Returns:
            What this rank is to raise, or to warn of where nothing is raised; and what it is to warn of in any case.
        """
        told = self._told(text, changes, error)
        place = f"{self._wording.place} at {self._place}"
        try:
            heard = self._ranks.meet(place, told, waits=error is None)
        except UnansweredError as failure:
            message = missing_ranks_text(failure.missing, failure.seconds, self._wording.place, self._place)
            return self._alone(text, message)
        except dist.DistError as failure:
            return self._alone(text, unreachable_text(str(failure), self._wording.place))
        if error is not None:
            return text, ""
        others = [one for one in heard if one.rank != self._ranks.me]
        changed = [(one.rank, one.text) for one in others if one.kind == "changed"]
        failed = [(one.rank, one.text) for one in others if one.kind == "error"]
        if self._raises:
            return others_text(text, changed), others_text("", failed) if self.speaks else ""
        if not self.speaks:
            return "", ""
        known = {change.names[0] for change in told_already}
        news = [(one.rank, one.text) for one in others if one.kind == "changed" and not set(one.layers) <= known]
        return others_text(text, news), others_text("", failed)

    def _told(self, text: str, changes: Sequence[StatsChange], error: BaseException | None) -> Told | None:
        layers = tuple([change.names[0] for change in changes])
        if isinstance(error, StatsChangedError):
            names = layers or tuple([change.names[0] for change in error.changes])
            return Told(self._ranks.me, "changed", str(error), names)
        if error is not None:
            first = str(error).partition("\n")[0]
            said = f"{type(error).__name__}: {first}" if first else type(error).__name__
            return Told(self._ranks.me, "error", "\n".join(filter(None, [f"left the block with {said}", text])), layers)
        return Told(self._ranks.me, "changed", text, layers) if text else None

    def _alone(self, text: str, message: str) -> tuple[str, str]:
        """What to do where the others cannot be heard.

        Raises:
            BNGuardError: That is an error, and there is none of this rank's own.
        """
        if self._raises and not text:
            raise BNGuardError(message)
        return text, message
