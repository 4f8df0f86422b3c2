"""What several rules ask about one layer: whether its statistics are sound, and whether it is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bnguard.layers.bits import are_numbers, has_values, readable, same_bits, wide
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import unwrapped_tensor


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer has parameters of its own, none of which is trained."""
    own = list(module.parameters(recurse=False))
    return bool(own) and not any([parameter.requires_grad for parameter in own])


def statistics_of_layer(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The buffers of a layer with these names, in the order of registration."""
    return {name: tensor for name, tensor in module.named_buffers(recurse=False) if name in names}


def has_inverted_momentum(momentum: Any) -> bool:
    """Whether a momentum looks like one of Keras, where 0.9 keeps most of the old statistics."""
    return isinstance(momentum, float) and 0.5 < momentum < 1


def half_precision_of(statistics: Mapping[str, Tensor]) -> str | None:
    """The dtype of statistics in half precision or less, such as ``"float16"``; None if there are none."""
    dtypes = {
        dtype for tensor in statistics.values() if (dtype := tensor.dtype).is_floating_point and dtype.itemsize < 4
    }
    return str(dtypes.pop()).removeprefix("torch.") if dtypes else None


@outside_modes
def has_broken(statistics: Mapping[str, Tensor]) -> bool:
    """Whether some of the statistics are NaN, infinite, or a negative variance. Waits for the device."""
    return any([are_numbers([tensor]) and _is_broken(name, tensor) for name, tensor in readable(statistics).items()])


def _is_broken(name: str, statistic: Tensor) -> bool:
    if not statistic.is_floating_point():
        return False
    statistic = wide(statistic)
    bad = ~statistic.isfinite()
    if "var" in name:
        bad = bad | (statistic < 0)
    return bool(bad.any())


@outside_modes
def is_initial(statistics: Mapping[str, Tensor]) -> bool:
    """Whether the statistics are those of a new layer: mean 0, variance 1, no batch counted. Waits for the device."""
    own = readable(statistics)
    mean, var, count = (own.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or not are_numbers(own.values()):
        return False
    return bool(mean.eq(0).all()) and bool(var.eq(1).all()) and (count is None or not wide(count).any())


@outside_modes
def have_moved(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Whether parameters have other bits than their copies. Waits for the device."""
    for name, copied in before.items():
        parameter = now.get(name)
        if parameter is None or not has_values(parameter) or parameter.device != copied.device:
            continue
        if parameter.shape == copied.shape and not same_bits(copied, unwrapped_tensor(parameter)):
            return True
    return False


@outside_modes
def are_learned(parameters: Mapping[str, Tensor]) -> bool:
    """Whether a weight or bias differs between channels; those of a new layer are constants. Waits for the device."""
    own = [parameter for parameter in readable(parameters).values() if parameter.dim() == 1 and parameter.numel() > 1]
    return are_numbers(own) and any([bool((parameter != parameter[0]).any()) for parameter in own])
