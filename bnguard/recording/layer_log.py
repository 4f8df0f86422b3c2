"""What a watch has seen of one layer: updates by line and mode, however many there were."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack

from bnguard.guard.policy import is_in_backward
from bnguard.layers.bits import below_transforms, has_values
from bnguard.layers.drift import eps_of
from bnguard.layers.kinds import StatsLayer, tensor_table
from bnguard.recording.model_calls import ModelCall
from bnguard.recording.optimizer_steps import OptimizerSteps, StepCounter
from bnguard.recording.timeline import Timeline
from bnguard.records import Mode
from bnguard.torch_internals.functional_call import in_functional_call, in_reentrant_checkpoint
from bnguard.torch_internals.tracing import aside, is_recorded

__all__ = ["FEW_VALUES", "Ledger", "Line"]


FEW_VALUES: Final = 8


@dataclass(slots=True)
class Line:
    """The same while it grows."""

    site: str
    mode: Mode
    count: int
    first_step: int
    last_step: int
    batch_shape: tuple[int, ...] | None
    fewest_values: int | None
    timeline: Timeline
    small_batches: int = 0


@dataclass(slots=True)  # not frozen: that takes three times as long to make
class Forward:
    """One updating forward of the step under way."""

    site: str
    place: tuple[CodeType, int] | None
    call: int
    backward: int


_MOST_FORWARDS: Final = 64  # of one step that are told apart
_MOST_PATTERNS: Final = 16


@dataclass(slots=True)
class Several:
    """Steps in which a layer updated several times, by the lines that did it.

    Attributes:
        steps: How many there were.
        most: Most updates in one of them.
    """

    steps: int = 0
    most: int = 0


@dataclass(slots=True)
class WrongGradients:
    """Backward passes through an eval-mode forward whose layer has updated since.

    Attributes:
        count: How many.
        eval_site: The line of the eval-mode forward.
        train_site: The line of the latest update before the backward pass.
    """

    count: int
    eval_site: str
    train_site: str


class Ledger:
    """What was seen of one layer. All of it is told from the host: no tensor is read.

    Attributes:
        layer: Its names, type and buffers; the module weakly.
        model: The model in which it was met; weakly.
        model_name: What to call that, where there are several.
        tensors: Its statistics as they hang on it, by name.
        first: The name of the first of them.
        first_tensor: That one.
        before: Copies of them when it was met.
        updates: All of them.
        evaluations: Forwards in eval mode.
        held: Updates that a guard has prevented.
        keeps_its_own: Whether several ranks train it, each with statistics of its own.
        untracked: Forwards in train mode with ``track_running_stats`` off, although there are statistics.
        frozen: Updates by line while autograd recorded and no parameter of the layer was trained.
        several: Steps with several forwards, by their lines.
        places: Steps in which one forward of the model called the layer several times.
        trained: Whether it has updated while its parameters were trained.
        is_compiled: Whether a graph has been traced through it.
        undone: The line of the first update after the layer had been put into eval mode by itself; else None.
        wrong: What is known of wrong gradients.
    """

    __slots__ = (
        "_forwards", "_is_owned", "_last_site", "_lines", "_model", "_module", "_more_forwards", "_optimizers",
        "_optimizers_of", "_own_eval", "_step", "before", "buffers", "eps", "evaluations", "first", "first_tensor",
        "frozen", "frozen_before", "held", "is_compiled", "keeps_its_own", "kind", "model_name", "momentum", "names",
        "places", "several", "tensors", "trained", "type", "undone", "untracked", "updates", "wrong",
    )  # fmt: skip

    def __init__(self, layer: StatsLayer, model: nn.Module, model_name: str, before: dict[str, Tensor]) -> None:
        module: Any = layer.module
        self.model_name = model_name
        self.names = layer.names
        self.type = type(module).__name__
        self.kind = layer.kind
        self.buffers = layer.buffers
        self.eps = eps_of(module)
        self.momentum = getattr(module, "momentum", None)
        self._module = weakref.ref(layer.module)
        self._model = weakref.ref(model)
        self.before = before
        self._take_tensors(tensor_table(module, "_buffers"))
        self._lines: dict[tuple[str, tuple[bool, ...]], Line] = {}  # by line and mode
        self.updates = 0
        self.evaluations = 0
        self.held = 0
        self.keeps_its_own = False
        self.untracked = 0
        self.frozen: dict[str, int] = {}
        self.frozen_before: dict[str, tuple[Tensor, nn.Parameter]] = {}  # those not trained at an update, as then
        self.trained = False
        self.is_compiled = False
        self.several: dict[tuple[str, ...], Several] = {}
        self.places = 0
        self.undone: str | None = None
        self.wrong: WrongGradients | None = None
        self._own_eval = False
        self._last_site = ""
        self._step = 0
        self._forwards: list[Forward] = []
        self._more_forwards = 0
        self._is_owned = False
        self._optimizers: tuple[OptimizerSteps, ...] = ()
        self._optimizers_of = -1  # changes of the counter for which those are right

    @property
    def module(self) -> nn.Module | None:
        """The layer, as long as somebody else keeps it."""
        return self._module()

    @property
    def lines(self) -> list[Line]:
        """Updates by line and mode."""
        return list(self._lines.values())

    def add(
        self,
        call: ModelCall,
        args: tuple[Any, ...],
        steps: StepCounter,
        backwards: int,
        timelines: defaultdict[str, Timeline],
    ) -> None:
        """Takes in one update, after so many backward passes."""
        module = self._module()
        if module is None:
            return
        input = args[0] if args and isinstance(args[0], Tensor) else None
        flags = _flags_of(module, input, call)
        step = self._step_now(module, steps)
        self.updates += 1
        self._last_site = call.site
        mode = self._add_to_line(call.site, flags, step, input, timelines)
        if mode.training and self._own_eval and self.undone is None and not mode.calibration:
            self.undone = call.site
        if not self._is_frozen(module):
            self.trained = True
            if self.frozen_before:
                self.frozen_before = {}
        elif mode.grad and mode.training:
            if call.site in self.frozen or len(self.frozen) < _MOST_PATTERNS:
                self.frozen[call.site] = self.frozen.get(call.site, 0) + 1
            if not self.frozen_before:
                self._keep_frozen(module)
        if mode.grad and not mode.recompute:
            if step != self._step:
                self.close_step()
                self._step = step
            if len(self._forwards) < _MOST_FORWARDS:
                self._forwards.append(Forward(call.site, call.place, call.number, backwards))
            else:
                self._more_forwards += 1

    def add_evaluation(self, module: nn.Module) -> None:
        """Takes in one forward that updates nothing."""
        if module.training:
            self.untracked += getattr(module, "track_running_stats", True) is False
            return
        self.evaluations += 1
        if not self._own_eval:
            model = self._model()
            # By itself: its model trains, and so does this forward.
            self._own_eval = (
                model is not None
                and model is not module
                and model.training
                and torch.is_grad_enabled()
                and self._may_learn(module)
            )

    def watch_backward(self, output: Any, call: ModelCall) -> None:
        """Looks, when backward comes to an eval-mode forward, whether the layer has updated in the meantime."""
        node = output.grad_fn if isinstance(output, Tensor) else None
        if node is None:
            return
        updates, site = self.updates, call.site

        def passed(_: Any) -> None:
            if self.updates > updates:
                count = 1 if self.wrong is None else self.wrong.count + 1
                self.wrong = WrongGradients(count, site, self._last_site)

        node.register_prehook(passed)

    def is_optimized(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is one of an optimizer by whose steps the layer goes."""
        return any([id(parameter) in optimizer.parameters for optimizer in self._optimizers])

    def close_step(self) -> None:
        """Judges the forwards of the step that is over."""
        forwards, self._forwards = self._forwards, []
        more, self._more_forwards = self._more_forwards, 0
        if len(forwards) < 2:
            return
        extra: list[Forward] = []
        from_places = False
        for number, forward in enumerate(forwards):
            earlier = forwards[:number]
            if not earlier:
                continue
            same_pass = [
                other for other in earlier if other.backward == forward.backward and other.site == forward.site
            ]
            if any([other.call == forward.call for other in earlier]):
                from_places = True  # in one forward of the model
            elif same_pass or all([other.site != forward.site for other in earlier]):
                extra.append(forward)  # else a backward pass lies between: gradients are accumulated
        self.places += from_places
        if extra:
            sites = tuple(sorted({forward.site for forward in forwards}))
            if sites in self.several or len(self.several) < _MOST_PATTERNS:
                several = self.several.setdefault(sites, Several())
                several.steps += 1
                several.most = max(several.most, len(forwards) + more)

    def now(self) -> dict[str, Tensor]:
        """The statistics of now; the last that were known where the layer is gone."""
        module = self._module()
        buffers = self.tensors if module is None else tensor_table(module, "_buffers")
        return {name: tensor for name in self.buffers if (tensor := buffers.get(name)) is not None}

    def has_own_tensors(self, module: nn.Module) -> bool:
        """Whether a forward works on the layer's own statistics, and not on some that ``functional_call`` lends it.

        Others that have come to stay, after ``.double()`` say, are the layer's own from then on.
        """
        buffers = tensor_table(module, "_buffers")
        for name, tensor in self.tensors.items():
            if buffers.get(name) is not tensor:
                if in_functional_call():
                    return False
                self._take_tensors(buffers)
                return True
        return True

    def _take_tensors(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Takes the statistics of now for the layer's own."""
        self.tensors = {name: tensor for name in self.before if (tensor := buffers.get(name)) is not None}
        self.first = next(iter(self.tensors), "")
        self.first_tensor = self.tensors.get(self.first)

    def _add_to_line(
        self,
        site: str,
        flags: tuple[bool, ...],
        step: int,
        input: Tensor | None,
        timelines: defaultdict[str, Timeline],
    ) -> Mode:
        line = self._lines.get((site, flags))
        # A program would have our arithmetic in it.
        is_plain = input is not None and (
            (_get_tracing_state() is None and not _len_torch_dispatch_stack()) or not is_recorded((), {})
        )
        if line is None:
            shape = tuple(map(int, input.shape)) if is_plain and input is not None else None
            line = Line(site, Mode(*flags), 0, step, step, shape, None, timelines[site])
            self._lines[site, flags] = line
        line.count += 1
        line.timeline.add(step)
        line.last_step = step
        if is_plain and input is not None and input.dim() > 1:
            values = input.numel() // max(1, input.shape[1])
            if line.fewest_values is None or values < line.fewest_values:
                line.fewest_values = values
            if values < FEW_VALUES:
                line.small_batches += 1
        return line.mode

    def _step_now(self, module: nn.Module, steps: StepCounter) -> int:
        if self._optimizers_of != steps.changes:
            self._optimizers, is_owned = steps.of(module, self._model() or module)
            self._optimizers_of = steps.changes
            if is_owned and not self._is_owned:
                self._is_owned = True
                for line in self._lines.values():  # of before the first step of its optimizer
                    line.first_step = line.last_step = 0
        optimizers = self._optimizers
        if len(optimizers) < 2:  # quickly
            return optimizers[0].count if optimizers else 0
        return max([optimizer.count for optimizer in optimizers])

    def _trained_parameter(self) -> nn.Parameter | None:
        """One of the layer, or else of its model."""
        for module in (self._module(), self._model()):
            found = () if module is None else module.parameters()
            parameter = next((parameter for parameter in found if parameter.requires_grad), None)
            if parameter is not None:
                return parameter
        return None

    def _is_frozen(self, module: nn.Module) -> bool:
        """Whether none of the layer's parameters is trained; of a layer without any, none of its model's."""
        has_own = False
        for parameter in module._parameters.values():
            if parameter is not None:
                if parameter.requires_grad:
                    return False
                has_own = True
        return has_own or self._trained_parameter() is None

    @aside()
    def _keep_frozen(self, module: nn.Module) -> None:
        own = {name: below_transforms(parameter) for name, parameter in module._parameters.items()}
        present = {
            name: parameter for name, parameter in own.items() if parameter is not None and has_values(parameter)
        }
        self.frozen_before = {name: (parameter.detach().clone(), parameter) for name, parameter in present.items()}

    def _may_learn(self, module: nn.Module) -> bool:
        """Whether the layer's own parameters are trained; one that is frozen on purpose has none that are."""
        return any([parameter.requires_grad for parameter in module.parameters(recurse=False)])


def _flags_of(module: nn.Module, input: Tensor | None, call: ModelCall) -> tuple[bool, ...]:
    """The first fields of ``Mode``, for a forward that is about to begin."""
    is_inference = torch.is_inference_mode_enabled()
    return (
        module.training,
        torch.is_grad_enabled() or (module.training and not is_inference and in_reentrant_checkpoint()),
        is_inference,
        torch._C._is_any_autocast_enabled() and input is not None and _is_autocast(input.device.type),
        is_in_backward(),
        call.calibrates,
    )


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
