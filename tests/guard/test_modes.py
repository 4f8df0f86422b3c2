"""A mode of the user's, around a block or inside it, sees the operations of the model and none of a guard."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

import bnguard
from tests import policies
from tests.asserts import assert_clean, assert_same_bits, state_of, told
from tests.nets import OwnForward, ReassigningNorm, ScaledNorm, images, warmed

GUARDS = {**policies.GUARDS, "budget raise": {"updates": 3}}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "stock": lambda: nn.BatchNorm2d(2),
    "own": lambda: OwnForward(2),
    "reassigning": lambda: ReassigningNorm(2),
    "subclass": lambda: ScaledNorm(2),
    "instance": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    "sync": lambda: nn.SyncBatchNorm(2),
}


class Functions(TorchFunctionMode):
    """Notes each call of a function of torch, and each attribute of a tensor that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Notes each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {"functions": Functions, "operations": Operations}
COUNTING = ("add_", "aten.add_.Tensor")  # of num_batches_tracked, which a held forward does not count


def steps(net: nn.Module) -> None:
    """Two forwards, of which those that are stopped are left out."""
    for seed in range(2):
        try:
            net(images(seed=seed).requires_grad_()).sum().backward()
        except bnguard.StatsChangedError:
            return


@pytest.mark.parametrize("is_around", [True, False], ids=["around", "inside"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("guard", GUARDS)
def test_mode_sees_what_it_sees_without_a_guard(
    guard: str, layer: str, mode: str, training: bool, is_around: bool
) -> None:
    """In the same order, in the first block of a guard and in later ones; but for the counter of a held layer."""
    net = nn.Sequential(warmed(LAYERS[layer]()))
    twin = copy.deepcopy(net)
    eval_too = guard == "running"
    first = MODES[mode]()
    with first:
        steps(twin.train(training and not eval_too))
    again = bnguard.frozen(net.train(training), **GUARDS[guard])
    for _ in range(3):
        net.zero_grad()
        expected = first.seen
        seen = MODES[mode]()
        with told(), seen if is_around else nullcontext(), again, nullcontext() if is_around else seen:
            steps(net)
        found = seen.seen
        if guard == "raise" and training:  # the first forward is stopped, before or after it has run
            expected = expected[: len(found)]
        elif guard in ("restore", "budget") and layer == "stock":
            found, expected = ([name for name in some if name not in COUNTING] for some in (found, expected))
        assert found == expected
        assert not _get_current_function_mode_stack()
    assert_clean(net)


class Refusing(TorchFunctionMode):
    """Lets nothing of a comparison pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.cat, torch.equal, torch.Tensor.item, torch.Tensor.clone, torch.Tensor.data_ptr):
            raise AssertionError(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize("guard", GUARDS)
def test_modes_do_not_change_the_comparison(guard: str, is_written: bool) -> None:
    """A mode that refuses what a guard computes with hinders no block, and is itself as it was."""
    net = nn.Sequential(warmed(nn.BatchNorm2d(2))).eval()
    entry, layer = state_of(net), net[0]
    again = bnguard.frozen(net, **GUARDS[guard])
    with torch.device("meta"), Refusing():
        modes = _get_current_function_mode_stack()
        for _ in range(3):
            with told() as said, again:
                if is_written:
                    layer.running_mean.data.add_(1)
            assert bool(said.error or said.warnings) == (is_written and guard != "rollback")
            assert _get_current_function_mode_stack() == modes
    if guard != "warn":
        assert_same_bits(state_of(net), entry)
    assert_clean(net)
