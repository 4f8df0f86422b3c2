"""The least that a guard and a watch must do, to read the figures against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["least_around", "least_forward", "least_step", "least_watch"]


def least_around(net: nn.Module) -> None:
    """One walk, one copy of all statistics, one attribute on each layer and off again, one comparison."""
    layers = [module for module in net.modules() if module._buffers]
    statistics = [layer._buffers[name] for layer in layers for name in ("running_mean", "running_var")]
    counts = [layer._buffers["num_batches_tracked"] for layer in layers]
    before, counted = torch.cat(statistics), [count.item() for count in counts]
    for layer in layers:
        layer.__dict__["forward"] = layer.forward
    for layer in layers:
        del layer.__dict__["forward"]
    after = torch.cat(statistics)
    assert torch.equal(before.view(torch.int32), after.view(torch.int32))
    assert counted == [count.item() for count in counts]


@contextmanager
def least_watch() -> Iterator[None]:
    """Hooks that do nothing on all modules, as models that are made later need them, on steps and backward passes."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    run = autograd._engine_run_backward
    with ExitStack() as undo:
        undo.callback(register_module_forward_pre_hook(lambda module, args: None).remove)
        undo.callback(register_module_forward_hook(lambda module, args, output: None).remove)
        undo.callback(register_optimizer_step_post_hook(lambda optimizer, args, kwargs: None).remove)
        undo.callback(setattr, autograd, "_engine_run_backward", run)
        autograd._engine_run_backward = counted
        yield


def least_forward(layer: nn.BatchNorm2d, x: Tensor) -> Callable[[], Tensor]:
    """The call of ``F.batch_norm``, and nothing around it."""
    mean, var = torch.zeros(layer.num_features), torch.ones(layer.num_features)
    return partial(F.batch_norm, x, mean, var, layer.weight, layer.bias, True, 0.1, layer.eps)


def least_step(net: nn.Module, step: Callable[[], None], *, copies: bool) -> Callable[[], None]:
    """A step in which each BatchNorm layer counts and calls ``F.batch_norm``, and nothing around it.

    Args:
        net: The net.
        step: Its training step.
        copies: Whether to copy all statistics of a layer right before and right after its forward, as a budget must
            to know which values are its update's; they are concatenated at the end.
    """
    layers = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]

    def run() -> None:
        kept: list[tuple[Tensor, Tensor, Any, Any]] = []
        for layer in layers:
            layer.__dict__["forward"] = partial(_copying_forward if copies else _plain_forward, layer, kept)
        try:
            step()
        finally:
            for layer in layers:
                del layer.__dict__["forward"]
        if copies:
            torch.cat([before for before, *_ in kept]), torch.cat([after for _, after, *_ in kept])

    return run


def _plain_forward(layer: Any, kept: list[Any], x: Tensor) -> Tensor:
    own, parameters = layer._buffers, layer._parameters
    own["num_batches_tracked"].add_(1)
    weight, bias = parameters["weight"], parameters["bias"]
    return F.batch_norm(x, own["running_mean"], own["running_var"], weight, bias, True, layer.momentum, layer.eps)


def _copying_forward(layer: Any, kept: list[Any], x: Tensor) -> Tensor:
    own = layer._buffers
    both, number = (own["running_mean"], own["running_var"]), own["num_batches_tracked"]
    before, number_before = torch.cat(both), number.item()
    y = _plain_forward(layer, kept, x)
    kept.append((before, torch.cat(both), number_before, number.item()))
    return y
