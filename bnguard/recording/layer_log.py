"""What a watch records of one layer: its updates by line and mode, in memory that does not grow with their number."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnguard.findings.events import Evaluation, Forward, LayerEnd, Result, StepEnd, Update
from bnguard.findings.observer import LayerObserver
from bnguard.findings.rule import Evidence
from bnguard.layers.kinds import OTHER_BUFFERS, StatsLayer
from bnguard.recording.layer_listener import SeenLayer
from bnguard.recording.model_calls import ModelCall
from bnguard.recording.optimizer_steps import OptimizerSteps, StepCounter
from bnguard.recording.timeline import Timeline
from bnguard.records import FEW_VALUES, Mode, StatsUpdates
from bnguard.torch_internals.checkpointing import is_in_backward
from bnguard.torch_internals.distributed import differs_per_rank
from bnguard.torch_internals.functional_call import in_reentrant_checkpoint
from bnguard.torch_internals.tracing import is_recorded

_MOST_FORWARDS: Final = 64  # of one step that are distinguished


@dataclass(slots=True)
class UpdateSite:
    """The updates of one layer from one line in one mode, as far as the run has come. For fields see ``StatsUpdates``.

    Attributes:
        timeline: The updates of this line over the steps, shared by all layers.
    """

    site: str
    mode: Mode
    count: int
    first_step: int
    last_step: int
    batch_shape: tuple[int, ...] | None
    fewest_values: int | None
    timeline: Timeline
    small_batches: int = 0

    def add(self, step: int, input: Tensor | None) -> None:
        """Adds one update.

        Args:
            step: The step of the layer's optimizer.
            input: The input; None if its shape is unknown.
        """
        self.count += 1
        self.timeline.add(step)
        self.last_step = step
        if input is not None and input.dim() > 1:
            values = input.numel() // max(1, input.shape[1])
            if self.fewest_values is None or values < self.fewest_values:
                self.fewest_values = values
            if values < FEW_VALUES:
                self.small_batches += 1


class LayerLog(SeenLayer):
    """What was seen of one layer, from the host alone: no tensor is read. Rules get every event through an observer.

    Attributes:
        model_name: What to call its model if several were watched.
        differs_per_rank: Whether several ranks train it, each with statistics of its own.
    """

    __slots__ = (
        "_forward_count", "_forwards", "_is_owned", "_model", "_momentum", "_observer", "_optimizers", "_optimizers_of",
        "_sites", "_step", "differs_per_rank", "model_name",
    )  # fmt: skip

    def __init__(self, layer: StatsLayer, model: nn.Module, model_name: str) -> None:
        super().__init__(layer)
        self.model_name = model_name
        self.differs_per_rank = differs_per_rank(model)
        self._model = weakref.ref(model)
        self._momentum = getattr(layer.module, "momentum", None)
        # The rules are about statistics of batches.
        self._observer = LayerObserver(()) if layer.kind is OTHER_BUFFERS else LayerObserver()
        self._sites: dict[tuple[str, tuple[bool, ...]], UpdateSite] = {}  # by line and mode
        self._step = 0
        self._forwards: list[Forward] = []  # updating ones of that step
        self._forward_count = 0
        self._is_owned = False
        self._optimizers: tuple[OptimizerSteps, ...] = ()
        self._optimizers_of = -1  # the counter's ``changes`` for which those are right

    @property
    def sites(self) -> list[UpdateSite]:
        """The updates by line and mode."""
        return list(self._sites.values())

    # What happened.

    def record_update(
        self,
        call: ModelCall,
        args: tuple[Any, ...],
        steps: StepCounter,
        backwards: int,
        timelines: defaultdict[str, Timeline],
    ) -> None:
        """Records one update.

        Args:
            call: How the forward has come about.
            args: Its arguments.
            steps: The optimizer steps so far.
            backwards: How many backward passes there were so far.
            timelines: The timeline of each line.
        """
        module = self._module()
        if module is None:
            return
        input = args[0] if args and isinstance(args[0], Tensor) else None
        flags = _flags_of(module, input, call)
        step = self._step_now(module, steps)
        if is_recorded((), {}):
            input = None  # the program would contain our arithmetic on its shape
        self.updates += 1
        site = self._sites.get((call.site, flags))
        if site is None:
            shape = None if input is None else tuple(map(int, input.shape))
            site = UpdateSite(call.site, Mode(*flags), 0, step, step, shape, None, timelines[call.site])
            self._sites[call.site, flags] = site
        site.add(step, input)
        mode = site.mode
        update = Update(module, call.site, mode, self._is_frozen(module))
        for listener in self._observer.on_update:
            listener(update)
        if mode.grad and not mode.recompute:
            if step != self._step:
                self.close_step()
                self._step = step
            self._forward_count += 1
            if len(self._forwards) < _MOST_FORWARDS:
                self._forwards.append(Forward(call.site, call.number, backwards))

    def record_held(self) -> None:
        """Records an update that a guard has prevented."""
        for listener in self._observer.on_held:
            listener()

    def record_evaluation(self, module: nn.Module) -> None:
        """Records a forward that updates nothing."""
        evaluation = Evaluation(module, self._model())
        for listener in self._observer.on_evaluation:
            listener(evaluation)

    def record_result(self, output: Any, call: ModelCall) -> None:
        """Records the result of a forward in eval mode, while autograd was recording."""
        result = Result(output, call.site)
        for listener in self._observer.on_result:
            listener(result)

    def close_step(self) -> None:
        """Ends the present step of the layer's optimizer."""
        if self._forwards:
            step = StepEnd(tuple(self._forwards), self._forward_count)
            self._forwards, self._forward_count = [], 0
            for listener in self._observer.on_step_end:
                listener(step)

    # What is known.

    def records(self, model_name: str) -> tuple[StatsUpdates, ...]:
        """The updates by line and mode, with the class of the model if several were watched."""
        return tuple(
            [
                StatsUpdates(
                    self.names, self.type, site.site, site.mode, site.count, site.first_step, site.last_step,
                    site.batch_shape, site.fewest_values, site.small_batches, model_name,
                )
                for site in self._sites.values()
            ]
        )  # fmt: skip

    def evidence(self, name: str, now: Mapping[str, Tensor], *, has_stepped: bool) -> list[Evidence]:
        """What the rules have found so far.

        Args:
            name: What to call the layer.
            now: Its present statistics.
            has_stepped: Whether any optimizer has made a step.
        """
        optimized = tuple([optimizer.parameters for optimizer in self._optimizers])
        end = LayerEnd(name, self.type, self._momentum, self.records(""), self.before, now, has_stepped, optimized)
        return self._observer.evidence(end)

    # Parts.

    def _step_now(self, module: nn.Module, steps: StepCounter) -> int:
        if self._optimizers_of != steps.changes:
            self._optimizers, is_owned = steps.of(module, self._model() or module)
            self._optimizers_of = steps.changes
            if is_owned and not self._is_owned:
                self._is_owned = True
                for site in self._sites.values():  # these updates precede the first step of its optimizer
                    site.first_step = site.last_step = 0
        optimizers = self._optimizers
        if len(optimizers) < 2:  # the usual case, without a list
            return optimizers[0].count if optimizers else 0
        return max([optimizer.count for optimizer in optimizers])

    def _is_frozen(self, module: nn.Module) -> bool:
        """Whether none of the layer's parameters is trained; for a layer without any, none of its model's."""
        has_own = False
        for parameter in module._parameters.values():
            if parameter is not None:
                if parameter.requires_grad:
                    return False
                has_own = True
        return has_own or not any(
            parameter.requires_grad
            for owner in (module, self._model())
            if owner is not None
            for parameter in owner.parameters()
        )


def _flags_of(module: nn.Module, input: Tensor | None, call: ModelCall) -> tuple[bool, ...]:
    """The first fields of ``Mode``, for a forward that is about to begin."""
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
