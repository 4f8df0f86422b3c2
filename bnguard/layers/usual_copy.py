"""Copy the statistics of torch's own BatchNorm layers on the CPU, and compare them: ``flat_copy`` past torch.

A test compares the two ways on random layers.

Note [Memory]
~~~~~~~~~~~~~
A block around one training step mostly holds such layers. There it takes longer to call torch than to copy: so what is
copied and compared is memory. That is the same to the bit where the tensors are ordinary, contiguous ones. As long as
they live and have the pointer of the beginning the memory is theirs: so both are seen to before each read. Whatever
gives a tensor other memory (``.data``, ``set_()``, ``resize_()``, ``share_memory_()``, freeing its storage) shows in
its pointer, or its length; another dtype or stride over the same memory is looked for as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnguard.layers.comparison import Moved
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.torch_internals.tensor_forms import form_check
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import is_wrapped

_DTYPE: Final[attrgetter[Any]] = attrgetter("dtype")
_BYTES: Final[attrgetter[Any]] = attrgetter("nbytes")
_IS_CPU: Final[attrgetter[Any]] = attrgetter("is_cpu")
_LAYOUT: Final[attrgetter[Any]] = attrgetter("layout")
_FLOATS: Final = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
_UNUSUAL: Final = "tensors that cannot be copied as memory"
_COUNTER: Final = torch.int64.itemsize
_BATCH: Final = 128  # layers

Bytes: TypeAlias = bytes | bytearray


class _Arrays(dict[int, type[ctypes.Array[ctypes.c_char]]]):
    """The classes of arrays of bytes, by size: it takes long to make one."""

    def __missing__(self, size: int) -> type[ctypes.Array[ctypes.c_char]]:
        self[size] = array = ctypes.c_char * size
        return array


_arrays: Final = _Arrays()


class Layout(NamedTuple):
    """Where the statistics of layers are in their memory put together: first the numbers of batches, then the others.

    Attributes:
        dtype: The dtype of means and variances.
        sizes: How many bytes the mean and the variance of each layer take.
    """

    dtype: torch.dtype
    sizes: list[int]

    def parts(self, values: Bytes) -> list[bytes]:
        """The memory of each layer: number of batches, mean and variance."""
        count = len(self.sizes) // 2
        ends = list(accumulate(map(int.__add__, self.sizes[::2], self.sizes[1::2]), initial=_COUNTER * count))
        numbers = [values[_COUNTER * row : _COUNTER * (row + 1)] for row in range(count)]
        return [bytes(number + values[start:end]) for number, start, end in zip(numbers, ends, ends[1:], strict=False)]

    @outside_modes
    def views(self, values: bytearray) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The numbers of batches, and the mean and the variance of each layer: tensors that are this memory."""
        count = len(self.sizes) // 2
        numbers = torch.frombuffer(values, dtype=torch.int64, count=count)
        flat = torch.frombuffer(values, dtype=self.dtype, offset=_COUNTER * count)
        return numbers.unbind(), flat.split([size // self.dtype.itemsize for size in self.sizes])

    def by_name(self, row: int, part: Bytes) -> dict[str, Tensor]:
        """The statistics of one layer, of which this is the memory."""
        numbers, statistics = Layout(self.dtype, self.sizes[2 * row : 2 * row + 2]).views(bytearray(part))
        return dict(zip(BATCH_NORM_STATISTICS, (*statistics, *numbers), strict=True))


# What one forward has made of the statistics of one layer: the position of the layer among the copied ones, its memory
# right before and right after the forward, as in ``Layout.parts``, and the layout of these. Each forward makes one.
Write: TypeAlias = tuple[int, bytes, bytes, Layout]


class FlatDifference(NamedTuple):
    """Statistics at two points in time, not all of which are equal.

    Attributes:
        row: The position of the first layer among all.
        then: The memory of their statistics at the first point in time.
        now: Their memory at the second one.
        layout: That of the memory.
    """

    row: int
    then: bytes
    now: bytes
    layout: Layout

    @outside_modes
    def layers(self) -> list[Moved]:
        """The layers that have moved, by their positions."""
        found = []
        for row, (then, now) in enumerate(zip(self.layout.parts(self.then), self.layout.parts(self.now), strict=True)):
            if then != now:
                end = _COUNTER + self.layout.sizes[2 * row]
                places = (slice(_COUNTER, end), slice(end, None), slice(_COUNTER))
                names = [
                    name for name, place in zip(BATCH_NORM_STATISTICS, places, strict=True) if then[place] != now[place]
                ]
                values = self.layout.by_name(row, then), self.layout.by_name(row, now)
                found.append(Moved(self.row + row, tuple(names), *values))
        return found


class UsualTensors:
    """Means, variances and numbers of batches of layers, and the memory that they are in.

    Args:
        columns: The means, the variances and the numbers of batches of the layers.

    Attributes:
        tensors: All of these: first the numbers of batches, then the mean and the variance of each layer.
        places: Where they are in memory.
        layout: That of their memory put together.

    Raises:
        RuntimeError: They are not what torch's own layers have, on the CPU and with values.
    """

    __slots__ = ("_columns", "_has_same_forms", "_memory", "layout", "places", "tensors")

    def __init__(self, columns: list[list[Tensor]]) -> None:
        self._columns = columns
        means, variances, numbers = columns
        statistics = list(chain.from_iterable(zip(means, variances, strict=True)))
        self.tensors = tensors = numbers + statistics
        if set(map(type, tensors)) != {Tensor} or any(map(is_wrapped, tensors)):
            raise RuntimeError(_UNUSUAL)
        dtypes = set(map(_DTYPE, statistics))
        if len(dtypes) > 1 or not dtypes <= _FLOATS or set(map(_DTYPE, numbers)) != {torch.int64}:
            raise RuntimeError(_UNUSUAL)
        if not all(map(_IS_CPU, tensors)) or set(map(_LAYOUT, tensors)) != {torch.strided}:
            raise RuntimeError(_UNUSUAL)
        if not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
            raise RuntimeError(_UNUSUAL)
        if any(map(Tensor.dim, numbers)) or set(map(Tensor.dim, statistics)) != {1}:
            raise RuntimeError(_UNUSUAL)
        self.places = list(map(Tensor.data_ptr, tensors))
        if 0 in self.places:
            raise RuntimeError(_UNUSUAL)
        self._has_same_forms = form_check(tensors)
        sizes = list(map(_BYTES, tensors))
        self.layout = Layout(dtypes.pop(), sizes[len(numbers) :])
        self._memory = [_arrays[size].from_address(place) for size, place in zip(sizes, self.places, strict=True)]

    def read(self) -> bytes:
        """Copies their memory.

        Raises:
            RuntimeError: One of them was given other memory, or more or less of it, or none.
        """
        tensors = self.tensors
        if list(map(Tensor.data_ptr, tensors)) != self.places or not self._has_same_forms(*tensors):
            raise RuntimeError("a tensor is elsewhere in memory, or may have been converted in place")
        return b"".join(self._memory)

    def read_here(self) -> bytes:
        """Copies their memory again, after a forward that has only written to it.

        Raises:
            RuntimeError: One of them was given other memory, or none.
        """
        if list(map(Tensor.data_ptr, self.tensors)) != self.places:
            raise RuntimeError("a tensor is elsewhere in memory")
        return b"".join(self._memory)

    def read_elsewhere(self) -> bytes:
        """Copies their memory, wherever it is.

        Raises:
            RuntimeError: They are no usual ones any more, or were converted.
        """
        moved = UsualTensors(self._columns)
        if moved.layout != self.layout:
            raise RuntimeError("a tensor was converted in place")
        return moved.read()

    def has_statistics(self, values: bytes) -> bool:
        """Whether means and variances are as they were when the memory was copied."""
        start = _COUNTER * len(self._columns[0])
        try:
            return self.read_here()[start:] == values[start:]
        except RuntimeError:
            return False


class UsualCopy:
    """A copy of means, variances and numbers of batches, taken when it is made.

    Args:
        batches: The tensors, so many layers together that what is read of them one after the other stays in the caches
            of the processor: all but the last of ``_BATCH`` layers.

    Attributes:
        batches: See above.

    Raises:
        RuntimeError: See ``UsualTensors.read``.
    """

    __slots__ = ("_then", "_views", "batches")

    def __init__(self, batches: Sequence[UsualTensors]) -> None:
        self.batches = batches
        self._then: list[Bytes] = list(map(UsualTensors.read, batches))
        self._views: list[tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None

    def take(self) -> None:
        """Copies the values that the tensors have now.

        Raises:
            RuntimeError: See ``UsualTensors.read``.
        """
        self._then = list(map(UsualTensors.read, self.batches))

    def drop(self) -> None:
        """Gives the memory of the copied values back, until ``take()``."""
        self._then, self._views = [], None

    def is_unchanged(self) -> bool:
        """Whether the tensors still have the copied bits.

        Raises:
            RuntimeError: See ``moved``.
        """
        return not self.moved()

    def moved(self) -> list[FlatDifference]:
        """What the tensors have moved to, where they do not have the copied bits.

        Raises:
            RuntimeError: See ``UsualTensors.read_elsewhere``.
        """
        found = []
        for number, tensors in enumerate(self.batches):
            try:
                now = tensors.read()
            except RuntimeError:
                now = tensors.read_elsewhere()
            if self._then[number] != now:
                found.append(FlatDifference(_BATCH * number, bytes(self._then[number]), now, tensors.layout))
        return found

    def absorb(self, writes: Sequence[Write]) -> bool:
        """Replaces the copied values with those that a series of writes has left.

        Returns:
            Whether each of them began with the copied values or with those that the one before it left; else nothing
            is replaced.
        """
        written: dict[int, list[bytes]] = {}  # by number of a batch
        for row, before, then, _ in writes:
            number, place = divmod(row, _BATCH)
            parts = written.get(number)
            if parts is None:
                written[number] = parts = self.batches[number].layout.parts(self._then[number])
            if before != parts[place]:
                return False
            parts[place] = then
        after = self._then[:]
        for number, parts in written.items():
            known = after[number]
            values = b"".join([part[:_COUNTER] for part in parts] + [part[_COUNTER:] for part in parts])
            if isinstance(known, bytearray):
                known[:] = values  # in place: there are views
            else:
                after[number] = values
        self._then = after
        return True

    def views(self) -> Iterator[tuple[int, Tensor]]:
        """The id of each tensor and its copied values, a view: writing to it changes what is compared with."""
        if self._views is None:
            then = list(map(bytearray, self._then))
            self._then = [*then]  # first: what there are views of is what is compared
            self._views = [batch.layout.views(values) for batch, values in zip(self.batches, then, strict=True)]
        views = chain.from_iterable(chain.from_iterable(self._views))
        return zip(map(id, chain.from_iterable([batch.tensors for batch in self.batches])), views, strict=True)

    def pointers(self) -> Iterator[tuple[int, int]]:
        """The id of each tensor, and where its values were in memory when they were copied."""
        return chain.from_iterable([zip(map(id, batch.tensors), batch.places, strict=True) for batch in self.batches])


def usual_copy_of(columns: list[list[Tensor]]) -> UsualCopy | None:
    """A copy of the means, variances and numbers of batches of layers; None if they are not usual ones."""
    try:
        starts = range(0, len(columns[0]), _BATCH)
        return UsualCopy([UsualTensors([column[row : row + _BATCH] for column in columns]) for row in starts])
    except RuntimeError:
        return None
