"""See which forwards of which layers update, by the hook on all modules alone: nothing is hung on any of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from torch import Tensor, nn

from bnguard.guard.hooks import guard_of
from bnguard.guard.policy import decide
from bnguard.layers.bits import holds, readable
from bnguard.layers.drift import eps_of, largest_mean_shift
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree
from bnguard.records import StatsChange
from bnguard.torch_internals import global_hook
from bnguard.torch_internals.compile import object_at, record_compiled
from bnguard.torch_internals.functional_call import has_lent_buffers, in_functional_call
from bnguard.torch_internals.locks import RLock
from bnguard.torch_internals.tracing import outside_modes

_MOST_NESTED: Final = 16  # forwards of one layer inside each other


class SeenLayer:
    """A layer that was met, and the statistics that it had then.

    Attributes:
        names: As in ``StatsUpdates``, like ``type``.
        kind: How the layer updates.
        buffers: The names of its statistics.
        eps: What it adds to its variance.
        tensors: Its statistics as they hang on it, by name.
        first: The name of the first of them.
        first_tensor: The tensor of that name.
        before: Copies of its statistics when it was met.
        updates: How many updates there were.
        is_compiled: Whether a graph has been traced through it.
    """

    __slots__ = (
        "_module", "before", "buffers", "eps", "first", "first_tensor", "is_compiled", "kind", "names", "tensors",
        "type", "updates",
    )  # fmt: skip

    def __init__(self, layer: StatsLayer) -> None:
        self.names = layer.names
        self.type = type(layer.module).__name__
        self.kind = layer.kind
        self.buffers = layer.buffers
        self.eps = eps_of(layer.module)
        buffers = own_tensors(layer.module, "_buffers")
        self.before = copies_of({name: tensor for name in layer.buffers if (tensor := buffers.get(name)) is not None})
        self._take_tensors(buffers)
        self.updates = 0
        self.is_compiled = False
        self._module = weakref.ref(layer.module)

    @property
    def module(self) -> nn.Module | None:
        """The layer, as long as it exists."""
        return self._module()

    def now(self) -> dict[str, Tensor]:
        """The present statistics that can be read; the last known ones if the layer has been deleted."""
        module = self._module()
        buffers = self.tensors if module is None else own_tensors(module, "_buffers")
        return readable({name: buffers.get(name) for name in self.buffers})

    def has_own_tensors(self, module: nn.Module) -> bool:
        """Whether a forward works on the layer's own statistics, and not on some that ``functional_call`` lends it.

        Tensors that have replaced them for good, as after ``.double()``, are the layer's own from then on.
        """
        buffers = own_tensors(module, "_buffers")
        for name, tensor in self.tensors.items():
            if buffers.get(name) is not tensor:
                if in_functional_call():
                    return False
                self._take_tensors(buffers)
                return True
        return True

    def is_shared_by(self, layer: StatsLayer) -> bool:
        """Whether another layer has the same statistics, as a clone of meta-learning has those of its original."""
        return own_tensors(layer.module, "_buffers").get(self.first) is self.first_tensor is not None

    def adopt(self, module: nn.Module) -> None:
        """Takes a module with the same statistics for the layer if that is deleted."""
        if self._module() is None:
            self._module = weakref.ref(module)

    def change(self, now: Mapping[str, Tensor]) -> StatsChange | None:
        """How its statistics differ from those of the beginning, as a change by no forward; None if they do not."""
        before = self.before
        differing = tuple([name for name in before if name not in now or not _same(before[name], now[name])])
        if not differing:
            return None
        return StatsChange(self.names, self.type, differing, 0, None, largest_mean_shift(before, now, self.eps))

    def _take_tensors(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Takes the present statistics as the layer's own."""
        self.tensors = {name: tensor for name in self.before if (tensor := buffers.get(name)) is not None}
        self.first = next(iter(self.tensors), "")
        self.first_tensor = self.tensors.get(self.first)


L = TypeVar("L", bound=SeenLayer)


@dataclass(slots=True, eq=False, repr=False)
class Pending:
    """A running forward of which only its end tells whether it has updated.

    Attributes:
        versions: See ``_versions``; None if its statistics were uninitialised, and the forward initialises them.
        call: How the forward has come about.
        is_sure: Whether it updates if it does not fail.
    """

    versions: list[tuple[int, int]] | None
    call: Any
    is_sure: bool = False


# Of a forward that updates nothing, while another forward of the layer runs or has failed.
_NO_UPDATE: Final = Pending(None, None)


