"""Entering and leaving a guard, with nothing in between."""

from __future__ import annotations

from functools import partial
from typing import Final

from torch import nn

import bnguard
from benchmarks import rivals
from benchmarks.floors import least_around
from benchmarks.models import bn_chain
from benchmarks.race import Contender, race, spread
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS"]

_EFFORT: Final = {1: (20, 300), 10: (20, 60), 53: (30, 20), 100: (20, 10), 1_000: (15, 1), 10_000: (7, 1)}  # by layers
_TARGETS: Final = {53: (0.65, 0.5)}
FRESH, REUSED, BY_HAND = "a new frozen(net, 'restore')", "the same guard again", "by hand"
WATCHING, LEAST = "a new frozen(net)", "the least: a walk, a copy, an attribute a layer, a comparison"
# At most, by layers.
_MICROSECONDS: Final[dict[int, dict[str, float]]] = {53: {FRESH: 4.0, REUSED: 3.2}, 10_000: {FRESH: 8.0, REUSED: 8.0}}


def _contenders(net: nn.Module) -> list[Contender]:
    guard = bnguard.frozen(net, "restore")

    def fresh() -> None:
        with bnguard.frozen(net, "restore"):
            pass

    def reused() -> None:
        with guard:
            pass

    def raising() -> None:
        with bnguard.frozen(net):
            pass

    return [
        Contender(FRESH, fresh),
        Contender(REUSED, reused),
        Contender(WATCHING, raising),
        Contender(LEAST, partial(least_around, net)),
        Contender(BY_HAND, partial(rivals.guarded_by_hand, net)),
    ]


def enter_exit(layers: int) -> list[Row]:
    """Against clones, two hooks, ``torch.equal`` and removal for each layer."""
    contenders = _contenders(bn_chain(layers))
    rounds, steps = _EFFORT[layers]
    result = race(contenders, rounds=rounds, steps=steps, garbage=True)
    row = partial(Row, f"enter_exit/{layers}", f"Enter and exit, {layers:,} layer{'s' * (layers > 1)} of 256 channels")
    targets = dict(zip((FRESH, REUSED), _TARGETS.get(layers, (None, None)), strict=True))
    others = (FRESH, REUSED, WATCHING, LEAST)
    return [row(name, BY_HAND, result.ratio(name, BY_HAND), targets.get(name)) for name in others]


def scaling() -> list[Row]:
    """What a layer costs among 53, and among 10,000."""
    rows: list[Row] = []
    for layers, targets in _MICROSECONDS.items():
        contenders = _contenders(bn_chain(layers))
        rounds, steps = _EFFORT[layers]
        result = race(contenders, rounds=rounds, steps=steps, garbage=True)
        row = partial(Row, "enter_exit/scaling", "Enter and exit, microseconds a layer", reference=f"{layers:,} layers")
        for name, seconds in result.seconds.items():
            figures = [1e6 * second / layers for second in seconds]
            rows.append(row(name, ratio=spread(figures), target=targets.get(name)))
    return rows


BENCHMARKS: Final[dict[str, Benchmark]] = {
    **{f"enter_exit/{layers}": partial(enter_exit, layers) for layers in _EFFORT},
    "enter_exit/scaling": scaling,
}
