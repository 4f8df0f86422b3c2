"""A guard around the runs of an Ignite engine.

::

    from bnguard.integrations.ignite import BNGuardHandler
    from ignite.engine import Events, create_supervised_trainer

    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
    handler = BNGuardHandler(model, use_running_stats=True, include="backbone")
    handler.attach(trainer, check_at=Events.EPOCH_COMPLETED)
    trainer.run(loader, max_epochs=2)

Ignite calls ``model.train()`` at every iteration, which undoes ``bn.eval()``. To learn of a validation that was left in
train mode, attach a handler to the engine that validates::

    from ignite.engine import create_supervised_evaluator

    evaluator = create_supervised_evaluator(model)
    BNGuardHandler(model).attach(evaluator)
    evaluator.run(loader)

Needs the extra ``ignite`` (``pip install 'bnguard[ignite]'``).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import nn

from bnguard.guard.frozen import frozen
from bnguard.guard.options import OnChange
from bnguard.guard.phrases import Phrases
from bnguard.integrations._base import missing_text, settings_of
from bnguard.layers.select import Selector
from bnguard.records import GuardedLayer, StatsChange
from bnguard.torch_internals.ranks import Group

try:
    from ignite.engine import Engine, Events
    from ignite.engine.events import CallableEventWithFilter, EventsList
except ModuleNotFoundError as error:
    if error.name != "ignite":
        raise
    raise ImportError(missing_text(__name__, "pytorch-ignite", "ignite")) from None

__all__ = ["BNGuardHandler"]

_PHRASES: Final = Phrases(
    place="BNGuardHandler()",
    place_with_budget="BNGuardHandler(updates={})",
    choice="BNGuardHandler(model, {})",
    everything="handler.changes lists them all",
    is_of_run=True,
)


class BNGuardHandler:
    """Holds the running statistics of a model still during the runs of Ignite engines, or says who moves them.

    From ``attach(engine)`` on each ``engine.run()`` is a block of ``bnguard.frozen``: all handlers of all events are
    inside, whatever their order. However the run ends (to its end, ``terminate()``, an exception, Ctrl-C), the guard
    leaves, and nothing of it stays on the model. ``interrupt()`` ends a block too; the ``run()`` that resumes begins
    another, with a fresh budget of ``updates``.

    It is ``run()`` that is guarded, not events that are handled: an engine with a handler of
    ``Events.EXCEPTION_RAISED`` keeps exceptions from you, one that raises there keeps them from the handlers after it,
    and no event tells of a run that is resumed. So the guard adds no handler, and exceptions go where they went.

    A deep copy of an engine is guarded as well, on the model that it runs.

    Not covered: a run that is under way already when the handler is attached. A checkpoint that is loaded inside the
    run is a change of the statistics: load it before, as ``Checkpoint.load_objects`` is meant to be used.

    Args:
        model: The model that the engines run, or one layer.
        on_change: What to do about an update: ``"raise"``, ``"warn"`` or ``"restore"``, as in ``bnguard.frozen``.
        use_running_stats: Guarded layers normalise with their running statistics, as in eval mode.
        affine: Hold ``weight`` and ``bias`` of the guarded layers too.
        updates: Updates that each layer may make in a run; one more is the change.
        include: Guard only these layers, as in ``bnguard.frozen``.
        exclude: Do not guard these layers.
        group: Whose ranks agree in a distributed run, as in ``bnguard.frozen``.

    Raises:
        TypeError: ``model`` is no module; an option has the wrong type.
        ValueError: An option has a wrong value, contradicts another, or a pattern selects nothing.

    Warns:
        BNGuardWarning: The model has no layer with running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        on_change: OnChange = "raise",
        *,
        use_running_stats: bool = False,
        affine: bool = False,
        updates: int = 0,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        group: Group = None,
    ) -> None:
        settings = settings_of(_PHRASES, on_change, use_running_stats, affine, updates, include, exclude, group)
        self._guard = frozen._with(model, settings)
        self._runs: list[_GuardedRun] = []

    def attach(self, engine: Engine, check_at: Events | CallableEventWithFilter | EventsList | None = None) -> None:
        """Guards each run of ``engine`` from the next one on. Several engines may be attached to.

        Args:
            engine: The trainer, or an evaluator.
            check_at: When to compare the statistics during the run, as ``Events.EPOCH_COMPLETED`` or
                ``Events.ITERATION_COMPLETED(every=100)``; what else but forwards changed is then found there. Each
                comparison waits for the device. None compares at the end of the run only.

        Raises:
            TypeError: ``engine`` is no Ignite engine.
            ValueError: The handler is attached to it already, or ``check_at`` is no event of it or is
                ``Events.EXCEPTION_RAISED``, which would keep exceptions from you.
        """
        if not isinstance(engine, Engine):
            raise TypeError(f"attach() takes an ignite.engine.Engine, got {type(engine).__name__}")
        if any([run.engine is engine for run in self._runs]):
            raise ValueError("this BNGuardHandler is attached to the engine already: call detach() first")
        if check_at is not None and Events.EXCEPTION_RAISED in _events_in(check_at):
            raise ValueError(
                "check_at=Events.EXCEPTION_RAISED: once that event has a handler, Ignite keeps exceptions from you; "
                "leave it out, the end of the run compares in any case"
            )
        self._runs.append(_GuardedRun(engine, self._guard, check_at))

    def detach(self) -> None:
        """Leaves the engines as they were; a run that is under way is guarded to its end. Twice does nothing."""
        while self._runs:
            self._runs.pop().remove()

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the current or last run. See ``bnguard.frozen``."""
        return self._guard.changes

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The guarded layers, and how each is protected."""
        return self._guard.layers

    def check(self) -> None:
        """Compares the statistics now, and acts as the end of the run would. Outside of a run, does nothing.

        Raises:
            StatsChangedError: Under ``on_change="raise"``, if something changed or the error of a forward was caught.
        """
        self._guard.check()

    def report(self) -> str:
        """What is guarded, how, and what changed, as text."""
        return self._guard.report()


