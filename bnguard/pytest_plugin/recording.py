"""What a test does to the running statistics of the models that it runs, seen without touching them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from bnguard.errors import BNGuardError
from bnguard.guard.hooks import guard_of
from bnguard.guard.messages import Cause, changed_text, kept_text
from bnguard.guard.phrases import Phrases
from bnguard.guard.policy import POLICIES, PolicyEntry, UpdateCount, count_update, decide
from bnguard.layers.kinds import StatsLayer, moving_statistics
from bnguard.layers.parents import name_as_parts, registrations
from bnguard.layers.tree import any_layer
from bnguard.pytest_plugin.requests import TestGuards
from bnguard.recording.layer_listener import LayerListener, SeenLayer
from bnguard.records import StatsChange
from bnguard.torch_internals import global_hook
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.compile import is_in_graphs, models_in_graphs, record_in_graph, was_compiled
from bnguard.torch_internals.distributed import rank_prefix


class _Layer(SeenLayer):
    """One layer.

    Attributes:
        model: Its model.
        count: The line of its first update.
        moved: What that moved.
    """

    __slots__ = ("count", "model", "moved")

    def __init__(self, layer: StatsLayer, model: _Model) -> None:
        super().__init__(layer)
        self.model = model
        self.count = UpdateCount()
        self.moved: tuple[str, ...] = ()

    def release(self) -> None:
        """Frees memory when the layer is deleted."""
        self.before, self.tensors, self.first_tensor = {}, {}, None


class _Model:
    """A model that was met: the names of its layers are looked up in the whole model that it is a part of, once."""

    __slots__ = ("has_named", "layers")

    def __init__(self) -> None:
        self.layers: list[_Layer] = []
        self.has_named = False

    def name_layers(self, part: nn.Module) -> None:
        """Names the layers as parts of the largest model that contains ``part``."""
        if not self.has_named:
            self.has_named = True
            name_as_parts(self.layers, registrations.root_of(part))


class TestRecording(LayerListener[_Layer]):
    """Records what a test moves, without a hook, an attribute or a strong reference on any of its models.

    It is the outermost block around the test: what a block inside holds or puts back is nothing to it.

    Args:
        guards: The guards of the test. What they guard is theirs to tell.
        phrases: What warnings call the recording; None for no warnings.
    """

    __test__ = False  # pytest collects classes with this name

    def __init__(self, guards: TestGuards, phrases: Phrases | None) -> None:
        super().__init__()
        self._guards = guards
        self._phrases = phrases
        self._entry = PolicyEntry(None, POLICIES["warn"], outermost=True)
        self._refusals: list[str] = []
        self._first: tuple[StatsChange, str] | None = None

    def begin(self) -> None:
        """Meets models from now on."""
        self._meets_models = True
        for model in models_in_graphs():
            self._take_in(model)
        global_hook.listen(self)

    def end(self) -> None:
        """Meets no further models; those that were met are still seen."""
        self._meets_models = False

    def stop(self) -> tuple[list[StatsChange], list[str]]:
        """Ends the recording. Returns what changed, and what there is to say about it."""
        global_hook.unlisten(self, keep_hook=True)
        moved: list[StatsChange] = []
        others: list[tuple[_Layer, StatsChange]] = []
        for log in self.logs:
            if log.updates:
                moved.append(_change_of(log))
            elif (module := log.module) is not None and not self._guards.have_guarded_layer(id(module)):
                found = log.change(log.now())
                if found is not None:
                    log.model.name_layers(module)
                    others.append((log, replace(found, names=log.names)))
        return moved + [found for _, found in others], [rank_prefix() + text for text in self._texts(others)]

    def traced(self, key: int) -> None:
        """Compares, here and in later tests, the model of a module that is compiled into a graph."""
        super().traced(key)
        known = self._known.get(key)
        model = None if known is None else known()
        if model is not None and any_layer(model) and not is_in_graphs(key):
            record_in_graph(model)

    # Parts.

    def _texts(self, others: list[tuple[_Layer, StatsChange]]) -> list[str]:
        if self._phrases is None:
            return []
        texts = list(self._refusals)
        if self._first is not None:
            texts.append(kept_text(*self._first, 0, self._phrases))
        elif others:
            modules = [log.module for log, _ in others]
            is_compiled = all([module is not None and was_compiled(module) for module in modules])
            cause: Cause = "compiled" if is_compiled else "unknown"
            found = [change for _, change in others]
            texts.append(changed_text(found, restored=False, cause=cause, phrases=self._phrases))
        return texts

    def _take_in(self, model: nn.Module) -> None:
        try:
            super()._take_in(model)
        except BNGuardError as error:
            self._refusals.append(f"{type(model).__name__} is not guarded. {error}")

    def _met(self, model: nn.Module, layers: list[StatsLayer]) -> None:
        met = _Model()
        for layer in layers:
            log = _Layer(layer, met)
            met.layers.append(log)
            self._add(log, layer)

    def _updates(self, log: _Layer, module: nn.Module, args: tuple[Any, ...], output: Any, call: Any) -> None:
        log.updates += 1
        if log.count.site is not None:
            return
        log.model.name_layers(module)
        log.moved = moving_statistics(StatsLayer(module, log.names, log.buffers, log.kind))
        count_update(log.count, call_site())
        if self._first is None:
            self._first = _change_of(log), "train" if module.training else "eval"

    def _is_held(self, log: _Layer, module: nn.Module) -> bool:
        if self._guards.guard_layer(id(module)):
            return True
        guard = guard_of(module)
        return guard is not None and self._entry not in decide((*guard.ruling.entries, self._entry), id(module)).told

    def _forget(self, key: int) -> None:
        log = self._by_id.get(key)
        super()._forget(key)
        if log is not None:
            log.release()


def _change_of(log: _Layer) -> StatsChange:
    where, inside = log.count.lines
    return StatsChange(log.names, log.type, log.moved, log.updates, where, None, inside=inside)
