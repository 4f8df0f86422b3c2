"""Under ``"raise"``: a batch that torch refuses is torch's error, and a message names what would move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, statistics, told, values

# What torch refuses, and the like that it takes.
REFUSED: list[tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = [
    (lambda: nn.BatchNorm1d(3), (1, 3), (2, 3)),
    (lambda: nn.BatchNorm1d(3), (1, 3, 1), (1, 3, 2)),
    (lambda: nn.BatchNorm2d(3), (1, 3, 1, 1), (2, 3, 1, 1)),
    (lambda: nn.BatchNorm3d(3), (1, 3, 1, 1, 1), (1, 3, 1, 2, 1)),
    (lambda: nn.SyncBatchNorm(3), (1, 3), (2, 3)),
    (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 1), (4, 3, 2)),
    (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (3, 1), (3, 2)),
    (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (4, 3, 1, 1), (1, 3, 1, 2)),
]
EVERY_LAYER = pytest.mark.parametrize(("make", "refused", "taken"), REFUSED)


def message_of(model: nn.Module, input: Tensor) -> str:
    """What torch says about an input."""
    with pytest.raises(ValueError, match=r"Expected more than 1|expected") as caught:
        model(input)
    return str(caught.value)


@EVERY_LAYER
@pytest.mark.parametrize("updates", [0, 1])
def test_batch_of_single_values_is_torchs_error(
    updates: int, make: Callable[[], nn.Module], refused: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    """The same text; and the counter, which torch moves before it looks, stays."""
    layer, twin = make(), make()
    with bnguard.frozen(layer, updates=updates):
        for _ in range(updates):
            layer(torch.randn(taken))
        before = values(statistics(layer))
        assert message_of(layer, torch.randn(refused)) == message_of(twin, torch.randn(refused))
        assert_same_bits(statistics(layer), before)
    assert_clean(layer)


@EVERY_LAYER
def test_batch_that_torch_takes_is_stopped(
    make: Callable[[], nn.Module], refused: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    """Two values are enough."""
    layer = make()
    with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(layer):
        layer(torch.randn(taken))


def said_to_move(layer: nn.Module, input: Tensor) -> str:
    """The second line of the error."""
    with told() as said, bnguard.frozen(layer):
        layer(input)
    assert said.error is not None
    return said.error.splitlines()[1]


def test_momentum_zero_moves_the_counter() -> None:
    """And says so: ``old * 1 + batch * 0`` has the bits of ``old``."""
    layer = nn.BatchNorm1d(3, momentum=0.0)
    assert said_to_move(layer, torch.randn(4, 3)) == "this forward would update num_batches_tracked."
    layer.momentum = None  # the average of all batches
    everything = "this forward would update running_mean, running_var and num_batches_tracked."
    assert said_to_move(layer, torch.randn(4, 3)) == everything


def test_momentum_zero_with_infinities_moves_the_rest() -> None:
    """A batch with an infinity makes NaN also of what momentum 0 keeps: the comparison at the end names it."""
    layer = nn.BatchNorm1d(3, momentum=0.0)
    with told(), bnguard.frozen(layer, "warn") as guard:
        layer(torch.full((4, 3), torch.inf))
    assert layer.running_mean.isnan().all()
    assert guard.changes[0].buffers == ("running_mean", "running_var", "num_batches_tracked")


def test_instance_norm_counts_nothing() -> None:
    """Its counter never moves, so it is not named."""
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    assert said_to_move(layer, torch.randn(2, 3, 4, 4)) == "this forward would update running_mean and running_var."
