"""Copy the statistics of torch's own BatchNorm layers on the CPU, and compare them: ``flat_copy`` in one function each.

A block around one training step mostly holds such layers. There it is not torch that takes time, but how much Python
runs; a test compares the two ways on random layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor

from bnguard.layers.bits import comparison_dtype, same_flat_bits
from bnguard.torch_internals.transforms import is_wrapped

_ORDINARY: Final = {Tensor}
_DTYPE: Final[attrgetter[Any]] = attrgetter("dtype")
_FLOATS: Final = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
_INTEGERS: Final = {torch.int64}


class UsualCopy:
    """A copy of means, variances and numbers of batches, taken when it is made.

    Args:
        columns: The means, the variances and the numbers of batches of the layers.

    Raises:
        ValueError: They are not what torch's own layers have, on the CPU and with values.
        RuntimeError: They cannot be concatenated.
    """

    __slots__ = ("_counts", "_flat", "_numbers", "_places", "_sizes", "_tensors", "_viewed")

    def __init__(self, columns: list[list[Tensor]]) -> None:
        means, variances, counts = columns
        tensors = means + variances
        if set(map(type, tensors)) != _ORDINARY or set(map(type, counts)) != _ORDINARY:
            raise ValueError
        dtypes = set(map(_DTYPE, tensors))
        if len(dtypes) > 1 or not dtypes <= _FLOATS or set(map(_DTYPE, counts)) != _INTEGERS:
            raise ValueError
        self._tensors, self._counts = tensors, counts
        self._places = places = list(map(Tensor.data_ptr, tensors + counts))
        if 0 in places or not counts[0].is_cpu or any(map(Tensor.dim, counts)):
            raise ValueError
        self._sizes = list(map(Tensor.numel, tensors))
        self._flat = flat = torch.cat(tensors)
        if flat.dim() > 1 or not flat.is_cpu or is_wrapped(flat) or flat.requires_grad:
            raise ValueError
        self._numbers = list(map(Tensor.item, counts))
        self._viewed: Tensor | None = None  # replaces _numbers once views() has been called: callers may write to them

    def is_unchanged(self) -> bool:
        """Whether the tensors still have the copied bits.

        Raises:
            RuntimeError: They cannot be concatenated or compared any more, because the shape or device of one has
                changed in place, or its memory has been given back: torch would crash.
        """
        if 0 in map(Tensor.data_ptr, self._tensors + self._counts):
            raise RuntimeError("a tensor has no memory")
        numbers = self._numbers if self._viewed is None else self._viewed.tolist()
        if list(map(Tensor.item, self._counts)) != numbers:
            return False
        now, then = torch.cat(self._tensors), self._flat
        if now.dtype is not then.dtype:
            return False
        if now.nbytes % 8:
            return same_flat_bits(now, then, comparison_dtype(then))
        return torch.equal(now.view(torch.int64), then.view(torch.int64))

    def views(self) -> Iterator[tuple[int, Tensor]]:
        """The id of each tensor and its copied values, a view: writing to it changes what is compared with."""
        if self._viewed is None:
            self._viewed = torch.tensor(self._numbers, device="cpu")  # not the device of a torch.device() block
        yield from zip(map(id, self._tensors), self._flat.split(self._sizes), strict=True)
        yield from zip(map(id, self._counts), self._viewed.unbind(), strict=True)

    def pointers(self) -> Iterator[tuple[int, int]]:
        """The id of each tensor, and where its values were in memory when they were copied."""
        return zip(map(id, self._tensors + self._counts), self._places, strict=True)
