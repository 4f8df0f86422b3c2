"""Tensors as bits: NaN equals itself, and -0.0 is not 0.0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

__all__ = ["as_bytes", "below_transforms", "from_bytes", "has_values", "same_bits"]


def has_values(tensor: Any) -> bool:
    """Whether bits can be read: not lazy, not on the meta device, not fake, not inside a transform."""
    return not (
        is_lazy(tensor)
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or _functorch.is_functorch_wrapped_tensor(tensor)
    )


def as_bytes(flat: Tensor) -> Tensor:
    """The bytes of a one-dimensional tensor, shape ``(numel * itemsize,)``, without a copy."""
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def from_bytes(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """A one-dimensional view of bytes as another dtype; the inverse of ``as_bytes``."""
    if dtype.is_complex:
        return torch.view_as_complex(flat.view(dtype.to_real()).reshape(-1, 2))
    return flat.view(dtype)


def below_transforms(tensor: Any) -> Any:
    """The tensor that a transform of ``torch.func`` works on, or has left behind wrapped."""
    while tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on one device have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(one.detach().reshape(-1)), as_bytes(other.detach().reshape(-1)))
