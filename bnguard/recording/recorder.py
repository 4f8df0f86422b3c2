"""Record updates as they happen, of one model or of every model in the process."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from bnguard.guard.hooks import guard_of
from bnguard.guard.policy import decide
from bnguard.layers.bits import readable
from bnguard.layers.drift import DriftSample, sample_of
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.other_buffers import select_with_buffers
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree, unwrapped
from bnguard.recording.layer_log import LayerLog
from bnguard.recording.model_calls import ModelCall, ModelCalls
from bnguard.recording.optimizer_steps import BackwardCounter, StepCounter
from bnguard.recording.ranks import Ranks
from bnguard.recording.timeline import Timeline
from bnguard.torch_internals import global_hook
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.compile import object_at, record_compiled
from bnguard.torch_internals.distributed import differs_per_rank
from bnguard.torch_internals.functional_call import has_lent_buffers
from bnguard.torch_internals.tracing import outside_modes
from bnguard.words import name_text

_MOST_SAMPLES: Final = 256
_MOST_NESTED: Final = 16  # forwards of one layer inside each other


@dataclass(slots=True)
class _Pending:
    """A running forward of a layer that can only be seen to update by comparing its statistics.

    Attributes:
        versions: See ``_versions``; None if its statistics were uninitialised, and the forward initialises them.
        call: How the forward has come about.
    """

    versions: list[tuple[int, int]] | None
    call: ModelCall


class Recorder:
    """What a watch records while it is open: a log for each layer.

    Args:
        model: The model; None for every model that runs.
        every: At which optimizer steps to measure the drift, as in ``watch``.
        buffers: Patterns of other buffers to record.

    Attributes:
        logs: The logs of all layers, model by model, in the order of ``state_dict()``.
        steps: The steps of all optimizers.
        samples: Measurements of the drift.
        timelines: Updates over the steps, by line, in the order of their first updates.
        place: What is watched, in words that are equal on all ranks.
        ranks: The ranks of a distributed run; None until a model is met in one.
    """

    def __init__(
        self, model: nn.Module | None, every: int | Literal["auto"] | None, buffers: tuple[str, ...] = ()
    ) -> None:
        self._model = model
        self._buffers = buffers
        self._every = every
        self._manager: weakref.ref[object] | None = None  # while it is open
        self._lock = threading.RLock()
        self._by_id: dict[int, LayerLog] = {}  # by id of the layer
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # by id: modules of models that have been met
        self._tree: Tree | None = None
        self._pending: dict[tuple[int, int], list[_Pending]] = {}  # by thread and layer
        self._calls = ModelCalls()
        self._backwards = BackwardCounter()
        self._interval = 1 if every in (None, "auto") else int(every)
        self._model_names: Counter[str] = Counter()
        self.logs: list[LayerLog] = []
        self.steps = StepCounter()
        self.samples: list[DriftSample] = []
        self.timelines: defaultdict[str, Timeline] = defaultdict(Timeline)
        self.ranks: Ranks | None = None
        self.place = ""
        self.wants_results = False  # until there is a layer of which only results tell

    def open(self, manager: object = None) -> None:
        """Records from now on, at most as long as ``manager`` lives."""
        if manager is not None:
            self._manager = weakref.ref(manager, self.detach)  # rule 3 of Note [Ctrl-C]
        where = call_site()
        what = "every model" if self._model is None else type(self._model).__name__
        self.place = f"watch of {what} at {os.path.basename(where.filename)}:{where.lineno}"  # folders may differ
        if self._model is not None:
            self._take_in(self._model)
        self._backwards.open()
        self.steps.open(None if self._every is None else self._sample)
        global_hook.listen(self)

    def close(self) -> None:
        """Stops recording."""
        self.detach()
        with self._lock:
            for log in self.logs:
                log.close_step()
            if self._every == "auto":
                if self.samples and self.samples[-1].step == self.steps.count:
                    self.samples.pop()  # measured again below, with what came after that step
                self._measure(self.steps.count)
        self.ranks = self.ranks or Ranks.here()

    def detach(self, _: object = None) -> None:
        """Is no longer called by torch. May be done again."""
        global_hook.unlisten(self)
        self.steps.close()
        self._backwards.close()
        self._manager = None
        self._known.clear()  # whose callbacks know this object

    def model_of(self, log: LayerLog) -> str:
        """The name of a layer's model if several models were met, else an empty string."""
        return log.model_name if self._model_names.total() > 1 else ""

    def name_of(self, log: LayerLog) -> str:
        """The first name of a layer, preceded by the name of its model if several models were met."""
        return name_text(log.names[0], self.model_of(log))

    # What torch calls.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Records a forward that is about to begin."""
        call = self._calls.begin(module, sys._getframe(3))
        if module is self._model:
            self._look_again()
        log = self._by_id.get(id(module)) or self._meet(module)
        if log is None:
            return
        predict = log.kind.predict
        if predict is None:
            self._wait(log, module, call)
        elif predict(module):
            if _is_prevented(module):
                log.record_held()
            elif module._buffers.get(log.first) is log.first_tensor or log.has_own_tensors(module):
                with self._lock:
                    log.record_update(call, args, self.steps, self._backwards.count, self.timelines)
        else:
            log.record_evaluation(module)
            if not module.training and not self.wants_results and torch.is_grad_enabled():
                self._want_results()

    def _meet(self, module: nn.Module) -> LayerLog | None:
        """Records the layers of a model that has not been met before, if every model is watched."""
        is_known = self._model is not None or id(module) in self._known
        if is_known or module.__dict__.get("_is_replica", False):  # made by DataParallel for one forward
            return None
        self._take_in(module)
        return self._by_id.get(id(module))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Records what a forward has done."""
        log = self._by_id.get(id(module))
        if log is None:
            return
        if log.kind.predict is None:
            waiting = self._pending.get((threading.get_ident(), id(module)))
            if waiting:
                pending = waiting.pop()
                has_updated = (
                    module.training if pending.versions is None else _versions(log, module) != pending.versions
                )
                if has_updated:
                    with self._lock:
                        log.record_update(pending.call, args, self.steps, self._backwards.count, self.timelines)
                else:
                    log.record_evaluation(module)
        if not module.training and torch.is_grad_enabled():
            call = self._calls.under_way(sys._getframe(3))
            if call is not None:
                log.record_result(output, call)

    def traced(self, key: int) -> None:
        """Records that a graph is traced through a module."""
        log = self._by_id.get(key)
        if log is None and self._model is None and key not in self._known:
            model = object_at(key)
            if isinstance(model, nn.Module):
                self._take_in(model)
            log = self._by_id.get(key)
        module = None if log is None else log.module
        if log is not None and module is not None:
            log.is_compiled = True
            record_compiled(module)

    # Parts.

    @outside_modes
    def _take_in(self, model: nn.Module) -> None:
        """Records the layers of a model from now on."""
        self.ranks = self.ranks or Ranks.here()
        with self._lock:
            tree = Tree(model)
            layers = self._layers_of(model, tree)
            if has_lent_buffers([layer.module for layer in layers]):
                return
            if self._model is not None:
                self._tree = tree
            else:
                for part in tree.modules:
                    key = id(part)
                    self._known[key] = weakref.ref(part, lambda _, key=key: self._forget(key))  # type: ignore[misc]  # a default
            fresh = [layer for layer in layers if not self._is_known(layer)]
            if fresh:
                name = self._name_of(model)
                for layer in fresh:
                    self._open_log(layer, model, name)

    def _layers_of(self, model: nn.Module, tree: Tree) -> list[StatsLayer]:
        if not self._buffers:
            return tree.layers
        try:
            return select_with_buffers(model, tree.layers, self._buffers)
        except ValueError:  # one of many models, none of whose buffers has such a name
            return tree.layers

    def _is_known(self, layer: StatsLayer) -> bool:
        known = self._by_id.get(id(layer.module))
        return known is not None and known.module is layer.module

    def _name_of(self, model: nn.Module) -> str:
        """A name for a model, used if there are several; a model that grows keeps its name."""
        if model is self._model and self.logs:
            return self.logs[0].model_name
        name = type(unwrapped(model)).__name__
        self._model_names[name] += 1
        number = self._model_names[name]
        return name if number == 1 else f"{name} {number}"

    def _open_log(self, layer: StatsLayer, model: nn.Module, model_name: str) -> None:
        buffers = own_tensors(layer.module, "_buffers")
        present = {name: tensor for name in layer.buffers if (tensor := buffers.get(name)) is not None}
        log = LayerLog(layer, model, model_name, copies_of(present))
        log.differs_per_rank = differs_per_rank(model)
        self._by_id[id(layer.module)] = log
        self.logs.append(log)

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        self._by_id.pop(key, None)  # its log stays: it will be reported

    def _look_again(self) -> None:
        """Records also the layers that were added to the model since."""
        if self._tree is not None and self._model is not None and not self._tree.has_same_modules():
            self._take_in(self._model)

    def _sample(self, step: int) -> None:
        """Measures the drift, if this step is one at which to measure."""
        if step % self._interval:
            return
        with self._lock:
            self._measure(step)
            if self._every == "auto" and len(self.samples) >= _MOST_SAMPLES:
                self._interval *= 2
                self.samples = [sample for sample in self.samples if sample.step % self._interval == 0]

    def _measure(self, step: int) -> None:
        """Measures the drift on the device."""
        layers = [(number, log.before, log.now(), log.eps) for number, log in enumerate(self.logs)]
        self.samples.append(sample_of(step, layers))

    def _wait(self, log: LayerLog, module: nn.Module, call: ModelCall) -> None:
        if _is_prevented(module):
            log.record_held()
            return
        self._want_results()
        waiting = self._pending.setdefault((threading.get_ident(), id(module)), [])
        del waiting[:-_MOST_NESTED]  # of forwards that have failed
        waiting.append(_Pending(_versions(log, module), call))

    def _want_results(self) -> None:
        if not self.wants_results:
            self.wants_results = True
            global_hook.update_hooks()


def _is_prevented(module: nn.Module) -> bool:
    """Whether a guard keeps the update of a forward from happening."""
    guard = guard_of(module)
    return guard is not None and decide(guard.ruling.entries, id(module)).action != "update"


def _versions(log: LayerLog, module: nn.Module) -> list[tuple[int, int]] | None:
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
