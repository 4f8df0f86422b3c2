"""See whether tensors still have the dtypes, shapes and strides that they had."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from bnguard.torch_internals.tracing import outside_modes

# What torch has for the inputs of compiled graphs: one call for all tensors. Not in torch 2.4.
_TensorGuards: Final[Any] = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


def form_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Makes a function that is called with the same tensors later, one argument each.

    Returns:
        It says whether they have the dtypes, shapes and strides of now. False may also mean that autocast or inference
        mode is on that was off now, or the other way around.
    """
    if _can_check():
        check: Callable[..., bool] = _guards_of(*tensors).check
        return check
    forms = _forms_of(tensors)
    return lambda *later: _forms_of(later) == forms


def _guards_of(*tensors: Tensor) -> Any:
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def _forms_of(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


@functools.cache
@outside_modes
def _can_check() -> bool:
    """Whether torch's own check is there, and does what it did."""
    tensor = torch.zeros(2, device="cpu")
    try:
        check = _guards_of(tensor).check
        was_same = check(tensor)
        tensor.data = tensor.data.view(torch.int32)
        was_converted = not check(tensor)
        tensor.data = tensor.data.view(torch.float32)
        tensor.as_strided_((2,), (0,))
        return was_same and was_converted and not check(tensor)
    except Exception:
        return False
