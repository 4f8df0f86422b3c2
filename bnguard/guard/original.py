"""Copy what a layer has before a forward, and see whether the forward has changed it."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn

from bnguard.guard.hold import copies_outside_modes
from bnguard.layers.bits import has_values, same_bits
from bnguard.layers.kinds import BATCH_NORM_STATISTICS
from bnguard.layers.swaps import own_tensors, swaps
from bnguard.layers.usual_copy import UsualCopy, UsualTensors, usual_copy_of
from bnguard.torch_internals.tracing import is_calm, outside_modes, unseen
from bnguard.torch_internals.transforms import is_wrapped, unwrapped_tensor


class Original:
    """What a layer had before any of the forwards that are under way.

    Args:
        tensors: The statistics, as objects, without those that a transform of ``torch.func`` has lent.
        copy: A copy of all of them; None for ``values`` in its place.
        values: Copies of those that can be read.
        pointers: Where these were in memory.

    Attributes:
        tensors: See above.
        has_changed: Whether one of those forwards was found to have changed them.
        is_shared: Whether there was more than one.
        is_awaited: Whether it is to be put back by the last of them: not while another one is reading.
    """

    __slots__ = ("_copied", "_copy", "_pointers", "_values", "has_changed", "is_awaited", "is_shared", "tensors")

    def __init__(
        self,
        tensors: dict[str, Tensor],
        copy: UsualCopy | None,
        values: dict[str, Tensor] | None = None,
        pointers: dict[str, int] | None = None,
    ) -> None:
        self.tensors = tensors
        self.has_changed = self.is_shared = self.is_awaited = False
        self._copy = copy
        self._copied = tensors
        self._values, self._pointers = values, pointers

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Copies of the statistics that can be read, by name."""
        if self._values is None:
            views = {} if self._copy is None else dict(self._copy.views())
            self._values = {name: views[id(tensor)] for name, tensor in self._copied.items()}
        return self._values

    @property
    def pointers(self) -> Mapping[str, int]:
        """Where these were in memory."""
        if self._pointers is None:
            places = {} if self._copy is None else dict(self._copy.pointers())
            self._pointers = {name: places[id(tensor)] for name, tensor in self._copied.items()}
        return self._pointers

    def moved(self, module: nn.Module) -> tuple[str, ...]:
        """The statistics of the layer that have other bits now."""
        copy, own = self._copy, module._buffers
        if (
            copy is not None
            and id(module) not in swaps
            and is_calm()
            and all(map(is_, map(own.get, self.tensors), self.tensors.values()))
        ):
            try:
                if copy.is_unchanged():
                    return ()
            except RuntimeError:  # converted in place
                pass
        return self._moved(module)

    @outside_modes
    def _moved(self, module: nn.Module) -> tuple[str, ...]:
        own = own_tensors(module, "_buffers")
        pairs = [(name, value, unwrapped_tensor(own.get(name))) for name, value in self.values.items()]
        return tuple(
            [name for name, value, now in pairs if now is not None and has_values(now) and not same_bits(value, now)]
        )


class OriginalCopier:
    """Copies the statistics of one layer again and again.

    Args:
        names: The buffers that hold them.
    """

    __slots__ = ("_found", "_names", "_tensors", "_usual")

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._found: list[Tensor | None] = []  # by these names, at the last copy
        self._tensors: dict[str, Tensor] = {}  # those that were there
        self._usual: UsualTensors | None = None  # if they were torch's own three

    def copy_of(self, module: Any) -> Original:
        """What the layer has now."""
        is_quick = id(module) not in swaps and is_calm()
        own = module._buffers if is_quick else own_tensors(module, "_buffers")
        found = list(map(own.get, self._names))
        if len(found) != len(self._found) or not all(map(is_, found, self._found)):
            self._found, self._usual = found, None
            self._tensors = {name: one for name, one in zip(self._names, found, strict=True) if one is not None}
        copy = self._usual_copy() if is_quick and tuple(self._tensors) == BATCH_NORM_STATISTICS else None
        return _original(self._tensors) if copy is None else Original(self._tensors, copy)

    def _usual_copy(self) -> UsualCopy | None:
        """A copy in few steps; None where that takes more. A test compares the two ways."""
        if self._usual is not None:
            try:
                return UsualCopy([self._usual])
            except RuntimeError:  # they have other memory now
                self._usual = None
        copy = usual_copy_of([[tensor] for tensor in self._tensors.values()])
        if copy is not None:
            (self._usual,) = copy.batches
        return copy


@unseen
def _original(tensors: dict[str, Tensor]) -> Original:
    values = copies_outside_modes(tensors)
    if len(values) < len(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not is_wrapped(tensor)}
    pointers = {name: unwrapped_tensor(tensors[name]).data_ptr() for name in values}
    return Original(tensors, None, values, pointers)
