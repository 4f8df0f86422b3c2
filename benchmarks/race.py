"""Time several things in turn, and compare them within each round."""

from __future__ import annotations

import gc
import statistics
import timeit
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.utils.benchmark import timer

__all__ = ["Contender", "Race", "Spread", "race", "race_of_steps"]


@dataclass(frozen=True, slots=True)
class Contender:
    """Something to time.

    Attributes:
        name: Its name in the table.
        step: What is timed, several times in a row.
        around: What is entered before those and left after them, untimed.
    """

    name: str
    step: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, with their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Race:
    """Seconds of one step of each contender, by name, one figure for each round."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, reference: str) -> Spread:
        """How long ``name`` takes, in units of ``reference``: the spread over the rounds."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return spread([ours / theirs for ours, theirs in pairs])


def spread(figures: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(figures) == 1:
        return Spread(figures[0], figures[0], figures[0])
    low, middle, high = statistics.quantiles(figures, n=4, method="inclusive")
    return Spread(middle, low, high)


def race_of_steps(contenders: Sequence[Contender], *, rounds: int, untimed: int = 1, threads: int = 1) -> Race:
    """Times single steps of the contenders in turn: on a busy machine they spread, and cost as much as on an idle one.

    Untimed steps come before each, so that no step pays for what the one of another contender has left in caches.
    """
    return race(contenders, rounds=rounds, steps=1, untimed=untimed, threads=threads)


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    steps: int,
    untimed: int = 0,
    threads: int = 1,
    garbage: bool = False,
) -> Race:
    """Times the contenders in turn, forwards in one round and backwards in the next.

    So a machine that becomes slower or faster does so for all of them. Two rounds come before the first that counts.
    The clock is that of ``torch.utils.benchmark``, which waits for a GPU; its ``Timer`` would run every turn thrice.

    Args:
        contenders: What to time; names are unique.
        rounds: How often each has its turn.
        steps: Steps of one turn that are timed together.
        untimed: Steps of one turn that come before those.
        threads: Of torch.
        garbage: Whether the garbage collector stays on, as in a program; ``timeit`` turns it off.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    setup = gc.enable if garbage else "pass"
    timers = {contender.name: timeit.Timer(contender.step, setup, timer) for contender in contenders}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number in range(-2, rounds):
            for contender in contenders if number % 2 else reversed(contenders):
                if garbage:
                    gc.collect()  # each pays for its own
                with contender.around():
                    for _ in range(untimed):
                        contender.step()
                    measured = timers[contender.name].timeit(steps) / steps
                if number >= 0:
                    seconds[contender.name].append(measured)
    finally:
        torch.set_num_threads(threads_before)
    return Race(seconds)
