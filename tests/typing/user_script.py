"""What a user's script gets from the public names, as type checkers see it; nothing here runs.

``.ci/run`` checks it with mypy and pyright, against the package as the README's command installs it.
"""

from collections.abc import Callable
from typing import assert_type

import torch
from torch import nn

import bnguard

net = nn.BatchNorm1d(3)

assert_type(bnguard.frozen(net), bnguard.frozen)
with bnguard.frozen(net, "warn", updates=1) as guard:
    assert_type(guard, bnguard.frozen)
    assert_type(guard.changes, tuple[bnguard.StatsChange, ...])
    assert_type(guard.layers, tuple[bnguard.GuardedLayer, ...])


@bnguard.frozen(net)
def validate(batch: torch.Tensor) -> float:
    """A function under a guard."""
    return float(net(batch).sum())


@bnguard.strict
def train_step(model: nn.Module, batch: torch.Tensor) -> float:
    """A step under ``strict``."""
    return float(model(batch).sum())


@bnguard.strict(on_change="warn", include="*")
def other_step(model: nn.Module, batch: torch.Tensor) -> float:
    """A step under ``strict`` with options."""
    return float(model(batch).sum())


step: Callable[[nn.Module, torch.Tensor], float] = train_step
other: Callable[[nn.Module, torch.Tensor], float] = other_step
check: Callable[[torch.Tensor], float] = validate

assert_type(bnguard.watch(net), bnguard.watch)
assert_type(bnguard.audit(net), tuple[bnguard.Finding, ...])
assert_type(bnguard.diff(net, net), bnguard.StatsDiff)
