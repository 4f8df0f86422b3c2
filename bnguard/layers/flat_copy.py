"""Copy many tensors of one device into few flat tensors, so that comparing them takes one device synchronisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bnguard.layers.bits import (
    as_bytes,
    as_integers,
    comparison_dtype,
    flattened,
    from_bytes,
    has_values,
    same_flat_bits,
    write_all,
)
from bnguard.torch_internals.transforms import PLAIN


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

    __slots__ = ("dtype", "pointers", "rank", "shapes", "sizes", "tensors")

    def __init__(
        self,
        tensors: list[Tensor],
        dtype: torch.dtype,
        rank: int | None,
        shapes: list[torch.Size] | None,
        sizes: list[int],
    ) -> None:
        self.tensors = tensors
        self.dtype = dtype
        self.rank = rank
        self.shapes = shapes
        self.sizes = sizes
        self.pointers: list[int] | None = None

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

    def is_in_place(self) -> bool:
        """Whether the tensors have the shapes, and are in the memory, that they had when they were copied."""
        has_shapes = self.shapes is None or self.shapes == [tensor.shape for tensor in self.tensors]
        has_sizes = self.sizes == list(map(Tensor.numel, self.tensors))
        return has_shapes and has_sizes and self.pointers == list(map(Tensor.data_ptr, self.tensors))

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

    Attributes:
        is_on_host: Whether they are in the memory of the CPU.
    """

    __slots__ = ("_flats", "_parts", "_view_dtypes", "is_on_host")

    def __init__(self, parts: list[Part]) -> None:
        # Widest dtype first: in the joined bytes, each part is then aligned for a view as its own dtype.
        self._parts = sorted(parts, key=_width)
        self._flats = self._current_flats()
        self._view_dtypes = [comparison_dtype(flat) for flat in self._flats]
        self.is_on_host = all(map(_is_on_host, self._flats))

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
        for part, flat in zip(self._parts, _by_part(self._parts, self._flats), strict=True):
            yield from zip(map(id, part.tensors), part.views(flat), strict=True)

    def beside_current(self) -> FlatPair:
        """The copied values beside the current ones. Does not wait for the device.

        Raises:
            RuntimeError: A tensor has another shape or dtype by now, or is elsewhere in memory.
        """
        if not all([part.is_in_place() for part in self._parts]):
            raise RuntimeError("a tensor was replaced")
        now = self._current_flats()
        if [(flat.shape, flat.dtype) for flat in now] != [(flat.shape, flat.dtype) for flat in self._flats]:
            raise RuntimeError("a tensor was converted")
        return FlatPair(self._parts, self._flats, now, self._view_dtypes)

    def write_back(self) -> None:
        """Writes the copied values into the tensors, past autograd, whatever is there. Does not wait for the device."""
        for part, flat in zip(self._parts, _by_part(self._parts, self._flats), strict=True):
            write_all(part.tensors, part.views(flat))

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


class FlatPair:
    """Copied values of tensors of one device, and those of the same tensors at one later moment.

    Args:
        parts: The tensors.
        then: Their values when they were copied, as ``FlatCopy`` keeps them.
        now: Their values later, likewise.
        view_dtypes: The ``comparison_dtype`` of each flat tensor.
    """

    __slots__ = ("_differs", "_is_computed", "_now", "_parts", "_then", "_view_dtypes")

    def __init__(
        self, parts: list[Part], then: list[Tensor], now: list[Tensor], view_dtypes: list[torch.dtype]
    ) -> None:
        self._parts = parts
        self._then = then
        self._now = now
        self._view_dtypes = view_dtypes
        self._is_computed: torch.cuda.Event | None = None

    def launch(self) -> None:
        """Has the device find out whether any bits differ, and does not wait for it."""
        differing = [
            (as_integers(one, dtype) != as_integers(other, dtype)).any()
            for one, other, dtype in zip(self._then, self._now, self._view_dtypes, strict=True)
        ]
        self._differs: Tensor = differing[0] if len(differing) == 1 else torch.stack(differing).any()
        if self._differs.is_cuda:  # another stream may be the current one when the result is read
            self._is_computed = torch.cuda.current_stream(self._differs.device).record_event()

    def result(self) -> Tensor:
        """Whether any bits differ: one truth value on the device, which ``launch()`` has begun to compute."""
        if self._is_computed is not None:
            self._is_computed.synchronize()
        return self._differs

    def values(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The id of each tensor, its values when it was copied and its later ones, on the CPU: one read."""
        then, now = self._then, self._now
        if not _is_on_host(then[0]):
            # One flat tensor each; cloned, because views as other dtypes need them aligned.
            then, now = [[side.clone()] for side in torch.stack([*then, *now]).cpu().unbind()]
        for part, *sides in zip(self._parts, _by_part(self._parts, then), _by_part(self._parts, now), strict=True):
            yield from zip(map(id, part.tensors), *map(part.views, sides), strict=True)


def pairs_of(both: Sequence[tuple[Tensor, Tensor]]) -> list[FlatPair] | None:
    """Joins pairs of tensors into one flat pair for each device; None if two have another dtype, shape or device."""
    sides: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for one, other in both:
        if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
            return None
        sides.setdefault(one.device, []).append((as_bytes(flattened(one)), as_bytes(flattened(other))))
    joined = [[torch.cat(side) for side in zip(*some, strict=True)] for some in sides.values()]
    return [FlatPair([], [then], [now], [comparison_dtype(then)]) for then, now in joined]


def _width(part: Part) -> int:
    return -part.dtype.itemsize


def _is_on_host(flat: Tensor) -> bool:
    return flat.is_cpu


def _by_part(parts: list[Part], flats: list[Tensor]) -> list[Tensor]:
    """One flat tensor per part, a view. See ``FlatCopy._current_flats``."""
    if len(flats) == len(parts):
        return flats
    pieces = flats[0].split([sum(part.sizes) * part.dtype.itemsize for part in parts])
    return [from_bytes(piece, part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def copy_of_columns(columns: list[list[Tensor]]) -> FlatCopy | None:
    """Copies all columns, if each has plain tensors of one dtype and rank and all are on one device; else None.

    Properties that are slow to read from each tensor are checked once, on the flat copy.
    """
    groups: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for column in columns:
        first = column[0]
        if type(first) not in PLAIN:
            return None
        groups.setdefault((first.dtype, first.dim()), []).extend(column)
    parts = []
    try:
        for (dtype, rank), tensors in groups.items():
            if rank > 1 or not set(map(type, tensors)) <= PLAIN:
                return None
            if {tensor.dtype for tensor in tensors} != {dtype}:
                return None
            parts.append(part_of(tensors, dtype, rank))
        copy = FlatCopy(parts)
    except RuntimeError:  # several devices or ranks, or a tensor that a torch.func transform has left wrapped
        return None
    return copy if parts and copy.has_values() else None


def copies_of(tensors: list[Tensor]) -> list[FlatCopy]:
    """Copies tensors into one flat copy per device."""
    found: dict[torch.device, dict[tuple[torch.dtype, int | None], list[Tensor]]] = {}
    for tensor in tensors:
        rank = tensor.dim() if tensor.dim() <= 1 else None
        found.setdefault(tensor.device, {}).setdefault((tensor.dtype, rank), []).append(tensor)
    return [FlatCopy([part_of(some, dtype, rank) for (dtype, rank), some in parts.items()]) for parts in found.values()]
