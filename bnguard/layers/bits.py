"""Tensors as bits: NaN equals itself, and -0.0 is not 0.0."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

__all__ = [
    "PLAIN",
    "as_bytes",
    "below_transforms",
    "digest_of",
    "from_bytes",
    "has_values",
    "same_bits",
    "same_words",
    "word_of",
]


PLAIN: Final = frozenset({Tensor, nn.Parameter})  # classes without behaviour of their own


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


def digest_of(tensors: Mapping[str, Tensor | None]) -> str:
    """A short text that is the same for tensors of the same names, dtypes, shapes and bits. Reads them."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor is not None and has_values(tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            data = as_bytes(tensor.detach().reshape(-1).cpu())
            digest.update(ctypes.string_at(data.data_ptr(), data.numel()))
    return digest.hexdigest()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on one device have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(one.detach().reshape(-1)), as_bytes(other.detach().reshape(-1)))


def word_of(flat: Tensor) -> torch.dtype:
    """The integer dtype as which a contiguous one-dimensional tensor compares fastest: eight times as fast as bytes."""
    size = flat.nbytes
    return torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8


def same_words(one: Tensor, other: Tensor, word: torch.dtype) -> bool:
    """Whether two contiguous one-dimensional tensors have the same dtype, length and bits.

    Raises:
        RuntimeError: They are on different devices.
    """
    if one.dtype != other.dtype or one.nbytes != other.nbytes:
        return False
    if one.is_complex():
        one, other = torch.view_as_real(one).reshape(-1), torch.view_as_real(other).reshape(-1)
    return torch.equal(one.view(word), other.view(word))
