"""Whatever call of bnguard fails on the way in, inside or on the way out: the model is as it was."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits

PACKAGE = str(Path(bnguard.__file__).parent) + os.sep
TORCH = str(Path(torch.__file__).parent) + os.sep


class InjectedError(Exception):
    """What a call is made to raise."""


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Faults:
    """Makes the ``target``-th call that bnguard makes into torch raise; counts them all.

    Calls into torch's Python code and into its extension count, those that close a context do not: torch itself
    does not survive that. No garbage is collected meanwhile: what is called then, bnguard does not call.
    """

    def __init__(self, target: int | None = None) -> None:
        self.target = target
        self.calls: list[str] = []

    def __enter__(self) -> Faults:
        self._collects = gc.isenabled()
        gc.disable()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        if self._collects:
            gc.enable()

    def _event(self, frame: Any, event: str, arg: Any) -> None:
        if event == "c_call":
            caller, name = frame, getattr(arg, "__qualname__", str(arg))
            home = str(getattr(arg, "__module__", None))  # of torch.cat; a method of a tensor has none
            is_torch = home.startswith("torch") or isinstance(getattr(arg, "__self__", None), torch.Tensor)
            is_torch = is_torch and name != "set_eval_frame"  # around each of our functions, before torch 2.7
        elif event == "call":
            caller, name = frame.f_back, frame.f_code.co_qualname
            is_torch = frame.f_code.co_filename.startswith(TORCH) and not name.endswith("__exit__")
        else:
            return
        if is_torch and caller is not None and caller.f_code.co_filename.startswith(PACKAGE):
            self.calls.append(name)
            if len(self.calls) - 1 == self.target:
                raise InjectedError(name)


def make_net() -> nn.Sequential:
    """A layer of each kind; two parameters have a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1),
        nn.BatchNorm2d(3),
        OwnForward(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.SyncBatchNorm(3),
    )
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[1].weight.grad = torch.ones_like(net[1].weight)
    return net


def run_plainly(net: nn.Module, guard: bnguard.frozen) -> None:
    """Nothing that updates."""
    with guard:
        net.eval()(torch.ones(2, 2, 3, 3))


def run_training(net: nn.Module, guard: bnguard.frozen) -> None:
    """A train-mode forward."""
    with guard:
        net.train()(torch.randn(4, 2, 3, 3))


def run_with_writes(net: nn.Module, guard: bnguard.frozen) -> None:
    """Writes of all sorts."""
    with guard:
        net[1].running_mean.add_(1)  # type: ignore[operator]
        net[2].running_var = torch.full((3,), 7.0)
        net[4].running_mean = net[4].running_mean.double()


SCENARIOS = {
    "raise": (lambda net: bnguard.frozen(net), run_plainly),
    "raise-training": (lambda net: bnguard.frozen(net), run_training),
    "raise-writes": (lambda net: bnguard.frozen(net), run_with_writes),
    "restore-training": (lambda net: bnguard.frozen(net, "restore"), run_training),
    "restore-writes": (lambda net: bnguard.frozen(net, "restore"), run_with_writes),
    "running-training": (lambda net: bnguard.frozen(net, use_running_stats=True), run_training),
    "affine": (lambda net: bnguard.frozen(net, "restore", affine=True), run_training),
    "budget-spent": (lambda net: bnguard.frozen(net, "restore", updates=1), run_plainly),
}


def assert_as_it_was(net: nn.Module, before: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Statistics, objects, flags and gradients are those of before, and nothing of ours is left."""
    assert_clean(net)
    assert torch.is_grad_enabled()
    for name, tensor in net.named_buffers():
        if not (name == "4.running_mean" and tensor.dtype == torch.float64):
            assert tensor is tensors[name], name
            assert_same_bits(tensor, before.get_buffer(name))
        else:
            assert_same_bits(tensor, before.get_buffer(name).double())
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad, name
        assert (parameter.grad is not None) == (name in ("0.weight", "1.weight")), name


@pytest.mark.filterwarnings("ignore::bnguard.BNGuardWarning")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_model_survives_every_failing_call(scenario: str) -> None:
    """Each call that a guard makes into torch is made to raise, one run each; the model is as before every time."""
    make_guard, run = SCENARIOS[scenario]
    net, faults = make_net(), Faults()
    guard = make_guard(net)
    attempt(faults, run, net, guard)
    assert {"cat", "equal", "_get_tracing_state"} & {name.split(".")[-1] for name in faults.calls}
    for target in range(len(faults.calls)):
        net = make_net()
        before, tensors = copy.deepcopy(net), dict(net.named_buffers())
        guard = make_guard(net)
        attempt(Faults(target), run, net, guard)
        assert_as_it_was(net, before, tensors)
        with bnguard.frozen(net, "restore"):  # and it can be guarded again
            net[1].train()(torch.randn(4, 3, 3, 3))
        assert_as_it_was(net, before, tensors)


def attempt(faults: Faults, run: Callable[..., None], net: nn.Module, guard: bnguard.frozen) -> None:
    """One run, whatever comes of it."""
    try:
        with faults:
            run(net, guard)
    except (InjectedError, bnguard.StatsChangedError):
        pass
