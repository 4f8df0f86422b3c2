"""Compare tensors bit by bit: NaN equals itself, and -0.0 differs from 0.0."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from bnguard.torch_internals.foreach import copy_each
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import PLAIN, is_fake, is_wrapped, unwrapped_tensor


def has_values(tensor: Any) -> bool:
    """Whether a tensor has bits that can be copied and compared.

    Not if it has no values, or none that bnguard could read. See ``is_valueless`` and ``what_is_unreadable``.
    """
    is_plain = type(tensor) in PLAIN  # neither lazy nor fake
    if (tensor.is_meta or is_wrapped(tensor)) if is_plain else is_valueless(tensor):
        return False
    return what_is_unreadable(tensor) is None


def is_valueless(tensor: Any) -> bool:
    """Whether a tensor has no values: it is lazy, on the meta device, fake, or inside a transform."""
    return is_lazy(tensor) or is_fake(tensor) or is_wrapped(tensor) or tensor.is_meta


def what_is_unreadable(tensor: Any) -> str | None:
    """What a tensor with values is, such as ``"a nested tensor"``, if its bits cannot be copied and compared."""
    if type(tensor) not in PLAIN:
        tensor = unwrapped_tensor(tensor)
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and tensor.layout is torch.strided:
            return f"a {type(tensor).__name__}, a class with __torch_dispatch__"
    if not _is_supported(tensor.dtype):
        return f"a quantised tensor ({tensor.dtype})" if tensor.is_quantized else f"a tensor of {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"a tensor with the layout {tensor.layout}"
    if tensor.is_nested:
        return "a nested tensor"
    return None if tensor.data_ptr() or not tensor.numel() else "a tensor whose memory has been freed"


@functools.cache
@outside_modes
def _is_supported(dtype: torch.dtype) -> bool:
    """Whether torch copies and converts tensors of a dtype: no quantised one, no ``torch.uint4`` or ``bits8``."""
    try:
        wide(torch.empty(1, dtype=dtype, device="cpu").clone()).to(torch.complex128)
    except RuntimeError:
        return False
    return True


def wide(tensor: Tensor) -> Tensor:
    """The values of a tensor in the widest floating dtype of their kind, as torch computes little in eight bits."""
    tensor = tensor.detach()
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def readable(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of some tensors that can be read, as ordinary tensors."""
    present = {name: unwrapped_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}
    return {name: tensor.as_subclass(Tensor) for name, tensor in present.items() if has_values(tensor)}


def count_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The value of ``num_batches_tracked``; None without one that is a single number. Waits for the device."""
    count = readable(tensors).get("num_batches_tracked")
    return int(wide(count)) if count is not None and count.numel() == 1 and are_numbers([count]) else None


def are_numbers(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements of some tensors are real numbers that can be read."""
    return all([has_values(tensor) and not tensor.is_complex() for tensor in tensors])


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether some tensors are real numbers, and have one shape, which is not empty."""
    return len({tensor.shape for tensor in tensors}) == 1 and tensors[0].numel() > 0 and are_numbers(tensors)


def write(tensor: Tensor, value: Tensor) -> None:
    """Writes values into a tensor, past autograd: no version counter increases, and a later backward pass works."""
    target = tensor.data
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim]:  # expanded: its elements share memory, to which torch writes only once
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.copy_(value)


def write_all(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes values into tensors of one dtype and device, past autograd, in few operations of the device."""
    try:
        copy_each([tensor.data for tensor in tensors], values)
    except RuntimeError:  # an expanded one: see write()
        for tensor, value in zip(tensors, values, strict=True):
            write(tensor, value)


def put_back(target: Tensor, value: Tensor, place: int | None, *, differs: bool | None = None) -> None:
    """Gives a tensor back an earlier value, past autograd, unless it has its bits.

    Args:
        target: The tensor.
        value: The value, with its dtype and on its device.
        place: Where the tensor's values were in memory. If they are elsewhere now, or have another shape, they are
            replaced and not overwritten: through ``.data`` the tensor was given memory that may be somebody else's.
            None if that is not known.
        differs: Whether the bits are known to differ; None if they are to be compared.
    """
    if differs is False or (differs is None and target.shape == value.shape and same_bits(target, value)):
        return
    if target.shape != value.shape or place not in (None, target.data_ptr()):
        target.data = value.clone()
    else:
        write(target, value)


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

    None, and tensors that cannot be read, are skipped.
    """
    digest = hashlib.sha256()
    for name, tensor in readable(tensors).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        data = as_bytes(flattened(tensor).cpu())
        digest.update(ctypes.string_at(data.data_ptr(), data.numel()))
    return digest.hexdigest()


def flattened(tensor: Tensor) -> Tensor:
    """Flattens a tensor into a contiguous one, with lazy conjugation and negation resolved."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on one device have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(flattened(one)), as_bytes(flattened(other)))


def holds(current: Tensor, value: Tensor) -> bool:
    """Whether ``current`` has the bits of ``value``, converted to its dtype and device.

    A conversion does not preserve the bits of a NaN: if the dtypes differ, all NaNs are equal.
    """
    expected = value.to(current.device, current.dtype)
    if current.dtype != value.dtype and current.shape == value.shape:
        current, expected = wide(current), wide(expected)
        if (is_nan := current.isnan() & expected.isnan()).any():
            current, expected = current.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0)
    return same_bits(current, expected)


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
    return torch.equal(as_integers(one, view_dtype), as_integers(other, view_dtype))


def as_integers(flat: Tensor, view_dtype: torch.dtype) -> Tensor:
    """Views a contiguous one-dimensional tensor as its ``comparison_dtype``, without a copy."""
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(view_dtype)
