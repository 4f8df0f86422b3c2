"""Running statistics that are parameters or plain attributes are named once, if they move."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from bnguard.guard import unregistered
from tests.asserts import assert_clean, assert_same_bits, told


def as_parameter(tensor: Tensor) -> Tensor:
    """In the state dict, but not among the buffers."""
    return nn.Parameter(tensor, requires_grad=False)


def as_attribute(tensor: Tensor) -> Tensor:
    """In neither."""
    return tensor


EVERY_WAY = pytest.mark.parametrize("way", [as_parameter, as_attribute])


class Handmade(nn.Module):
    """Hands its statistics to ``F.batch_norm``."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.running_mean = way(torch.zeros(3))
        self.running_var = way(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, training=self.training)


def make_net(way: Any) -> nn.Sequential:
    """A layer that is guarded and does not move, and one that cannot be guarded."""
    return nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Sequential(Handmade(way)))


def rows() -> Tensor:
    """Eight rows of three features."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 2


@EVERY_WAY
@pytest.mark.parametrize("options", [{}, {"on_change": "restore"}, {"use_running_stats": True}], ids=str)
def test_statistics_that_are_no_buffers_are_named_once(way: Any, options: dict[str, Any]) -> None:
    """With the remedy, at the end of the first block in which they move; they move as without a guard."""
    net, twin = make_net(way), make_net(way)
    with told() as said:
        for _ in range(2):
            with bnguard.frozen(net, **options):
                assert_same_bits(net(rows()), twin(rows()))
    assert said.error is None
    (text,) = said.warnings
    assert text.startswith("also moved inside frozen(), not guarded: running_mean and running_var of 1.0 (Handmade).\n")
    assert "register_buffer()" in text
    assert_same_bits(net[1][0].running_mean, twin[1][0].running_mean)
    assert_clean(net)


@EVERY_WAY
@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
def test_statistics_that_do_not_move_are_not_named(way: Any) -> None:
    """In eval mode, or where a frozen layer keeps its constants like this."""
    net = make_net(way)
    with bnguard.frozen(net):
        net[1].eval()
        net(rows())
    with bnguard.frozen(net), torch.no_grad():
        net[1][0].running_mean.add_(1)  # of a copy that follows another model, in eval mode


@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
def test_parameter_that_is_trained_is_not_named() -> None:
    """An optimizer moves it, whatever its name is."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.running_mean = nn.Parameter(torch.zeros(3))

        def forward(self, input: Tensor) -> Tensor:
            return input - self.running_mean

    net = nn.Sequential(nn.BatchNorm1d(3).eval(), Learned())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with bnguard.frozen(net):
        net(rows()).square().sum().backward()
        optimizer.step()
    assert net[1].running_mean.abs().sum() > 0


@EVERY_WAY
@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
def test_statistics_outside_of_the_selection_are_not_named(way: Any) -> None:
    """The user has said which part it is about."""
    net = make_net(way)
    net[1].append(nn.BatchNorm1d(3).eval())
    with bnguard.frozen(net, include="0"):
        net(rows())
    with bnguard.frozen(net, exclude="1"):
        net(rows())


def test_buffers_of_these_names_are_guarded_instead() -> None:
    """The remedy is one."""
    net = make_net(as_attribute)
    for name in ("running_mean", "running_var"):
        value = net[1][0].__dict__.pop(name)
        net[1][0].register_buffer(name, value)
    before = copy.deepcopy(net.state_dict())
    with told() as said, bnguard.frozen(net, "restore"):
        net(rows())
    assert said.warnings == []
    assert_same_bits(net.state_dict(), before)


def test_nothing_of_a_model_is_kept() -> None:
    """What is remembered of it goes with it."""
    gc.collect()
    before = len(unregistered._known._entries), len(unregistered._told._entries)
    net = make_net(as_attribute)
    with told(), bnguard.frozen(net):
        net(rows())
    assert len(unregistered._told._entries) == before[1] + 1
    del net
    gc.collect()
    assert (len(unregistered._known._entries), len(unregistered._told._entries)) == before


@EVERY_WAY
def test_statistics_that_are_added_between_blocks_are_named(way: Any) -> None:
    """The model is looked at again if one of its modules has got an attribute."""
    net = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Sequential(nn.Identity()))
    guard = bnguard.frozen(net)
    with told() as said:
        for number in range(6):
            if number == 3:
                net[1][0].__class__ = Handmade  # type: ignore[assignment]  # mypy takes it for a property
                net[1][0].running_mean, net[1][0].running_var = way(torch.zeros(3)), way(torch.ones(3))
                net[1][0].is_handmade = True
            with guard:
                net(rows())
    (text,) = said.warnings
    assert "not guarded: running_mean and running_var of 1.0 (Handmade).\n" in text
