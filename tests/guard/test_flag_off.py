"""``use_running_stats`` and an InstanceNorm whose ``track_running_stats`` is off: torch would use the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, statistics, values
from tests.nets import images, warmed
from tests.old_torch import needs_guarded_graphs


def make(*, training: bool) -> nn.InstanceNorm2d:
    """A layer with statistics, whose flag was put off later, as libraries do to evaluate with the batch."""
    layer = warmed(nn.InstanceNorm2d(2, track_running_stats=True, affine=True)).train(training)
    layer.track_running_stats = False
    return layer


def expected(layer: nn.InstanceNorm2d, x: Tensor) -> Tensor:
    """What the statistics say."""
    twin = nn.InstanceNorm2d(2, track_running_stats=True, affine=True)
    twin.load_state_dict(layer.state_dict())
    return twin.eval()(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", ["raise", "warn", "restore"])
def test_statistics_are_used_although_the_flag_is_off(policy: str, training: bool) -> None:
    """Bit for bit as with the flag on, in eval mode; flag, mode and statistics are as before."""
    layer, x = make(training=training), images()
    before = values(statistics(layer))
    with bnguard.frozen(layer, policy, use_running_stats=True):
        assert_same_bits(layer(x), expected(layer, x))
    assert not layer.track_running_stats
    assert layer.training == training
    assert_same_bits(statistics(layer), before)
    assert_clean(layer)


@needs_guarded_graphs
@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_used_in_a_graph(training: bool) -> None:
    """Also where the graph was compiled before the block."""
    layer, x = make(training=training), images()
    run = torch.compile(layer, backend="eager")
    run(x)
    before = values(statistics(layer))
    with bnguard.frozen(layer, use_running_stats=True):
        assert torch.allclose(run(x), expected(layer, x), atol=1e-6)
    assert not layer.track_running_stats
    assert_same_bits(statistics(layer), before)
    assert_clean(layer)


def test_other_policies_leave_the_flag_alone() -> None:
    """Under ``"restore"`` it normalises with the batch, as without a guard."""
    layer, x = make(training=False), images()
    twin = make(training=False)
    with bnguard.frozen(layer, "restore"):
        assert_same_bits(layer(x), twin(x))
