"""The least that a guard must do, to read the figures against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["least_around", "least_forward"]


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


def least_forward(layer: nn.BatchNorm2d, x: Tensor) -> Callable[[], Tensor]:
    """The call of ``F.batch_norm``, and nothing around it."""
    mean, var = torch.zeros(layer.num_features), torch.ones(layer.num_features)
    return partial(F.batch_norm, x, mean, var, layer.weight, layer.bias, True, 0.1, layer.eps)
