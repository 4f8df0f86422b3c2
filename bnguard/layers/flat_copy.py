"""Copy many tensors of one device into few flat tensors, so that comparing them takes one device synchronisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnguard.layers.bits import as_bytes, comparison_dtype, from_bytes, has_values, same_flat_bits


@dataclass(slots=True)
class Part:
    """Tensors of one dtype that are concatenated into one flat tensor.

    Attributes:
        tensors: The tensors, all on one device.
        dtype: Their dtype.
        rank: Their number of dimensions if all have 0 or all have 1; else None.
        shapes: Their shapes if ``rank`` is None; else None.
        sizes: Their numbers of elements.
        pointers: Where their values were in memory when they were copied.
    """

    tensors: list[Tensor]
    dtype: torch.dtype
    rank: int | None
    shapes: list[torch.Size] | None
    sizes: list[int]
    pointers: list[int] | None = None

    def flat(self) -> Tensor:
        """Copies the current values into one flat tensor.

        Raises:
            RuntimeError: They cannot be concatenated, or the memory of one has been given back: torch would crash.
        """
        pointers = list(map(Tensor.data_ptr, self.tensors))
        if 0 in pointers and any([tensor.numel() and not tensor.data_ptr() for tensor in self.tensors]):
            raise RuntimeError("a tensor has no memory")
        if self.pointers is None:
            self.pointers = pointers
        if self.rank == 0:
            return torch.stack(self.tensors)
        if self.rank == 1:
            return torch.cat(self.tensors)
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors])

    def views(self, flat: Tensor) -> Sequence[Tensor]:
        """Splits ``flat`` into views with the shapes of the tensors."""
        if self.rank == 0:
            scalars: Sequence[Tensor] = flat.unbind()
            return scalars
        pieces: Sequence[Tensor] = flat.split(self.sizes)
        if self.shapes is None:
            return pieces
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def part_of(tensors: list[Tensor], dtype: torch.dtype, rank: int | None) -> Part:
    """Makes a ``Part`` of tensors that share a dtype and, unless it is None, a rank."""
    if rank == 0:
        return Part(tensors, dtype, 0, None, [1] * len(tensors))
    shapes = None if rank == 1 else [tensor.shape for tensor in tensors]
    return Part(tensors, dtype, rank, shapes, list(map(Tensor.numel, tensors)))


class FlatCopy:
    """A copy of tensors of one device in few flat tensors, taken when it is made.

    Args:
        parts: The tensors, all on one device.
    """

    __slots__ = ("_flats", "_parts", "_view_dtypes")

    def __init__(self, parts: list[Part]) -> None:
        # Widest dtype first: in the joined bytes, each part is then aligned for a view as its own dtype.
        self._parts = sorted(parts, key=_width)
        self._flats = self._current_flats()
        self._view_dtypes = [comparison_dtype(flat) for flat in self._flats]

    def has_values(self) -> bool:
        """Whether values were copied, and can be compared: not from tensors on the meta device or sparse ones."""
        return all([type(flat) is Tensor and has_values(flat) for flat in self._flats])

    def is_unchanged(self) -> bool:
        """Whether the tensors still have the copied bits.

        Raises:
            RuntimeError: The tensors cannot be concatenated or compared any more, because the dtype, shape or device
                of one has changed in place.
        """
        return all(map(same_flat_bits, self._current_flats(), self._flats, self._view_dtypes))

    def views(self) -> Iterator[tuple[int, Tensor]]:
        """The id of each tensor and its copied values, a view in its shape."""
        for part, flat in zip(self._parts, self._flats_by_part(), strict=True):
            yield from zip(map(id, part.tensors), part.views(flat), strict=True)

    def pointers(self) -> Iterator[tuple[int, int]]:
        """The id of each tensor, and where its values were in memory when they were copied."""
        for part in self._parts:
            yield from zip(map(id, part.tensors), part.pointers or (), strict=True)

    def _current_flats(self) -> list[Tensor]:
        """The current values, one flat tensor per part; on a GPU all parts as bytes in one tensor.

        There each comparison would take a device synchronisation.
        """
        flats = [part.flat() for part in self._parts]
        if len(flats) < 2 or _is_on_host(flats[0]):
            return flats
        return [torch.cat([as_bytes(flat) for flat in flats])]

    def _flats_by_part(self) -> list[Tensor]:
        """The copied values, one flat tensor per part."""
        if len(self._flats) == len(self._parts):
            return self._flats
        pieces = self._flats[0].split([sum(part.sizes) * part.dtype.itemsize for part in self._parts])
        return [from_bytes(piece, part.dtype) for piece, part in zip(pieces, self._parts, strict=True)]


def _width(part: Part) -> int:
    return -part.dtype.itemsize


def _is_on_host(flat: Tensor) -> bool:
    return flat.is_cpu
