"""Count optimizer steps and backward passes: which step an update belongs to, and what lies between two forwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from bnguard.recording.journal import Journal
from bnguard.torch_internals.patching import AttributePatch, Patch, backward_patch, step_hook_patch


class OptimizerSteps:
    """The steps of one optimizer.

    Attributes:
        count: How many there were, including those that a ``GradScaler`` skipped.
        latest: The number of the latest one among those of all optimizers, as far as steps were worked up.
        parameters: The ids of its parameters, without those with a learning rate of 0; empty once it is deleted, since
            other objects may then get these ids.
    """

    __slots__ = ("_groups", "_optimizer", "count", "latest", "parameters")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer, self._forget)
        self._groups: list[tuple[int, bool]] = []
        self.parameters: frozenset[int] = frozenset()
        self.count = self.latest = 0
        self.look_again()

    def look_again(self) -> None:
        """Reads the parameters again."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._groups = groups = _groups_of(optimizer)
            both = zip(optimizer.param_groups, groups, strict=True)
            learning = [group["params"] for group, (_, stands_still) in both if not stands_still]
            self.parameters = frozenset([id(parameter) for parameters in learning for parameter in parameters])

    def has_others(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has other parameters than before."""
        groups = optimizer.param_groups
        if len(groups) != len(self._groups):
            return True
        for group, (number, stands_still) in zip(groups, self._groups, strict=True):  # as in ``_groups_of``
            rate = group.get("lr")
            if len(group["params"]) != number or (not isinstance(rate, Tensor) and rate == 0) != stands_still:
                return True
        return False

    def work_up(self, tick: int) -> None:
        """Works up one of these steps, which was that of all optimizers with this number."""
        self.latest = tick

    def is_over(self) -> bool:
        """Whether the optimizer is deleted."""
        return self._optimizer() is None

    def has_replaced(self, other: OptimizerSteps) -> bool:
        """Whether it comes after the other one: that is deleted, or has the same parameters."""
        return other.is_over() or not self.parameters.isdisjoint(other.parameters)

    def _forget(self, _: object) -> None:
        self.parameters = frozenset()


def _groups_of(optimizer: Optimizer) -> list[tuple[int, bool]]:
    """Of each group of parameters how many there are, and whether its learning rate is 0."""
    groups = optimizer.param_groups  # reading a tensor would wait for its device
    return [(len(group["params"]), not isinstance(rate := group.get("lr"), Tensor) and rate == 0) for group in groups]


class StepCounter:
    """The steps of every optimizer in this process, while it is open. Closing twice has no effect.

    Optimizers take turns, as those of a GAN do, follow each other, as those of two stages of training do, or wrap each
    other. A round ends when one of them makes its next step, or another one takes its place.

    Attributes:
        optimizers: The optimizers that have made a step and are not deleted.
        count: The rounds so far: for a single optimizer, its steps.
        ticks: The steps of all optimizers so far.
        changes: How often an optimizer or some of its parameters were added: what was derived from them before is
            outdated then.
    """

    def __init__(self) -> None:
        self.optimizers: list[OptimizerSteps] = []
        self._journal: Journal | None = None  # while it is open
        self._after_each: Callable[[int], None] | None = None
        self._round: set[OptimizerSteps] = set()
        self.count = 0
        self.ticks = 0
        self.changes = 0

    def open(self, journal: Journal, after_each: Callable[[int], None] | None = None) -> None:
        """Counts from now on.

        Args:
            journal: Where the steps are noted. It catches up before each of them.
            after_each: Called at the first step of each round, with the new ``count``.
        """
        self._journal, self._after_each = journal, after_each
        _step_hook.add(self)
        _scaler_step.add(self)

    def close(self) -> None:
        """Stops counting."""
        _scaler_step.remove(self)
        _step_hook.remove(self)
        self._journal = self._after_each = None

    def of(self, parameters: Iterable[int]) -> tuple[OptimizerSteps, ...]:
        """The optimizers that train some of the parameters with these ids."""
        wanted = frozenset(parameters)
        return tuple([steps for steps in self.optimizers if not wanted.isdisjoint(steps.parameters)])

    def steps_of(self, optimizer: Optimizer) -> OptimizerSteps:
        """The steps of one optimizer."""
        for steps in self.optimizers:
            if steps._optimizer() is optimizer:
                return steps
        self._is_about_to_change()
        steps = OptimizerSteps(optimizer)
        self.optimizers = [*[other for other in self.optimizers if not other.is_over()], steps]
        return steps

    def _is_about_to_change(self) -> None:
        if self._journal is not None:
            self._journal.work_up()
        self.changes += 1

    def add_step_of(self, optimizer: Optimizer) -> None:
        """Counts one step."""
        journal = self._journal  # close() may come between any two lines
        if journal is None:
            return
        journal.catch_up()
        steps = self.steps_of(optimizer)
        if steps.has_others(optimizer):
            self._is_about_to_change()
            steps.look_again()
        is_successor = not steps.count and any([steps.has_replaced(other) for other in self._round])
        self.ticks += 1
        steps.count += 1
        journal.entries.append((steps.work_up, (self.ticks,)))
        if self._round and not is_successor and steps not in self._round:
            self._round.add(steps)
            return
        self._round = {steps}
        self.count += 1
        after_each = self._after_each
        if after_each is not None:
            after_each(self.count)


def has_stepped_since(optimizers: Sequence[OptimizerSteps], tick: int) -> bool:
    """Whether one of the optimizers has made a step after this one of all optimizers."""
    return any([steps.latest > tick for steps in optimizers])


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
        may_end_early: Whether some of them had to compute gradients of certain tensors only.
    """

    __slots__ = ("_before_each", "count", "may_end_early")

    def __init__(self) -> None:
        self._before_each: Callable[[], None] | None = None  # while it is open
        self.count = 0
        self.may_end_early = False

    def open(self, before_each: Callable[[], None]) -> None:
        """Counts from now on. Calls ``before_each`` before each of them is counted."""
        self._before_each = before_each
        _engine_call.add(self)

    def add(self) -> None:
        """Counts one that begins."""
        before_each = self._before_each  # close() may come between any two lines
        if before_each is not None:
            before_each()
        self.count += 1

    def close(self) -> None:
        """Stops counting."""
        _engine_call.remove(self)
        self._before_each = None


def _count_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        inputs = args[4] if len(args) > 4 else kwargs.get("inputs")
        for counter in _engine_call.users:
            counter.add()
            if inputs:
                counter.may_end_early = True
        return run(*args, **kwargs)

    return counted


_engine_call: Final[AttributePatch[BackwardCounter]] = backward_patch(_count_backward)
