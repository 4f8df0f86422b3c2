"""Whether the statistics of one layer are sound: finite, learned, in a precision that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnguard.layers.bits import has_values
from bnguard.torch_internals.tracing import aside

__all__ = ["half_precision_of", "has_broken", "is_initial", "is_of_another_convention"]


def is_of_another_convention(momentum: Any) -> bool:
    """Whether a momentum is one of Keras', say, where most of the old statistics is kept."""
    return isinstance(momentum, float) and 0.5 < momentum < 1


def half_precision_of(statistics: Mapping[str, Tensor]) -> str | None:
    """The dtype of statistics in half precision; None where none are."""
    dtypes = {tensor.dtype for tensor in statistics.values()} & {torch.float16, torch.bfloat16}
    return str(dtypes.pop()) if dtypes else None


@aside()
def has_broken(statistics: Mapping[str, Tensor]) -> bool:
    """Whether some of a layer's statistics hold NaN, infinity, or a variance below 0. Reads them."""
    return any([has_values(tensor) and _is_broken(name, tensor) for name, tensor in statistics.items()])


def _is_broken(name: str, statistic: Tensor) -> bool:
    if not statistic.is_floating_point():
        return False
    bad = ~statistic.isfinite()
    if "var" in name:
        bad = bad | (statistic < 0)
    return bool(bad.any())


@aside()
def is_initial(statistics: dict[str, Tensor]) -> bool:
    """Whether statistics are those that torch gives a new layer: mean 0, variance 1, no batch counted. Reads them."""
    mean, var, count = (statistics.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or not has_values(mean) or not has_values(var):
        return False
    return bool(mean.eq(0).all()) and bool(var.eq(1).all()) and (count is None or int(count) == 0)
