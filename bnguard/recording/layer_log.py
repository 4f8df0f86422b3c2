"""What a watch records of one layer: its updates by line and mode, in memory that does not grow with their number."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnguard.findings.events import Evaluation, LayerEnd, Result, StepEnd, Update, UpdateSite
from bnguard.findings.observer import LayerObserver
from bnguard.findings.rule import Evidence
from bnguard.findings.soundness import is_initial
from bnguard.guard.hooks import guard_of
from bnguard.layers.bits import holds
from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer
from bnguard.layers.swaps import Table, own_tensors
from bnguard.layers.tree import parameters_of
from bnguard.recording.layer_listener import SeenLayer, copies_of
from bnguard.recording.model_calls import ModelCall
from bnguard.recording.optimizer_steps import OptimizerSteps, StepCounter, has_stepped_since
from bnguard.recording.timeline import Timeline
from bnguard.recording.update_sites import count_update, joined, leaf_of, watch_result
from bnguard.records import Mode, StatsUpdates
from bnguard.torch_internals.checkpointing import is_in_backward
from bnguard.torch_internals.distributed import differs_per_rank
from bnguard.torch_internals.functional_call import in_reentrant_checkpoint
from bnguard.torch_internals.tracing import is_capturing, is_recorded, outside_modes

_MOST_UPDATES: Final = 64  # of one step that are distinguished
_MOST_COPIES: Final = 16
_MOST_WRITES: Final = 64  # of somebody else that are looked at


class LayerLog(SeenLayer):
    """What was seen of one layer, from the host alone: no tensor is read. Rules get every event through an observer.

    Note [Put back by hand]
    ~~~~~~~~~~~~~~~~~~~~~~~
    Scripts save statistics, run forwards that should not count, and put them back. Such forwards are no updates. A
    forward in train mode leaves the version and the place of the running mean alone, so whether somebody else has
    written is seen at the next forward for nothing. Only then is the value compared with copies; these are taken before
    forwards that may be put back: those without gradients, and those after the first of a step. Without success, copies
    are taken of the first few only.

    Attributes:
        model_number: The number of its model among those that were met.
        differs_per_rank: Whether several ranks train it, each with statistics of its own.
        is_loaded: Whether a state dict was loaded into it.
    """

    __slots__ = (
        "_copies", "_copies_left", "_count", "_evaluations", "_is_trained", "_last", "_model", "_momentum", "_observer",
        "_optimizers", "_optimizers_of", "_parameters", "_parameters_before", "_parents", "_recalibrates",
        "_rewritten", "_rivals", "_sites", "_tick", "_updates", "_was_evaluated", "_writes_left",
        "differs_per_rank", "is_loaded", "model_number",
    )  # fmt: skip

    def __init__(self, layer: StatsLayer, model: nn.Module, model_number: int, parents: Sequence[nn.Module]) -> None:
        super().__init__(layer)
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
        self._optimizers_of = -1  # the counter's ``changes`` for which those are right
        self._last = self._place()
        self._copies: list[tuple[Update | None, dict[str, Tensor]]] = []  # the update after it
        self._copies_left = _MOST_COPIES
        self._recalibrates = -1  # at which tick the statistics were reset
        self._was_evaluated = False
        self._evaluations = 0
        self._rewritten = 0
        self._writes_left = _MOST_WRITES

    @property
    def sites(self) -> list[UpdateSite]:
        """The updates by line and mode."""
        return list(self._sites.values())

    # What happened.

    def record_beginning(self, steps: StepCounter) -> None:
        """Looks, right before a forward that may update, whether somebody else has written."""
        if self._place() != self._last:
            self._record_write(steps.ticks)
        self._was_evaluated = False
        may_be_put_back = not torch.is_grad_enabled() or (self._updates and self._tick == steps.ticks)
        if self._copies_left and may_be_put_back and not is_capturing():
            self._copies_left -= 1
            self._copies.append((None, copies_of(self._present())))

    def record_update(
        self,
        module: nn.Module,
        call: ModelCall,
        args: tuple[Any, ...],
        output: Any,
        steps: StepCounter,
        backwards: int,
        timelines: defaultdict[str, Timeline],
    ) -> None:
        """Records one update.

        Args:
            module: The layer, or a clone that shares its statistics.
            call: How the forward has come about.
            args: Its arguments.
            output: What it has returned; None if it is not over.
            steps: The optimizer steps so far.
            backwards: How many backward passes there were so far.
            timelines: The timeline of each line.
        """
        input = args[0] if args and isinstance(args[0], Tensor) else None
        flags = _flags_of(module, input, call)
        if is_recorded((), {}):
            input = None  # the program would contain our arithmetic on its shape
        if self._optimizers_of != steps.changes:
            self._find_optimizers(module, steps)
        if self._tick != steps.ticks:
            self.close_step(steps)
        key = (call.site, call.part, flags)
        site = self._sites.get(key)
        if site is None:
            shape = None if input is None else tuple(map(int, input.shape))
            site = UpdateSite(call.site, call.part, Mode(*flags), steps.count, steps.count, shape)
            self._sites[key] = site
        self.updates += 1
        count_update(site, input, steps.count, getattr(module, "momentum", None))
        timelines[call.site].add(steps.count)
        site.recalibrating += self._recalibrates == steps.ticks
        update = Update(site, self._is_frozen(module), call.number, call.parent, backwards)
        if site.mode.grad and not site.mode.recompute:
            watch_result(output, update)
        for listener in self._observer.on_update:
            listener(update, module)
        self._count += 1
        if len(self._updates) < _MOST_UPDATES:
            self._updates.append(update)
        if self._copies and self._copies[-1][0] is None:
            self._copies[-1] = update, self._copies[-1][1]
        self._last = self._place()

    def record_reset(self, tick: int) -> None:
        """Records that ``reset_running_stats()`` was called."""
        self._recalibrates = tick
        self._last = self._place()

    def record_load(self) -> None:
        """Records that a state dict was loaded."""
        self.is_loaded = True
        self._last = self._place()
        self._copies.clear()

    def record_held(self) -> None:
        """Records an update that a guard has prevented."""
        for listener in self._observer.on_held:
            listener()

    def record_evaluation(self, module: nn.Module, steps: StepCounter) -> None:
        """Records a forward that updates nothing."""
        self._find_optimizers(module, steps)
        if self._place() != self._last:
            was_evaluated = self._was_evaluated
            if not self._record_write(steps.ticks) and was_evaluated and not module.training and self._is_trained:
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

    def close(self, steps: StepCounter) -> None:
        """Ends the record."""
        if self._place() != self._last:
            self._record_write(steps.ticks)
        self.close_step(steps)

    def close_step(self, steps: StepCounter) -> None:
        """Ends what lies between two steps of optimizers."""
        updates, count = [update for update in self._updates if not update.is_undone], self._count
        module = self.module
        self._updates, self._count, tick = [], 0, self._tick
        self._tick = steps.ticks
        self._copies = [copied for copied in self._copies if copied[0] is None]
        if module is not None:
            self._find_optimizers(module, steps)
        is_trained = None
        if steps.ticks > tick:
            is_trained = has_stepped_since(self._optimizers, tick)
            self._is_trained = self._is_trained or (is_trained and not self._is_frozen(module))
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

    def _place(self) -> tuple[int, int, int] | None:
        """The first statistic, its version and its place in memory, if it has them."""
        module = self.module
        try:
            # The table of a ScriptModule has no get().
            tensor = self.first_tensor if module is None else module._buffers[self.first]
            return None if tensor is None else (id(tensor), tensor._version, tensor.data_ptr())
        except (KeyError, RuntimeError, ValueError):  # an inference tensor, a lazy one, or one of a transform
            return None

    @outside_modes
    def _record_write(self, tick: int) -> bool:
        """Somebody else has written. Returns whether that is explained: put back by hand, or reset."""
        was, self._last = self._last, self._place()
        self._writes_left -= 1
        if self._writes_left < 0 or is_capturing():
            return True
        now = self._present()
        if is_initial({name: tensor for name, tensor in now.items() if name != "num_batches_tracked"}):
            self._recalibrates = tick
            return True
        for position, (_, copied) in enumerate(self._copies):
            if all([name in now and holds(now[name], value) for name, value in copied.items()]):
                for update, _ in self._copies[position:]:
                    if update is not None and not update.is_undone:
                        self._undo(update)
                del self._copies[position:]
                self._copies_left = _MOST_COPIES
                return True
        # Other tensors are those of a conversion.
        return was is None or self._last is None or was[0] != self._last[0]

    def _undo(self, update: Update) -> None:
        update.is_undone = True
        self.updates -= 1
        self._count -= 1
        site = update.of
        site.count -= 1
        if update.has_learned is not None:
            site.results -= 1
            site.learned -= update.has_learned

    def _find_optimizers(self, module: nn.Module, steps: StepCounter) -> None:
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
        parameters = list(self._parameters.values()) if module is None else self._trainable(module)
        return not any([parameter.requires_grad for parameter in parameters])


def _flags_of(module: nn.Module, input: Tensor | None, call: ModelCall) -> tuple[bool, ...]:
    """The first fields of ``Mode``, for a forward that is about to begin or has just ended."""
    is_inference = torch.is_inference_mode_enabled()
    return (
        module.training,
        torch.is_grad_enabled() or (module.training and not is_inference and in_reentrant_checkpoint()),
        is_inference,
        input is not None and _is_autocast(input.device.type),
        is_in_backward(),
        call.calibrates,
    )


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
