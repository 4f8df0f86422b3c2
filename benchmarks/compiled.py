"""A compiled training step, in a block and without one."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

import bnguard
from benchmarks.models import make_step, sample
from benchmarks.race import Contender, race
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS"]

_EFFORT: Final = {"resnet50": (15, 1), "small_cnn": (30, 6)}
PLAIN = "unguarded, compiled"


def compiled(name: str) -> list[Row]:
    """Inductor, ``fullgraph=True``."""
    net, x, y = sample(name)
    step = make_step(torch.compile(net, fullgraph=True), net, x, y)

    def each_step() -> None:
        with bnguard.frozen(net, "restore"):
            step()

    loop = "frozen(net, 'restore') around the loop"
    contenders = [
        Contender(PLAIN, step),
        Contender(loop, step, partial(bnguard.frozen, net, "restore")),
        Contender("frozen(net, 'restore') around each step", each_step),
    ]
    rounds, steps = _EFFORT[name]
    result = race(contenders, rounds=rounds, steps=steps)
    row = partial(Row, f"compiled/{name}", f"Compiled training step, {name}, batch {tuple(x.shape)}")
    targets = {loop: 1.0}
    return [
        row(other.name, PLAIN, result.ratio(other.name, PLAIN), targets.get(other.name)) for other in contenders[1:]
    ]


BENCHMARKS: Final[dict[str, Benchmark]] = {f"compiled/{name}": partial(compiled, name) for name in _EFFORT}
