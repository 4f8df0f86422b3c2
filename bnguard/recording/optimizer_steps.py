"""Count optimizer steps and backward passes: which step an update belongs to, and what lies between two forwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from bnguard.torch_internals.patching import AttributePatch, Patch, backward_patch, step_hook_patch


class OptimizerSteps:
    """The steps of one optimizer, and of those before it with the same parameters.

    Attributes:
        count: How many there were, including those that a ``GradScaler`` skipped.
        parameters: The ids of its parameters; empty once it is deleted, since other objects may then get these ids.
    """

    __slots__ = ("_optimizer", "_trained", "count", "parameters")

    def __init__(self, optimizer: Optimizer, earlier: Iterable[OptimizerSteps] = ()) -> None:
        self._optimizer = weakref.ref(optimizer, self._forget)
        self.parameters = self._trained = _parameters_of(optimizer)
        self.count: int = max([other.count for other in earlier if self.has_replaced(other)], default=0)

    def add_step(self) -> bool:
        """Counts one step; returns whether the number of the optimizer's parameters has changed since the last."""
        self.count += 1
        optimizer = self._optimizer()
        if optimizer is None or sum([len(group["params"]) for group in optimizer.param_groups]) == len(self.parameters):
            return False
        self.parameters = self._trained = _parameters_of(optimizer)
        return True

    def has_replaced(self, other: OptimizerSteps) -> bool:
        """Whether it trains what the other one trains, or did until it was deleted."""
        return not self._trained.isdisjoint(other._trained)

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether these are the steps of this optimizer."""
        return self._optimizer() is optimizer

    def is_over(self) -> bool:
        """Whether the optimizer is deleted."""
        return self._optimizer() is None

    def owns_any(self, module: nn.Module) -> bool:
        """Whether the optimizer has a parameter of the module or of its children."""
        return any([id(parameter) in self.parameters for parameter in module.parameters()])

    def _forget(self, _: object) -> None:
        self.parameters = frozenset()


def _parameters_of(optimizer: Optimizer) -> frozenset[int]:
    return frozenset([id(parameter) for group in optimizer.param_groups for parameter in group["params"]])


class StepCounter:
    """The steps of every optimizer in this process, while it is open. Closing twice has no effect.

    Of several optimizers the one with the most steps counts: those of a GAN take turns, and one that wraps another, as
    SAM does, steps with it.

    Attributes:
        optimizers: The optimizers that have made a step, without those that are deleted and replaced.
        count: The steps of the optimizer that has made most.
        changes: How often an optimizer or some of its parameters were added: what was derived from them before is
            outdated then.
    """

    def __init__(self) -> None:
        self.optimizers: list[OptimizerSteps] = []
        self._after_each: Callable[[int], None] | None = None  # while it is open
        self.count = 0
        self.changes = 0
        self._by_id: dict[int, OptimizerSteps] = {}

    def open(self, after_each: Callable[[int], None] | None = None) -> None:
        """Counts from now on. Calls ``after_each`` after each step that increases ``count``, with the new value."""
        self._after_each = after_each
        _step_hook.add(self)
        _scaler_step.add(self)

    def close(self) -> None:
        """Stops counting."""
        _scaler_step.remove(self)
        _step_hook.remove(self)
        self._after_each = None

    def of(self, layer: nn.Module, model: nn.Module) -> tuple[tuple[OptimizerSteps, ...], bool]:
        """The optimizers by which the steps of a layer are counted, and whether they train it or its model.

        They are the optimizers of its own parameters; if there are none, those of the rest of its model; for a model
        that is not trained, such as a teacher, all optimizers.
        """
        for module in (layer, model):
            own = tuple([optimizer for optimizer in self.optimizers if optimizer.owns_any(module)])
            if own:
                return own, True
        return tuple(self.optimizers), False

    def steps_of(self, optimizer: Optimizer) -> OptimizerSteps:
        """The steps of one optimizer."""
        steps = self._by_id.get(id(optimizer))
        if steps is None or not steps.is_of(optimizer):
            steps = OptimizerSteps(optimizer, self.optimizers)
            kept = [other for other in self.optimizers if not (other.is_over() and steps.has_replaced(other))]
            self.optimizers = [*kept, steps]
            alive = {key: other for key, other in self._by_id.items() if not other.is_over()}
            self._by_id = {**alive, id(optimizer): steps}
            self.changes += 1
        return steps

    def add_step_of(self, optimizer: Optimizer) -> None:
        """Counts one step."""
        steps = self.steps_of(optimizer)
        if steps.add_step():
            self.changes += 1
        if steps.count > self.count:
            self.count = steps.count
            if self._after_each is not None:
                self._after_each(self.count)


def _stepped(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for counter in _step_hook.users:
        counter.add_step_of(optimizer)


_step_hook: Final[Patch[StepCounter]] = step_hook_patch(_stepped)


def _count_scaled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Also counts the steps that a ``GradScaler`` skips because of infinite gradients: no hook sees those."""

    def counted(scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        before = [(counter, counter.steps_of(optimizer).count) for counter in _scaler_step.users]
        result = step(scaler, optimizer, *args, **kwargs)
        for counter, count in before:
            if counter.steps_of(optimizer).count == count:
                counter.add_step_of(optimizer)
        return result

    return counted


_scaler_step: Final[AttributePatch[StepCounter]] = AttributePatch(GradScaler, "step", _count_scaled)


class BackwardCounter:
    """The backward passes of this process while it is open. Opening or closing twice has no effect.

    Attributes:
        count: How many have begun.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def open(self) -> None:
        """Counts from now on."""
        _engine_call.add(self)

    def close(self) -> None:
        """Stops counting."""
        _engine_call.remove(self)


def _count_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        for counter in _engine_call.users:
            counter.count += 1
        return run(*args, **kwargs)

    return counted


_engine_call: Final[AttributePatch[BackwardCounter]] = backward_patch(_count_backward)
