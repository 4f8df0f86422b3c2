"""Copy the statistics of torch's own BatchNorm layers on the CPU, and compare them: ``flat_copy`` in one function each.

A block around one training step mostly holds such layers. There it is not torch that takes time, but how much Python
runs; a test compares the two ways on random layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bnguard.layers.bits import comparison_dtype, same_flat_bits
from bnguard.layers.comparison import Moved
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.torch_internals.transforms import is_wrapped

_ORDINARY: Final = {Tensor}
_DTYPE: Final[attrgetter[Any]] = attrgetter("dtype")
_FLOATS: Final = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
_INTEGERS: Final = {torch.int64}
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Values = dict[str, Tensor]


class Write:
    """What one forward has made of the statistics of one layer.

    Attributes:
        row: The position of the layer among the copied ones.
        before: The layer's mean and variance, which have one length, right before the forward, concatenated.
        after: These right after it.
        number: The number of batches right before it.
        number_after: The number of batches right after it.
    """

    __slots__ = ("after", "before", "number", "number_after", "row")

    def __init__(self, row: int, before: Tensor, after: Tensor, number: int, number_after: int) -> None:
        self.row = row
        self.before = before
        self.after = after
        self.number = number
        self.number_after = number_after

    def values(self) -> tuple[Values, Values]:
        """The statistics before and after, by name."""
        before, after = (
            dict(zip(BATCH_NORM_STATISTICS, (*flat.chunk(2), _counter(number)), strict=True))
            for flat, number in ((self.before, self.number), (self.after, self.number_after))
        )
        return before, after


class FlatDifference(NamedTuple):
    """Values of statistics at two points in time, not all of which are equal.

    Attributes:
        then: Means and variances at the first point in time, concatenated layer by layer.
        now: These at the second one.
        sizes: The number of channels of each of them.
        numbers: The numbers of batches at both points in time.
    """

    then: Tensor
    now: Tensor
    sizes: list[int]
    numbers: tuple[list[int], list[int]]

    def layers(self) -> Iterator[Moved]:
        """The layers that have moved, by their positions."""
        bits = _BITS[self.then.itemsize]
        differing = self.then.view(bits).ne(self.now.view(bits)).cumsum(0).tolist()
        upto = [differing[end - 1] if end else 0 for end in accumulate(self.sizes, initial=0)]
        flats = [flat.split(self.sizes) for flat in (self.then, self.now)]
        for row, numbers in enumerate(zip(*self.numbers, strict=True)):
            start = 2 * row
            moved = (upto[start + 1] > upto[start], upto[start + 2] > upto[start + 1], numbers[0] != numbers[1])
            if any(moved):
                names = tuple([name for name, has in zip(BATCH_NORM_STATISTICS, moved, strict=True) if has])
                then, now = (
                    dict(zip(BATCH_NORM_STATISTICS, (*flat[start : start + 2], _counter(number)), strict=True))
                    for flat, number in zip(flats, numbers, strict=True)
                )
                yield Moved(row, names, then, now)


class UsualTensors:
    """Means, variances and numbers of batches of layers, in the form in which they are copied.

    Args:
        columns: The means, the variances and the numbers of batches of the layers.

    Attributes:
        statistics: Mean and variance of each layer.
        counts: Its number of batches.
        everything: All of these.
        places: Where they are in memory.
        sizes: The lengths of the statistics.
        shape: The shape of all of them concatenated.

    Raises:
        ValueError: They are not what torch's own layers have, on the CPU and with values.
    """

    __slots__ = ("counts", "everything", "places", "shape", "sizes", "statistics")

    def __init__(self, columns: list[list[Tensor]]) -> None:
        means, variances, counts = columns
        tensors = list(chain.from_iterable(zip(means, variances, strict=True)))
        if set(map(type, tensors)) != _ORDINARY or set(map(type, counts)) != _ORDINARY:
            raise ValueError
        dtypes = set(map(_DTYPE, tensors))
        if len(dtypes) > 1 or not dtypes <= _FLOATS or set(map(_DTYPE, counts)) != _INTEGERS:
            raise ValueError
        self.statistics, self.counts, self.everything = tensors, counts, tensors + counts
        self.places = places = list(map(Tensor.data_ptr, self.everything))
        if 0 in places or not counts[0].is_cpu or any(map(Tensor.dim, counts)):
            raise ValueError
        self.sizes = list(map(Tensor.numel, tensors))
        self.shape = torch.Size((sum(self.sizes),))

    def lengths(self) -> list[int]:
        """The length of the mean and the variance of each layer together."""
        return list(map(int.__add__, self.sizes[::2], self.sizes[1::2]))

    def are_in_place(self) -> bool:
        """Whether none was given other memory since."""
        return list(map(Tensor.data_ptr, self.everything)) == self.places

    def have_memory(self) -> bool:
        """Whether each has memory, whichever: torch would crash where one has none."""
        return 0 not in map(Tensor.data_ptr, self.everything)


class UsualCopy:
    """A copy of means, variances and numbers of batches, taken when it is made.

    Args:
        tensors: The tensors, all of which are in place.

    Raises:
        ValueError: They are not on the CPU, or not ordinary ones.
        RuntimeError: They cannot be concatenated.
    """

    __slots__ = ("_flat", "_numbers", "_of", "_viewed")

    def __init__(self, tensors: UsualTensors) -> None:
        self._of = tensors
        self._flat = flat = torch.cat(tensors.statistics)
        if flat.shape != tensors.shape or not flat.is_cpu or flat.requires_grad or is_wrapped(flat):
            raise ValueError
        self._numbers = list(map(Tensor.item, tensors.counts))
        self._viewed: Tensor | None = None  # replaces _numbers once views() has been called: callers may write to them

    def is_unchanged(self) -> bool:
        """Whether the tensors still have the copied bits.

        Raises:
            RuntimeError: They cannot be concatenated or compared any more. See ``moved``.
        """
        return self.moved() is None

    def moved(self) -> FlatDifference | None:
        """What the tensors have moved to; None if they still have the copied bits.

        Raises:
            RuntimeError: They cannot be concatenated or compared any more, because the dtype, shape or device of one
                has changed in place, or its memory has been given back: torch would crash.
        """
        if not self._of.have_memory():
            raise RuntimeError("a tensor has no memory")
        numbers: list[Any] = self._numbers if self._viewed is None else self._viewed.tolist()
        numbers_now: list[Any] = list(map(Tensor.item, self._of.counts))
        now, then = torch.cat(self._of.statistics), self._flat
        if now.dtype is not then.dtype or now.shape != then.shape:
            raise RuntimeError("a tensor was converted in place")
        if list(map(Tensor.numel, self._of.statistics)) != self._of.sizes:
            raise RuntimeError("a tensor has another length")
        if numbers_now == numbers and _same(now, then):
            return None
        return FlatDifference(then, now, self._of.sizes, (numbers, numbers_now))

    def absorb(self, writes: Sequence[Write]) -> bool:
        """Replaces the copied values with those that a series of writes has left.

        Returns:
            Whether each of them began with the copied values or with those that the one before it left; else nothing
            is replaced.
        """
        numbers: list[Any] = list(self._numbers if self._viewed is None else self._viewed.tolist())
        befores = [write.before for write in writes]
        if [write.row for write in writes] == list(range(len(numbers))):  # the usual case: each layer once, in order
            sizes = self._of.lengths()
            expected, rows = self._flat, [write.after for write in writes]
            is_alike = numbers == [write.number for write in writes]
            numbers = [write.number_after for write in writes]
        else:
            expected, rows, sizes, is_alike = self._followed(writes, numbers)
        now, after = torch.cat(befores), torch.cat(rows)
        if not (is_alike and now.dtype is expected.dtype is after.dtype is self._flat.dtype):
            return False
        if after.nbytes != self._flat.nbytes or list(map(Tensor.numel, befores)) != sizes or not _same(now, expected):
            return False
        self._flat.copy_(after)
        self._numbers = numbers
        if self._viewed is not None:
            self._viewed.copy_(_counter(numbers))
        return True

    def _followed(self, writes: Sequence[Write], numbers: list[int]) -> tuple[Tensor, list[Tensor], list[int], bool]:
        """What each of the writes should have begun with, concatenated, and what all of them leave.

        Args:
            writes: The writes.
            numbers: The copied numbers of batches; replaced with those that the writes leave.

        Returns:
            What they should have begun with; mean and variance of each layer after them, concatenated; the lengths of
            the first; and whether they began with the right numbers of batches.
        """
        rows = list(self._flat.split(self._of.lengths()))
        begins, are_right = [], True
        for write in writes:
            begins.append(rows[write.row])
            are_right = are_right and write.number == numbers[write.row]
            rows[write.row], numbers[write.row] = write.after, write.number_after
        return torch.cat(begins), rows, list(map(Tensor.numel, begins)), are_right

    def views(self) -> Iterator[tuple[int, Tensor]]:
        """The id of each tensor and its copied values, a view: writing to it changes what is compared with."""
        if self._viewed is None:
            self._viewed = _counter(self._numbers)
        yield from zip(map(id, self._of.statistics), self._flat.split(self._of.sizes), strict=True)
        yield from zip(map(id, self._of.counts), self._viewed.unbind(), strict=True)

    def pointers(self) -> Iterator[tuple[int, int]]:
        """The id of each tensor, and where its values were in memory when they were copied."""
        return zip(map(id, self._of.everything), self._of.places, strict=True)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two flat tensors of one dtype and length have the same bits."""
    if one.nbytes % 8:
        return same_flat_bits(one, other, comparison_dtype(other))
    return torch.equal(one.view(torch.int64), other.view(torch.int64))


def _counter(numbers: Any) -> Tensor:
    return torch.tensor(numbers, device="cpu")  # not the device of a torch.device() block
