"""Capture tensors of modules, compare them later bit for bit, and write them back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.layers.bits import has_values, holds, is_valueless, put_back, readable, same_bits, wide
from bnguard.layers.comparison import Comparison, grouped
from bnguard.layers.flat_copy import FlatCopy, copies_of, copy_of_columns
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.layers.swaps import Table, own_tables, own_tensors, put_tensor, swap_lock
from bnguard.layers.usual_copy import UsualCopy, Write, usual_copy_of
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import PLAIN, unwrapped_tensor


class Difference(NamedTuple):
    """Tensors of one module that were removed, or whose bits differ from the captured ones.

    Attributes:
        owner: Index of the module in the snapshot.
        names: The names of the tensors.
    """

    owner: int
    names: tuple[str, ...]


class Snapshot:
    """A copy of named tensors of modules, together with references to the tensor objects.

    A tensor that is registered in several places is copied once. Tensors without values, on the meta device, fake or
    uninitialised, and those that cannot be read, such as quantised ones, are not copied. An uninitialised tensor is
    assumed to have had the values that torch initialises it with: mean 0, variance 1.

    Args:
        modules: The modules that own the tensors.
        names: For each module the names of its tensors, all of which must exist.
        table: Whether these are buffers or parameters.
        is_flat: Whether ``compared()`` is to be used on the CPU as well.

    Attributes:
        modules: See above.
        has_other_forms: Whether values were captured again in another dtype or shape: the copies do not have them.
    """

    __slots__ = (
        "_columns", "_compared", "_copies", "_groups", "_names", "_odd", "_places", "_pointers", "_saved_by_id",
        "_table", "_transient", "has_other_forms", "modules",
    )  # fmt: skip

    @outside_modes
    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[tuple[str, ...]],
        table: Table = "_buffers",
        *,
        is_flat: bool = False,
    ) -> None:
        self.modules = modules
        self.has_other_forms = False
        self._names = names
        self._table = table
        # Modules with the same names form a group. Their tensors with one name form a column, mostly of one dtype.
        self._groups: dict[tuple[str, ...], Sequence[int]] = grouped(names)
        self._columns: list[list[Tensor]] = self._current_columns()  # type: ignore[assignment]  # all exist
        self._places: list[tuple[int, int]] | None = None  # first column and row of each module, once needed
        self._pointers: dict[int, int] | None = None  # once needed
        transient = list(map(_TRANSIENT, modules))
        # By module: names of buffers that are not in the state dict. A deleted one is no longer among them.
        self._transient = (
            {owner: frozenset(some) for owner, some in enumerate(transient) if some} if any(transient) else {}
        )
        self._odd: dict[int, Tensor] = {}
        self._saved_by_id: dict[int, Tensor | None] | None = None
        self._compared: Comparison | None = None  # right after changed(): what is on a device
        self._copies: Sequence[FlatCopy | UsualCopy]
        is_usual = not is_flat and len(self._groups) == 1 and names[0] == BATCH_NORM_STATISTICS
        usual = usual_copy_of(self._columns) if is_usual else None
        if usual is not None:
            self._copies = (usual,)
            return
        copy = copy_of_columns(self._columns)
        if copy is not None:
            self._copies = (copy,)
            return
        tensors = list({id(tensor): tensor for column in self._columns for tensor in column}.values())
        self._odd = {id(tensor): tensor for tensor in tensors if type(tensor) not in PLAIN or not has_values(tensor)}
        self._copies = copies_of([tensor for tensor in tensors if id(tensor) not in self._odd])
        if self._odd:
            odd = {key: unwrapped_tensor(tensor) for key, tensor in self._odd.items() if has_values(tensor)}
            values = {key: tensor.detach().clone() for key, tensor in odd.items()}
            self._saved_by_id = {**self._index(), **dict.fromkeys(self._odd), **values}

    @classmethod
    def of_usual(cls, modules: Sequence[nn.Module], columns: list[list[Tensor]], copy: UsualCopy) -> Self:
        """A snapshot of torch's own BatchNorm layers whose statistics are all in the state dict.

        Args:
            modules: The layers.
            columns: Their means, variances and numbers of batches.
            copy: The copy of these.
        """
        snapshot, names = cls.__new__(cls), BATCH_NORM_STATISTICS
        snapshot.modules, snapshot._names, snapshot._table = modules, [names] * len(modules), "_buffers"
        snapshot._groups, snapshot._columns, snapshot._copies = {names: range(len(modules))}, columns, (copy,)
        snapshot._places = snapshot._pointers = snapshot._saved_by_id = None
        snapshot._transient, snapshot._odd, snapshot._compared, snapshot.has_other_forms = {}, {}, None, False
        return snapshot

    def renew(self, copy: UsualCopy) -> None:
        """Replaces the copy of ``of_usual`` layers with another one of the same tensors."""
        self._copies = (copy,)
        self._pointers = None

    def forget(self) -> None:
        """Drops what refers to the copy of ``of_usual`` layers."""
        self._saved_by_id = None
        self.has_other_forms = False

    def has_same_values(self) -> bool:
        """Whether the captured tensor objects have the captured bits. The caller sees to modes and autograd."""
        if self.has_other_forms:
            return False
        try:
            return all([copy.is_unchanged() for copy in self._copies])
        except RuntimeError:  # converted in place through .data: other shapes or devices
            return False

    @outside_modes
    def absorb(self, writes: Sequence[Write]) -> bool:
        """Replaces the captured values with what ``writes`` have left; False, with nothing done, if they do not fit."""
        copy = self._copies[0]
        try:
            return self._saved_by_id is None and isinstance(copy, UsualCopy) and copy.absorb(writes)
        except RuntimeError:
            return False

    @outside_modes
    def is_intact(self) -> bool:
        """Whether every module has the captured tensor objects with the captured bits.

        Takes one comparison per device. False if the snapshot has tensors that cannot be compared this way.
        """
        return not self._odd and self._has_same_objects() and self.has_same_values()

    @property
    def waits(self) -> bool:
        """Whether to compare takes a synchronisation with a device."""
        return any([isinstance(copy, FlatCopy) and not copy.is_on_host for copy in self._copies])

    @outside_modes
    def compared(self) -> Comparison | None:
        """The captured values beside the current ones, without waiting for a device.

        None if some copies are not flat, as those of tensors on the CPU unless the snapshot is flat; if a tensor is
        another object, has another shape or dtype by now, or is elsewhere in memory. ``changed()`` compares these.
        """
        copies = [copy for copy in self._copies if isinstance(copy, FlatCopy)]
        if self._odd or self.has_other_forms or len(copies) < len(self._copies) or not self._has_same_objects():
            return None
        try:
            pairs = [copy.beside_current() for copy in copies]
        except RuntimeError:
            return None
        return Comparison(self._names, self._groups, self._columns, pairs)

    @outside_modes
    def write_back(self) -> None:
        """Writes the captured values of a flat snapshot, past autograd, whatever is there; waits for no device."""
        for copy in self._copies:
            if isinstance(copy, FlatCopy):
                copy.write_back()

    def _has_same_objects(self) -> bool:
        return all([all(map(is_, *sides)) for sides in zip(self._current_columns(), self._columns, strict=True)])

    @outside_modes
    def changed(self) -> list[Difference]:
        """Lists the tensors that were removed, or whose bits differ from the captured ones.

        A tensor that was converted to another dtype or device is compared with the captured values, converted likewise.
        Another object with the same bits does not count as changed.
        """
        differences = []
        self._compared = self.compared() if self.waits else None
        for owner in range(len(self.modules)):
            places = self._pairs(owner)
            differing = tuple([name for name, then, now in places if not self._is_intact(owner, name, now, then)])
            if differing:
                differences.append(Difference(owner, differing))
        return differences

    @outside_modes
    def restore(self, *, is_compared: bool = False) -> None:
        """Restores the captured objects and values.

        Values are written through ``.data`` and only if bits differ. No version counter increases, so a later backward
        pass still works. An object of another dtype or device that replaced the captured one is kept if it holds the
        captured values, converted; otherwise it is replaced with a new tensor. Only captured tensors are written to.

        Args:
            is_compared: Whether ``changed()`` has just been called: what it has found need not be read again.
        """
        self._compared = self._compared if is_compared else None
        places = [(owner, *place) for owner in range(len(self.modules)) for place in self._pairs(owner)]
        for owner, name, original, current in places:
            self._restore(owner, name, current, original)

    @outside_modes
    def captured(self, owner: int) -> dict[str, Tensor]:
        """Copies of the captured values of one module's tensors by name, without tensors that had no values."""
        return {name: value.clone() for name, value in self.views(owner).items()}

    def views(self, owner: int) -> dict[str, Tensor]:
        """The captured values themselves by name, without tensors that had no values. Nobody may write to them."""
        index = self._index_of_saved()
        return {
            name: value
            for name, original in zip(self._names[owner], self.objects_of(owner), strict=True)
            if (value := index.get(id(original))) is not None  # not there: another thread has ended the block
        }

    @outside_modes
    def accept(self, owner: int) -> None:
        """Replaces the captured values of one module's tensors with their current values."""
        self.recapture(owner, {name: unwrapped_tensor(now) for name, _, now in self._pairs(owner) if now is not None})

    @outside_modes
    def recapture(self, owner: int, values: Mapping[str, Tensor]) -> None:
        """Replaces the captured values of one module's tensors with ``values``, by name."""
        for name, original in zip(self._names[owner], self.objects_of(owner), strict=True):
            saved, value = self._saved(original), values.get(name)
            if value is None or not has_values(value):
                continue
            if saved is None:
                if has_values(original):  # it was uninitialised at capture
                    self._index_of_saved()[id(original)] = value.clone()
                    self.has_other_forms = True
            elif value.shape != saved.shape or _is_converted(value, saved):
                # A dtype that represents both exactly: the layer may be converted back.
                dtype = torch.promote_types(wide(saved).dtype, wide(value).dtype)
                self._index_of_saved()[id(original)] = value.to(dtype, copy=True)
                self.has_other_forms = True
            else:
                saved.copy_(value)

    def without_values(self) -> frozenset[int]:
        """Indices of the modules with a tensor that cannot be compared, and is not a lazy tensor."""
        if not self._odd:
            return frozenset()
        missing = {id(tensor) for tensor in self._odd.values() if self._saved(tensor) is None and not is_lazy(tensor)}
        owners = range(len(self.modules))
        return frozenset([owner for owner in owners if any(id(tensor) in missing for tensor in self.objects_of(owner))])

    @outside_modes
    def before(self, owner: int) -> dict[str, Tensor]:
        """Copies of the captured values of one module's tensors by name; initial values for uninitialised tensors.

        Right after ``changed()`` they are on the CPU, like those of ``now()``, if no tensor has been replaced.
        """
        values = {}
        for name, original in zip(self._names[owner], self.objects_of(owner), strict=True):
            pair = self._pair(original, original)
            value = self._value(name, original) if pair is None else pair[0]
            if value is not None:
                values[name] = value.clone()
        return values

    @outside_modes
    def now(self, owner: int) -> dict[str, Tensor]:
        """The current tensors of one module by name, without tensors that cannot be read."""
        places = [(name, now, self._pair(then, now)) for name, then, now in self._pairs(owner)]
        return readable({name: now if pair is None else pair[1] for name, now, pair in places})

    def _current_columns(self) -> list[list[Tensor | None]]:
        """The current tensors by column; None for a removed tensor."""
        with swap_lock:
            tables = own_tables(self.modules, self._table)
            if len(self._groups) == 1:
                return [[table.get(name) for table in tables] for names in self._groups for name in names]
            return [
                [tables[owner].get(name) for owner in owners]
                for names, owners in self._groups.items()
                for name in names
            ]

    def _pairs(self, owner: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Yields name, captured object and current object of each of one module's tensors."""
        table = own_tensors(self.modules[owner], self._table)
        for name, original in zip(self._names[owner], self.objects_of(owner), strict=True):
            yield name, original, table.get(name)

    def objects_of(self, owner: int) -> list[Tensor]:
        """The captured tensor objects of one module, in the order of its names."""
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
        is_kept = current is not None and (has_values(current) or is_valueless(current))
        if current is not None and current is not original and is_kept and _is_converted(current, original):
            if value is not None and has_values(current) and not holds(current, value):
                expected = value.to(current.device, current.dtype, copy=True)  # the user may write to it later
                as_parameter = isinstance(current, nn.Parameter)
                self._put(owner, name, nn.Parameter(expected, current.requires_grad) if as_parameter else expected)
            return
        if value is not None and has_values(original):
            target = unwrapped_tensor(original)
            pair = self._pair(original, current)
            differs = None if pair is None else not same_bits(*pair)
            put_back(target, value.to(target.device, target.dtype), self._place(original), differs=differs)
        if current is not original:
            self._put(owner, name, original)

    def _pair(self, original: Tensor, current: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Copies on the CPU of the captured and the current values, if ``changed()`` has made them."""
        return self._compared.of(original) if self._compared is not None and current is original else None

    def _place(self, original: Tensor) -> int | None:
        """Where the values of a tensor were in memory when they were captured; None if that is not known."""
        if self._pointers is None:
            self._pointers = dict(itertools.chain.from_iterable([copy.pointers() for copy in self._copies]))
        return self._pointers.get(id(original))

    def _put(self, owner: int, name: str, tensor: Tensor) -> None:
        """Sets the module's tensor ``name``, at its original position in the dictionary."""
        module, names = self.modules[owner], self._names[owner]
        put_tensor(module, self._table, name, tensor, names[names.index(name) + 1 :])
        if name in self._transient.get(owner, ()):
            module._non_persistent_buffers_set.add(name)

    def _is_intact(self, owner: int, name: str, current: Tensor | None, original: Tensor) -> bool:
        """Whether ``current`` has the captured values of ``original``, converted to its dtype and device."""
        if current is None:
            return self._has_moved(owner, original)
        if (pair := self._pair(original, current)) is not None:
            return same_bits(*pair)
        current = unwrapped_tensor(current)
        value = self._value(name, original)
        if value is None or is_valueless(current):
            return True
        return has_values(current) and holds(current, value)

    def _has_moved(self, owner: int, original: Tensor) -> bool:
        """Whether a parameter is now registered elsewhere in its module, under another name.

        Pruning and parametrization move a parameter. They may also change its values, and compute the original ones
        from them.
        """
        if self._table != "_parameters":
            return False
        return any(parameter is original for parameter in self.modules[owner].parameters())

    def _value(self, name: str, original: Tensor) -> Tensor | None:
        """The captured values; the values that torch initialises a tensor with if it was uninitialised at capture."""
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

    @outside_modes
    def _index(self) -> dict[int, Tensor | None]:
        """The captured values by the id of their tensor."""
        return dict(itertools.chain.from_iterable([copy.views() for copy in self._copies]))


_TRANSIENT: Final = attrgetter("_non_persistent_buffers_set")
_INITIAL: Final = {"running_mean": 0.0, "running_var": 1.0}


def _is_converted(current: Tensor, original: Tensor) -> bool:
    return current.dtype != original.dtype or current.device != original.device
