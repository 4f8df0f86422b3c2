"""What ``watch`` costs: a step, and one forward of a layer."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import nn

import bnguard
from benchmarks import floors, rivals
from benchmarks.models import make_step, sample
from benchmarks.race import Contender, race, race_of_steps, spread
from benchmarks.results import Benchmark, Row, compared

__all__ = ["BENCHMARKS", "WATCHED"]

PLAIN, WATCHED, ALL = "unguarded", "watch(net) around the loop", "watch() of everything around the loop"
HOOKS = "clone and torch.equal in hooks"
FLOOR = "hooks on all modules that do nothing"
_BEFORE: Final = 5  # steps that come before: at the first ones of a run there is more to see
_RUN: Final = 1000  # steps
_SAMPLED: Final = f"watch(net, every='auto') around {_RUN:,} steps"


def step(name: str, steps: int, target: float, size: int | None = None) -> list[Row]:
    """A training step; with images of ``size`` if it is given."""
    net, x, y = sample(name)
    title = f"Training step under watch, {name}"
    if size is not None:
        x, title = torch.randn(*x.shape[:2], size, size), f"{title}, images of {size} x {size}"
    train = make_step(net, net, x, y)
    contenders = [
        Contender(PLAIN, train),
        Contender(WATCHED, train, partial(bnguard.watch, net)),
        Contender(ALL, train, bnguard.watch),
        Contender(HOOKS, train, partial(rivals.compared_by_hooks, net)),
        Contender(FLOOR, train, floors.least_watch),
    ]
    result = race_of_steps(contenders, rounds=steps, untimed=_BEFORE if name == "bn_mlp" else 1)
    key = f"watch/{name}" if size is None else f"watch/{name}/{size}"
    return compared(key, title, result, PLAIN, {WATCHED: target, ALL: target})


def whole_run() -> list[Row]:
    """A whole run: what ``every="auto"`` measures at a step depends on how many there have been."""
    net, x, y = sample("bn_mlp")
    train = make_step(net, net, x, y)
    contenders = [
        Contender(PLAIN, train),
        Contender(_SAMPLED, train, partial(bnguard.watch, net, every="auto")),
        Contender(f"watch(net) around {_RUN:,} steps", train, partial(bnguard.watch, net)),
        Contender(HOOKS, train, partial(rivals.compared_by_hooks, net)),
        Contender(FLOOR, train, floors.least_watch),
    ]
    result = race(contenders, rounds=10, steps=_RUN)
    return compared("watch/auto", "Training run under watch, bn_mlp", result, PLAIN, {_SAMPLED: 1.2})


def forward() -> list[Row]:
    """One forward of one layer among many, in train mode."""
    net, x = nn.Sequential(*[nn.BatchNorm1d(8) for _ in range(20)]), torch.randn(4, 8)

    def run() -> None:
        net(x)

    contenders = [
        Contender(PLAIN, run),
        Contender(WATCHED, run, partial(bnguard.watch, net)),
        Contender(HOOKS, run, partial(rivals.compared_by_hooks, net)),
        Contender(FLOOR, run, floors.least_watch),
    ]
    seconds = race(contenders, rounds=60, steps=50).seconds
    rows = []
    for name, target in ((WATCHED, 10.0), (HOOKS, None), (FLOOR, None)):
        pairs = zip(seconds[name], seconds[PLAIN], strict=True)
        more = spread([1e6 * (ours - theirs) / len(net) for ours, theirs in pairs])
        rows.append(Row("watch/forward", "One forward of a layer, microseconds more", name, PLAIN, more, target))
    return rows


BENCHMARKS: Final[dict[str, Benchmark]] = {
    "watch/resnet50": partial(step, "resnet50", 17, 1.03),
    "watch/resnet50/224": partial(step, "resnet50", 7, 1.03, 224),
    "watch/bn_mlp": partial(step, "bn_mlp", 1000, 1.15),
    "watch/auto": whole_run,
    "watch/forward": forward,
}
