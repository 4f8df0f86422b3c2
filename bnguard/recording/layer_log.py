"""What a watch records of one layer: its updates by line and mode, in memory that does not grow with their number."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn

from bnguard.findings.events import Evaluation, LayerEnd, Result, StepEnd, Update, UpdateSite
from bnguard.findings.observer import LayerObserver
from bnguard.findings.rule import Evidence
from bnguard.findings.soundness import is_initial
from bnguard.guard.hooks import guard_of
from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer
from bnguard.layers.swaps import Table, own_tensors
from bnguard.layers.tree import parameters_of
from bnguard.recording.layer_listener import copies_of
from bnguard.recording.model_calls import ModelCall
from bnguard.recording.optimizer_steps import OptimizerSteps, has_stepped_since
from bnguard.recording.run import Run
from bnguard.recording.update_sites import count_update, joined, leaf_of, watch_result
from bnguard.recording.usual_forwards import UsualForwards
from bnguard.records import Mode, StatsUpdates
from bnguard.torch_internals.autocast import is_any_autocast, is_autocast
from bnguard.torch_internals.checkpointing import running_backward
from bnguard.torch_internals.distributed import differs_per_rank
from bnguard.torch_internals.functional_call import in_reentrant_checkpoint
from bnguard.torch_internals.tracing import is_capturing, is_traced, outside_modes

_MOST_UPDATES: Final = 64  # of one step that are distinguished
_MOST_WRITES: Final = 64  # of somebody else that are looked at
_USUAL: Final = True, True, False, False, False, False  # in train mode with gradients


class LayerLog(UsualForwards):
    """What was seen of one layer, from the host alone: no tensor is read. Rules get every event through an observer.

    Attributes:
        model_number: The number of its model among those that were met.
        differs_per_rank: Whether several ranks train it, each with statistics of its own.
        is_loaded: Whether a state dict was loaded into it.
    """

    __slots__ = (
        "_count", "_evaluations", "_is_trained", "_model", "_momentum", "_observer", "_optimizers", "_parameters",
        "_parameters_before", "_parents", "_recalibrates", "_rewritten", "_rivals", "_sites", "_tick", "_updates",
        "_writes_left", "differs_per_rank", "is_loaded", "model_number",
    )  # fmt: skip

    def __init__(
        self, layer: StatsLayer, model: nn.Module, model_number: int, parents: Sequence[nn.Module], run: Run
    ) -> None:
        super().__init__(layer, run)
        self.model_number = model_number
        self.differs_per_rank = differs_per_rank(model)
        self.is_loaded = False
        self._model = weakref.ref(model)
        self._parents = [weakref.ref(parent) for parent in parents]
        self._momentum = getattr(layer.module, "momentum", None)
        own = own_tensors(layer.module, "_parameters")
        self._parameters = {name: tensor for name, tensor in own.items() if tensor is not None}
        self._parameters_before = copies_of(self._parameters)
        # The rules are about statistics of batches.
        self._observer = LayerObserver(()) if layer.kind is OTHER_BUFFERS else LayerObserver()
        self._sites: dict[tuple[str, str, tuple[bool, ...]], UpdateSite] = {}  # by line and mode
        self._tick = 0
        self._updates: list[Update] = []  # since that step of any optimizer
        self._count = 0
        self._is_trained = False
        self._optimizers: tuple[OptimizerSteps, ...] = ()
        self._rivals: tuple[OptimizerSteps, ...] = ()
        self._recalibrates = -1  # at which tick the statistics were reset
        self._evaluations = 0
        self._rewritten = 0
        self._writes_left = _MOST_WRITES

    @property
    def sites(self) -> list[UpdateSite]:
        """The updates by line and mode."""
        return list(self._sites.values())

    # What happened.

    def is_written(self, module: nn.Module) -> bool:
        """Whether somebody else has written since the last forward: then ``record_write`` is due."""
        return self._place(module) != self._last

    def record_beginning(self) -> None:
        """Takes copies, right before a forward that may update, if it may be put back."""
        self._was_evaluated = False
        if self._copies.left:
            tick = self._run.steps.ticks
            if (tick == self._tick_noted or not is_grad_enabled()) and not is_capturing():
                self._copies.add(tick, copies_of(self._present()))

    def note_update(self, module: nn.Module, call: ModelCall, args: tuple[Any, ...], output: Any) -> None:
        """Notes one update. See Note [Two parts of a record].

        Args:
            module: The layer, or a clone that shares its statistics.
            call: How the forward has come about.
            args: Its arguments.
            output: What it has returned; None if it is not over.
        """
        run = self._run
        journal, steps = run.journal, run.steps
        input = args[0] if args and isinstance(args[0], Tensor) else None
        training, inference = module.training, is_inference_mode_enabled()
        grad = is_grad_enabled() or (training and not inference and in_reentrant_checkpoint())
        autocast = is_any_autocast() and input is not None and is_autocast(input)
        flags = training, grad, inference, autocast, running_backward() != -1, call.calibrates
        # A program that is being traced would contain our reading of the shape.
        shape = None if input is None or is_traced() else input.shape
        key = (call.site, call.part, flags)
        site = self._sites.get(key)
        if site is None:
            batch_shape = None if shape is None else tuple(map(int, shape))
            site = UpdateSite(call.site, call.part, Mode(*flags), steps.count, steps.count, batch_shape)
            site = self._sites.setdefault(key, site)  # another thread may have made it
        update = Update(site, self._is_frozen(module), call.number, call.parent, run.backwards.count)
        if site.mode.grad and not site.mode.recompute:
            watch_result(output, update, run)
        self._copies.updated(update)
        self._last = self._place(module)
        last, self._last_noted, self._tick_noted = self._last_noted, update, steps.ticks
        own = self._module
        is_alike = last is not None and last.of is site and last.is_frozen is update.is_frozen
        if not is_alike or self._optimizers_of != steps.changes:
            journal.is_due = True
        if own() is not module:
            own, journal.is_due = weakref.ref(module), True
        is_usual = flags == _USUAL and not update.is_frozen and update.has_learned is False
        self._usual_site = site if is_usual else None
        momentum = getattr(module, "momentum", None)
        journal.entries.append((self.record_update, (own, update, shape, momentum, steps.count, steps.ticks)))

    def record_update(
        self,
        own: weakref.ref[nn.Module],
        update: Update,
        shape: Sequence[int] | None,
        momentum: Any,
        count: int,
        tick: int,
    ) -> None:
        """Records an update that was noted.

        Args:
            own: The layer, or a clone that shares its statistics.
            update: The update.
            shape: The shape of the batch, if it is known.
            momentum: The momentum of the layer.
            count: How many rounds of optimizer steps had begun.
            tick: How many steps all optimizers had made.
        """
        module = own()
        if module is not None and self._optimizers_of != self._steps.changes:
            self._find_optimizers(module)
        if self._tick != tick:
            self.close_step(tick, is_frozen=update.is_frozen if own is self._module else None)
        site = update.of
        self.updates += 1
        count_update(update, shape, count, momentum)
        self._run.timelines[site.site].add(count)
        site.recalibrating += self._recalibrates == tick
        for listener in self._observer.on_update:
            listener(update, module)
        self._count += 1
        if len(self._updates) < _MOST_UPDATES:
            self._updates.append(update)

    def record_reset(self) -> None:
        """Records that ``reset_running_stats()`` was called."""
        self._recalibrates = self._run.steps.ticks
        self._last = self._place(self.module)

    def record_load(self) -> None:
        """Records that a state dict was loaded."""
        self.is_loaded = True
        self._last = self._place(self.module)
        self._copies.clear()

    def record_held(self) -> None:
        """Records an update that a guard has prevented."""
        for listener in self._observer.on_held:
            listener()

    def record_evaluation(self, module: nn.Module) -> None:
        """Records a forward that updates nothing."""
        self._find_optimizers(module)
        if self.is_written(module):
            was_evaluated = self._was_evaluated
            if not self.record_write() and was_evaluated and not module.training and self._is_trained:
                self._rewritten += 1
        self._was_evaluated = not module.training
        self._evaluations += self._was_evaluated
        guard = guard_of(module) if module.training else None
        is_held = guard is not None and any([entry.policy.holds for entry in guard.ruling.entries])
        evaluation = Evaluation(module, self._model(), is_held)
        for listener in self._observer.on_evaluation:
            listener(evaluation)

    def record_result(self, output: Any, call: ModelCall) -> None:
        """Records the result of a forward in eval mode, while autograd was recording."""
        result = Result(output, call.site)
        for listener in self._observer.on_result:
            listener(result)

    def record_eval_undone(self, call: ModelCall) -> None:
        """Records that the last update was the first after a ``train()`` that undid an ``eval()`` of this layer."""
        for listener in self._observer.on_eval_undone:
            listener(call.site)

    def close(self) -> None:
        """Ends the record."""
        if self._place(self.module) != self._last:
            self.record_write()
        self.close_step(self._run.steps.ticks)

    def close_step(self, now: int, *, is_frozen: bool | None = None) -> None:
        """Ends what lies between two steps of optimizers.

        Args:
            now: How many steps of them are over.
            is_frozen: Whether no parameter is trained now; None if that is to be seen.
        """
        updates, count, tick = self._updates, self._count, self._tick
        module = self._module()
        self._updates, self._count, self._tick = [], 0, now
        if self._copies.kept:
            self._copies.step(now)
        if module is not None and self._optimizers_of != self._steps.changes:
            self._find_optimizers(module)
        is_trained = None
        if now > tick:
            is_trained = has_stepped_since(self._optimizers, tick)
            if is_trained and not self._is_trained:
                self._is_trained = not (self._is_frozen(module) if is_frozen is None else is_frozen)
        if updates:
            is_of_rival = not is_trained and has_stepped_since(self._rivals, tick)
            step = StepEnd(tuple(updates), count, is_trained, is_of_rival)
            for listener in self._observer.on_step_end:
                listener(step)

    # What is known.

    def records(self, model_name: str) -> tuple[StatsUpdates, ...]:
        """The updates by line and mode, with the name of the model if several were watched."""
        records: dict[tuple[str, Mode], StatsUpdates] = {}
        for site in self._sites.values():
            if site.count:
                record = StatsUpdates(
                    self.names, self.type, site.site, site.mode, site.count, site.first_step, site.last_step,
                    site.batch_shape, site.fewest_values, site.small_batches, model_name,
                )  # fmt: skip
                earlier = records.get((site.site, site.mode))
                records[site.site, site.mode] = record if earlier is None else joined(earlier, record)
        return tuple(records.values())

    def evidence(
        self,
        name: str,
        now: Mapping[str, Tensor],
        learned: Mapping[str, int],
        steps: int,
        broken: tuple[int, int] | None,
    ) -> list[Evidence]:
        """What the rules have found so far.

        Args:
            name: What to call the layer.
            now: Its present statistics.
            learned: By line, most updates of a layer that were learned from.
            steps: How many steps all optimizers have made.
            broken: Between which optimizer steps its statistics broke, if that was measured.
        """
        optimized = frozenset().union(*[optimizer.parameters for optimizer in self._optimizers])
        sites = tuple([site for site in self._sites.values() if site.count])
        is_frozen = self._is_frozen(self.module)
        is_trained = self._is_trained or (has_stepped_since(self._optimizers, 0) and not is_frozen)
        end = LayerEnd(
            name, self.type, self._momentum, sites, learned, self.before, now, self._parameters_before,
            self._present("_parameters"), steps,
            is_trained, self.is_loaded, self._evaluations, self._rewritten, optimized, broken,
        )  # fmt: skip
        return self._observer.evidence(end)

    # Parts.

    def _present(self, table: Table = "_buffers") -> dict[str, Tensor]:
        """The statistics or the parameters; the last known ones if the layer has been deleted."""
        known = self.tensors if table == "_buffers" else self._parameters
        module = self.module
        own = known if module is None else own_tensors(module, table)
        return {name: tensor for name in known if (tensor := own.get(name)) is not None}

    @outside_modes
    def record_write(self) -> bool:
        """Records that somebody else has written. Returns whether that is explained: put back by hand, or reset.

        See Note [Put back by hand].
        """
        was, self._last = self._last, self._place(self.module)
        self._writes_left -= 1
        if self._writes_left < 0 or is_capturing():
            return True
        now = self._present()
        if is_initial({name: tensor for name, tensor in now.items() if name != "num_batches_tracked"}):
            self._recalibrates = self._run.steps.ticks
            return True
        undone = self._copies.undone_by(now)
        if undone is not None:
            for update in undone:
                self._undo(update)
            if not self._updates:
                self._tick_noted = -1
            return True
        # Other tensors are those of a conversion.
        return was is None or self._last is None or was[0] != self._last[0]

    def _undo(self, update: Update) -> None:
        update.is_undone = True
        if update in self._updates:
            self._updates.remove(update)
        self.updates -= 1
        self._count -= 1
        site = update.of
        site.count -= 1
        if update.has_learned is not None:
            site.results -= 1
            site.learned -= update.has_learned

    def _find_optimizers(self, module: nn.Module) -> None:
        steps = self._run.steps
        if self._optimizers_of == steps.changes:
            return
        self._optimizers_of = steps.changes
        self._optimizers = steps.of(map(id, map(leaf_of, self._trainable(module))))
        model = self._model()
        of_model = () if model is None else steps.of(map(id, parameters_of(model)))
        self._rivals = tuple([one for one in steps.optimizers if one not in of_model and one not in self._optimizers])

    def _trainable(self, module: nn.Module) -> list[Any]:
        """The layer's parameters; for a layer without any, those of the smallest part of its model around it."""
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own:
            return own
        for reference in self._parents:
            parent = reference()
            found = [] if parent is None else list(parameters_of(parent))
            if found:
                return found
        return []

    def _is_frozen(self, module: nn.Module | None) -> bool:
        for parameter in () if module is None else module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return False
        parameters = list(self._parameters.values()) if module is None else self._trainable(module)
        return not any([parameter.requires_grad for parameter in parameters])
