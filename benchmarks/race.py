"""Time several things in turn, and compare them within each round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch.utils.benchmark import Timer

__all__ = ["Contender", "Race", "Spread", "race"]


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


def race(contenders: Sequence[Contender], *, rounds: int, steps: int, threads: int = 1, garbage: bool = False) -> Race:
    """Times the contenders in turn, forwards in one round and backwards in the next.

    So a machine that becomes slower or faster does so for all of them. Two rounds come before the first that counts.

    Args:
        contenders: What to time; names are unique.
        rounds: How often each has its turn.
        steps: Steps of one turn.
        threads: Of torch.
        garbage: Whether the garbage collector stays on, as in a program; the clock of ``timeit`` turns it off.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    setup = "import gc; gc.enable()" if garbage else "pass"
    timers = {
        contender.name: Timer("step()", setup, globals={"step": contender.step}, num_threads=threads)
        for contender in contenders
    }
    for number in range(-2, rounds):
        for contender in contenders if number % 2 else reversed(contenders):
            with contender.around():
                measured = timers[contender.name].timeit(steps if number >= 0 else 1).mean
            if number >= 0:
                seconds[contender.name].append(measured)
    return Race(seconds)
