"""The guard of a trainer's run, on which each integration is built."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from torch import nn

from bnguard.guard import messages
from bnguard.guard.frozen import frozen
from bnguard.guard.idle import IdleCheck
from bnguard.guard.options import Frontend, OnChange, Settings, settings_for
from bnguard.guard.phrases import Phrases
from bnguard.integrations._messages import no_part_text
from bnguard.integrations._phase import Phase, RunOptions, taken_from
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.select import is_within
from bnguard.layers.tree import find_layers
from bnguard.records import GuardedLayer, StatsChange
from bnguard.words import short_repr

Target: TypeAlias = str | Sequence[str] | nn.Module | None


class RunGuard:
    """Guards the running statistics of a model during each run of a trainer.

    An integration derives from this class and calls ``_begin_run(model)`` when a run begins, ``_reach(epoch, step)`` at
    the beginning of each epoch and step if the phase is not the whole run, ``check()`` before results are used that
    must not depend on changed statistics (a validation, a checkpoint), ``_end_run()`` when the run ends, and
    ``_end_failed_run(error)`` when it ends with an exception. It adds to ``_batches`` after each batch: if none of the
    guarded layers was called meanwhile, the end of the run warns about that.

    Args:
        phrases: What messages call the guard.
        target: What to guard: the path of a submodule of the model that the trainer trains, or several; a module; None
            for the whole model.
        on_change: What to do about an update, as in ``frozen``.
        options: The other options of ``frozen``, and those about the phase.

    Raises:
        TypeError: ``target`` or an option has the wrong type, or there is no such option.
        ValueError: ``target`` is empty; an option has a wrong value or contradicts another.
    """

    def __init__(self, phrases: Phrases, target: Target, on_change: OnChange, options: RunOptions) -> None:
        self._part = target if isinstance(target, nn.Module) else None
        self._paths = () if isinstance(target, nn.Module) else _as_paths(target)
        others: Any = dict(options)
        self._phase: Phase = taken_from(others)
        self._settings: Settings = settings_for(Frontend(phrases), on_change, others, RunOptions)
        self._guard: frozen | None = None  # of the current run, else of the last one
        self._block = ExitStack()  # while it is open
        self._batches = 0  # that the trainer has run, as far as the integration counts them

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": ExitStack()}  # a copy of a guard is closed

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the current or last run. See ``bnguard.frozen``."""
        return () if self._guard is None else self._guard.changes

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The guarded layers, and how each is protected. Empty before the first run if the model is not known."""
        return () if self._guard is None else self._guard.layers

    def check(self) -> None:
        """Compares the statistics now, and acts as the end of the run would. Outside a run, does nothing.

        Raises:
            StatsChangedError: Under ``on_change="raise"``, if something changed or the error of a forward was caught.
        """
        if self._guard is not None:
            self._guard.check()

    def report(self) -> str:
        """What is guarded, how, and what changed, as text."""
        return messages.report_text(self.changes, self.layers, self._settings)

    def _guarded_of(self, model: nn.Module) -> nn.Module:
        """The module on which the guard is: the model that the trainer trains, or the one that the user has given.

        Raises:
            ValueError: The model lacks a submodule that is to be guarded.
        """
        for path in self._paths:
            _check_path(model, path, self._settings.frontend.phrases)
        return model if self._part is None else self._part

    def _layers_of(self, model: nn.Module) -> list[StatsLayer]:
        """The layers in what is guarded, before ``include`` and ``exclude``."""
        return [layer for layer in find_layers(self._guarded_of(model)) if is_within(layer, self._paths)]

    def _part_name(self, model: nn.Module) -> str:
        """The target, else the patterns, as a prefix that distinguishes the metrics of several guards."""
        names = list(self._paths)
        if self._part is not None:
            names = [name for name, module in model.named_modules() if module is self._part]
            names = names or [type(self._part).__name__]
        elif not names:
            names = [pattern for pattern in self._settings.include if isinstance(pattern, str)]
        return f"{','.join(names)}/" if any(names) else ""

    def _prepare(self, model: nn.Module) -> frozen:
        """Makes the guard of a run. See ``frozen`` for the errors and the warning.

        Args:
            model: The model that the trainer trains.
        """
        settings = self._settings._replace(within=self._paths)
        if multiprocessing.parent_process() is not None:  # ddp_spawn: the callback that the user has stays empty
            phrases = settings.frontend.phrases
            phrases = phrases._replace(everything=f"{phrases.everything}, in this process")
            settings = settings._replace(frontend=settings.frontend._replace(phrases=phrases))
        self._guard = frozen._with(self._guarded_of(model), settings)
        return self._guard

    def _begin_run(self, model: nn.Module, epoch: int = 0, step: int = 0) -> None:
        """Guards the model from now on, or from the beginning of the phase on.

        Args:
            model: The model that the trainer trains.
            epoch: The number of epochs that are over; not 0 in a run that is resumed.
            step: The number of optimizer steps that are over.
        """
        guard = self._prepare(model)
        if self._phase.covers(epoch, step):
            self._start(guard)

    def _start(self, guard: frozen) -> None:
        """Begins a block."""
        self._block.enter_context(IdleCheck(guard, lambda: self._batches))

    def _reach(self, epoch: int, step: int) -> None:
        """Begins or ends the guard of a run, if the phase begins or ends here.

        Raises:
            StatsChangedError: As at the end of a block.
        """
        if self._guard is None or self._phase.is_whole_run:
            return
        if not self._phase.covers(epoch, step):
            RunGuard._end_run(self)  # not that of a subclass: the run goes on
        elif not self._is_on():
            self._start(self._guard)

    def _is_on(self) -> bool:
        """Whether the model is guarded at the moment."""
        return self._guard is not None and bool(self._guard._open)

    def _end_run(self, error: BaseException | None = None) -> None:
        """Ends the guard of a run. If it has ended, does nothing.

        Args:
            error: The exception with which the run ends. Findings become notes of it.

        Raises:
            StatsChangedError: As at the end of a block, if ``error`` is None.
        """
        self._block.__exit__(None if error is None else type(error), error, None)

    def _end_failed_run(self, error: BaseException) -> list[str]:
        """Ends the guard of a run that ended with an exception, and raises nothing that would replace it.

        Returns:
            The notes that were added to the exception.
        """
        earlier = len(getattr(error, "__notes__", ()))
        try:
            self._end_run(error)
        except Exception as failure:
            error.add_note(f"bnguard: {type(failure).__name__}: {failure}")
        return list(getattr(error, "__notes__", ()))[earlier:]


def phrases_of(call: str, variable: str, target: Target = None) -> Phrases:
    """What messages call the guard of an integration.

    Args:
        call: The name of its class.
        variable: What its instance is called in an example.
        target: What the user has given to be guarded.
    """
    first = "" if target is None else "model, " if isinstance(target, nn.Module) else f"{target!r}, "
    first = first.replace("{", "{{").replace("}", "}}")  # the choice is a format
    return Phrases(
        place=f"{call}()",
        place_with_budget=f"{call}(updates={{}})",
        choice=f"{call}({first}{{}})",
        everything=f"{variable}.changes lists them all",
        is_of_run=True,
    )


def _as_paths(target: Any) -> tuple[str, ...]:
    if target is None:
        return ()
    paths = [target] if isinstance(target, str) else target
    if not isinstance(paths, (list, tuple)) or not all([isinstance(path, str) for path in paths]):
        raise TypeError(
            "target must be the path of a submodule, such as 'backbone', a list of them, a module, or None for the "
            f"whole model, got {short_repr(target)}; layers are chosen with include="
        )
    if not paths or not all(paths):
        raise ValueError(f"target={target!r} names no submodule; leave it out to mean the whole model")
    return tuple(paths)


def _check_path(model: nn.Module, path: str, phrases: Phrases) -> None:
    """Checks that there is a submodule at a path.

    Raises:
        ValueError: There is none.
    """
    part = model
    names = path.split(".")
    for position, name in enumerate(names):
        child = part._modules.get(name)
        if child is None:
            there = ".".join(names[:position]) or type(model).__name__
            children = [key for key, module in part._modules.items() if module is not None]
            raise ValueError(no_part_text(path, there, name, children, phrases))
        part = child
