"""Count the steps of optimizers: which step an update of a layer belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnguard.torch_internals.turns import Turn

__all__ = ["OptimizerSteps", "StepCounter"]


class OptimizerSteps:
    """The steps of one optimizer.

    Attributes:
        count: How many there were; those that a ``GradScaler`` has skipped count as well.
        parameters: The ids of its parameters; none once it is gone, for then other ones may have them.
    """

    __slots__ = ("_optimizer", "count", "parameters")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer, self._forget)
        self.count = 0
        self.parameters = frozenset[int]()

    def add_step(self) -> bool:
        """Counts one; True where the optimizer has other parameters than at the last."""
        self.count += 1
        optimizer = self._optimizer()
        if optimizer is None:
            return False
        ids = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if len(ids) == len(self.parameters):
            return False
        self.parameters = frozenset(ids)
        return True

    def is_of(self, optimizer: Optimizer) -> bool:
        """Whether these are the steps of an optimizer."""
        return self._optimizer() is optimizer

    def owns_any(self, module: nn.Module) -> bool:
        """Whether one of the module's parameters, or of its children's, is the optimizer's."""
        return any([id(parameter) in self.parameters for parameter in module.parameters()])

    def _forget(self, _: object) -> None:
        self.parameters = frozenset()


class StepCounter:
    """The steps of every optimizer in this process, while it is open. Closing twice does nothing.

    Of several optimizers the one with most steps counts: those of a GAN step in turns, one that wraps another, as SAM
    does, steps with it.

    Args:
        after_each: Called after each step with the number of steps so far, if that has grown.

    Attributes:
        optimizers: Those that have stepped.
        count: Steps of the one that has made most.
        changes: How often an optimizer, or parameters of one, came in: what was derived from them before is old.
    """

    def __init__(self, after_each: Callable[[int], None] | None = None) -> None:
        self.optimizers: list[OptimizerSteps] = []
        self._after_each = after_each
        self.count = 0
        self.changes = 0
        self._by_id: dict[int, OptimizerSteps] = {}
        self._handle: Any = None

    def open(self) -> None:
        """Counts from now on."""
        self._handle = register_optimizer_step_post_hook(self._stepped)
        _scaled_steps.open(self)

    def close(self) -> None:
        """Counts no more."""
        _scaled_steps.close(self)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def of(self, layer: nn.Module, model: nn.Module) -> tuple[tuple[OptimizerSteps, ...], bool]:
        """The optimizers whose steps a layer goes by, and whether they train it or its model.

        Those that have its own parameters; a layer that has none there goes by those that train the rest of the model,
        and a model that none trains, a teacher for one, by all.
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
            steps = OptimizerSteps(optimizer)
            self._by_id[id(optimizer)] = steps
            self.optimizers.append(steps)
        return steps

    def _stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.add_step_of(optimizer)

    def add_step_of(self, optimizer: Optimizer) -> None:
        """Counts one step."""
        steps = self.steps_of(optimizer)
        if steps.add_step():
            self.changes += 1
        if steps.count > self.count:
            self.count = steps.count
            if self._after_each is not None:
                self._after_each(self.count)


class _ScaledSteps:
    """Tells counters of the steps that a ``GradScaler`` skips because of infinite gradients: no optimizer sees them."""

    def __init__(self) -> None:
        self._turn = Turn()
        self._counters: tuple[StepCounter, ...] = ()
        self._step: Any = None  # torch's own, while ours is in its place
        self._ours: Any = None

    def open(self, counter: StepCounter) -> None:
        with self._turn:
            self._counters = (*self._counters, counter)
            if self._step is None:
                self._step = step = GradScaler.step

                def counted(scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
                    before = [(counter, counter.steps_of(optimizer).count) for counter in self._counters]
                    result = step(scaler, optimizer, *args, **kwargs)
                    for counter, count in before:
                        if counter.steps_of(optimizer).count == count:
                            counter.add_step_of(optimizer)
                    return result

                self._ours = counted
                setattr(GradScaler, "step", counted)  # noqa: B010  # whose type knows no other

    def close(self, counter: StepCounter) -> None:
        self._turn.end(lambda: self._close(counter))

    def _close(self, counter: StepCounter) -> None:
        self._counters = tuple([other for other in self._counters if other is not counter])
        if not self._counters and self._step is not None and GradScaler.step is self._ours:
            setattr(GradScaler, "step", self._step)  # noqa: B010
            self._step = self._ours = None


_scaled_steps = _ScaledSteps()
