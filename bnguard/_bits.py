"""Tensors as bits: NaN equals itself, and -0.0 is not 0.0."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_bytes", "from_bytes", "same_bits"]


def as_bytes(flat: Tensor) -> Tensor:
    """The bytes of a one-dimensional tensor, shape ``(numel * itemsize,)``, without a copy."""
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def from_bytes(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """A one-dimensional view of bytes as another dtype; the inverse of ``as_bytes``."""
    if dtype.is_complex:
        return torch.view_as_complex(flat.view(dtype.to_real()).reshape(-1, 2))
    return flat.view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on one device have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(one.detach().reshape(-1)), as_bytes(other.detach().reshape(-1)))
