"""A compiled training step, in a block and without one."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

import bnguard
from benchmarks import rivals
from benchmarks.models import make_step, sample
from benchmarks.race import Contender, race_of_steps
from benchmarks.results import Benchmark, Row, compared
from benchmarks.step import PUT_BACK, entered_each_step

__all__ = ["BENCHMARKS"]

_STEPS: Final = {"resnet50": 15, "small_cnn": 180}
PLAIN = "unguarded, compiled"


def compiled(name: str) -> list[Row]:
    """Inductor, ``fullgraph=True``."""
    net, x, y = sample(name)
    step = make_step(torch.compile(net, fullgraph=True), net, x, y)

    loop = "frozen(net, 'restore') around the loop"
    contenders = [
        Contender(PLAIN, step),
        Contender(loop, step, partial(bnguard.frozen, net, "restore")),
        Contender("frozen(net, 'restore') around each step", entered_each_step(net, step)),
        Contender(PUT_BACK, rivals.put_back_by_hand(net, step)),
    ]
    result = race_of_steps(contenders, rounds=_STEPS[name])
    title = f"Compiled training step, {name}, batch {tuple(x.shape)}"
    return compared(f"compiled/{name}", title, result, PLAIN, {loop: 1.0})


BENCHMARKS: Final[dict[str, Benchmark]] = {f"compiled/{name}": partial(compiled, name) for name in _STEPS}
