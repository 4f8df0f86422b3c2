"""What a user's script gets from the public names, as type checkers see it; nothing here runs.

``.ci/run`` checks it with mypy and pyright, against the package as the README's command installs it.
"""

# pyright: basic, reportUnnecessaryTypeIgnoreComment=error

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

policy: bnguard.OnChange = "rollback"
selectors: list[bnguard.Selector] = ["*", net, nn.BatchNorm2d, lambda name, module: name == "stem"]
assert_type(bnguard.frozen(net, policy, include=selectors, exclude=(nn.BatchNorm1d, "head")), bnguard.frozen)
bnguard.frozen(net, include=nn.BatchNorm1d)
bnguard.frozen(net, check="deferred")
bnguard.frozen(net, check="later")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
bnguard.frozen(net, "restor")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
bnguard.frozen(net, include=int)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
bnguard.strict("restore")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


def worst(record: bnguard.watch) -> list[tuple[str, float]]:
    """What a record has, with the types of its records."""
    assert_type(record.updates, tuple[bnguard.StatsUpdates, ...])
    assert_type(record.drift, tuple[bnguard.Drift, ...])
    assert_type(record.series, bnguard.DriftSeries)
    assert_type(record.update_series, bnguard.UpdateSeries)
    _severities: list[bnguard.Severity] = [finding.severity for finding in record.findings]
    _modes: list[bnguard.Mode] = [update.mode for update in record.updates]
    return [(drift.names[0], drift.largest) for drift in record.drift]


def told(error: bnguard.StatsChangedError) -> tuple[bnguard.StatsChange, ...]:
    """An error has its data."""
    return error.changes


assert_type(bnguard.recalibrate(net, [torch.ones(2, 3)], include=nn.BatchNorm1d), bnguard.Recalibration)
assert_type(bnguard.register_layer(nn.BatchNorm1d, ["mean"]), bnguard.LayerRegistration)
assert_type(bnguard.watch(net), bnguard.watch)
assert_type(bnguard.audit(net), tuple[bnguard.Finding, ...])
assert_type(bnguard.diff(net, net), bnguard.StatsDiff)
