"""The bytes of many tensors of one device as one flat tensor: one copy, one comparison, one synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnguard._bits import as_bytes, from_bytes

__all__ = ["Image"]


@dataclass(frozen=True, slots=True)
class _Part:
    """Tensors of one dtype, side by side."""

    dtype: torch.dtype
    tensors: list[Tensor]
    sizes: list[int]
    shapes: list[torch.Size] | None  # None where all are one-dimensional
    scalars: bool  # all of them


class Image:
    """What some tensors held when the image was taken.

    Args:
        groups: The tensors, all on one device, by dtype and then by id.
    """

    __slots__ = ("_bytes", "_parts")

    def __init__(self, groups: Mapping[torch.dtype, Mapping[int, Tensor]]) -> None:
        # Widest first, so that each part is aligned for a view as its own dtype.
        dtypes = sorted(groups, key=lambda dtype: -dtype.itemsize)
        self._parts = [_part(dtype, list(groups[dtype].values())) for dtype in dtypes]
        self._bytes = _bytes_of(self._parts)

    def is_unchanged(self) -> bool:
        """Whether the tensors hold the same bits now.

        Raises:
            RuntimeError: The tensors no longer fit side by side: some have changed dtype, shape or device in place.
        """
        now = _bytes_of(self._parts)
        if now.shape != self._bytes.shape or now.device != self._bytes.device:
            return False
        # Wide words compare eight times as fast as bytes.
        word = {0: torch.int64, 4: torch.int32}.get(now.numel() % 8, torch.uint8)
        return torch.equal(now.view(word), self._bytes.view(word))

    def views(self) -> dict[int, Tensor]:
        """What each tensor held, in its shape of then, by the id of the tensor; views of the image."""
        views: dict[int, Tensor] = {}
        start = 0
        for part in self._parts:
            for position, (tensor, size) in enumerate(zip(part.tensors, part.sizes, strict=True)):
                stop = start + size * part.dtype.itemsize
                view = from_bytes(self._bytes[start:stop], part.dtype)
                views[id(tensor)] = view.reshape(part.shapes[position]) if part.shapes else view
                start = stop
        return views


def _part(dtype: torch.dtype, tensors: list[Tensor]) -> _Part:
    ranks = {tensor.dim() for tensor in tensors}
    shapes = None if ranks == {1} else [tensor.shape for tensor in tensors]
    return _Part(dtype, tensors, [tensor.numel() for tensor in tensors], shapes, ranks == {0})


def _bytes_of(parts: Iterable[_Part]) -> Tensor:
    images = []
    for part in parts:
        if part.scalars:
            flat = torch.stack(part.tensors)
        elif part.shapes is None:
            flat = torch.cat(part.tensors)
        else:
            flat = torch.cat([tensor.reshape(-1) for tensor in part.tensors])
        images.append(as_bytes(flat))
    return images[0] if len(images) == 1 else torch.cat(images)
