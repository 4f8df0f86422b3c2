"""One forward of one BatchNorm layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
from torch import nn

import bnguard
from benchmarks import rivals
from benchmarks.floors import least_forward
from benchmarks.models import BatchNormAct2d
from benchmarks.race import Contender, race
from benchmarks.results import Benchmark, Row, compared

__all__ = ["BENCHMARKS"]

_SHAPES: Final = {"2x8x1x1": (100, 200), "32x256x14x14": (20, 2)}  # rounds and steps
_OWN: Final = {"2x8x1x1": (100, 200, 1.6), "8x64x16x16": (60, 40, 1.25)}  # rounds, steps, and the target
PLAIN, EMPTY = "plain forward", "with one empty forward pre-hook"


@contextmanager
def _empty_hooks(net: nn.Module, number: int) -> Iterator[None]:
    def hook(*args: object) -> None:
        pass

    layers = rivals.batch_norms(net)
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    handles += [layer.register_forward_hook(hook) for layer in layers if number == 2]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(name: str) -> list[Row]:
    """In train mode under guards that hold, and in eval mode under guards that watch."""
    shape = tuple(map(int, name.split("x")))
    rounds, steps = _SHAPES[name]
    net = nn.BatchNorm2d(shape[1])
    x = torch.randn(shape)
    run = partial(net, x)

    contenders = [
        Contender(PLAIN, run),
        Contender("frozen(bn, 'restore')", run, partial(bnguard.frozen, net, "restore")),
        Contender("frozen(bn, use_running_stats=True)", run, partial(bnguard.frozen, net, use_running_stats=True)),
        Contender("the least: F.batch_norm alone", least_forward(net, x)),
        Contender("with two empty hooks", run, partial(_empty_hooks, net, 2)),
        Contender("built with track_running_stats=False", run, partial(rivals.untracked, net)),
        Contender("momentum 0", run, partial(rivals.momentum_zero, net)),
        Contender("clone and torch.equal in hooks", run, partial(rivals.compared_by_hooks, net)),
    ]
    result = race(contenders, rounds=rounds, steps=steps)
    row = partial(Row, f"forward/{name}", f"One forward of BatchNorm2d, {name}")
    # Where the layer itself takes this long, the least is as long as a plain forward.
    targets = {"frozen(bn, 'restore')": 0.85 if name == "2x8x1x1" else 1.0}
    rows = [
        row(f"train mode, {other.name}", PLAIN, result.ratio(other.name, PLAIN), targets.get(other.name))
        for other in contenders[1:]
    ]

    net.eval()
    contenders = [
        Contender(PLAIN, run),
        Contender(EMPTY, run, partial(_empty_hooks, net, 1)),
        *[Contender(f"frozen(bn, {policy!r})", run, partial(bnguard.frozen, net, policy))
          for policy in ("raise", "warn", "restore")],
    ]  # fmt: skip
    result = race(contenders, rounds=rounds, steps=steps)
    targets = {"frozen(bn, 'raise')": 1.05}
    rows += [
        row(f"eval mode, {other.name}", EMPTY, result.ratio(other.name, EMPTY), targets.get(other.name))
        for other in contenders[2:]
    ]
    rows += [row(f"eval mode, {other.name}", PLAIN, result.ratio(other.name, PLAIN)) for other in contenders[1:]]
    return rows


def own_forward(name: str) -> list[Row]:
    """A layer whose forward nobody can predict, in eval mode: its statistics are compared after each call."""
    shape = tuple(map(int, name.split("x")))
    rounds, steps, target = _OWN[name]
    net = BatchNormAct2d(shape[1]).eval()
    run = partial(net, torch.randn(shape))
    held = "frozen(layer, 'raise')"
    contenders = [
        Contender(PLAIN, run),
        Contender(held, run, partial(bnguard.frozen, net, "raise")),
        Contender("frozen(layer, 'restore')", run, partial(bnguard.frozen, net, "restore")),
        Contender("with two empty hooks", run, partial(_empty_hooks, net, 2)),
        Contender("clone and torch.equal in hooks", run, partial(rivals.compared_by_hooks, net)),
    ]
    result = race(contenders, rounds=rounds, steps=steps)
    title = f"One forward of a layer with a forward of its own, eval mode, {name}"
    return compared(f"forward/own/{name}", title, result, PLAIN, {held: target})


BENCHMARKS: Final[dict[str, Benchmark]] = {
    **{f"forward/{name}": partial(forward, name) for name in _SHAPES},
    **{f"forward/own/{name}": partial(own_forward, name) for name in _OWN},
}
