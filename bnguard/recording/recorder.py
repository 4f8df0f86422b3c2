"""Record updates as they happen, of one model or of every model in the process."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import defaultdict
from types import FrameType
from typing import Any, Final, Literal

import torch
from torch import nn

from bnguard.layers.by_identity import ByIdentity
from bnguard.layers.drift import DriftSample
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.other_buffers import select_with_buffers
from bnguard.layers.swaps import own_tensors
from bnguard.layers.tree import Tree, ancestors_of, parts_of, unwrapped
from bnguard.recording.drift_samples import DriftSamples
from bnguard.recording.journal import Journal
from bnguard.recording.layer_listener import LayerListener, Pending
from bnguard.recording.layer_log import LayerLog
from bnguard.recording.model_calls import ModelCall, ModelCalls, call_at
from bnguard.recording.model_names import ModelName, distinct
from bnguard.recording.optimizer_steps import BackwardCounter, StepCounter
from bnguard.recording.ranks import Ranks
from bnguard.recording.run import Run
from bnguard.recording.timeline import Timeline
from bnguard.recording.unwatched import Unwatched
from bnguard.torch_internals import global_hook, model_events
from bnguard.torch_internals.callsite import MODULE_CALL, call_site
from bnguard.torch_internals.checkpointing import is_in_backward
from bnguard.torch_internals.node_hooks import NodeHooks
from bnguard.words import name_text

_MOST_SAMPLES: Final = 256
# Where the frame of the call is, seen from ``before``: that of a module, and that of the one whose forward calls it.
# Each call of a module has four frames at least, so that there is no other one between them.
_CALL: Final = 4
_CALL_AROUND: Final = 8


class Recorder(LayerListener[LayerLog]):
    """What a watch records while it is open: a log for each layer.

    Args:
        model: The model; None for every model that runs.
        every: At which optimizer steps to measure the drift, as in ``watch``.
        buffers: Patterns of other buffers to record.

    Attributes:
        steps: The steps of all optimizers.
        unwatched: Running statistics that cannot be recorded.
        timelines: Updates over the steps, by line, in the order of their first updates.
        place: What is watched, in words that are equal on all ranks.
        ranks: The ranks of a distributed run; None until a model is met in one.
    """

    def __init__(
        self, model: nn.Module | None, every: int | Literal["auto"] | None, buffers: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self._model = model
        self._meets_models = model is None
        self._buffers = buffers
        self._every = every
        self._manager: weakref.ref[object] | None = None  # while it is open
        self._tree: Tree | None = None
        # Modules that were not met so far.
        self._loaded: ByIdentity[None] = ByIdentity()
        # Modules that were put into eval mode, and the one on which eval() was called; then a train() has reached them.
        self._evaluated: ByIdentity[weakref.ref[nn.Module]] = ByIdentity()
        self._undone: ByIdentity[None] = ByIdentity()
        self._calls = ModelCalls()
        self._outermost = 0  # the id of the module whose call began last from outside of all modules
        self._keeps_up = False  # with each call of the model
        self._takes_short_way = False
        self._samples = DriftSamples()
        self._interval = 1 if every in (None, "auto") else int(every)
        self._models: list[ModelName] = []
        self._shown: list[str] = []  # how they are named
        self._by_statistic: dict[int, LayerLog] = {}  # by id of the first one, which the log keeps
        self._journal = Journal(self._lock)
        self._run = Run(self._journal, StepCounter(), BackwardCounter(), defaultdict(Timeline), NodeHooks())
        self.steps, self.timelines = self._run.steps, self._run.timelines
        self.unwatched = Unwatched()
        self.ranks: Ranks | None = None
        self.place = ""

    @property
    def samples(self) -> list[DriftSample]:
        """Measurements of the drift."""
        with self._lock:
            return self._samples.computed()

    def open(self, manager: object = None) -> None:
        """Records from now on, at most as long as ``manager`` lives."""
        if manager is not None:
            self._manager = weakref.ref(manager, self.detach)  # rule 3 of Note [Ctrl-C]
        where = call_site()
        what = "every model" if self._model is None else type(self._model).__name__
        self.place = f"watch of {what} at {os.path.basename(where.filename)}:{where.lineno}"  # folders may differ
        if self._model is not None:
            self._take_in(self._model)
        self._run.backwards.open(self._journal.catch_up)
        self.steps.open(self._journal, None if self._every is None else self._sample)
        model_events.listen(self)
        global_hook.listen(self)

    def close(self) -> None:
        """Stops recording."""
        self.detach()
        with self._lock:
            for log in self.logs:
                log.close()
            if self._every == "auto":
                self._samples.remove_last(self.steps.count)  # measured again, with what came after that step
                self._measure(self.steps.count)
        self.ranks = self.ranks or Ranks.here()

    def detach(self, _: object = None) -> None:
        """Is no longer called by torch. May be done again."""
        global_hook.unlisten(self)
        model_events.unlisten(self)
        self.steps.close()
        self._run.backwards.close()
        self._manager = None
        self._known.clear()  # whose callbacks know this object

    def model_of(self, log: LayerLog) -> str:
        """The name of a layer's model if several models were met, else an empty string."""
        if len(self._models) < 2:
            return ""
        if len(self._shown) < len(self._models):
            self._shown = distinct(self._models)
        return self._shown[log.model_number]

    def name_of(self, log: LayerLog) -> str:
        """The first name of a layer, preceded by the name of its model if several models were met."""
        return name_text(log.names[0], self.model_of(log))

    # What torch calls.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Records a forward that is about to begin."""
        key = id(module)
        log, by_frame = self._by_id.get(key), self._calls.by_frame
        frame: FrameType | None = sys._getframe(_CALL)
        if frame is None or frame.f_code is not MODULE_CALL:  # before torch 2.5, or called by the hook of somebody else
            frame = call_at(sys._getframe(2))
        elif log is not None and self._takes_short_way and module is not self._model:
            try:
                around = sys._getframe(_CALL_AROUND)
            except ValueError:  # the stack is not that deep
                call = None
            else:
                call = by_frame.get(id(around)) if around.f_code is MODULE_CALL else None
            if isinstance(call, ModelCall) and not call.wraps and log.is_usual(module):
                by_frame[id(frame)] = (call,)
                return
        if log is None and not module._modules and (not self._meets_models or key in self._known):
            by_frame.pop(id(frame), None)
            return  # most modules of a model
        begun = self._calls.begin(module, frame)
        if not begun.parent:
            self._outermost = key
        if module is self._model:
            self._look_again()
            log = self._by_id.get(key)
        if log is not None and self.wants_results and log.is_usual(module):
            self._pend(module, Pending(None, begun, is_sure=True))
        elif log is not None or self._meets_models:
            self._see(module, args, begun)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Records what a forward has done."""
        key = id(module)
        log = self._by_id.get(key)
        if log is not None:
            frame = sys._getframe(_CALL)
            begun = self._calls.by_frame.get(id(frame))
            if begun is None or isinstance(begun, ModelCall):
                self._after_layer(log, module, args, output, None)
            elif not (self._takes_short_way and log.note_usual(module, begun[0], args, output)):
                self._after_layer(log, module, args, output, self._calls.at(frame))
        if key == self._outermost:
            self._journal.catch_up()

    def _after_layer(
        self, log: LayerLog, module: nn.Module, args: tuple[Any, ...], output: Any, call: ModelCall | None
    ) -> None:
        """Records what a forward of a layer has done; with its call if it is known to have updated."""
        if call is None:
            waiting = self._pending.get((threading.get_ident(), id(module)))
            if waiting and waiting[-1].is_sure:
                call = waiting.pop().call
        if call is None:
            super().after(module, args, output)
        else:
            self._updates(log, module, args, output, call)
        if not module.training and torch.is_grad_enabled():
            call = self._calls.under_way(sys._getframe(3))
            if call is not None:
                self._work_up()
                self._keeps_up = True  # a backward pass through the result asks for later updates
                self._choose_way()
                log.record_result(output, call)

    def loaded(self, model: nn.Module) -> None:
        """Records that a state dict was loaded."""
        self._work_up()
        for module in parts_of(model):
            log = self._by_id.get(id(module))
            if log is not None:
                log.record_load()
            else:
                self._loaded.put(module, None)

    def was_reset(self, layer: nn.Module) -> None:
        """Records that the statistics of a layer were reset."""
        self._work_up()
        log = self._by_id.get(id(layer))
        if log is not None:
            log.record_reset()

    def mode_changed(self, module: nn.Module, *, training: bool, by_user: bool) -> None:
        """Records which layers were put into eval mode by themselves, and which of them a ``train()`` reached."""
        parts = list(parts_of(module))
        ids = {id(part) for part in parts} - {id(module), id(unwrapped(module))}
        for part in [part for part in parts if part._buffers]:  # layers are among them
            if training:
                by = self._evaluated.get(part)
                self._evaluated.drop(part)
                alone = None if by is None else by()
                if alone is not None and id(alone) in ids:
                    self._undone.put(part, None)
            else:
                self._undone.drop(part)
                if by_user:
                    self._evaluated.put(part, weakref.ref(module))
        self._choose_way()

    # Parts.

    def _choose_way(self) -> None:
        """Decides whether usual updates are noted in short, see Note [Usual forwards]."""
        self._takes_short_way = self.wants_results and not self._keeps_up and not self._undone

    def _want_results(self) -> None:
        super()._want_results()
        self._choose_way()

    def _work_up(self) -> None:
        self._journal.work_up()

    def _predicted(self, log: LayerLog, module: nn.Module, args: tuple[Any, ...], call: ModelCall) -> None:
        if getattr(module, "momentum", None) == 0:
            return  # moves nothing but the counter
        if is_in_backward():  # whose end may be cut off
            super()._predicted(log, module, args, call)
            return
        if log.is_written(module):
            self._work_up()
            log.record_write()
        log.record_beginning()
        self._want_results()
        self._pend(module, Pending(None, call, is_sure=True))

    def _updates(self, log: LayerLog, module: nn.Module, args: tuple[Any, ...], output: Any, call: ModelCall) -> None:
        log.note_update(module, call, args, output)
        if self._keeps_up:
            self._journal.is_due = True
        if self._undone and self._undone.drop(module):
            self._work_up()
            log.record_eval_undone(call)
            self._choose_way()

    def _evaluates(self, log: LayerLog, module: nn.Module) -> None:
        self._work_up()
        log.record_evaluation(module)
        if torch.is_grad_enabled():
            if not module.training:
                self._want_results()
        else:
            self._evaluated.drop(module)  # what eval() was called for

    def _is_held(self, log: LayerLog, module: nn.Module) -> bool:
        is_held = super()._is_held(log, module)
        if is_held:
            log.record_held()
        return is_held

    def _take_in(self, model: nn.Module) -> None:
        self.ranks = self.ranks or Ranks.here()
        super()._take_in(model)

    def _remember(self, tree: Tree) -> None:
        if self._model is None:
            super()._remember(tree)
        else:
            self._tree = tree

    def _met(self, model: nn.Module, layers: list[StatsLayer]) -> None:
        fresh = []
        for layer in layers:
            first = self._owner_of(layer)
            if first is None:
                fresh.append(layer)
            else:
                first.adopt(layer.module)
                self._by_id[id(layer.module)] = first
        if not fresh:
            return
        number = self._number_of(model)
        for layer in fresh:
            log = LayerLog(layer, model, number, ancestors_of(layer.module, model), self._run)
            log.is_loaded = self._loaded.drop(layer.module)
            self._add(log, layer)
            if log.first_tensor is not None:
                self._by_statistic[id(log.first_tensor)] = log

    def _owner_of(self, layer: StatsLayer) -> LayerLog | None:
        """The log of another layer with the same statistics."""
        buffer = own_tensors(layer.module, "_buffers").get(layer.buffers[0])
        log = None if buffer is None else self._by_statistic.get(id(buffer))
        return log if log is not None and log.is_shared_by(layer) else None

    def _layers_of(self, model: nn.Module, tree: Tree) -> list[StatsLayer]:
        self.unwatched.meet(model, tree)
        if not self._buffers:
            return tree.layers
        try:
            return select_with_buffers(model, tree.layers, self._buffers)
        except ValueError:  # one of many models, none of whose buffers has such a name
            return tree.layers

    def _number_of(self, model: nn.Module) -> int:
        """The number of a model, by which it is named; a model that grows keeps it."""
        if model is not self._model or not self._models:
            self._models.append(ModelName.at_call(model, sys._getframe()))
        return len(self._models) - 1

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
            if self._every == "auto" and len(self._samples) >= _MOST_SAMPLES:
                self._interval *= 2
                self._samples.thin_out(self._interval)

    def _measure(self, step: int) -> None:
        """Measures the drift on the device."""
        self._samples.measure(step, self._logs)
