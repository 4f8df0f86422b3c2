"""Entering and leaving a guard, with nothing in between, and the parts of that."""

from __future__ import annotations

from functools import partial
from typing import Final

from torch import nn

import bnguard
from benchmarks import rivals
from benchmarks.floors import least_around
from benchmarks.models import bn_chain
from benchmarks.race import Contender, Race, race, spread
from benchmarks.results import Benchmark, Row
from bnguard.guard.again import Again
from bnguard.guard.options import PLAIN, check_settings
from bnguard.guard.policy import Counts
from bnguard.layers.tree import Tree

__all__ = ["BENCHMARKS"]

_EFFORT: Final = {
    1: (20, 300),
    2: (20, 300),
    10: (20, 60),
    53: (30, 20),
    100: (20, 10),
    1_000: (15, 1),
    10_000: (7, 1),
}  # by layers
_UNTIMED: Final = 3  # blocks that come before: the collection of garbage leaves nothing in the caches
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
    result = _race(_contenders(bn_chain(layers)), layers)
    row = partial(Row, f"enter_exit/{layers}", f"Enter and exit, {layers:,} layer{'s' * (layers > 1)} of 256 channels")
    targets = dict(zip((FRESH, REUSED), _TARGETS.get(layers, (None, None)), strict=True))
    others = (FRESH, REUSED, WATCHING, LEAST)
    return [row(name, BY_HAND, result.ratio(name, BY_HAND), targets.get(name)) for name in others]


def scaling() -> list[Row]:
    """What a layer costs among 53, and among 10,000."""
    rows: list[Row] = []
    for layers, targets in _MICROSECONDS.items():
        result = _race(_contenders(bn_chain(layers)), layers)
        title = "Enter and exit, microseconds a layer"
        rows += _microseconds("enter_exit/scaling", title, result, layers, targets)
    return rows


def parts() -> list[Row]:
    """What a block consists of that is entered once more, and what one has more that the next guard takes over."""
    rows: list[Row] = []
    for layers in (2, *_MICROSECONDS):
        result = _race(_parts_of_a_block(bn_chain(layers)), layers)
        title = "Parts of enter and exit, microseconds a layer"
        rows += _microseconds("enter_exit/parts", title, result, layers, {})
    return rows


def _parts_of_a_block(net: nn.Module) -> list[Contender]:
    guard = bnguard.frozen(net, "restore")
    with guard:
        pass  # from now on it is known that the net has no layers beside its modules
    settings = check_settings("restore", False, False, 0, None, None, None, "exit", frontend=PLAIN)
    tree = Tree(net)
    block = Again(tree, tree.layers, settings, Counts())
    del tree  # a block that others know does not refer to the net weakly
    check = block.check_anew()
    assert check is not None
    assert block.is_ready()

    def again() -> None:
        with guard:
            pass

    def attached() -> None:
        assert block.begin()
        block.end(net)

    def held_weakly() -> None:
        assert block.release()
        assert block.is_ready()

    return [
        Contender("the whole block", again),
        Contender("at the beginning: is the model as it was", block.is_ready),
        Contender("the same, after it was referred to weakly: a new guard", held_weakly),
        Contender("put something on each layer, and take it off", attached),
        Contender("copy the statistics", block.check_anew),
        Contender("compare them", check.moved),
        Contender("at the end: are the same objects there", block.is_quiet),
    ]


def _race(contenders: list[Contender], layers: int) -> Race:
    rounds, steps = _EFFORT[layers]
    return race(contenders, rounds=rounds, steps=steps, untimed=_UNTIMED, garbage=True)


def _microseconds(key: str, title: str, result: Race, layers: int, targets: dict[str, float]) -> list[Row]:
    """A row for each contender, of which there are so many layers."""
    row = partial(Row, key, title, reference=f"{layers:,} layers")
    figures = {name: [1e6 * second / layers for second in seconds] for name, seconds in result.seconds.items()}
    return [row(name, ratio=spread(some), target=targets.get(name)) for name, some in figures.items()]


BENCHMARKS: Final[dict[str, Benchmark]] = {
    **{f"enter_exit/{layers}": partial(enter_exit, layers) for layers in _EFFORT if layers != 2},
    "enter_exit/scaling": scaling,
    "enter_exit/parts": parts,
}
