"""Capture tensors of modules, compare them later bit for bit, and write them back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.layers.bits import PLAIN, as_bytes, below_transforms, has_values, same_bits
from bnguard.layers.flat_copy import Counts, Image, part_of
from bnguard.layers.kinds import tensor_table, tensor_tables
from bnguard.torch_internals.tracing import aside

__all__ = ["Difference", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Tensors of one module that are gone or have other bits than at capture.

    Attributes:
        owner: Index of the module in the snapshot.
        names: The names of those tensors.
    """

    owner: int
    names: tuple[str, ...]


class Snapshot:
    """The bits of named tensors of some modules, and which tensor objects they were.

    A tensor that hangs at several places is kept once. No value is kept of tensors that have none: on the meta device,
    fake, or not yet initialised (those are taken to start as torch initialises them: mean 0, variance 1).

    Args:
        modules: The modules that own the tensors.
        names: For each module the names of its tensors; each must be there.
        table: Which tensors are meant, buffers or parameters.
    """

    __slots__ = ("_columns", "_groups", "_images", "_names", "_odd", "_places", "_saved_by_id", "_table", "modules")

    @aside()
    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[tuple[str, ...]],
        table: Literal["_buffers", "_parameters"] = "_buffers",
    ) -> None:
        self.modules = modules
        self._names = names
        self._table = table
        # Modules with the same names go together: their tensors of one name are a column, mostly of one kind.
        self._groups: dict[tuple[str, ...], Sequence[int]] = _grouped(names)
        self._columns: list[list[Tensor]] = self._gathered()  # type: ignore[assignment]  # each is there
        self._places: list[tuple[int, int]] | None = None  # of each module: its first column, its row; made when needed
        self._odd: dict[int, Tensor] = {}
        self._saved_by_id: dict[int, Tensor | None] | None = None
        images = _images_of_columns(self._columns)
        if images is not None:
            self._images = images
            return
        tensors = list({id(tensor): tensor for column in self._columns for tensor in column}.values())
        self._odd = {id(tensor): tensor for tensor in tensors if type(tensor) not in PLAIN or not has_values(tensor)}
        self._images = _images_of([tensor for tensor in tensors if id(tensor) not in self._odd])
        if self._odd:
            odd_values = {key: tensor.detach().clone() for key, tensor in self._odd.items() if has_values(tensor)}
            self._saved_by_id = {**self._index(), **dict.fromkeys(self._odd), **odd_values}

    def is_intact(self) -> bool:
        """Whether every place holds the object of capture with the bits of capture: one comparison for each device."""
        if self._odd:
            return False
        for now, then in zip(self._gathered(), self._columns, strict=True):
            if not all(map(is_, now, then)):
                return False
        with aside():
            try:
                return all([image.is_unchanged() for image in self._images])
            except RuntimeError:  # converted in place, through .data: other shapes or devices
                return False

    @aside()
    def changed(self) -> list[Difference]:
        """Lists the tensors that are gone, or have other bits than at capture.

        A tensor that was converted since (another dtype or device) counts as changed where it is not the converted
        value of capture. Another object with the same bits does not count.
        """
        differences = []
        for owner in range(len(self.modules)):
            places = self._pairs(owner)
            differing = tuple([name for name, then, now in places if not self._is_intact(owner, name, now, then)])
            if differing:
                differences.append(Difference(owner, differing))
        return differences

    @aside()
    def restore(self) -> None:
        """Puts the captured objects and values back, wherever they are not.

        Writes past autograd (no version counter moves: a backward pass that comes later is not disturbed) and only
        where bits differ. An object of another dtype or device that replaced the captured one stays if it holds the
        captured values, cast; else a fresh tensor with those values takes its place. No tensor that somebody else put
        there is written to.
        """
        places = [(owner, *place) for owner in range(len(self.modules)) for place in self._pairs(owner)]
        for owner, name, original, current in places:
            self._restore(owner, name, current, original)

    @aside()
    def deviation(self, owner: int) -> Tensor:
        """Whether one module's tensors differ from the captured ones, as a tensor on their device: nothing is read."""
        deviations: list[Tensor] = []
        for _, original, now in self._pairs(owner):
            saved = self._saved(original)
            if saved is None:
                continue
            if now is None or now.shape != saved.shape:
                return torch.ones((), dtype=torch.bool, device=saved.device)
            expected = saved.to(now.device, now.dtype)
            if now.dtype != saved.dtype:
                deviations.append(((now != expected) & ~(now.isnan() & expected.isnan())).any())
            else:
                deviations.append((as_bytes(now.detach().reshape(-1)) != as_bytes(expected.reshape(-1))).any())
        return torch.stack(deviations).any() if deviations else torch.zeros((), dtype=torch.bool)

    @aside()
    def refresh(self, owner: int, unless: Tensor | None) -> None:
        """Takes the current values of one module's tensors for the captured ones, unless ``unless`` says no."""
        for _, original, now in self._pairs(owner):
            saved = self._saved(original)
            if saved is None or now is None or now.shape != saved.shape:
                continue
            # In a dtype that holds both, bit for bit: nobody knows here which of them it is.
            dtype = torch.promote_types(saved.dtype, now.dtype)
            value = now.to(dtype) if unless is None else torch.where(unless, saved.to(now.device, dtype), now.to(dtype))
            if _is_converted(value, saved):
                self._index_of_saved()[id(original)] = value.clone()
            else:
                saved.copy_(value)

    def without_values(self) -> frozenset[int]:
        """The modules of which something cannot be compared: it had no value, and torch initialises it with none."""
        if not self._odd:
            return frozenset()
        missing = {id(tensor) for tensor in self._odd.values() if self._saved(tensor) is None and not is_lazy(tensor)}
        owners = range(len(self.modules))
        return frozenset([owner for owner in owners if any(id(tensor) in missing for tensor in self.objects_of(owner))])

    @aside()
    def before(self, owner: int) -> dict[str, Tensor]:
        """The captured values (shape as captured) of one module's tensors, by name."""
        values = {}
        for name, original in zip(self._names[owner], self.objects_of(owner), strict=True):
            value = self._value(name, original)
            if value is not None:
                values[name] = value.clone()
        return values

    def now(self, owner: int) -> dict[str, Tensor]:
        """The current tensors of one module, by name, as far as they have values."""
        table = tensor_table(self.modules[owner], self._table)
        tensors = {name: table.get(name) for name in self._names[owner]}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and has_values(tensor)}

    def _gathered(self) -> list[list[Tensor | None]]:
        """The current tensors, column by column."""
        tables = tensor_tables(self.modules, self._table)
        if len(self._groups) == 1:
            return [[table.get(name) for table in tables] for names in self._groups for name in names]
        return [
            [tables[owner].get(name) for owner in owners] for names, owners in self._groups.items() for name in names
        ]

    def _pairs(self, owner: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """The names of one module's tensors, with the captured objects and those of now."""
        table = tensor_table(self.modules[owner], self._table)
        for name, original in zip(self._names[owner], self.objects_of(owner), strict=True):
            yield name, original, table.get(name)

    def objects_of(self, owner: int) -> list[Tensor]:
        """The captured tensor objects of one module, in the order of their names."""
        if self._places is None:
            starts = itertools.accumulate(map(len, self._groups), initial=0)
            places = {
                owner: (start, row)
                for start, owners in zip(starts, self._groups.values(), strict=False)
                for row, owner in enumerate(owners)
            }
            self._places = [places[owner] for owner in range(len(self.modules))]
        start, row = self._places[owner]
        return [column[row] for column in self._columns[start : start + len(self._names[owner])]]

    def _restore(self, owner: int, name: str, current: Tensor | None, original: Tensor) -> None:
        if current is None and self._has_moved(owner, original):
            return
        value = self._value(name, original)
        if current is not None and current is not original and _is_converted(current, original):
            if value is not None and has_values(current) and not _holds(current, value):
                expected = value.to(current.device, current.dtype, copy=True)  # the user may write to it later
                as_parameter = isinstance(current, nn.Parameter)
                self._put(owner, name, nn.Parameter(expected, current.requires_grad) if as_parameter else expected)
            return
        if value is not None and has_values(original):
            expected = value.to(original.device, original.dtype)
            if original.shape != expected.shape:
                original.data = expected.clone()
            elif not same_bits(original, expected):
                original.data.copy_(expected)
        if current is not original:
            self._put(owner, name, original)

    def _put(self, owner: int, name: str, tensor: Tensor) -> None:
        """Hangs ``tensor`` under ``name`` again, whatever took that name since, in the order of capture."""
        module, names = self.modules[owner], self._names[owner]
        if isinstance(module, torch.jit.ScriptModule):
            setattr(module, name, tensor)
            return
        own = tensor_table(module, self._table)
        for table in (module._buffers, module._parameters, module._modules, module.__dict__):
            if table is not own:
                table.pop(name, None)
        is_missing = name not in own
        own[name] = tensor
        if is_missing:
            for later in names[names.index(name) + 1 :]:
                if later in own:
                    own[later] = own.pop(later)

    def _is_intact(self, owner: int, name: str, current: Tensor | None, original: Tensor) -> bool:
        """Whether ``current`` has the captured value of ``original``, converted as ``current`` is."""
        if current is None:
            return self._has_moved(owner, original)
        current = below_transforms(current)
        value = self._value(name, original)
        if value is None or not has_values(current):
            return True
        return _holds(current, value)

    def _has_moved(self, owner: int, original: Tensor) -> bool:
        """Whether a parameter hangs elsewhere in its module now, and is no longer what had its name.

        Pruning and parametrizing put it there, and may change it so that what they compute from it stays the same.
        """
        if self._table != "_parameters":
            return False
        return any(parameter is original for parameter in self.modules[owner].parameters())

    def _value(self, name: str, original: Tensor) -> Tensor | None:
        """The captured value; for a tensor that was uninitialised then, what torch initialises it with."""
        saved = self._saved(original)
        if saved is None and name in _INITIAL and not original.is_meta and has_values(original):
            return torch.full_like(original.data, _INITIAL[name])
        return saved

    def _saved(self, original: Tensor) -> Tensor | None:
        return self._index_of_saved()[id(original)]

    def _index_of_saved(self) -> dict[int, Tensor | None]:
        if self._saved_by_id is None:
            self._saved_by_id = self._index()
        return self._saved_by_id

    def _index(self) -> dict[int, Tensor | None]:
        """The captured values by the id of the tensor that had them."""
        views: dict[int, Tensor | None] = {}
        for image in self._images:
            views.update(image.views())
        return views


_INITIAL: Final = {"running_mean": 0.0, "running_var": 1.0}


def _grouped(names: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Sequence[int]]:
    """The positions of equal names."""
    if len(set(map(id, names))) == 1:  # mostly
        return {names[0]: range(len(names))}
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, its_names in enumerate(names):
        groups.setdefault(its_names, []).append(position)
    return dict(groups)


def _images_of_columns(columns: list[list[Tensor]]) -> list[Image | Counts] | None:
    """What the columns hold, where each is of one kind and all are on one device; else None.

    What cannot be read off each tensor at little cost is read off the copy of all of them.
    """
    groups: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for column in columns:
        first = column[0]
        if type(first) not in PLAIN:
            return None
        groups.setdefault((first.dtype, first.dim()), []).extend(column)
    images: list[Image | Counts] = []
    parts = []
    try:
        for (dtype, rank), tensors in groups.items():
            if rank > 1 or not set(map(type, tensors)) <= PLAIN:
                return None
            if rank == 0 and dtype is torch.int64 and tensors[0].is_cpu:
                images.append(Counts(tensors))
            elif {tensor.dtype for tensor in tensors} == {dtype}:
                parts.append(part_of(tensors, dtype, rank))
            else:
                return None
        if parts:
            images.append(Image(parts))
    except RuntimeError:  # several devices, several ranks, or what a transform has left behind
        return None
    return images if all([image.is_of_values() for image in images]) else None


def _images_of(tensors: list[Tensor]) -> list[Image | Counts]:
    """An image for each device."""
    groups: dict[torch.device, dict[tuple[torch.dtype, int | None], list[Tensor]]] = {}
    for tensor in tensors:
        rank = tensor.dim() if tensor.dim() <= 1 else None
        groups.setdefault(tensor.device, {}).setdefault((tensor.dtype, rank), []).append(tensor)
    return [Image([part_of(some, dtype, rank) for (dtype, rank), some in parts.items()]) for parts in groups.values()]


def _holds(current: Tensor, value: Tensor) -> bool:
    """Whether ``current`` is ``value``, converted: the bits of a NaN count only as long as nobody converted it."""
    expected = value.to(current.device, current.dtype)
    if current.dtype != value.dtype and current.shape == value.shape:
        is_nan = current.isnan() & expected.isnan()
        return same_bits(current.detach().masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0))
    return same_bits(current, expected)


def _is_converted(current: Tensor, original: Tensor) -> bool:
    return current.dtype != original.dtype or current.device != original.device
