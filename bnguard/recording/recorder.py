"""Record updates as they happen: of one model, or of every one in the process."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from bnguard.guard.layer_guard import sentries
from bnguard.guard.messages import name_text
from bnguard.guard.policy import decide
from bnguard.layers.bits import below_transforms, has_values
from bnguard.layers.drift import DriftSample, sample_of
from bnguard.layers.kinds import StatsLayer, tensor_table
from bnguard.layers.tree import Tree, unwrapped
from bnguard.recording.backward_passes import BackwardCounter
from bnguard.recording.layer_log import Ledger
from bnguard.recording.model_calls import ModelCall, ModelCalls
from bnguard.recording.optimizer_steps import StepCounter
from bnguard.recording.timeline import Timeline
from bnguard.torch_internals import global_hook as _every_forward
from bnguard.torch_internals.compile import object_at, take_in
from bnguard.torch_internals.distributed import keeps_its_own
from bnguard.torch_internals.functional_call import lent_tensors
from bnguard.torch_internals.ranks import Group, Ranks
from bnguard.torch_internals.tracing import aside

__all__ = ["Recorder", "copies_of"]

_MOST_SAMPLES: Final = 256
_MOST_NESTED: Final = 16  # forwards of one layer inside each other


@dataclass(slots=True)
class _Pending:
    """A forward under way of a layer of which only its statistics tell whether it updates."""

    versions: list[tuple[int, int]]
    call: ModelCall


class Recorder:
    """What a watch writes down while it is open: a ledger for each layer.

    Args:
        model: The model; None for every one that runs.
        every: At which optimizer steps to measure the drift; see ``watch``.
        group: Whose ranks report together; see ``watch``.

    Attributes:
        ledgers: Of all layers, as met, models in the order of ``state_dict()``.
        steps: The steps of all optimizers.
        samples: Measurements of the drift.
        timelines: Updates over the steps by line, in the order in which lines updated first.
        place: What is watched, as it is called in other ranks too.
        ranks: Those of a distributed run, as soon as a model is met in one.
    """

    def __init__(self, model: nn.Module | None, every: int | Literal["auto"] | None, group: Group) -> None:
        self._model = model
        self._every = every
        self._group = group
        self._lock = threading.RLock()
        self._by_id: dict[int, Ledger] = {}  # by id of the layer
        self._known: dict[int, weakref.ref[nn.Module]] = {}  # by id: modules of models that have been met
        self._tree: Tree | None = None
        self._pending: dict[tuple[int, int], list[_Pending]] = {}  # by thread and layer
        self._calls = ModelCalls()
        self._backwards = BackwardCounter()
        self._interval = 1 if every in (None, "auto") else int(every)
        self._model_names: Counter[str] = Counter()
        self.ledgers: list[Ledger] = []
        self.steps = StepCounter(None if every is None else self._sample)
        self.samples: list[DriftSample] = []
        self.timelines: defaultdict[str, Timeline] = defaultdict(Timeline)
        self.ranks: Ranks | None = None
        self.place = ""
        self.wants_results = False  # until there is something that only results tell

    def open(self) -> None:
        """Records from now on."""
        self.place = f"watch of {'every model' if self._model is None else type(self._model).__name__}"
        if self._model is not None:
            self._take_in(self._model)
        self._backwards.open()
        self.steps.open()
        _every_forward.listen(self)

    def close(self) -> None:
        """Records no more."""
        _every_forward.unlisten(self)
        self.steps.close()
        self._backwards.close()
        with self._lock:
            for ledger in self.ledgers:
                ledger.close_step()
            if self._every == "auto":
                if self.samples and self.samples[-1].step == self.steps.count:
                    self.samples.pop()  # what came after that step counts, too
                self._measure(self.steps.count)
        self.ranks = self.ranks or Ranks.of(self._group)

    def model_of(self, ledger: Ledger) -> str:
        """What to call a layer's model where that tells layers apart; else nothing."""
        return ledger.model_name if self._model_names.total() > 1 else ""

    def name_of(self, ledger: Ledger) -> str:
        """The first name of a layer, with that of its model where that tells layers apart."""
        return name_text(ledger.names[0], self.model_of(ledger))

    # What torch calls.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Takes note of a forward that is about to begin."""
        call = self._calls.begin(module, sys._getframe(3))
        ledger = self._by_id.get(id(module))
        if ledger is None:
            if self._model is not None:
                if module is self._model:
                    self._look_again()
                return
            if id(module) in self._known or getattr(module, "_is_replica", False):  # of DataParallel: gone soon
                return
            self._take_in(module)
            ledger = self._by_id.get(id(module))
            if ledger is None:
                return
        elif module is self._model:
            self._look_again()
        predict = ledger.kind.predict
        if predict is None:
            self._wait(ledger, module, call)
        elif predict(module):
            if _is_prevented(module):
                ledger.held += 1
            elif module._buffers.get(ledger.first) is ledger.first_tensor or ledger.has_own_tensors(module):
                with self._lock:
                    ledger.add(call, args, self.steps, self._backwards.count, self.timelines)
        else:
            ledger.add_evaluation(module)
            if not module.training and not self.wants_results and torch.is_grad_enabled():
                self._want_results()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes note of what a forward has done."""
        ledger = self._by_id.get(id(module))
        if ledger is None:
            return
        if ledger.kind.predict is None:
            waiting = self._pending.get((threading.get_ident(), id(module)))
            if waiting:
                pending = waiting.pop()
                if _versions(ledger, module) != pending.versions:
                    with self._lock:
                        ledger.add(pending.call, args, self.steps, self._backwards.count, self.timelines)
                else:
                    ledger.add_evaluation(module)
        if not module.training and torch.is_grad_enabled():
            call = self._calls.under_way(sys._getframe(3))
            if call is not None:
                ledger.watch_backward(output, call)

    def traced(self, key: int) -> None:
        """Takes note of a module that a graph takes in."""
        ledger = self._by_id.get(key)
        if ledger is None and self._model is None and key not in self._known:
            model = object_at(key)
            if isinstance(model, nn.Module):
                self._take_in(model)
            ledger = self._by_id.get(key)
        module = None if ledger is None else ledger.module
        if ledger is not None and module is not None:
            ledger.is_compiled = True
            take_in(module)

    # Parts.

    @aside()
    def _take_in(self, model: nn.Module) -> None:
        """Records the layers of a model from now on."""
        self.ranks = self.ranks or Ranks.of(self._group)
        lent = lent_tensors()
        with self._lock:
            tree = Tree(model)
            if lent and any(
                [id(buffer) in lent for part in tree.layers for buffer in part.module.buffers(recurse=False)]
            ):
                return  # what it has now is not its own
            if self._model is not None:
                self._tree = tree
            else:
                for part in tree.modules:
                    key = id(part)
                    self._known[key] = weakref.ref(part, lambda _, key=key: self._forget(key))  # type: ignore[misc]  # a default
            fresh = [layer for layer in tree.layers if not self._is_known(layer)]
            if fresh:
                name = self._name_of(model)
                for layer in fresh:
                    self._open_ledger(layer, model, name)

    def _is_known(self, layer: StatsLayer) -> bool:
        known = self._by_id.get(id(layer.module))
        return known is not None and known.module is layer.module

    def _name_of(self, model: nn.Module) -> str:
        """What to call a model where there are several; one that grows keeps its name."""
        if model is self._model and self.ledgers:
            return self.ledgers[0].model_name
        name = type(unwrapped(model)).__name__
        self._model_names[name] += 1
        number = self._model_names[name]
        return name if number == 1 else f"{name} {number}"

    def _open_ledger(self, layer: StatsLayer, model: nn.Module, model_name: str) -> None:
        buffers = tensor_table(layer.module, "_buffers")
        present = {name: tensor for name in layer.buffers if (tensor := buffers.get(name)) is not None}
        ledger = Ledger(layer, model, model_name, copies_of(present))
        ledger.keeps_its_own = keeps_its_own(model)
        self._by_id[id(layer.module)] = ledger
        self.ledgers.append(ledger)

    def _forget(self, key: int) -> None:
        self._known.pop(key, None)
        self._by_id.pop(key, None)  # stays in the order: what it did is still to be told

    def _look_again(self) -> None:
        """Takes in what has come into the model since."""
        if self._tree is not None and self._model is not None and not self._tree.has_same_modules():
            self._take_in(self._model)

    def _sample(self, step: int) -> None:
        """Measures the drift, where it is the turn of that step."""
        if step % self._interval:
            return
        with self._lock:
            self._measure(step)
            if self._every == "auto" and len(self.samples) >= _MOST_SAMPLES:
                self._interval *= 2
                self.samples = [sample for sample in self.samples if sample.step % self._interval == 0]

    def _measure(self, step: int) -> None:
        """Measures the drift on the device."""
        layers = [(number, ledger.before, ledger.now(), ledger.eps) for number, ledger in enumerate(self.ledgers)]
        self.samples.append(sample_of(step, layers))

    def _wait(self, ledger: Ledger, module: nn.Module, call: ModelCall) -> None:
        if _is_prevented(module):
            ledger.held += 1
            return
        self._want_results()
        waiting = self._pending.setdefault((threading.get_ident(), id(module)), [])
        del waiting[:-_MOST_NESTED]  # of forwards that have failed
        waiting.append(_Pending(_versions(ledger, module), call))

    def _want_results(self) -> None:
        if not self.wants_results:
            self.wants_results = True
            _every_forward.interests_changed()


def _is_prevented(module: nn.Module) -> bool:
    """Whether a guard keeps the update of a forward from happening."""
    sentry = sentries.get(id(module))
    return sentry is not None and decide(sentry.claims).stance != "stand"


def _versions(ledger: Ledger, module: nn.Module) -> list[tuple[int, int]]:
    """Which tensors the statistics are, and how often each was written to: nothing is read from the device."""
    buffers = tensor_table(module, "_buffers")
    present = [tensor for name in ledger.buffers if (tensor := buffers.get(name)) is not None]
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in present]


@aside()
def copies_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors as they are now, as far as they have values."""
    plain = {name: below_transforms(tensor) for name, tensor in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in plain.items() if has_values(tensor)}
