"""The end of a block in a distributed run: all ranks raise, one warns for all, or nothing happens."""

from __future__ import annotations

import json
import os
import threading
import weakref
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

import torch.distributed as dist

from bnguard.errors import BNGuardError, StatsChangedError
from bnguard.guard.messages import missing_ranks_text, others_text, unreachable_text
from bnguard.guard.phrases import Phrases
from bnguard.records import StatsChange
from bnguard.torch_internals.callsite import CallSite
from bnguard.torch_internals.meetings import Heard, Place, Told, UnansweredError
from bnguard.torch_internals.ranks import Ranks

__all__ = ["Agreement", "Occasion", "Parting", "Statistics"]

_threads: Final = threading.local()


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a rank knows of statistics that another rank may have put in the place of its own.

    Attributes:
        found: By layer: a digest of what was found there, and the rank that may have put it there.
        of: Digests of what the layers of these names have here now.
    """

    found: Mapping[str, tuple[str, int]]
    of: Callable[[Iterable[str]], dict[str, str]]


Parting = Literal["wait", "tell", "skip"]


@dataclass(slots=True)
class Occasion:
    """One call of a decorated function.

    Attributes:
        name: What the function is called in all ranks.
        key: What the call is called in all ranks, as soon as the first block of it has begun.
        inner: By place: how often ranks have been to meet inside of it.
        parts: Of a function with several models, one for each.
    """

    name: str
    key: str = ""
    inner: Counter[str] = field(default_factory=Counter)
    parts: dict[int, Occasion] = field(default_factory=dict)

    def part(self, number: int) -> Occasion:
        """That of one model."""
        return self.parts.setdefault(number, Occasion(f"{self.name}, model {number}"))


class Agreement:
    """What the ranks make of what each has found at the end of its block.

    Args:
        ranks: The ranks.
        site: The user's line where the block began.
        phrases: What messages call the block.
        raises: Whether what was found is an error.
        occasion: Of a decorated function, whose calls meet wherever they are made: the call.
    """

    __slots__ = (
        "__weakref__",
        "_inner",
        "_neighbours",
        "_occasion",
        "_phrases",
        "_place",
        "_raises",
        "_ranks",
        "_site",
    )  # fmt: skip

    def __init__(self, ranks: Ranks, site: CallSite, phrases: Phrases, raises: bool, occasion: Occasion | None) -> None:
        self._ranks = ranks
        self._site = site
        self._place = Place("", f"the end of {phrases.place} at {site}")
        self._occasion = occasion
        self._phrases = phrases
        self._raises = raises
        self._neighbours = _open_in_thread()
        # By place: how often ranks have been to meet inside of this block.
        self._inner: Counter[str] = Counter() if occasion is None else occasion.inner

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that warns for all."""
        return self._ranks.speaks

    def begin(self) -> None:
        """The block begins. What it is called in all ranks depends on what is around it, not on what was before."""
        self._neighbours[:] = [reference for reference in self._neighbours if reference() is not None]
        key = self._key() if self._occasion is None else self._occasion.key
        if self._occasion is not None and not key:
            key = self._occasion.key = self._key()
        self._place = Place(key, self._place.text)
        self._neighbours.append(weakref.ref(self))

    def _key(self) -> str:
        """What a block that begins now is called in all ranks, whatever their folders and copies of the code."""
        site = self._site
        line = f"{os.path.basename(site.filename)}:{site.lineno}+{site.offset} in {site.function}"
        name = f"{self._phrases.place} at {line if self._occasion is None else self._occasion.name}"
        outer = self._outer()
        return outer[-1]._key_inside(name) if outer else f"{name}#{self._ranks.count(name)}"

    def _key_inside(self, name: str) -> str:
        """What the next meeting of this name inside of this block is called."""
        number = self._inner[name]
        self._inner[name] += 1
        return f"{self._place.digest}/{name}#{number}"

    def end(self) -> None:
        """The block is over; twice does nothing."""
        self._neighbours[:] = [reference for reference in self._neighbours if reference() not in (None, self)]

    def abandon(self, error: BaseException) -> None:
        """Tells the others that an error has kept this rank from looking; they need not wait for it."""
        if not self._ranks.is_over:
            self._tell(self._place, self._told("", (), error))

    def reach(
        self,
        text: Callable[[frozenset[str]], str],
        changes: Sequence[StatsChange],
        error: BaseException | None,
        said: Sequence[StatsChange],
        statistics: Statistics,
        parting: Parting,
        is_end: bool,
    ) -> tuple[str, str, frozenset[str]]:
        """Tells the other ranks what was found here, and hears from them.

        Args:
            text: What was found, but for these layers; empty for nothing.
            changes: The layers concerned.
            error: The exception that leads this rank out of the block, of which the others are told.
            said: Layers of which this rank has warned.
            statistics: What is known of statistics that another rank may have overwritten.
            parting: Whether to wait for the others, to tell them and go on, or neither.
            is_end: Whether the block ends; else this is a comparison inside of it.

        Returns:
            What this rank is to raise, or to warn of where nothing is raised; what it is to warn of in any case; the
            layers that another rank has overwritten.
        """
        suspects = frozenset(statistics.found)
        if parting == "skip" or self._ranks.is_over:  # with the process group ends what they have to do with each other
            return text(suspects), "", suspects
        place = self._place
        if not is_end:
            place = Place(self._key_inside("check()"), f"check() of {self._phrases.place} at {self._site}")
        if parting == "tell":
            whole = text(suspects)
            left = [change for change in changes if change.names[0] not in suspects]
            self._tell(place, self._told(whole, left, error))
            return whole, "", suspects
        asks = tuple([(source, name) for name, (_, source) in statistics.found.items()])
        told = self._told(text(frozenset()), changes, None)
        if asks:
            told = Told(self._ranks.me, "changed", text(suspects), (), asks)
        try:
            heard = self._ranks.meet(place, told, waits=True, around=self._around(is_end))
            overwritten = frozenset[str]()
            if any([one.asks for one in heard.told]):
                answers, overwritten = self._overwritten(heard, statistics)
                last = answers.again("in the end", self._told(text(overwritten), changes, None))
                gone = [one for one in heard.told if one.rank in heard.left]
                return *self._of(text(overwritten), [*gone, *last.told], said, heard.left), overwritten
            return *self._of(text(overwritten), heard.told, said, heard.left), overwritten
        except UnansweredError as failure:
            message = missing_ranks_text(failure.missing, failure.seconds, place.text, failure.elsewhere)
            return *self._alone(text(suspects), message), suspects
        except dist.DistError as failure:
            return *self._alone(text(suspects), unreachable_text(str(failure), place.text)), suspects

    def _around(self, is_end: bool) -> list[Place]:
        """Where the ranks meet after this."""
        places = [other._place for other in self._outer()]
        return places if is_end else [*places, self._place]

    def _outer(self) -> list[Agreement]:
        """The blocks around this one in which the same ranks agree, the first one first."""
        outer: list[Agreement] = []
        for reference in self._neighbours:
            other = reference()
            if other is self:
                break
            if other is not None and other._ranks.members == self._ranks.members:
                outer.append(other)
        return outer

    def _tell(self, place: Place, told: Told | None) -> None:
        with suppress(dist.DistError):
            self._ranks.meet(place, told, waits=False)

    def _of(
        self, text: str, heard: Sequence[Told], said: Sequence[StatsChange], left: frozenset[int]
    ) -> tuple[str, str]:
        """What this rank is to say, of its own and of what it has heard; the first that stays says it for all."""
        speaks = self._ranks.me == next(rank for rank in self._ranks.members if rank not in left)
        others = [one for one in heard if one.rank != self._ranks.me]
        failed = [(one.rank, one.text) for one in others if one.kind == "error"]
        aside = others_text("", failed) if speaks else ""
        if self._raises:
            return others_text(text, [(one.rank, one.text) for one in others if one.kind == "changed"]), aside
        if not speaks:
            return "", ""
        known = {change.names[0] for change in said}
        news = [(one.rank, one.text) for one in others if one.kind == "changed" and not set(one.layers) <= known]
        return others_text(text, news), aside

    def _overwritten(self, heard: Heard, statistics: Statistics) -> tuple[Heard, frozenset[str]]:
        """Which of the layers that this rank asks about have the statistics of the rank that is asked.

        All of those whose rank cannot be asked: it is no member of the group, or has left.
        """
        names = sorted({name for one in heard.told for rank, name in one.asks if rank == self._ranks.me})
        mine = Told(self._ranks.me, "statistics", json.dumps(statistics.of(names))) if names else None
        answers = heard.again("statistics", mine)
        known = {one.rank: json.loads(one.text) for one in answers.told}
        overwritten = [
            name
            for name, (digest, rank) in statistics.found.items()
            if rank in heard.left or rank not in self._ranks.members or known.get(rank, {}).get(name) == digest
        ]
        return answers, frozenset(overwritten)

    def _told(self, text: str, changes: Sequence[StatsChange], error: BaseException | None) -> Told | None:
        layers = tuple([change.names[0] for change in changes])
        if isinstance(error, StatsChangedError):
            names = layers or tuple([change.names[0] for change in error.changes])
            return Told(self._ranks.me, "changed", str(error), names)
        if isinstance(error, SystemExit) and not error.code:
            error = None
        if error is not None and not isinstance(error, (GeneratorExit, CancelledError)):
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


def _open_in_thread() -> list[weakref.ref[Agreement]]:
    """Of the blocks that are open in this thread, the first ones first."""
    try:
        found: list[weakref.ref[Agreement]] = _threads.open
    except AttributeError:
        found = _threads.open = []
    return found
