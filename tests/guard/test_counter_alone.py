"""A forward that moves the number of batches alone spends no budget: momentum 0, and a batch that torch refuses."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, told


class Scaled(nn.BatchNorm1d):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def usual() -> nn.Module:
    """Torch's own layers alone."""
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))


def mixed() -> nn.Module:
    """One of them beside a layer with a forward of its own."""
    return nn.Sequential(nn.BatchNorm1d(3), Scaled(3))


NETS: dict[str, Callable[[], nn.Module]] = {"usual": usual, "mixed": mixed, "layer": lambda: nn.BatchNorm1d(3)}
EVERY_NET = pytest.mark.parametrize("make", NETS.values(), ids=NETS)
EVERY_POLICY = pytest.mark.parametrize("policy", ["raise", "restore", "warn"])


def set_momentum(net: nn.Module, momentum: float) -> None:
    """What ``bypass_bn`` and ``enable_running_stats`` of SAM do."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = momentum


def sam(net: nn.Module, seed: int) -> list[Any]:
    """A step of SAM: one forward that learns statistics, and one that must not."""
    batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    set_momentum(net, 0.1)
    first = net(batch)
    set_momentum(net, 0.0)
    second = net(batch + 1)
    set_momentum(net, 0.1)
    return [first, second, net(batch) if seed < 0 else None]


@EVERY_NET
@EVERY_POLICY
def test_step_of_sam_makes_one_update(make: Callable[[], nn.Module], policy: Any) -> None:
    """Under ``updates=1`` outputs and statistics are those of the twin, the number of batches too, step after step."""
    net = make()
    twin = copy.deepcopy(net)
    guard = bnguard.frozen(net, policy, updates=1)
    for seed in range(4):
        expected = sam(twin, seed)
        with told() as said, guard:
            outputs = sam(net, seed)
        assert (said.error, said.warnings) == (None, [])
        assert_same_bits(outputs, expected)
        assert_same_bits(state_of(net), state_of(twin))
        assert guard.changes == ()
    assert_clean(net)


@EVERY_NET
def test_second_update_is_found_all_the_same(make: Callable[[], nn.Module]) -> None:
    """After a forward that only counted, and before one."""
    net = make()
    for order in ([0.1, 0.0, 0.1], [0.0, 0.1, 0.1]):
        with pytest.raises(bnguard.StatsChangedError, match=r"updates=1"), bnguard.frozen(net, updates=1):
            for momentum in order:
                set_momentum(net, momentum)
                net(torch.randn(5, 3))
    assert_clean(net)


@EVERY_NET
@EVERY_POLICY
def test_forwards_that_only_count_may_overlap(make: Callable[[], nn.Module], policy: Any) -> None:
    """In several threads at the same time: none is stopped."""
    net = make()
    set_momentum(net, 0.0)
    twin = copy.deepcopy(net)
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            for _ in range(8):
                barrier.wait(20)
                net(torch.ones(5, 3))
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with told() as said, bnguard.frozen(net, policy, updates=1):
            threads = [threading.Thread(target=call) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert (errors, said.error, said.warnings) == ([], None, [])
    counters = [value for name, value in state_of(net).items() if "num" in name]
    assert all(8 <= int(value) <= 32 for value in counters)  # torch itself may lose one of two at the same time
    assert_same_bits(
        {name: value for name, value in state_of(net).items() if "num" not in name},
        {name: value for name, value in state_of(twin).items() if "num" not in name},
    )
    assert_clean(net)


@EVERY_NET
def test_batch_that_is_not_finite_is_an_update(make: Callable[[], nn.Module]) -> None:
    """Momentum 0 keeps no NaN away: the statistics would not be those of before."""
    net = make()
    with bnguard.frozen(net, "restore", updates=1):
        net(torch.randn(5, 3))
        after = state_of(net)
        set_momentum(net, 0.0)
        net(torch.full((5, 3), torch.nan))
        statistics = {name: value for name, value in state_of(net).items() if "num" not in name}
        assert_same_bits(statistics, {name: after[name] for name in statistics})
    assert_same_bits({name: value for name, value in state_of(net).items() if "num" not in name}, statistics)
    assert_clean(net)


@EVERY_NET
@pytest.mark.parametrize("policy", ["raise", "restore"])
def test_batch_that_torch_refuses_spends_nothing(make: Callable[[], nn.Module], policy: Any) -> None:
    """The error is torch's, and the next batch is the one that updates, as in the twin."""
    net = make()
    twin = copy.deepcopy(net)
    batch = torch.randn(5, 3)
    for module in (net, twin):
        with bnguard.frozen(net, policy, updates=1):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                module(torch.randn(1, 3))
            module(batch)
    assert_same_bits(state_of(net), state_of(twin))
    assert_clean(net)


def test_outer_guard_without_a_budget_decides_as_ever() -> None:
    """What an inner budget lets through is the outer guard's to stop or to hold."""
    layer = nn.BatchNorm1d(3, momentum=0.0)
    before = state_of(layer)
    with bnguard.frozen(layer, "restore"), bnguard.frozen(layer, updates=1):
        layer(torch.randn(5, 3))
        assert_same_bits(state_of(layer), before)
    with (
        pytest.raises(bnguard.StatsChangedError, match="num_batches_tracked"),
        bnguard.frozen(layer),
        bnguard.frozen(layer, updates=1),
    ):
        layer(torch.randn(5, 3))
    assert_same_bits(state_of(layer), before)
    assert_clean(layer)
