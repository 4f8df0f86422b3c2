"""Compare tensors bit by bit: NaN equals itself, and -0.0 differs from 0.0."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.torch_internals.transforms import is_fake, is_wrapped

PLAIN: Final = frozenset({Tensor, nn.Parameter})  # a subclass may override any operation


def has_values(tensor: Any) -> bool:
    """Whether a tensor has values to read: not if it is lazy, on the meta device, fake, or inside a transform."""
    return not (is_lazy(tensor) or tensor.is_meta or is_fake(tensor) or is_wrapped(tensor))


def as_bytes(flat: Tensor) -> Tensor:
    """Views a one-dimensional tensor as bytes of shape ``(numel * itemsize,)``, without a copy."""
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def from_bytes(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Views one-dimensional bytes as another dtype, without a copy; the inverse of ``as_bytes``."""
    if dtype.is_complex:
        return torch.view_as_complex(flat.view(dtype.to_real()).reshape(-1, 2))
    return flat.view(dtype)


def digest_of(tensors: Mapping[str, Tensor | None]) -> str:
    """Computes a hash of the names, dtypes, shapes and bits of tensors, copying them to the CPU.

    None, and tensors without values, are skipped.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor is not None and has_values(tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            data = as_bytes(_flat(tensor).cpu())
            digest.update(ctypes.string_at(data.data_ptr(), data.numel()))
    return digest.hexdigest()


def _flat(tensor: Tensor) -> Tensor:
    """Flattens a tensor into a contiguous one, with lazy conjugation and negation resolved."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on one device have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(_flat(one)), as_bytes(_flat(other)))


def comparison_dtype(flat: Tensor) -> torch.dtype:
    """The widest integer dtype to view a flat tensor as: int64 compares eight times as fast as uint8."""
    size = flat.nbytes
    return torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8


def same_flat_bits(one: Tensor, other: Tensor, view_dtype: torch.dtype) -> bool:
    """Whether two contiguous one-dimensional tensors have the same dtype, length and bits.

    Args:
        one: A tensor.
        other: Another tensor on the same device.
        view_dtype: The ``comparison_dtype`` of the two.

    Raises:
        RuntimeError: They are on different devices.
    """
    if one.dtype != other.dtype or one.nbytes != other.nbytes:
        return False
    if one.is_complex():
        one, other = torch.view_as_real(one).reshape(-1), torch.view_as_real(other).reshape(-1)
    return torch.equal(one.view(view_dtype), other.view(view_dtype))