class _GuardedRun:
    """Stands in an engine for its method ``run``, and calls that inside a block.

    Attributes:
        engine: The engine.
    """

    def __init__(self, engine: Engine, guard: frozen, check_at: Any) -> None:
        self.engine = engine
        self._guard: frozen | None = guard
        self._handle = None if check_at is None else engine.add_event_handler(check_at, self.check)
        self._earlier: Callable[..., Any] | None = vars(engine).get("run")
        self._run: Callable[..., Any] = engine.run
        functools.update_wrapper(self, self._run, updated=())  # not the attributes of another one of these
        vars(engine)["run"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guard = self._guard
        if guard is None:
            return self._run(*args, **kwargs)
        with guard:
            return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedRun:
        # The function that an engine runs, and so the model, is shared by a copy as a rule; else it is copied by now.
        other = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            is_shared = name == "_guard" and value is not None and id(value._model) not in memo
            vars(other)[name] = value if is_shared else copy.deepcopy(value, memo)
        return other

    def check(self, *args: object) -> None:
        """Compares; a handler of events."""
        if self._guard is not None:
            self._guard.check()

    def remove(self) -> None:
        """Gives the engine its own ``run`` back. Where somebody has wrapped this one since, it does nothing more."""
        self._guard = None
        if self._handle is not None:
            self._handle.remove()
        if vars(self.engine).get("run") is self:
            earlier = self._earlier
            while isinstance(earlier, _GuardedRun) and earlier._guard is None:
                earlier = earlier._earlier
            if earlier is None:
                del vars(self.engine)["run"]
            else:
                vars(self.engine)["run"] = earlier


def _events_in(event: Any) -> list[Any]:
    """The events that one value stands for."""
    return list(event) if isinstance(event, EventsList) else [event]
