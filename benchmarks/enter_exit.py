"""Entering and leaving a guard, with nothing in between."""

from __future__ import annotations

from functools import partial
from typing import Final

import bnguard
from benchmarks import rivals
from benchmarks.floors import least_around
from benchmarks.models import bn_chain
from benchmarks.race import Contender, race
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS"]

_EFFORT: Final = {1: (20, 300), 10: (20, 60), 53: (30, 20), 100: (20, 10), 1_000: (15, 1), 10_000: (7, 1)}  # by layers
_TARGETS: Final = {53: (0.65, 0.5)}
FRESH, REUSED, BY_HAND = "a new frozen(net, 'restore')", "the same guard again", "by hand"


def enter_exit(layers: int) -> list[Row]:
    """Against clones, two hooks, ``torch.equal`` and removal for each layer."""
    net = bn_chain(layers)
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

    watching, least = "a new frozen(net)", "the least: a walk, a copy, an attribute a layer, a comparison"
    contenders = [
        Contender(FRESH, fresh),
        Contender(REUSED, reused),
        Contender(watching, raising),
        Contender(least, partial(least_around, net)),
        Contender(BY_HAND, partial(rivals.guarded_by_hand, net)),
    ]
    rounds, steps = _EFFORT[layers]
    result = race(contenders, rounds=rounds, steps=steps, garbage=True)
    row = partial(Row, f"enter_exit/{layers}", f"Enter and exit, {layers:,} layer{'s' * (layers > 1)} of 256 channels")
    targets = dict(zip((FRESH, REUSED), _TARGETS.get(layers, (None, None)), strict=True))
    names = (FRESH, REUSED, watching, least)
    return [row(name, BY_HAND, result.ratio(name, BY_HAND), targets.get(name)) for name in names]


def scaling() -> list[Row]:
    """What a layer costs among 10,000, in units of what it costs among 100."""
    sizes = (100, 10_000)
    nets = {layers: bn_chain(layers) for layers in sizes}

    def enter_and_leave(layers: int) -> None:
        for _ in range(10_000 // layers):
            with bnguard.frozen(nets[layers], "restore"):
                pass

    names = {layers: f"a layer of {layers:,}" for layers in sizes}
    contenders = [Contender(names[layers], partial(enter_and_leave, layers)) for layers in sizes]
    result = race(contenders, rounds=9, steps=1, garbage=True)
    many, few = names[10_000], names[100]
    return [Row("enter_exit/scaling", "Enter and exit, by the number of layers", many, few, result.ratio(many, few), 2)]


BENCHMARKS: Final[dict[str, Benchmark]] = {
    **{f"enter_exit/{layers}": partial(enter_exit, layers) for layers in _EFFORT},
    "enter_exit/scaling": scaling,
}
