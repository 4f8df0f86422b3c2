"""A dictionary of hooks that user code has put aside while a block ended, and puts back, brings no guard back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, outcome, state_of, told
from tests.nets import OwnForward, images, warmed

TABLES = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
EVERY_LAYER = pytest.mark.parametrize("layer", [nn.BatchNorm2d, OwnForward])
EVERY_POLICY = pytest.mark.parametrize("policy", ["raise", "warn"])


def put_aside(layer: Any) -> dict[str, Any]:
    """Replaces the dictionaries of hooks, and returns the old ones."""
    old = {table: layer.__dict__[table] for table in TABLES}
    layer.__dict__.update({table: OrderedDict() for table in TABLES})
    return old


def left_by_a_block(layer: Any, policy: Any) -> nn.Sequential:
    """A net with the hooks of a block that has ended, and the statistics of before."""
    net = nn.Sequential(warmed(layer(2)))
    with bnguard.frozen(net, policy):
        old = put_aside(net[0])
    net[0].__dict__.update(old)
    assert "bnguard" in net[0]._forward_pre_hooks
    return net


@EVERY_POLICY
@EVERY_LAYER
def test_hook_that_comes_back_after_its_block_does_nothing(layer: Any, policy: str) -> None:
    """The next forward runs as without it, and removes it."""
    net = left_by_a_block(layer, policy)
    twin = nn.Sequential(warmed(layer(2)))
    assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert_same_bits(state_of(net), state_of(twin))
    assert_clean(net)
    assert not net[0]._forward_hooks_always_called


@pytest.mark.parametrize("tables", [TABLES[:1], TABLES[1:]], ids=["pre-hooks", "hooks"])
@EVERY_POLICY
def test_hook_that_comes_back_without_its_other_half_does_nothing(tables: tuple[str, ...], policy: Any) -> None:
    """Of a layer that is compared around each forward, one of both hooks comes back."""
    net, twin = nn.Sequential(warmed(OwnForward(2))), nn.Sequential(warmed(OwnForward(2)))
    with bnguard.frozen(net, policy):
        old = put_aside(net[0])
    net[0].__dict__.update({table: old[table] for table in tables})
    assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert_same_bits(state_of(net), state_of(twin))
    assert_clean(net)


@EVERY_LAYER
def test_hook_that_comes_back_survives_no_failed_forward(layer: Any) -> None:
    """The error is torch's own, and the forward after it removes what is left."""
    net = left_by_a_block(layer, "raise")
    twin = nn.Sequential(warmed(layer(2)))
    errors = []
    for each in (net, twin):
        with pytest.raises(RuntimeError) as caught:
            each(torch.zeros(4, 5, 2, 2))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    net(images())
    assert_clean(net)


@pytest.mark.parametrize("inner", ["raise", "warn", "restore", "rollback"])
@EVERY_POLICY
@EVERY_LAYER
def test_next_block_removes_a_hook_that_has_come_back(layer: Any, policy: str, inner: Any) -> None:
    """Without a forward, and is itself as it is on a layer without one."""
    net = left_by_a_block(layer, policy)
    twin = nn.Sequential(warmed(layer(2)))
    results: list[Any] = []
    for each in (net, twin):
        with told() as said, bnguard.frozen(each, inner) as guard:
            if inner != "raise":
                results.append(outcome(each, images()))
        results.append(state_of(each))
        assert [change.updates for change in guard.changes if change.updates] == ([1] if inner == "warn" else [])
        assert len(said.warnings) == (inner == "warn")
        assert_clean(each)
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert_same_bits(one, other)


@EVERY_LAYER
def test_hook_that_comes_back_inside_another_block_of_the_guard_acts(layer: Any) -> None:
    """It is that of the guard that is open, and goes at its end."""
    net = nn.Sequential(warmed(layer(2)))
    entry = copy.deepcopy(state_of(net))
    again = bnguard.frozen(net)
    with again:
        old = put_aside(net[0])
    with pytest.raises(bnguard.StatsChangedError), again:
        net[0].__dict__.update(old)
        net(images())
    assert_same_bits(state_of(net), entry)
    net(images())
    assert_clean(net)
