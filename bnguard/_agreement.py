"""The end of a block in a distributed run: all ranks raise, one warns for all, or nothing happens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from bnguard._callsite import CallSite
from bnguard._changes import StatsChange
from bnguard._ranks import Ranks, Told, UnansweredError
from bnguard._report import missing_ranks_text, others_text, unreachable_text
from bnguard._wording import Wording
from bnguard.errors import BNGuardError, StatsChangedError

__all__ = ["Agreement", "Statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a rank knows of statistics that another rank may have put in the place of its own.

    Attributes:
        found: By layer: a digest of what was found there, and the rank that may have put it there.
        of: Digests of what the layers of these names have here now.
    """

    found: Mapping[str, tuple[str, int]]
    of: Callable[[Iterable[str]], dict[str, str]]


class Agreement:
    """What the ranks make of what each has found at the end of its block.

    Args:
        ranks: The ranks.
        site: The user's line where the block began.
        wording: What messages call the block.
        raises: Whether what was found is an error.
    """

    __slots__ = ("_key", "_place", "_raises", "_ranks", "_wording")

    def __init__(self, ranks: Ranks, site: CallSite, wording: Wording, raises: bool) -> None:
        self._ranks = ranks
        self._place = str(site)
        # The same in ranks with other working directories, and other copies of the code.
        self._key = f"{wording.place} at {os.path.basename(site.filename)}:{site.lineno} in {site.function}"
        self._wording = wording
        self._raises = raises

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that warns for all."""
        return self._ranks.speaks

    def reach(
        self,
        text: Callable[[frozenset[str]], str],
        changes: Sequence[StatsChange],
        error: BaseException | None,
        said: Sequence[StatsChange],
        statistics: Statistics,
    ) -> tuple[str, str, frozenset[str]]:
        """Tells the other ranks what was found here, and hears from them.

        Does not wait for them where an exception is on its way: they are told, and it goes on.

        Args:
            text: What was found, but for these layers; empty for nothing.
            changes: The layers concerned.
            error: The exception that ends the block here.
            said: Layers of which this rank has warned.
            statistics: What is known of statistics that another rank may have overwritten.

        Returns:
            What this rank is to raise, or to warn of where nothing is raised; what it is to warn of in any case; the
            layers that another rank has overwritten.
        """
        place = self._key
        overwritten = frozenset[str]()
        whole = text(overwritten)
        if self._ranks.is_over:  # so is what the ranks have to do with each other
            return whole, "", overwritten
        if error is not None:
            with suppress(dist.DistError):
                self._ranks.meet(place, self._told(whole, changes, error), waits=False)
            return whole, "", overwritten
        asks = tuple([(source, name) for name, (_, source) in statistics.found.items()])
        told = self._told(whole, changes, None)
        if asks:
            told = Told(self._ranks.me, "changed", text(frozenset(statistics.found)), (), asks)
        try:
            heard = self._ranks.meet(place, told, waits=True)
            asked = {item for one in heard for item in one.asks}
            if asked:
                overwritten = self._overwritten(place, asked, statistics)
                whole = text(overwritten)
                heard = self._ranks.meet(f"{place}, in the end", self._told(whole, changes, None), waits=True)
        except UnansweredError as failure:
            message = missing_ranks_text(failure.missing, failure.seconds, self._wording.place, self._place)
            return *self._alone(whole, message), overwritten
        except dist.DistError as failure:
            return *self._alone(whole, unreachable_text(str(failure), self._wording.place)), overwritten
        return *self._of(whole, heard, said), overwritten

    def _of(self, text: str, heard: Sequence[Told], said: Sequence[StatsChange]) -> tuple[str, str]:
        """What this rank is to say, of its own and of what it has heard."""
        others = [one for one in heard if one.rank != self._ranks.me]
        failed = [(one.rank, one.text) for one in others if one.kind == "error"]
        aside = others_text("", failed) if self.speaks else ""
        if self._raises:
            return others_text(text, [(one.rank, one.text) for one in others if one.kind == "changed"]), aside
        if not self.speaks:
            return "", ""
        known = {change.names[0] for change in said}
        news = [(one.rank, one.text) for one in others if one.kind == "changed" and not set(one.layers) <= known]
        return others_text(text, news), aside

    def _overwritten(self, place: str, asked: set[tuple[int, str]], statistics: Statistics) -> frozenset[str]:
        """Which of the layers that this rank asks about have the statistics of the rank that is asked."""
        names = [name for rank, name in asked if rank == self._ranks.me]
        mine = Told(self._ranks.me, "statistics", json.dumps(statistics.of(names))) if names else None
        heard = {one.rank: json.loads(one.text) for one in self._ranks.meet(f"{place}, statistics", mine, waits=True)}
        found = statistics.found.items()
        return frozenset([name for name, (digest, rank) in found if heard.get(rank, {}).get(name) == digest])

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