class LayerListener(global_hook.Listener, Generic[L]):
    """Meets the models that run, and sees which forwards of their layers update.

    Models are held weakly.

    Attributes:
        wants_results: Whether torch calls ``after``, which takes a second hook on every module.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._by_id: dict[int, L] = {}  # by id of the layer
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # by id: modules of models that have been met
        self._pending: dict[tuple[int, int], list[Pending]] = {}  # by thread and layer
        self._meets_models = True  # whatever runs
        self._logs: list[L] = []
        self.wants_results = False  # until there is a layer of which only results tell

    @property
    def logs(self) -> list[L]:
        """One object for each layer, model by model, in the order of ``state_dict()``."""
        self._work_up()
        return self._logs

    # What comes of it.

    def _work_up(self) -> None:
        """Makes the logs current."""

    def _met(self, model: nn.Module, layers: list[StatsLayer]) -> None:
        """Has met layers of a model: calls ``_add()`` for those that it wants to see."""
        raise NotImplementedError

    def _updates(self, log: L, module: nn.Module, args: tuple[Any, ...], output: Any, call: Any) -> None:
        """A forward with these arguments has updated a layer, or, if there is no output yet, is about to."""
        raise NotImplementedError

    def _predicted(self, log: L, module: nn.Module, args: tuple[Any, ...], call: Any) -> None:
        """A forward will update, if it does not fail."""
        with self._lock:
            self._updates(log, module, args, None, call)

    def _evaluates(self, log: L, module: nn.Module) -> None:
        """A forward updates nothing, or has updated nothing."""

    def _is_held(self, log: L, module: nn.Module) -> bool:
        """Whether a guard keeps the update of a forward from happening."""
        guard = guard_of(module)
        return guard is not None and decide(guard.ruling.entries, id(module)).action != "update"

    # What torch calls.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Sees a forward that is about to begin."""
        self._see(module, args, None)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Sees what a forward has done of which its flags do not tell."""
        log = self._by_id.get(id(module))
        if log is None:
            return
        waiting = self._pending.get((threading.get_ident(), id(module)))
        pending = waiting.pop() if waiting else _NO_UPDATE
        if pending is _NO_UPDATE:
            return
        if pending.is_sure or (
            module.training if pending.versions is None else _versions(log, module) != pending.versions
        ):
            with self._lock:
                self._updates(log, module, args, output, pending.call)
        else:
            self._evaluates(log, module)

    def traced(self, key: int) -> None:
        """Sees that a graph is traced through a module."""
        log = self._by_id.get(key)
        if log is None and self._meets_models and key not in self._known:
            model = object_at(key)
            if isinstance(model, nn.Module):
                self._take_in(model)
            log = self._by_id.get(key)
        module = None if log is None else log.module
        if log is not None and module is not None:
            log.is_compiled = True
            record_compiled(module)

    # Parts.

    def _see(self, module: nn.Module, args: tuple[Any, ...], call: Any) -> None:
        log = self._by_id.get(id(module))
        if log is None:
            if not self._meets_models or id(module) in self._known or module.__dict__.get("_is_replica", False):
                return  # DataParallel makes replicas for one forward
            self._take_in(module)
            log = self._by_id.get(id(module))
            if log is None:
                return
        predict = log.kind.predict
        waiting = self._pending.get((threading.get_ident(), id(module)))
        last = waiting[-1] if waiting else None
        if predict is None:
            self._wait(log, module, call)
        elif not predict(module):
            self._evaluates(log, module)
        elif not self._is_held(log, module) and (
            module._buffers.get(log.first) is log.first_tensor or log.has_own_tensors(module)
        ):
            self._predicted(log, module, args, call)
        if waiting and waiting[-1] is last:  # of another forward
            self._pend(module, _NO_UPDATE)

    @outside_modes
    def _take_in(self, model: nn.Module) -> None:
        """Sees the layers of a model from now on."""
        with self._lock:
            tree = Tree(model)
            layers = self._layers_of(model, tree)
            if has_lent_buffers([layer.module for layer in layers]):
                return  # met at a later forward
            self._remember(tree)
            fresh = [layer for layer in layers if not self._is_known(layer)]
            if fresh:
                self._met(model, fresh)

    def _layers_of(self, model: nn.Module, tree: Tree) -> list[StatsLayer]:
        return tree.layers

    def _remember(self, tree: Tree) -> None:
        for part in tree.modules:
            key = id(part)
            self._known[key] = weakref.ref(part, lambda _, key=key: self._forget(key))  # type: ignore[misc]  # a default

    def _add(self, log: L, layer: StatsLayer) -> None:
        self._by_id[id(layer.module)] = log
        self._logs.append(log)

    def _is_known(self, layer: StatsLayer) -> bool:
        known = self._by_id.get(id(layer.module))
        return known is not None and known.module is layer.module

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        self._by_id.pop(key, None)  # what was seen of it stays

    def _wait(self, log: L, module: nn.Module, call: Any) -> None:
        if not self._is_held(log, module):
            self._want_results()
            self._pend(module, Pending(_versions(log, module), call))

    def _pend(self, module: nn.Module, pending: Pending) -> None:
        key = threading.get_ident(), id(module)
        waiting = self._pending.get(key)
        if waiting is None:
            self._pending[key] = [pending]
            return
        if len(waiting) > _MOST_NESTED:
            del waiting[:-_MOST_NESTED]  # of forwards that have failed
        waiting.append(pending)

    def _want_results(self) -> None:
        if not self.wants_results:
            self.wants_results = True
            global_hook.update_hooks()


def _versions(log: SeenLayer, module: nn.Module) -> list[tuple[int, int]] | None:
    """For each statistic its id, and how often the tensor was written to; no device sync. None if one is lazy."""
    buffers = own_tensors(module, "_buffers")
    present = [tensor for name in log.buffers if (tensor := buffers.get(name)) is not None]
    try:
        return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in present]
    except ValueError:  # a lazy tensor answers nothing else than that it is one
        return None


@outside_modes
def copies_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those tensors that can be read."""
    return {name: tensor.detach().clone() for name, tensor in readable(tensors).items()}


@outside_modes
def _same(one: Tensor, other: Tensor) -> bool:
    return holds(other, one)
