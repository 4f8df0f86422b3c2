"""Compare captured tensors with what they were at one later moment, when the result is wanted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnguard.layers.bits import same_bits
from bnguard.layers.flat_copy import FlatPair, pairs_of
from bnguard.torch_internals.tracing import outside_modes


class Moved(NamedTuple):
    """A module whose tensors have other bits than when they were captured.

    Attributes:
        owner: The position of the module.
        names: The names of these tensors.
        before: The captured values of all its tensors by name.
        now: The later values, likewise.
    """

    owner: int
    names: tuple[str, ...]
    before: Mapping[str, Tensor]
    now: Mapping[str, Tensor]


class Comparison:
    """The tensors of some modules at two moments. Refers to no module.

    Args:
        names: For each module the names of its tensors.
        groups: By equal names, the positions of the modules that have them.
        columns: The tensors with one name of each group.
        pairs: Their values at both moments.
    """

    __slots__ = ("_columns", "_groups", "_names", "_pairs", "_values")

    def __init__(
        self,
        names: Sequence[tuple[str, ...]],
        groups: Mapping[tuple[str, ...], Sequence[int]],
        columns: Sequence[Sequence[Tensor]],
        pairs: Sequence[FlatPair],
    ) -> None:
        self._names = names
        self._groups = groups
        self._columns = columns
        self._pairs = pairs
        self._values: dict[int, tuple[Tensor, Tensor]] | None = None

    @outside_modes
    def launch(self) -> None:
        """Has each device find out whether anything differs, and does not wait for it."""
        for pair in self._pairs:
            pair.launch()

    def results(self) -> list[Tensor]:
        """Whether anything differs, for ``any_differ``."""
        return [pair.result() for pair in self._pairs]

    @outside_modes
    def of(self, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        """The values of a tensor at both moments, on the CPU; None if it was not captured flat.

        The first call copies all values to the CPU: one read for each device.
        """
        if self._values is None:
            self._values = {key: (then, now) for pair in self._pairs for key, then, now in pair.values()}
        return self._values.get(id(tensor))

    @outside_modes
    def moved(self) -> list[Moved]:
        """The modules with differences."""
        moved = []
        starts = itertools.accumulate(map(len, self._groups), initial=0)
        rows: dict[int, list[Tensor]] = {}
        for start, (names, owners) in zip(starts, self._groups.items(), strict=False):
            for row, owner in enumerate(owners):
                rows[owner] = [column[row] for column in self._columns[start : start + len(names)]]
        for owner, tensors in sorted(rows.items()):
            found = dict(zip(self._names[owner], map(self.of, tensors), strict=True))
            sides = {name: pair for name, pair in found.items() if pair is not None}
            differing = tuple([name for name, pair in sides.items() if not same_bits(*pair)])
            if differing:
                before, now = ({name: pair[side] for name, pair in sides.items()} for side in (0, 1))
                moved.append(Moved(owner, differing, before, now))
        return moved


@outside_modes
def comparison_of(both: Sequence[tuple[Tensor, Tensor]]) -> Comparison | None:
    """A comparison of pairs of tensors; None if two have another dtype, shape or device."""
    pairs = pairs_of(both)
    return None if pairs is None else Comparison((), {}, (), pairs)


@outside_modes
def any_differ(comparisons: Sequence[Comparison]) -> list[bool]:
    """Of each comparison whether anything differs. Waits for what they have launched: one read for each device."""
    results = [(number, result) for number, each in enumerate(comparisons) for result in each.results()]
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for number, result in results:
        by_device.setdefault(result.device, []).append((number, result))
    found = [False] * len(comparisons)
    for some in by_device.values():
        values = torch.stack([result for _, result in some]).tolist()
        for (number, _), differs in zip(some, values, strict=True):
            found[number] |= differs
    return found


def grouped(names: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Sequence[int]]:
    """Groups positions by equal names."""
    if len(set(map(id, names))) == 1:  # the common case
        return {names[0]: range(len(names))}
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, its_names in enumerate(names):
        groups.setdefault(its_names, []).append(position)
    return dict(groups)
