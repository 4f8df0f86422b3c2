"""See what a forward has done to a layer's statistics, and decide about it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from bnguard.errors import hides_frame
from bnguard.guard.original import Original, OriginalCopier
from bnguard.guard.policy import Decision, Entries, decide, decide_and_count
from bnguard.guard.surroundings import Surroundings
from bnguard.layers.bits import has_values, put_back, write
from bnguard.layers.swaps import begin_swap, end_swap, own_tensors, put_tensor
from bnguard.torch_internals.fork import renew_after_fork
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import unwrapped_tensor

__tracebackhide__ = hides_frame

COUNTER_ALONE: Final = ("num_batches_tracked",)
forwards_lock: Final = RLock()
renew_after_fork(forwards_lock)


class Before:
    """The state of a layer right before a forward.

    Attributes:
        entries: The entries at its beginning.
        original: The statistics of the layer. Overlapping forwards share it: which one wrote what is unknown.
        error: The exception that was being handled.
        call: Identifies the frame in which torch calls the layer; None where the end of the forward is known otherwise.
        swap: Identifies the swap of the layer's statistics that the forward runs with; None without one.
    """

    __slots__ = ("__weakref__", "call", "entries", "error", "original", "swap")

    def __init__(self, entries: Entries, original: Original, error: BaseException | None) -> None:
        self.entries = entries
        self.original = original
        self.error = error
        self.call: object = None
        self.swap: object = None


class Passing:
    """A forward within a budget that copies what it writes itself. See ``UpdatingLayer``.

    Attributes:
        is_shared: Whether another forward of the layer overlaps with it.
    """

    __slots__ = ("__weakref__", "is_shared")

    def __init__(self) -> None:
        self.is_shared = False


class WatchedLayer(Surroundings):
    """A guarded layer whose statistics can be compared from one side of a forward to the other.

    Attributes:
        under_way: Forwards that are watched at the moment, weakly: one that Ctrl-C has ended is forgotten with its
            exception.
    """

    _before: dict[int, list[Before]] | None = None  # those that hooks watch, by thread, once there are some
    under_way: Sequence[weakref.ref[Before]] = ()  # not a WeakSet, which takes longer than all the rest
    _passing: weakref.ref[Passing] | None = None  # likewise forgotten with the exception that has ended it
    _original: Original | None = None
    _copier: OriginalCopier | None = None  # once there is something to copy

    def is_watched(self, entries: Entries) -> bool:
        """Whether anything comes of an update."""
        decision = decide(entries, self.layer_id)
        return decision.action != "update" or bool(decision.told or decision.within)

    def only_counts(self) -> bool:
        """Whether an update presumably moves nothing but the number of batches."""
        if torch.compiler.is_compiling() or "num_batches_tracked" not in self.names:
            return False
        return getattr(self.module, "momentum", None) == 0 and not self.is_captured()

    def is_under_way(self) -> bool:
        """Whether a forward is running that may update."""
        return self._is_watched_now() or (self._passing is not None and self._passing() is not None)

    def _is_watched_now(self) -> bool:
        """Whether a forward is watched."""
        return any([reference() is not None for reference in self.under_way])

    def begin_passing(self) -> Passing | None:
        """Begins a forward that copies the statistics itself; None if another one of the layer is under way."""
        passing = Passing()
        with forwards_lock:
            if (self.under_way or self._passing is not None) and self.is_under_way():
                return None
            self._passing = weakref.ref(passing)
            return passing

    def look(self, entries: Entries) -> Before:
        """Copies the statistics right before a forward."""
        with forwards_lock:
            original = self._original
            if original is not None and self._is_watched_now():
                original.is_shared = True
            else:
                if self._copier is None:
                    self._copier = OriginalCopier(self.names)
                self._original = original = self._copier.copy_of(self.module)
            passing = None if self._passing is None else self._passing()
            if passing is not None:
                passing.is_shared = original.is_shared = True
            before = Before(entries, original, sys.exception())
            self.under_way = (*self.under_way, weakref.ref(before))
        return before

    def run_swapped(self, before: Before, statistics: Mapping[str, Tensor], flags: Mapping[str, bool]) -> None:
        """Puts ``statistics`` and ``flags`` in place of the layer's own until the watch over a forward ends."""
        before.swap = object()
        begin_swap(self.module, statistics, flags, before.swap)

    def forget(self, before: Before) -> None:
        """Ends the watch over a forward."""
        if before.swap is not None:
            end_swap(self.module, before.swap)
        with forwards_lock:
            if len(self.under_way) == 1 and self.under_way[0]() is before:
                self.under_way = ()
            else:
                self.under_way = [other for other in self.under_way if other() not in (before, None)]
            if not self.under_way:
                self._original = None
                if before.original.is_awaited:
                    self.put_back(before)

    def restored(self) -> None:
        """The end of a block has restored the layer: forwards that go on after it are to leave it like this."""
        original = self._original
        if original is not None:
            with forwards_lock:
                own = own_tensors(self.module, "_buffers")
                original.tensors = {
                    name: old if (now := own.get(name)) is None else now for name, old in original.tensors.items()
                }

    def conclude(self, before: Before, has_failed: bool) -> None:
        """Decides about what a watched forward has done."""
        try:
            original = before.original
            # In this order: another thread says that there was a change before it puts back what shows it.
            moved = original.moved(self.module)
            if not moved and not original.has_changed:
                return
            is_free = moved == COUNTER_ALONE and not original.has_changed and (has_failed or self.only_counts())
            decision = decide(before.entries, self.layer_id, only_counts=True) if is_free else None
            if decision is None or not decision.within:
                original.has_changed = True
                decision = decide_and_count(before.entries, self.layer_id)
            if decision.action != "update":
                original.is_awaited = True
            if not has_failed:
                self.apply(decision)
            self.allow(decision, before)
        finally:
            self.forget(before)

    def allow(self, decision: Decision, before: Before) -> None:
        """Has the blocks whose budgets allowed an update take over what it has written."""
        with forwards_lock:  # before another forward begins, with which it would be shared
            for entry in decision.within:
                if entry.block is not None:
                    entry.block.allowed(self.layer_id, None if before.original.is_shared else before.original.values)

    @outside_modes
    def put_back(self, before: Before) -> None:
        """Gives the layer the tensors and the values from before a forward. Past autograd: see the exit check."""
        own = own_tensors(self.module, "_buffers")
        for name, tensor in before.original.tensors.items():
            if own.get(name) is not tensor:
                put_tensor(self.module, "_buffers", name, tensor)
            value = before.original.values.get(name)
            target = unwrapped_tensor(tensor)
            if value is None or not has_values(target):
                continue
            put_back(target, value, before.original.pointers[name])

    @outside_modes
    def commit(self, after: dict[str, Tensor | None]) -> None:
        """Gives the layer's own statistics what a forward has made of clones of them."""
        own = own_tensors(self.module, "_buffers")
        for name in self.names:
            tensor, value = own.get(name), after.get(name)
            if tensor is None or value is None:
                continue
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                put_tensor(self.module, "_buffers", name, value)
            elif has_values(tensor) and has_values(value):
                write(tensor, value)

    def apply(self, decision: Decision, args: tuple[Any, ...] = ()) -> None:
        """Raises or records what was decided about an update by a forward with these arguments."""
        decider = decision.decider
        if decision.action == "stop" and decider is not None and decider.block is not None:
            self.refuse_batch(args)
            raise decider.block.stopped(self.layer_id)
        for entry in decision.told:
            if entry.block is not None:
                entry.block.updated(self.layer_id)

    def decide_and_count(self, entries: Entries) -> Decision:
        """Decides about an update. While a CUDA graph is captured nothing runs: only an error is of use then."""
        if not self.is_captured():
            return decide_and_count(entries, self.layer_id)
        decision = decide(entries, self.layer_id)
        return decision if decision.action == "stop" else Decision("update")
