"""What ``watch`` costs: a step, and one forward of a layer."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import nn

import bnguard
from benchmarks.models import make_step, sample
from benchmarks.race import Contender, race, race_of_steps, spread
from benchmarks.results import Benchmark, Row, compared

__all__ = ["BENCHMARKS"]

PLAIN, WATCHED, ALL = "unguarded", "watch(net) around the loop", "watch() of everything around the loop"


def step(name: str, steps: int, target: float | None) -> list[Row]:
    """A training step."""
    net, x, y = sample(name)
    train = make_step(net, net, x, y)
    contenders = [
        Contender(PLAIN, train),
        Contender(WATCHED, train, partial(bnguard.watch, net)),
        Contender(ALL, train, bnguard.watch),
    ]
    result = race_of_steps(contenders, rounds=steps)
    targets = {} if target is None else {WATCHED: target, ALL: target}
    return compared(f"watch/{name}", f"Training step under watch, {name}", result, PLAIN, targets)


def forward() -> list[Row]:
    """One forward of one layer among many, in train mode."""
    net, x = nn.Sequential(*[nn.BatchNorm1d(8) for _ in range(20)]), torch.randn(4, 8)

    def run() -> None:
        net(x)

    watched = Contender(WATCHED, run, partial(bnguard.watch, net))
    result = race([Contender(PLAIN, run), watched], rounds=60, steps=50)
    pairs = zip(result.seconds[WATCHED], result.seconds[PLAIN], strict=True)
    more = [1e6 * (ours - theirs) / len(net) for ours, theirs in pairs]
    title = "One forward of a layer, microseconds more"
    return [Row("watch/forward", title, WATCHED, PLAIN, spread(more), 10.0)]


BENCHMARKS: Final[dict[str, Benchmark]] = {
    "watch/resnet50": partial(step, "resnet50", 17, 1.03),
    "watch/bn_mlp": partial(step, "bn_mlp", 1000, None),
    "watch/forward": forward,
}
