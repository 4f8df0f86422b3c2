"""Begin and end a block on a model on which nothing has changed since the last block of the same guard.

Note [The short way]
~~~~~~~~~~~~~~~~~~~~
Around a step of a small net a block costs mostly the Python that it runs: what runs once a step is not in the caches of
the processor any more. So a guard that is used again has a short way in and one out, of few functions. They do what
``Block.enter`` and ``Block.leave`` do to torch's own BatchNorm layers on the CPU. As soon as anything is otherwise,
``begin`` leaves the model as it is and ``is_quiet`` is false, and the block goes the long way. A test runs both ways on
random nets.

The short way opens the same block again. It found nothing and said nothing, so it is as good as new; and no forward
that began in it goes on, which the number of references to its entry tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from sys import getrefcount
from types import MethodType
from typing import Any, Final

from torch import Tensor

from bnguard.guard.copies import KEY, MARK, NO_CLONES, strip_clones
from bnguard.guard.exit_check import ExitCheck
from bnguard.guard.forward import forward_of_batch_norm
from bnguard.guard.hold import guards
from bnguard.guard.hooks import BeforeForward, LayerGuard, entries_lock
from bnguard.guard.options import Settings
from bnguard.guard.policy import NO_RULING, PolicyEntry, Rulings, innermost_order
from bnguard.layers.kinds import BATCH_NORM
from bnguard.layers.swaps import swaps
from bnguard.layers.tree import Tree
from bnguard.layers.usual_copy import UsualCopy
from bnguard.torch_internals.compile import GUARDS_GRAPHS
from bnguard.torch_internals.tracing import is_calm

_COLUMNS: Final = tuple(map(itemgetter, ("running_mean", "running_var", "num_batches_tracked")))
_PUT: Final = ("forward", "_replicate_for_data_parallel", "__getstate__", MARK)
_TABLE: Final = itemgetter("_buffers")
_ATTRIBUTES: Final = attrgetter("__dict__")


class Again:
    """What a block needs to begin and end the short way.

    Args:
        tree: The modules of the model.
        entry: What the block wants of its layers.
        layer_guards: Their guards, with the entry.
        check: The comparison of the block.

    Attributes:
        entry: What the block wants of its layers.
    """

    __slots__ = (
        "_attributes",
        "_check",
        "_columns",
        "_guards",
        "_has_forward",
        "_modules",
        "_ruling",
        "_tree",
        "entry",
    )

    def __init__(self, tree: Tree, entry: PolicyEntry, layer_guards: Sequence[LayerGuard], check: ExitCheck) -> None:
        self._tree = tree
        self._guards = layer_guards
        self._check = check
        self._ruling = layer_guards[0].ruling
        self._has_forward = self._ruling.needs_forward
        self._modules: list[Any] = [guard.module for guard in layer_guards]
        self._attributes: list[dict[str, Any]] = list(map(_ATTRIBUTES, self._modules))
        self._columns = self._current_columns()
        self.entry = entry

    def rest(self) -> bool:
        """Lets go of the block, so that no cycle outlives it; False if a forward that began in it goes on."""
        in_ruling = 1 if self._ruling.decider is None else 2
        if getrefcount(self.entry) != _REFERENCES + in_ruling or getrefcount(self._ruling) != _REFERENCES:
            return False
        self.entry.block = self.entry.manager = None
        self._check.forget()  # a guard that is kept for later keeps no copies
        return True

    def is_ready(self) -> bool:
        """Whether the model is as it was."""
        return is_calm() and not swaps and self._tree.is_current() and self._has_same_statistics()

    def begin(self) -> bool:
        """Puts the entry on all layers; False, with nothing done, where that takes the long way."""
        entry, ruling, has_forward = self.entry, self._ruling, self._has_forward
        is_running = entry.policy.action == "running"
        with entries_lock:
            for guard, attributes in zip(self._guards, self._attributes, strict=True):
                if (
                    guard.layer_id in guards
                    or guard.members
                    or guard._before
                    or guard._original is not None
                    or "forward" in attributes
                    or MARK in attributes
                    or attributes["_forward_hooks"]
                    or attributes["_forward_pre_hooks"]
                ):
                    return False
            entry.order = innermost_order()
            for guard, attributes in zip(self._guards, self._attributes, strict=True):
                guard.members[entry] = {} if is_running else None
                guard.ruling = ruling
                guards[guard.layer_id] = guard
                guard.mark = attributes[MARK] = guard.refuse_script
                attributes["__getstate__"] = guard.getstate
                if has_forward:
                    guard.has_forward = True
                    attributes["_replicate_for_data_parallel"] = guard.replicate
                    attributes["forward"] = MethodType(forward_of_batch_norm, guard)
                else:
                    guard.has_hooks = True
                    attributes["_forward_pre_hooks"][KEY] = BeforeForward(guard)
        return True

    def check_anew(self) -> ExitCheck | None:
        """The comparison with the statistics of now; None if they are not what they were."""
        try:
            self._check.renew(UsualCopy(self._columns))
        except (ValueError, RuntimeError):
            return None
        return self._check

    def is_quiet(self) -> bool:
        """Whether the model has the modules, the statistics and the values of the beginning."""
        return (
            is_calm()
            and not swaps
            and self._tree.has_same_modules()
            and self._has_same_statistics()
            and self._check.has_same_values()
        )

    def end(self) -> None:
        """Takes the entry off all layers. If that fails, ``drop_entry`` does the rest."""
        entry, has_forward = self.entry, self._has_forward
        with entries_lock:
            for guard, attributes in zip(self._guards, self._attributes, strict=True):
                guard.members.pop(entry, None)
                is_alone = not (guard.members or guard._before) and guard._original is None
                if not is_alone or guard.has_forward is not has_forward or getrefcount(guard.mark) > NO_CLONES:
                    strip_clones([guard])
                    guard.sync(Rulings())
                    continue
                guard.ruling = NO_RULING
                for name in _PUT:
                    if name in attributes and getattr(attributes[name], "__self__", None) is guard:
                        del attributes[name]
                guard.has_forward = False
                guard.mark = None
                if guard.has_hooks:
                    guard.remove_hooks()
                if guards.get(guard.layer_id) is guard:
                    del guards[guard.layer_id]
            for guard in self._guards:
                if guard.is_hook_elsewhere:
                    guard.sync(Rulings())

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

    def _current_columns(self) -> list[list[Tensor]]:
        tables = list(map(_TABLE, self._attributes))
        return [list(map(column, tables)) for column in _COLUMNS]


def again(
    tree: Tree, entry: PolicyEntry, layer_guards: Sequence[LayerGuard], check: ExitCheck, settings: Settings
) -> Again | None:
    """The short way for the next block of a guard, at the end of a quiet one; None where there is none.

    Args:
        tree: The modules of the model.
        entry: What the block wants of its layers.
        layer_guards: Their guards, with the entry.
        check: The comparison of the block.
        settings: The options of the guard.
    """
    is_usual = (
        GUARDS_GRAPHS
        and layer_guards
        and not (settings.affine or settings.updates or settings.buffers or settings.policy.hides)
        and all([isinstance(selector, str) for selector in (*settings.include, *settings.exclude)])
        and tree.is_plain()
        and check.has_usual_copy()
    )
    if not is_usual:
        return None
    ruling = layer_guards[0].ruling
    for guard in layer_guards:
        is_plain = guard.kind is BATCH_NORM and not (guard.copies_itself or guard.reduces_itself or guard.previous)
        is_alone = guard.ruling is ruling and guard.has_forward is ruling.needs_forward is not guard.has_hooks
        if not (is_plain and is_alone and guard.ruling.entries == (entry,)):
            return None
    return Again(tree, entry, layer_guards, check)


class _Probe:
    """Has an attribute that nothing else refers to."""

    def __init__(self) -> None:
        self.attribute = object()

    def references(self) -> int:
        return getrefcount(self.attribute)


_REFERENCES: Final = _Probe().references()
