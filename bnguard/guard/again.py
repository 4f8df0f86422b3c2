"""Begin and end a block on a model that has nothing but torch's own BatchNorm layers, on the CPU.

Note [The short way]
~~~~~~~~~~~~~~~~~~~~
Around a step of a small net a block costs mostly the Python that it runs: what runs once a step is not in the caches of
the processor any more. So there is a short way in and one out, of few functions. They do what ``Block.enter`` and
``Block.leave`` do to torch's own BatchNorm layers on the CPU, once a block on the model has found nothing else to look
after. As soon as anything is otherwise, ``begin`` leaves the model as it is and ``is_quiet`` is false, and the block
goes the long way. A test runs both on random nets.

A block that has ended the short way may be entered once more; see Note [Kept blocks]. It is as good as new if it has
nothing to tell, and once no forward that began in it goes on, which the number of references to its entry tells.

Under ``"warn"`` a ``forward`` on the instance records the updates, as under a budget: it takes a third of the time of a
hook. So where the user's code replaces the ``forward`` of a layer inside such a block, only its end tells of updates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, compress
from operator import attrgetter, itemgetter
from sys import getrefcount
from types import MethodType
from typing import Any, Final
from weakref import getweakrefcount

from torch import Tensor, nn

from bnguard.guard.bystanders import Search, containers_in, search_of
from bnguard.guard.copies import KEY, MARK, NO_CLONES, ONE_REFERENCE
from bnguard.guard.coverage import has_nothing_beside
from bnguard.guard.exit_check import ExitCheck
from bnguard.guard.forward import forward_of_batch_norm
from bnguard.guard.hold import guards
from bnguard.guard.hooks import BeforeForward, LayerGuard, drop_entry, entries_lock
from bnguard.guard.options import Settings
from bnguard.guard.policy import NO_RULING, Counts, PolicyEntry, Ruling, orders
from bnguard.layers.kinds import BATCH_NORM, BATCH_NORM_STATISTICS, BATCH_NORMS, StatsLayer
from bnguard.layers.swaps import swaps
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import UsualCopy, usual_copy_of
from bnguard.torch_internals.compile import GUARDS_GRAPHS
from bnguard.torch_internals.tracing import is_calm

(_IN_ONE_LIST,) = map(getrefcount, [object()])  # what it says of an object to which a list refers
_COLUMNS: Final = tuple(map(itemgetter, BATCH_NORM_STATISTICS))
_TABLE: Final = itemgetter("_buffers")
_ATTRIBUTES: Final = attrgetter("__dict__")
_MODULE: Final = attrgetter("module")


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
        "_attributes", "_check", "_columns", "_copy", "_counted", "_getstates", "_has_forward", "_holders", "_ids",
        "_is_no_layer", "_is_released", "_modules", "_replicas", "_ruling", "_search", "_size", "entry", "guards",
        "layers", "settings", "tree",
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
        self.guards = guards = list(map(LayerGuard, layers, zip(*self._columns, strict=True)))
        # What is put on each layer: made once, so that a block leaves nothing to the garbage collector. Not the mark,
        # to which references are counted.
        self._getstates = [guard.getstate for guard in guards]
        self._replicas: list[Any] = [guard.replicate if self._has_forward else None for guard in guards]
        self._holders: list[Any] = (
            [MethodType(forward_of_batch_norm, guard) for guard in guards]
            if self._has_forward
            else list(map(BeforeForward, guards))
        )
        self._ids = list(map(id, self._modules))
        self._copy: UsualCopy | None = None  # once there was one
        self._check: ExitCheck | None = None  # likewise
        layer_ids = set(map(id, map(_MODULE, tree.layers)))
        self._is_no_layer = [id(module) not in layer_ids for module in tree.modules]
        self._search: Search | None = None  # what ``_counted`` is of
        self._counted: list[Collection[Any]] | None = None  # once it is used again
        self._is_released = False

    def rest(self) -> bool:
        """Lets go of the block, so that no cycle outlives it; False if a forward that began in it goes on."""
        in_ruling = 1 if self._ruling.decider is None else 2
        if getrefcount(self.entry) != ONE_REFERENCE + in_ruling or getrefcount(self._ruling) != ONE_REFERENCE:
            return False
        self.entry.block = self.entry.manager = None
        if self._copy is not None:
            self._copy.drop()  # a guard that is kept for later keeps no copies
        if self._check is not None and self._check.is_used:
            self._check.forget()
        return True

    def release(self) -> bool:
        """Refers to the model weakly until ``is_ready()``; False, with nothing done, if what is on a layer lives on.

        ``rest()`` was called before. The block is the only one that refers to the tree, too.
        """
        put = [self._getstates, self._holders, *([self._replicas] if self._has_forward else [])]
        if not (
            all(map((_IN_ONE_LIST + len(put)).__eq__, map(getrefcount, self.guards)))
            and all(map(_IN_ONE_LIST.__eq__, map(getrefcount, chain.from_iterable(put))))
            and not any(map(getweakrefcount, chain(self.guards, self._holders)))
        ):
            return False  # such as a forward that is kept, or referred to weakly
        if getrefcount(self.tree) > ONE_REFERENCE + 1:
            return False  # an earlier block of the guard, in which a forward goes on
        for guard in self.guards:
            guard.module = None
        if self._check is not None:
            self._check.statistics.modules = ()
        self._modules, self._attributes = [], []
        self._counted = None
        self.tree.release()
        self._is_released = True
        return True

    def is_ready(self) -> bool:
        """Whether the model is as it was. Refers to it as before."""
        if self._is_released and not self._recover():
            return False
        if not (self.tree.has_same_structure() and self._has_same_statistics()):
            return False
        search = search_of(self.tree.model)
        is_known = search is not None and search is self._search
        if not (is_known or has_nothing_beside(self.tree.model, self.tree)):
            return False
        if self._counted is None or not is_known:
            # The attributes of layers are not counted: guards put some there.
            self._counted = list(map(_ATTRIBUTES, compress(self.tree.modules, self._is_no_layer)))
            if search is not None and search.containers:
                self._counted += containers_in(search)
        size = sum(map(len, self._counted))
        if not is_known:
            self._search, self._size = search, size
        return size == self._size  # else there may be layers beside its modules

    def _recover(self) -> bool:
        """Refers to the model as before; False if a part of it is gone."""
        if not self.tree.recover():
            return False
        self._is_released = False
        self._modules = modules = list(map(_MODULE, self.layers))
        self._attributes = list(map(_ATTRIBUTES, modules))
        for guard, module in zip(self.guards, modules, strict=True):
            guard.module = module
        if self._check is not None:
            self._check.statistics.modules = modules
        return True

    def begin(self) -> bool:
        """Puts the entry on all layers; False, with nothing done, where that takes the long way."""
        entry, ruling, has_forward = self.entry, self._ruling, self._has_forward
        is_running = entry.policy.action == "running"
        if swaps or not is_calm():
            return False
        with entries_lock:
            if guards and not guards.keys().isdisjoint(self._ids):
                return False
            for guard, attributes in zip(self.guards, self._attributes, strict=True):
                if (
                    guard.members
                    or guard._before
                    or guard._original is not None
                    or guard.previous is not None  # of another block, which has ended since
                    or "forward" in attributes
                    or MARK in attributes
                    or "__getstate__" in attributes
                    or "_replicate_for_data_parallel" in attributes
                    or attributes["_forward_hooks"]
                    or attributes["_forward_pre_hooks"]
                    or attributes["_non_persistent_buffers_set"]
                ):
                    return False
            entry.order = -next(orders)
            for guard, attributes, getstate, holder, replicate in zip(
                self.guards, self._attributes, self._getstates, self._holders, self._replicas, strict=True
            ):
                guard.members[entry] = {} if is_running else None
                guard.ruling = ruling
                guards[guard.layer_id] = guard
                guard.mark = attributes[MARK] = guard.refuse_script
                attributes["__getstate__"] = getstate
                if has_forward:
                    guard.has_forward = True  # right before it is: the garbage collector may run another block here
                    attributes["forward"] = holder
                    attributes["_replicate_for_data_parallel"] = replicate
                else:
                    guard.has_hooks = True
                    attributes["_forward_pre_hooks"][KEY] = holder
        return True

    def check_anew(self) -> ExitCheck | None:
        """The comparison with the statistics of now; None if they are not usual ones."""
        if self._copy is not None:
            try:
                self._copy.take()
            except RuntimeError:  # they have other memory now, or were converted
                pass
            else:
                return self._check
        self._copy = copy = usual_copy_of(self._columns)
        if copy is None:
            return None
        if self._check is None:
            self._check = ExitCheck.of_usual(self.layers, self.settings, self._columns, copy)
        else:
            self._check.renew(copy)
        return self._check

    def is_quiet(self) -> bool:
        """Whether the model has the modules and the statistics of the beginning, as objects."""
        return not swaps and is_calm() and self.tree.has_same_modules() and self._has_same_statistics()

    def end(self, model: nn.Module) -> None:
        """Takes the entry off all layers of the model. If that fails, ``drop_entry`` does the rest."""
        entry, has_forward = self.entry, self._has_forward
        others = []
        with entries_lock:
            for guard, attributes, getstate, holder, replicate in zip(
                self.guards, self._attributes, self._getstates, self._holders, self._replicas, strict=True
            ):
                hooks = attributes["_forward_pre_hooks"]
                try:
                    is_as_put = (
                        attributes["forward"] is holder
                        and attributes["_replicate_for_data_parallel"] is replicate
                        and guard.has_forward
                        if has_forward
                        else hooks[KEY] is holder
                    )
                    if not (
                        is_as_put
                        and attributes[MARK] is guard.mark
                        and attributes["__getstate__"] is getstate
                        and guard._original is None
                        and not guard._before
                        and getrefcount(guard.mark) <= NO_CLONES
                        and len(guard.members) == 1
                    ):
                        others.append(guard)
                        continue
                except KeyError:  # the user's code has taken it off
                    others.append(guard)
                    continue
                guard.members.pop(entry, None)
                guard.ruling = NO_RULING
                if has_forward:
                    attributes.pop("forward", None)  # not del: another block may have run since the look
                    attributes.pop("_replicate_for_data_parallel", None)
                    guard.has_forward = False
                attributes.pop("__getstate__", None)
                attributes.pop(MARK, None)
                guard.mark = None
                if has_forward or attributes["_forward_hooks"]:
                    if guard.has_hooks:
                        guard.remove_hooks()
                else:
                    hooks.pop(KEY, None)
                    guard.has_hooks = False
                guards.pop(guard.layer_id, None)
            if others:
                drop_entry(others, entry, model)

    def _has_same_statistics(self) -> bool:
        try:
            for module, attributes, mean, var, number in zip(
                self._modules, self._attributes, *self._columns, strict=True
            ):
                if module.__dict__ is not attributes:
                    return False  # the user has replaced it, and the rest refers to it
                table = attributes["_buffers"]
                if (
                    table["running_mean"] is not mean
                    or table["running_var"] is not var
                    or table["num_batches_tracked"] is not number
                ):
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
