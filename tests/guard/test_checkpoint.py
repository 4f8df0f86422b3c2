"""Activation checkpointing: inside a block, across its end, and with ``recompute_frozen``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_same_gradients, state_of, warns

KINDS = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
HOLDS = pytest.mark.parametrize(
    "options", [{"on_change": "restore"}, {"use_running_stats": True}], ids=["restore", "running"]
)


class Doubled(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def make_net() -> nn.Sequential:
    """One layer of each kind of update."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Doubled(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.SyncBatchNorm(4),
        nn.Dropout(0.3),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )


def make_input(seed: int = 1) -> torch.Tensor:
    """A batch that needs a gradient, as the reentrant kind wants it."""
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def set_mode(net: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Puts the twin's normalisation layers in eval mode where the guard makes them behave so."""
    for module in net.modules():
        if options.get("use_running_stats") and isinstance(module, _NormBase):
            module.eval()
    return net


def backward(net: nn.Module, x: torch.Tensor, run: Callable[..., torch.Tensor]) -> torch.Tensor:
    """One seeded forward and backward pass through ``run``; returns the output."""
    torch.manual_seed(3)
    output = run(net, x)
    output.square().sum().backward()
    return output


@KINDS
@HOLDS
def test_checkpoint_inside_a_block_has_the_twins_gradients(options: dict[str, Any], use_reentrant: bool) -> None:
    """Forward and recomputation inside: no update, and output and gradients of a twin without guard and checkpoint."""
    net, x, y = make_net(), make_input(), make_input()
    twin, before = set_mode(copy.deepcopy(net), options), state_of(net)
    with bnguard.frozen(net, **options):
        output = backward(net, x, lambda net, x: checkpoint(net, x, use_reentrant=use_reentrant))
    assert_same_bits(output, backward(twin, y, lambda net, x: net(x)))
    assert_same_bits(x.grad, y.grad)
    assert_same_gradients(net, twin)
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


@KINDS
def test_checkpoint_under_warn_moves_as_its_twin(use_reentrant: bool) -> None:
    """Under warn both forwards update, as without a guard, and both are counted."""
    net, x, y = make_net(), make_input(), make_input()
    twin = copy.deepcopy(net)
    with warns(), bnguard.frozen(net, "warn") as guard:
        backward(net, x, lambda net, x: checkpoint(net, x, use_reentrant=use_reentrant))
    backward(twin, y, lambda net, x: checkpoint(net, x, use_reentrant=use_reentrant))
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert {change.updates for change in guard.changes} == {2}


@KINDS
def test_recomputation_is_the_second_update_of_a_step(use_reentrant: bool) -> None:
    """``updates=1`` finds that a checkpointed region updates twice."""
    net, x = make_net(), make_input()
    with pytest.raises(bnguard.StatsChangedError, match="has updated once"), bnguard.frozen(net, updates=1):
        backward(net, x, lambda net, x: checkpoint(net, x, use_reentrant=use_reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@KINDS
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("options", [{}, {"determinism_check": "default"}, {"preserve_rng_state": True}])
def test_checkpoint_options_under_restore(options: dict[str, Any], nested: bool, use_reentrant: bool) -> None:
    """Whatever the options, and for a checkpoint within a checkpoint, backward inside the block fits its forward."""
    if use_reentrant and "determinism_check" in options:
        options = {}
    net, x, y = make_net(), make_input(), make_input()
    twin, before = copy.deepcopy(net), state_of(net)

    def run(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return checkpoint(net[1:5], x, use_reentrant=use_reentrant) if nested else net[1:5](x)

        return checkpoint(lambda x: net[5:](inner(net[:1](x))), x, use_reentrant=use_reentrant, **options)

    with bnguard.frozen(net, "restore"):
        backward(net, x, run)
    backward(twin, y, run)
    assert_same_bits(x.grad, y.grad)
    assert_same_gradients(net, twin)
    assert_same_bits(net.state_dict(), before)


@pytest.mark.parametrize("early_stop", [False, True])
@HOLDS
def test_early_stop_leaves_nothing_behind(options: dict[str, Any], early_stop: bool) -> None:
    """A recomputation that stops inside a layer, because nothing after it is needed, is held like any other."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Doubled(4)), make_input()
    before = state_of(net)
    with set_checkpoint_early_stop(early_stop), bnguard.frozen(net, **options):
        checkpoint(net, x, use_reentrant=False).sum().backward()
    assert_same_bits(net.state_dict(), before)
    assert_clean(net)


def test_checkpoint_under_autocast() -> None:
    """Under autocast, too, the recomputation fits the forward."""
    net, x, y = make_net(), make_input(), make_input()
    twin, before = copy.deepcopy(net), state_of(net)

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(net, x, use_reentrant=False).float()

    with bnguard.frozen(net, "restore"):
        backward(net, x, run)
    backward(twin, y, run)
    assert_same_gradients(net, twin)
    assert_same_bits(net.state_dict(), before)


@KINDS
def test_backward_after_the_block_is_foretold(use_reentrant: bool) -> None:
    """Under restore a later backward has the right gradients and updates the statistics: the block's end warns."""
    net, x, y = make_net(), make_input(), make_input()
    twin = copy.deepcopy(net)
    torch.manual_seed(3)
    with warns(at="with warns") as caught, bnguard.frozen(net, "restore"):
        loss = checkpoint(net, x, use_reentrant=use_reentrant).square().sum()
    loss.backward()
    assert caught.message == (
        "a checkpointed region was run inside frozen(), and its backward pass has not been run there.\n"
        "That pass recomputes the region, without the guard, and will update the running statistics.\n"
        "Call backward() inside the block, or run the region under torch.no_grad() if it needs no gradient."
    )
    backward(twin, y, lambda net, x: net(x))
    assert_same_bits(x.grad, y.grad)
    assert_same_gradients(net, twin)
    assert_same_bits(net.state_dict(), twin.state_dict())


@KINDS
def test_backward_after_use_running_stats_is_foretold(use_reentrant: bool) -> None:
    """A recomputation in the other mode is an error of torch's, or wrong gradients: the block's end warns of both."""
    net, x = make_net(), make_input()
    with warns() as caught, bnguard.frozen(net, use_running_stats=True):
        loss = checkpoint(net, x, use_reentrant=use_reentrant).square().sum()
    assert "will normalise with the batch" in caught.message
    if not use_reentrant:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()


@KINDS
@HOLDS
def test_no_warning_without_a_backward_to_come(options: dict[str, Any], use_reentrant: bool) -> None:
    """Backward inside the block, a graph that is gone, and a checkpoint under no_grad foretell nothing."""
    net = make_net()
    with bnguard.frozen(net, **options):
        checkpoint(net, make_input(), use_reentrant=use_reentrant).sum().backward()
        checkpoint(net, make_input(), use_reentrant=use_reentrant)
        with torch.no_grad():
            kept = checkpoint(net, make_input(), use_reentrant=use_reentrant)
    assert not kept.requires_grad


@KINDS
def test_only_the_outermost_block_foretells(use_reentrant: bool) -> None:
    """An inner block has nothing to foretell: the one around it still holds the layers."""
    net = make_net()
    with bnguard.frozen(net, "restore"):
        with bnguard.frozen(net, "restore"):
            loss = checkpoint(net, make_input(), use_reentrant=use_reentrant).sum()
        loss.backward()
    with warns(), bnguard.frozen(net, "restore"), bnguard.frozen(net, "restore"):
        loss = checkpoint(net, make_input(), use_reentrant=use_reentrant).sum()
    assert loss.requires_grad


# recompute_frozen


def train(net: nn.Module, run: Callable[..., Any], steps: int = 4) -> dict[str, torch.Tensor]:
    """Trains for some steps; ``run`` does forward and backward. Returns the state dict."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        run(net, make_input(step))
        optimizer.step()
    return state_of(net)


def plainly(net: nn.Module, x: torch.Tensor) -> None:
    """No checkpoint."""
    net(x).square().sum().backward()


def by_context_fn(net: nn.Module, x: torch.Tensor) -> None:
    """As the documentation of ``context_fn`` has it."""
    output = checkpoint(net, x, use_reentrant=False, context_fn=bnguard.recompute_frozen(net))
    output.square().sum().backward()


def by_with(net: nn.Module, x: torch.Tensor, use_reentrant: bool) -> None:
    """Around the step."""
    with bnguard.recompute_frozen(net):
        checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()


def around_backward(net: nn.Module, x: torch.Tensor) -> None:
    """Around the backward pass alone."""
    loss = checkpoint(net, x, use_reentrant=True).square().sum()
    with bnguard.recompute_frozen(net):
        loss.backward()


WAYS = {
    "context_fn": by_context_fn,
    "with-non-reentrant": lambda net, x: by_with(net, x, use_reentrant=False),
    "with-reentrant": lambda net, x: by_with(net, x, use_reentrant=True),
    "around-backward": around_backward,
}


@KINDS
def test_checkpointed_net_drifts_from_its_twin(use_reentrant: bool) -> None:
    """Without recompute_frozen the statistics differ: what it is there for (pytorch issue 96136)."""
    twin = train(make_net(), plainly)
    state = train(make_net(), lambda net, x: checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward())
    assert state["1.num_batches_tracked"] == 2 * twin["1.num_batches_tracked"]


@pytest.mark.parametrize("way", WAYS)
def test_recompute_frozen_trains_as_without_checkpointing(way: str) -> None:
    """After several steps parameters and statistics are bit for bit those of the net without checkpointing."""
    net = make_net()
    assert_same_bits(train(net, WAYS[way]), train(make_net(), plainly))
    assert_clean(net)


def test_recompute_frozen_goes_with_a_guard_around_the_step() -> None:
    """``updates=1`` around the step is content: each layer has updated once."""
    net = make_net()
    with bnguard.frozen(net, updates=1):
        by_context_fn(net, make_input())
    with bnguard.frozen(net, updates=1):
        by_with(net, make_input(), use_reentrant=True)


def test_backward_after_the_block_is_not_foretold_where_recompute_frozen_holds_it() -> None:
    """With recompute_frozen as context_fn the recomputation updates nothing, after the block either: no warning."""
    net, x = make_net(), make_input()
    before = state_of(net)
    with bnguard.frozen(net, "restore"):
        loss = checkpoint(net, x, use_reentrant=False, context_fn=bnguard.recompute_frozen(net)).square().sum()
    loss.backward()
    assert_same_bits(net.state_dict(), before)
    with warns(), bnguard.frozen(net, use_running_stats=True):  # recomputed in train mode: foretold
        loss = checkpoint(net, x, use_reentrant=False, context_fn=bnguard.recompute_frozen(net)).square().sum()


def test_recompute_frozen_lets_a_guard_inside_decide() -> None:
    """A guard within is the innermost one: its raise raises."""
    net = make_net()
    with bnguard.recompute_frozen(net), pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
        net(make_input())


def test_recompute_frozen_leaves_nothing_behind_on_an_exception() -> None:
    """An exception out of the block takes everything off, entered twice as well."""
    net = make_net()
    holding = bnguard.recompute_frozen(net)
    with pytest.raises(ZeroDivisionError), holding, holding:
        raise ZeroDivisionError
    assert_clean(net)
    assert repr(holding) == "<bnguard.recompute_frozen of a Sequential>"


def test_recompute_frozen_refuses_what_is_no_module() -> None:
    """The error names what was given."""
    with pytest.raises(TypeError, match=r"recompute_frozen\(\) takes a torch.nn.Module, got str"):
        bnguard.recompute_frozen("model")  # type: ignore[arg-type]
