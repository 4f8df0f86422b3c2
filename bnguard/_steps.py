"""Count the steps of optimizers: which step an update of a layer belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["OptimizerSteps", "StepCounter"]


class OptimizerSteps:
    """The steps of one optimizer.

    Attributes:
        count: How many there were.
        parameters: The ids of its parameters.
    """

    __slots__ = ("_optimizer", "count", "parameters")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
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

    def owns_any(self, module: nn.Module) -> bool:
        """Whether one of the module's parameters, or of its children's, is the optimizer's."""
        return any([id(parameter) in self.parameters for parameter in module.parameters()])


class StepCounter:
    """The steps of every optimizer in this process, while it is open. Closing twice does nothing.

    Args:
        after_each: Called after each step with the number of steps so far, of all of them.

    Attributes:
        optimizers: Those that have stepped.
        changes: How often an optimizer, or parameters of one, came in: what was derived from them before is old.
    """

    def __init__(self, after_each: Callable[[int], None] | None = None) -> None:
        self.optimizers: list[OptimizerSteps] = []
        self._after_each = after_each
        self.changes = 0
        self._by_id: dict[int, OptimizerSteps] = {}
        self._handle: Any = None

    @property
    def count(self) -> int:
        """The steps of all of them."""
        return sum([optimizer.count for optimizer in self.optimizers])

    def open(self) -> None:
        """Counts from now on."""
        self._handle = register_optimizer_step_post_hook(self._stepped)

    def close(self) -> None:
        """Counts no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def of(self, layer: nn.Module, model: nn.Module) -> tuple[OptimizerSteps, ...]:
        """The optimizers whose steps a layer goes by.

        Those that have its own parameters; a layer that has none there goes by those that train the rest of the model,
        and a model that none trains, a teacher for one, by all.
        """
        for module in (layer, model):
            own = tuple([optimizer for optimizer in self.optimizers if optimizer.owns_any(module)])
            if own:
                return own
        return tuple(self.optimizers)

    def _stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steps = self._by_id.get(id(optimizer))
        if steps is None or steps._optimizer() is not optimizer:
            steps = OptimizerSteps(optimizer)
            self._by_id[id(optimizer)] = steps
            self.optimizers.append(steps)
        if steps.add_step():
            self.changes += 1
        if self._after_each is not None:
            self._after_each(self.count)
