"""What people do today instead of a guard, each as a step and as what goes around the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "FrozenBatchNorm",
    "back_in_train_mode",
    "batch_norms",
    "compared_by_hooks",
    "compared_by_state_dict",
    "converted",
    "counted_by_hand",
    "eval_by_hand",
    "guarded_by_hand",
    "keep_in_eval_mode",
    "loaded_back",
    "momentum_zero",
    "put_back_by_hand",
    "untracked",
]

Step = Callable[[], object]


def batch_norms(net: nn.Module) -> list[Any]:
    """The BatchNorm layers of a net."""
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def eval_by_hand(net: nn.Module, step: Step) -> Step:
    """``net.train()``, then ``eval()`` on each BatchNorm, at each step."""

    def run() -> None:
        net.train()
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        step()

    return run


@contextmanager
def back_in_train_mode(net: nn.Module) -> Iterator[None]:
    """Undoes ``eval_by_hand``."""
    try:
        yield
    finally:
        net.train()


@contextmanager
def untracked(net: nn.Module) -> Iterator[None]:
    """``track_running_stats=False`` as a net has it that was built so: without buffers."""
    saved = [(bn, dict(bn._buffers)) for bn in batch_norms(net)]
    for bn, _ in saved:
        bn.track_running_stats = False
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None
    try:
        yield
    finally:
        for bn, buffers in saved:
            bn.track_running_stats = True
            bn._buffers.update(buffers)


@contextmanager
def momentum_zero(net: nn.Module) -> Iterator[None]:
    """Momentum 0, as SAM's second forward has it; the counter still moves."""
    saved = [(bn, bn.momentum) for bn in batch_norms(net)]
    for bn, _ in saved:
        bn.momentum = 0.0
    try:
        yield
    finally:
        for bn, momentum in saved:
            bn.momentum = momentum


class FrozenBatchNorm(nn.Module):
    """The affine formula of detection libraries: statistics and parameters as buffers.

    Source: ``FrozenBatchNorm2d`` of torchvision, which the formula is written after.
    """

    def __init__(self, bn: Any) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())
        self.eps = bn.eps

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


@contextmanager
def converted(net: nn.Module) -> Iterator[None]:
    """The net with a ``FrozenBatchNorm`` in place of each BatchNorm."""
    places = [
        (parent, name, child)
        for parent in net.modules()
        for name, child in parent._modules.items()
        if isinstance(child, _BatchNorm)
    ]
    for parent, name, child in places:
        parent._modules[name] = FrozenBatchNorm(child)
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def compared_by_state_dict(net: nn.Module, step: Step) -> Step:
    """A copy of ``state_dict()`` before each step, compared after it."""

    def run() -> None:
        before = {key: value.clone() for key, value in net.state_dict().items()}
        step()
        after = net.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before if "running" in key)

    return run


def loaded_back(net: nn.Module, step: Step) -> Step:
    """``load_state_dict`` of what the buffers were, after each step."""

    def run() -> None:
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        step()
        net.load_state_dict(before, strict=False)

    return run


def put_back_by_hand(net: nn.Module, step: Step) -> Step:
    """A clone of each running statistic before each step; after it ``torch.equal``, and ``copy_`` where it differs."""

    def run() -> None:
        buffers = [buffer for bn in batch_norms(net) for buffer in bn._buffers.values() if buffer is not None]
        before = [buffer.clone() for buffer in buffers]
        step()
        for buffer, value in zip(buffers, before, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    return run


@contextmanager
def compared_by_hooks(net: nn.Module) -> Iterator[None]:
    """Clones in a forward pre-hook of each layer, ``torch.equal`` in its forward hook."""
    before: dict[nn.Module, list[Tensor]] = {}
    moved: set[nn.Module] = set()

    def look(module: nn.Module, args: object) -> None:
        before[module] = [buffer.clone() for buffer in module._buffers.values() if buffer is not None]

    def compare(module: nn.Module, args: object, output: object) -> None:
        now = [buffer for buffer in module._buffers.values() if buffer is not None]
        if not all([torch.equal(then, buffer) for then, buffer in zip(before[module], now, strict=True)]):
            moved.add(module)

    handles = [bn.register_forward_pre_hook(look) for bn in batch_norms(net)]
    handles += [bn.register_forward_hook(compare) for bn in batch_norms(net)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def counted_by_hand(net: nn.Module, step: Step) -> Step:
    """The check that a step updates each layer once, without saying which line does it, or undoing anything."""
    counts = [bn.num_batches_tracked for bn in batch_norms(net)]

    def run() -> None:
        before = [count.item() for count in counts]
        step()
        assert all(count.item() == number + 1 for count, number in zip(counts, before, strict=True))

    return run


def guarded_by_hand(net: nn.Module) -> None:
    """What a guard does, written by hand: per layer three clones, two hooks, three comparisons, and two removals."""
    layers = batch_norms(net)
    saved = [{name: buffer.clone() for name, buffer in bn._buffers.items()} for bn in layers]

    def look(module: nn.Module, args: object) -> None:
        pass

    def compare(module: nn.Module, args: object, output: object) -> None:
        pass

    handles = [bn.register_forward_pre_hook(look) for bn in layers]
    handles += [bn.register_forward_hook(compare) for bn in layers]
    for bn, before in zip(layers, saved, strict=True):
        for name, buffer in before.items():
            assert torch.equal(buffer, bn._buffers[name])
    for handle in handles:
        handle.remove()


def keep_in_eval_mode(net: nn.Module) -> nn.Module:
    """A copy of a net whose BatchNorm layers stay in eval mode, whatever ``train()`` says, with fixed parameters."""
    net = copy.deepcopy(net)
    for bn in batch_norms(net):
        bn.eval().requires_grad_(False)
        bn.train = lambda mode=True, bn=bn: bn
    return net
