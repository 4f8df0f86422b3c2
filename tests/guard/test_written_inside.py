"""``use_running_stats`` where the block writes to the statistics: the layer normalises with those of the beginning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, outcome, state_of, statistics, told, values
from tests.nets import OwnForward, images, warmed

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
    "own": OwnForward,
}
EVERY_NORM = pytest.mark.parametrize("norm", NORMS)


def _reset(layer: Any) -> None:
    layer.running_mean.zero_()
    layer.running_var.fill_(1)


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({"running_mean": torch.tensor([3.0, 4.0]), "running_var": torch.ones(2)}, strict=False)


def _assign(layer: Any) -> None:
    layer.running_mean = torch.full_like(layer.running_mean, 7)


def _write(layer: Any) -> None:
    layer.running_var += 1


def _write_data(layer: Any) -> None:
    layer.running_mean.data.add_(3)  # no version counter tells


WRITES: list[Callable[[Any], None]] = [_reset, _load, _assign, _write, _write_data]


@EVERY_NORM
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_layer_normalises_with_the_statistics_of_the_beginning(
    training: bool, write: Callable[[Any], None], norm: str
) -> None:
    """In either mode, whatever writes to them."""
    net = nn.Sequential(warmed(NORMS[norm](2))).train(training)
    twin, before = copy.deepcopy(net).eval(), values(statistics(net))
    with told() as said, bnguard.frozen(net, "restore", use_running_stats=True):
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
        write(net[0])
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert len(said.warnings) == 1
    assert_same_bits(statistics(net), before)
    assert_clean(net)


@EVERY_NORM
def test_each_block_has_a_beginning_of_its_own(norm: str) -> None:
    """The innermost one decides."""
    net = nn.Sequential(warmed(NORMS[norm](2)))
    outer, x = copy.deepcopy(net).eval(), images()
    with told(), bnguard.frozen(net, "restore", use_running_stats=True):
        _write(net[0])
        inner = copy.deepcopy(net).eval()
        with bnguard.frozen(net, "restore", use_running_stats=True):
            assert_same_bits(net(x), inner(x))
            _write(net[0])
            assert_same_bits(net(x), inner(x))
        assert_same_bits(net(x), outer(x))


@pytest.mark.parametrize("training", [True, False])
def test_spent_budget_further_in_changes_nothing(training: bool) -> None:
    """A budget of another guard allows updates to nobody else."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2))).train(training)
    twin = copy.deepcopy(net).eval()
    with told(), bnguard.frozen(net, "restore", use_running_stats=True):
        _write(net[0])
        with bnguard.frozen(net, updates=1):
            for x in (images(), images()):
                assert_same_bits(net(x), twin(x))


def test_update_bn_calibrates_the_rest_of_the_net() -> None:
    """What follows a held part is calibrated with what the held part has always given."""
    torch.manual_seed(0)
    backbone, head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Sequential(nn.BatchNorm1d(8))
    net = nn.Sequential(backbone, head)
    for _ in range(20):
        net(torch.randn(32, 4) * 2 + 3)
    data: list[Tensor] = [torch.randn(16, 4) + 1 for _ in range(4)]
    expected = nn.BatchNorm1d(8, momentum=None)
    features = copy.deepcopy(backbone).eval()
    for batch in data:
        expected(features(batch))
    before = state_of(backbone)
    with told() as said, bnguard.frozen(backbone, "restore", use_running_stats=True):
        update_bn(data, net)
    assert_same_bits(backbone.state_dict(), before)
    assert_same_bits(statistics(head[0]), statistics(expected))
    assert len(said.warnings) == 1, "at the end: they were reset inside"


@EVERY_NORM
def test_gradients_after_the_block_are_those_of_the_forward(norm: str) -> None:
    """What the end of the block puts back is not what the backward pass needs."""
    net, twin = nn.Sequential(warmed(NORMS[norm](2))), nn.Sequential(warmed(NORMS[norm](2))).eval()
    twin.load_state_dict(net.state_dict())
    x, twin_x = images().requires_grad_(), images().requires_grad_()
    if isinstance(twin[0], nn.InstanceNorm2d):
        twin[0].track_running_stats = True
    with told(), bnguard.frozen(net, "restore", use_running_stats=True):
        _write(net[0])
        output = net(x)
        _reset(net[0])
    assert_same_bits(output, twin(twin_x))
    output.square().sum().backward()
    twin(twin_x).square().sum().backward()
    assert_same_bits(x.grad, twin_x.grad)


@EVERY_NORM
def test_net_that_is_converted_normalises_in_its_new_dtype(norm: str) -> None:
    """The statistics of the beginning, converted with it."""
    net = nn.Sequential(warmed(NORMS[norm](2)))
    with told(), bnguard.frozen(net, "restore", use_running_stats=True):
        net.double()
        assert_same_bits(net(images().double()), copy.deepcopy(net).eval()(images().double()))
        _write(net[0])
        net.float()
        x = images()
        assert torch.allclose(net(x), warmed(NORMS[norm](2)).eval()(x))
