"""The bits of many tensors of one device as a few flat tensors: one copy, one comparison, one synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from bnguard.layers.bits import as_bytes, from_bytes, same_words, word_of

__all__ = ["Counts", "Image", "Part", "part_of"]


@dataclass(slots=True)
class Part:
    """Tensors of one dtype, side by side.

    Attributes:
        tensors: Those, on one device.
        dtype: Their dtype.
        rank: The number of dimensions that all of them have, 0 or 1; None for any others.
        shapes: Their shapes, where those differ in more than the length.
        sizes: Their numbers of elements.
    """

    tensors: list[Tensor]
    dtype: torch.dtype
    rank: int | None
    shapes: list[torch.Size] | None
    sizes: list[int]

    def flat(self) -> Tensor:
        """The values of now in one dimension: a copy."""
        if self.rank == 0:
            return torch.stack(self.tensors)
        if self.rank == 1:
            return torch.cat(self.tensors)
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors])

    def views(self, flat: Tensor) -> Sequence[Tensor]:
        """The values of each tensor, in its shape, out of ``flat``."""
        if self.rank == 0:
            scalars: Sequence[Tensor] = flat.unbind()
            return scalars
        pieces: Sequence[Tensor] = flat.split(self.sizes)
        if self.shapes is None:
            return pieces
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def part_of(tensors: list[Tensor], dtype: torch.dtype, rank: int | None) -> Part:
    """A part of these tensors."""
    if rank == 0:
        return Part(tensors, dtype, 0, None, [1] * len(tensors))
    shapes = None if rank == 1 else [tensor.shape for tensor in tensors]
    return Part(tensors, dtype, rank, shapes, list(map(Tensor.numel, tensors)))


class Image:
    """What some tensors held when the image was taken.

    Args:
        parts: The tensors, all on one device.
    """

    __slots__ = ("_flats", "_parts", "_words")

    def __init__(self, parts: list[Part]) -> None:
        # Widest first, so that each is aligned for a view as its own dtype where they are joined.
        self._parts = sorted(parts, key=_width)
        self._flats = self._taken()
        self._words = [word_of(flat) for flat in self._flats]

    def is_of_values(self) -> bool:
        """Whether there were any: tensors on the meta device have none, nor those inside a transform."""
        return not any(
            [type(flat) is not Tensor or flat.is_meta or is_functorch_wrapped_tensor(flat) for flat in self._flats]
        )

    def is_unchanged(self) -> bool:
        """Whether the tensors hold the same bits now.

        Raises:
            RuntimeError: The tensors no longer fit side by side: some have changed dtype, shape or device in place.
        """
        return all(map(same_words, self._taken(), self._flats, self._words))

    def views(self) -> dict[int, Tensor]:
        """What each tensor held, in its shape of then, by the id of the tensor; views of the image."""
        views: dict[int, Tensor] = {}
        for part, flat in zip(self._parts, self._parted(), strict=True):
            views.update(zip(map(id, part.tensors), part.views(flat), strict=True))
        return views

    def _taken(self) -> list[Tensor]:
        """The values of now by part; where comparing means waiting, the bytes of all parts in one."""
        flats = [part.flat() for part in self._parts]
        if len(flats) < 2 or _is_on_host(flats[0]):
            return flats
        return [torch.cat([as_bytes(flat) for flat in flats])]

    def _parted(self) -> list[Tensor]:
        """The values that were taken, by part."""
        if len(self._flats) == len(self._parts):
            return self._flats
        pieces = self._flats[0].split([sum(part.sizes) * part.dtype.itemsize for part in self._parts])
        return [from_bytes(piece, part.dtype) for piece, part in zip(pieces, self._parts, strict=True)]


class Counts:
    """The same of whole numbers on the CPU, each in a tensor of its own: how many batches layers have counted.

    Args:
        tensors: Of an integer dtype, each with one element.
    """

    __slots__ = ("_saved", "_tensors", "_viewed")

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._saved = self._taken()
        self._viewed: Tensor | None = None  # the same, once somebody has views of it, and may write to them

    def is_of_values(self) -> bool:
        """Whether they are whole numbers."""
        return set(map(type, self._saved)) == {int}

    def is_unchanged(self) -> bool:
        """Whether the tensors hold the same numbers now."""
        return self._taken() == (self._saved if self._viewed is None else self._viewed.tolist())

    def views(self) -> dict[int, Tensor]:
        """What each tensor held, by the id of the tensor; views of what is compared with."""
        if self._viewed is None:
            self._viewed = torch.tensor(self._saved)
        return dict(zip(map(id, self._tensors), self._viewed.unbind(), strict=True))

    def _taken(self) -> list[int | float | bool]:
        # One by one takes half as long as a copy of all of them, and a comparison of that.
        return [tensor.item() for tensor in self._tensors]


def _width(part: Part) -> int:
    return -part.dtype.itemsize


def _is_on_host(flat: Tensor) -> bool:
    return flat.is_cpu
