"""A training step in which updates are allowed, by a budget or under ``"warn"``, against one that holds them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

import bnguard
from benchmarks import rivals
from benchmarks.floors import least_step
from benchmarks.models import bn_chain, make_step, sample
from benchmarks.race import Contender, race_of_steps
from benchmarks.results import Benchmark, Row

__all__ = ["BENCHMARKS"]

# How many steps of each contender are timed, by the number of BatchNorm layers.
_STEPS: Final = {2: 1000, 17: 100, 53: 15, 1_000: 30}
_NETS: Final = {2: "bn_mlp", 17: "small_cnn", 53: "resnet50"}

RESTORE, RESTORE_AGAIN = "frozen(net, 'restore') around each step", "the same guard again, 'restore'"
BUDGET, BUDGET_AGAIN = "frozen(net, updates=1) around each step", "the same guard again, updates=1"
WARN, WARN_AGAIN = "frozen(net, 'warn') around each step, updates stand", "the same guard again, 'warn', updates stand"
LEAST, WITHOUT_COPIES = "the least: all statistics copied before and after each forward", "the same without copies"
UNGUARDED, BY_HAND = "unguarded", "num_batches_tracked read before and after each step"


def _sample(layers: int) -> tuple[nn.Module, Tensor, Tensor]:
    if layers in _NETS:
        return sample(_NETS[layers])
    torch.manual_seed(0)
    net = nn.Sequential(bn_chain(layers, channels=8), nn.Flatten(), nn.Linear(8, 10))
    return net, torch.randn(8, 8, 1, 1), torch.randint(10, (8,))


def _fresh(net: nn.Module, step: rivals.Step, **options: object) -> Callable[[], None]:
    def run() -> None:
        with bnguard.frozen(net, **options):  # type: ignore[arg-type]  # not spelled out
            step()

    return run


def _again(net: nn.Module, step: rivals.Step, **options: object) -> Callable[[], None]:
    guard = bnguard.frozen(net, **options)  # type: ignore[arg-type]  # not spelled out

    def run() -> None:
        with guard:
            step()

    return run


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        yield


def updating(layers: int) -> list[Row]:
    """A training step of a net with so many BatchNorm layers."""
    net, x, y = _sample(layers)
    step = make_step(net, net, x, y)
    contenders = [
        Contender(UNGUARDED, step),
        Contender(RESTORE, _fresh(net, step, on_change="restore")),
        Contender(RESTORE_AGAIN, _again(net, step, on_change="restore")),
        Contender(BUDGET, _fresh(net, step, updates=1)),
        Contender(BUDGET_AGAIN, _again(net, step, updates=1)),
        Contender(WARN, _fresh(net, step, on_change="warn"), _without_warnings),
        Contender(WARN_AGAIN, _again(net, step, on_change="warn"), _without_warnings),
        Contender(BY_HAND, rivals.counted_by_hand(net, step)),
        Contender(LEAST, least_step(net, step, copies=True)),
        Contender(WITHOUT_COPIES, least_step(net, step, copies=False)),
    ]
    result = race_of_steps(contenders, rounds=_STEPS[layers])
    row = partial(Row, f"updates/{layers}", f"Training step whose updates are allowed, {layers:,} BatchNorm layers")
    pairs = [
        (BUDGET, RESTORE, 1.1),
        (BUDGET_AGAIN, RESTORE_AGAIN, 1.1),
        (WARN, RESTORE, 1.15),
        (WARN_AGAIN, RESTORE_AGAIN, 1.15),
        (BUDGET_AGAIN, UNGUARDED, None),
        (WARN_AGAIN, UNGUARDED, None),
        (BY_HAND, UNGUARDED, None),
        (LEAST, WITHOUT_COPIES, None),
    ]
    return [row(name, reference, result.ratio(name, reference), target) for name, reference, target in pairs]


BENCHMARKS: Final[dict[str, Benchmark]] = {f"updates/{layers}": partial(updating, layers) for layers in _STEPS}
