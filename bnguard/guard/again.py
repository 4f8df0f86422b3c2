"""Begin and end a block on a model that has nothing but torch's own BatchNorm layers, on the CPU.

Note [The short way]
~~~~~~~~~~~~~~~~~~~~
Around a step of a small net a block costs mostly the Python that it runs: what runs once a step is not in the caches of
the processor any more. So there is a short way in and one out, of few functions. They do what ``Block.enter`` and
``Block.leave`` do to torch's own BatchNorm layers on the CPU, once a block on the model has found nothing else to look
after. As soon as anything is otherwise, ``begin`` leaves the model as it is and ``is_quiet`` is false, and the block
goes the long way. A test runs both on random nets.

The next block on the model takes over what this one has needed; see Note [Kept blocks]. It is as good as new once its
counts are; and no forward that began in it goes on, which the number of references to its entry tells.

Under ``"warn"`` a ``forward`` on the instance records the updates, as under a budget: it takes a third of the time of a
hook. So where the user's code replaces the ``forward`` of a layer inside such a block, only its end tells of updates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import attrgetter, is_, itemgetter
from sys import getrefcount
from types import MethodType
from typing import Any, Final

from torch import Tensor, nn

from bnguard.guard.bystanders import counted_in, search_of
from bnguard.guard.copies import KEY, MARK, NO_CLONES, ONE_REFERENCE
from bnguard.guard.coverage import has_nothing_beside
from bnguard.guard.exit_check import ExitCheck
from bnguard.guard.forward import forward_of_batch_norm
from bnguard.guard.hold import guards
from bnguard.guard.hooks import BeforeForward, LayerGuard, drop_entry, entries_lock
from bnguard.guard.options import Settings
from bnguard.guard.policy import NO_RULING, Counts, PolicyEntry, Ruling, innermost_order
from bnguard.layers.kinds import BATCH_NORM, BATCH_NORM_STATISTICS, BATCH_NORMS, StatsLayer
from bnguard.layers.swaps import swaps
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import UsualCopy, UsualTensors
from bnguard.torch_internals.compile import GUARDS_GRAPHS
from bnguard.torch_internals.tracing import is_calm

(_IN_ONE_LIST,) = map(getrefcount, [object()])  # what it says of an object to which a list refers
_COLUMNS: Final = tuple(map(itemgetter, BATCH_NORM_STATISTICS))
_PUT: Final = (MARK, "__getstate__")
_PUT_WITH_FORWARD: Final = ("forward", "_replicate_for_data_parallel", *_PUT)
_TABLE: Final = itemgetter("_buffers")
_ATTRIBUTES: Final = attrgetter("__dict__")
_NOT_SAVED: Final = attrgetter("_non_persistent_buffers_set")


class Again:
    """What a block needs to begin and end the short way.

    Args:
        tree: The modules of the model.
        layers: What the block guards. See ``goes_short``.
        settings: Its options.
        counts: The updates that the block has seen: none.

    Attributes:
        tree: See above, as for the next two.
        layers: See there.
        settings: See there.
        entry: What the block wants of its layers.
        guards: The guards of the layers.
    """

    __slots__ = (
        "_attributes", "_check", "_columns", "_counted", "_has_forward", "_modules", "_ruling", "_search",
        "_size", "_tensors", "entry", "guards", "layers", "settings", "tree",
    )  # fmt: skip

    def __init__(self, tree: Tree, layers: Sequence[StatsLayer], settings: Settings, counts: Counts) -> None:
        self.tree = tree
        self.layers = layers
        self.settings = settings
        self.entry = entry = PolicyEntry(None, settings.policy, settings.updates, counts)
        self._modules: list[Any] = [layer.module for layer in layers]
        rows = {key: row for row, key in enumerate(map(id, self._modules))} if settings.updates else None
        self._ruling = ruling = Ruling((entry,), rows)
        self._has_forward = ruling.needs_forward or ruling.action == "update"
        self._attributes: list[dict[str, Any]] = list(map(_ATTRIBUTES, self._modules))
        tables = list(map(_TABLE, self._attributes))
        self._columns: list[list[Tensor]] = [list(map(column, tables)) for column in _COLUMNS]
        self.guards = list(map(LayerGuard, layers, zip(*self._columns, strict=True)))
        self._tensors: UsualTensors | None = None  # once there was a copy
        self._check: ExitCheck | None = None  # likewise
        self._search: object = None  # what ``_counted`` is of
        self._counted: list[Collection[Any]] | None = None  # once it is used again

    def rest(self) -> bool:
        """Lets go of the block, so that no cycle outlives it; False if a forward that began in it goes on."""
        in_ruling = 1 if self._ruling.decider is None else 2
        if getrefcount(self.entry) != ONE_REFERENCE + in_ruling or getrefcount(self._ruling) != ONE_REFERENCE:
            return False
        self.entry.block = self.entry.manager = None
        if self._check is not None:
            self._check.forget()  # a guard that is kept for later keeps no copies
        return True

    def release(self) -> bool:
        """Refers to the model weakly from now on; False, with nothing done, if what is on a layer outlives the block.

        ``rest()`` was called before. The block is the only one that refers to the tree, too.
        """
        if not all(map(_IN_ONE_LIST.__eq__, map(getrefcount, self.guards))):
            return False  # such as a forward that is kept
        if getrefcount(self.tree) > ONE_REFERENCE + 1:
            return False  # an earlier block of the guard, in which a forward goes on
        for guard in self.guards:
            guard.module = None
        if self._check is not None:
            self._check.statistics.modules = ()
        self._modules, self._attributes = [], []
        self._counted = self._counted and []
        self.tree.release()
        return True

    def recover(self) -> bool:
        """Refers to the model as before; False if a part of it is gone. What has changed, ``is_ready`` tells."""
        if not self.tree.recover():
            return False
        self._modules = modules = [layer.module for layer in self.layers]
        self._attributes = list(map(_ATTRIBUTES, modules))
        for guard, module in zip(self.guards, modules, strict=True):
            guard.module = module
        if self._check is not None:
            self._check.statistics.modules = modules
        if self._counted is not None:
            self._counted = counted_in(self.tree.model, self.tree)
        return True

    def is_ready(self) -> bool:
        """Whether the model is as it was."""
        if not (self.tree.is_current() and self._has_same_statistics()):
            return False
        model, search = self.tree.model, search_of(self.tree.model)
        if self._counted is None or search is not self._search:
            if not has_nothing_beside(model, self.tree):
                return False
            self._search, self._counted = search, counted_in(model, self.tree)
            self._size = sum(map(len, self._counted))
        return sum(map(len, self._counted)) == self._size  # else there may be layers beside its modules

    def begin(self) -> bool:
        """Puts the entry on all layers; False, with nothing done, where that takes the long way."""
        entry, ruling, has_forward = self.entry, self._ruling, self._has_forward
        is_running = entry.policy.action == "running"
        if not is_calm() or swaps:
            return False
        with entries_lock:
            for guard, attributes in zip(self.guards, self._attributes, strict=True):
                if (
                    guard.layer_id in guards
                    or guard.members
                    or guard._before
                    or guard._original is not None
                    or guard.previous is not None  # of another block, which has ended since
                    or "forward" in attributes
                    or MARK in attributes
                    or "__getstate__" in attributes
                    or "_replicate_for_data_parallel" in attributes
                    or attributes["_forward_hooks"]
                    or attributes["_forward_pre_hooks"]
                ):
                    return False
            entry.order = innermost_order()
            for guard, attributes in zip(self.guards, self._attributes, strict=True):
                guard.members[entry] = {} if is_running else None
                guard.ruling = ruling
                guards[guard.layer_id] = guard
                guard.mark = attributes[MARK] = guard.refuse_script
                attributes["__getstate__"] = guard.getstate
                if has_forward:
                    forward = MethodType(forward_of_batch_norm, guard)
                    guard.has_forward = True  # right before it is: the garbage collector may run another block here
                    attributes["forward"] = forward
                    attributes["_replicate_for_data_parallel"] = guard.replicate
                else:
                    guard.has_hooks = True
                    attributes["_forward_pre_hooks"][KEY] = BeforeForward(guard)
        return True

    def check_anew(self) -> ExitCheck | None:
        """The comparison with the statistics of now; None if they are not usual ones."""
        if any(map(_NOT_SAVED, self._modules)):
            return None
        try:
            if self._tensors is None or not self._tensors.are_in_place():
                self._tensors = UsualTensors(self._columns)
            copy = UsualCopy(self._tensors)
        except (ValueError, RuntimeError):
            return None
        if self._check is None:
            self._check = ExitCheck.of_usual(self.layers, self.settings, self._columns, copy)
        else:
            self._check.renew(copy)
        return self._check

    def is_quiet(self) -> bool:
        """Whether the model has the modules and the statistics of the beginning, as objects."""
        return is_calm() and not swaps and self.tree.has_same_modules() and self._has_same_statistics()

    def end(self, model: nn.Module) -> None:
        """Takes the entry off all layers of the model. If that fails, ``drop_entry`` does the rest."""
        entry, has_forward = self.entry, self._has_forward
        names = _PUT_WITH_FORWARD if has_forward else _PUT
        others = []
        with entries_lock:
            for guard, attributes in zip(self.guards, self._attributes, strict=True):
                is_alone = len(guard.members) == 1 and not guard._before and guard._original is None
                is_as_put = guard.has_forward if has_forward else KEY in attributes["_forward_pre_hooks"]
                if not (is_alone and is_as_put and getrefcount(guard.mark) <= NO_CLONES):
                    others.append(guard)
                    continue
                guard.members.pop(entry, None)
                guard.ruling = NO_RULING
                for name in names:
                    if getattr(attributes.get(name), "__self__", None) is guard:
                        attributes.pop(name, None)  # likewise
                guard.has_forward = False
                guard.mark = None
                if guard.has_hooks:
                    guard.remove_hooks()
                guards.pop(guard.layer_id, None)
            if others:
                drop_entry(others, entry, model)

    def _has_same_statistics(self) -> bool:
        if not all(map(is_, map(_ATTRIBUTES, self._modules), self._attributes)):
            return False  # the user has replaced the dictionary of a layer, to which the rest refers
        tables = list(map(_TABLE, self._attributes))
        try:
            for column, known in zip(_COLUMNS, self._columns, strict=True):
                if not all(map(is_, map(column, tables), known)):
                    return False
        except KeyError:
            return False
        return True


def goes_short(model: nn.Module, tree: Tree, layers: Sequence[StatsLayer], settings: Settings) -> bool:
    """Whether a block can go the short way, unless ``begin`` finds otherwise.

    Args:
        model: The model.
        tree: Its modules, as they are now.
        layers: What the block guards.
        settings: The options of the guard.
    """
    frontend = settings.frontend
    return (
        GUARDS_GRAPHS
        and frontend.has_coverage_warnings
        and not (frontend.compares_only or frontend.is_outermost or frontend.only_without_grad)
        and settings.check == "exit"
        and not (settings.affine or settings.buffers or settings.policy.hides)
        and settings.selects_by_name
        and bool(layers)
        and tree.is_plain()
        and all([layer.kind is BATCH_NORM and layer.buffers == BATCH_NORM_STATISTICS for layer in layers])
        and {type(layer.module) for layer in layers} <= BATCH_NORMS
        and not (settings.updates and _share_statistics(layers))
        and has_nothing_beside(model, tree)
    )


def _share_statistics(layers: Sequence[StatsLayer]) -> bool:
    """Whether an update of one layer is one of another, too."""
    tensors = [tensor for layer in layers for tensor in layer.module._buffers.values()]
    return len(set(map(id, tensors))) < len(tensors)
