"""``BNGuardHandler``: ``frozen`` around the runs of an Ignite engine.

::

    from bnguard.integrations.ignite import BNGuardHandler
    from ignite.engine import Events, create_supervised_trainer

    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
    handler = BNGuardHandler(model, use_running_stats=True, include="backbone")
    handler.attach(trainer, check_at=Events.EPOCH_COMPLETED)
    trainer.run(loader, max_epochs=2)

Ignite calls ``model.train()`` at every iteration, which undoes ``bn.eval()``. To find a validation in train mode,
attach a handler to the engine that validates::

    from ignite.engine import create_supervised_evaluator

    evaluator = create_supervised_evaluator(model)
    BNGuardHandler(model).attach(evaluator)
    evaluator.run(loader)

Needs the extra ``ignite`` (``pip install 'bnguard[ignite]'``).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Unpack

from torch import nn

from bnguard.guard.frozen import frozen
from bnguard.guard.idle import IdleCheck
from bnguard.guard.options import OnChange
from bnguard.integrations._base import RunGuard, phrases_of
from bnguard.integrations._messages import missing_text
from bnguard.integrations._phase import Phase, RunOptions
from bnguard.words import short_repr

try:
    from ignite.engine import Engine, Events
    from ignite.engine.events import CallableEventWithFilter, EventsList
except ModuleNotFoundError as error:
    if error.name != "ignite":
        raise
    raise ImportError(missing_text(__name__, "pytorch-ignite", "ignite")) from None

__all__ = ["BNGuardHandler"]


class BNGuardHandler(RunGuard):
    """Guards the running statistics of a model during the runs of Ignite engines.

    After ``attach(engine)`` each ``engine.run()`` is a block of ``bnguard.frozen`` that encloses all handlers of all
    events, in any order. However the run ends (normally, by ``terminate()``, an exception or Ctrl-C), the guard ends
    with it, and its hooks are removed from the model. ``interrupt()`` ends a block too; the ``run()`` that resumes
    begins another, with a new budget of ``updates``.

    The guard wraps ``run()`` and adds no handlers to the events of a run: an engine with a handler of
    ``Events.EXCEPTION_RAISED`` does not raise exceptions itself, and no event reports that a run is resumed.

    A deep copy of an engine is guarded as well, on the model that it runs.

    Not covered: a run that has begun before the handler is attached. A checkpoint that is loaded inside the run is a
    change of the statistics: load it before the run, as ``Checkpoint.load_objects`` is meant to be used.

    Args:
        target: What to guard: the model that the engines run, or a part of it, such as ``model.backbone``. No path: an
            engine does not know its model.
        on_change: What to do about an update: ``"raise"``, ``"warn"`` or ``"restore"``, as in ``bnguard.frozen``.
        **options: ``use_running_stats``, ``affine``, ``updates`` (per run), ``include``, ``exclude``, ``buffers``: see
            ``bnguard.frozen``. ``until_epoch=5`` ends the guard of a run when its epoch 5 begins, of which the first is
            0 (``engine.state.epoch`` counts from 1); ``from_epoch=2`` begins it with epoch 2. ``until_step`` and
            ``from_step`` count iterations.

    Raises:
        TypeError: ``target`` is not a module; an option has the wrong type, or there is no such option.
        ValueError: An option has a wrong value, contradicts another, or a pattern selects nothing.

    Warns:
        BNGuardWarning: The model has no layer with running statistics.
    """

    def __init__(self, target: nn.Module, on_change: OnChange = "raise", **options: Unpack[RunOptions]) -> None:
        if not isinstance(target, nn.Module):
            raise TypeError(
                "BNGuardHandler takes the model or a part of it, since an engine does not know its model, got "
                f"{short_repr(target)}"
            )
        super().__init__(phrases_of("BNGuardHandler", "handler", target), target, on_change, options)
        self._prepare(target)
        self._runs: list[_GuardedRun] = []

    def attach(self, engine: Engine, check_at: Events | CallableEventWithFilter | EventsList | None = None) -> None:
        """Guards each run of ``engine`` from the next one on. A handler may be attached to several engines.

        Args:
            engine: The trainer, or an evaluator.
            check_at: When to compare the statistics during the run, such as ``Events.EPOCH_COMPLETED`` or
                ``Events.ITERATION_COMPLETED(every=100)``, in order to find changes that are not made by forwards. Each
                comparison waits for the device. None compares at the end of the run only.

        Raises:
            TypeError: ``engine`` is no Ignite engine.
            ValueError: The handler is attached to the engine already, or ``check_at`` is no event of the engine or is
                ``Events.EXCEPTION_RAISED``, with a handler of which the engine no longer raises exceptions.
        """
        if not isinstance(engine, Engine):
            raise TypeError(f"attach() takes an ignite.engine.Engine, got {type(engine).__name__}")
        if any([run.engine is engine for run in self._runs]):
            raise ValueError("this BNGuardHandler is attached to the engine already: call detach() first")
        if check_at is not None and Events.EXCEPTION_RAISED in _events_in(check_at):
            raise ValueError(
                "check_at=Events.EXCEPTION_RAISED: once this event has a handler, Ignite no longer raises exceptions; "
                "leave it out, the end of the run compares in any case"
            )
        self._runs.append(_GuardedRun(engine, self._guard, check_at, self._phase))

    def detach(self) -> None:
        """Restores the engines. A run that has begun is guarded to its end. Calling this twice does nothing."""
        while self._runs:
            self._runs.pop().remove()


class _GuardedRun:
    """Replaces the method ``run`` of an engine, and calls it inside a block.

    Attributes:
        engine: The engine.
    """

    def __init__(self, engine: Engine, guard: frozen | None, check_at: Any, phase: Phase) -> None:
        self.engine = engine
        self._guard = guard
        self._phase = phase
        self._block: ExitStack | None = None  # while the engine runs
        self._is_in_block = False
        self._handles = [] if check_at is None else [engine.add_event_handler(check_at, self.check)]
        if not phase.is_whole_run:
            event = Events.EPOCH_STARTED if phase.unit == "epoch" else Events.ITERATION_STARTED
            self._handles.append(engine.add_event_handler(event, self.reach))
        self._earlier: Callable[..., Any] | None = vars(engine).get("run")
        self._run: Callable[..., Any] = engine.run
        functools.update_wrapper(self, self._run, updated=())  # not the attributes of another _GuardedRun
        vars(engine)["run"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guard = self._guard
        if guard is None:
            return self._run(*args, **kwargs)
        with ExitStack() as self._block:
            self._block.callback(self._forget)
            self._is_in_block = self._phase.is_whole_run
            if self._is_in_block:
                self._enter(guard, self._block)
            return self._run(*args, **kwargs)

    def _forget(self) -> None:
        self._block, self._is_in_block = None, False

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedRun:
        # Usually a copy of an engine shares its function, and so its model. Otherwise the model is in the memo by now.
        other = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            is_shared = name == "_guard" and value is not None and id(value._model) not in memo
            vars(other)[name] = value if is_shared else copy.deepcopy(value, memo)
        return other

    def check(self, *args: object) -> None:
        """Compares. Is a handler of events."""
        if self._guard is not None:
            self._guard.check()

    def reach(self, *args: object) -> None:
        """Begins or ends the block where the phase begins or ends. Is a handler of events."""
        guard, block, state = self._guard, self._block, self.engine.state
        if guard is None or block is None:
            return
        covers = self._phase.covers(state.epoch - 1, state.iteration - 1)
        if covers and not self._is_in_block:
            self._enter(guard, block)
        elif self._is_in_block and not covers:
            block.close()
        self._is_in_block = covers

    def _enter(self, guard: frozen, block: ExitStack) -> None:
        # Iterations that are over: the last one may have been ended before it called anything.
        block.enter_context(IdleCheck(guard, lambda: max(self.engine.state.iteration - 1, 0)))

    def remove(self) -> None:
        """Restores ``run``. If other code has wrapped this object since, it stays, and only calls what it replaced."""
        self._guard = None
        for handle in self._handles:
            handle.remove()
        if vars(self.engine).get("run") is self:
            earlier = self._earlier
            while isinstance(earlier, _GuardedRun) and earlier._guard is None:
                earlier = earlier._earlier
            if earlier is None:
                del vars(self.engine)["run"]
            else:
                vars(self.engine)["run"] = earlier


def _events_in(event: Any) -> list[Any]:
    """The events of ``a | b``, or a single event."""
    return list(event) if isinstance(event, EventsList) else [event]
