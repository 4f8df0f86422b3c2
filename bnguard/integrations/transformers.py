"""A guard around the training runs of a transformers ``Trainer``.

::

    from bnguard.integrations.transformers import BNGuardCallback
    from transformers import Trainer

    callback = BNGuardCallback(use_running_stats=True, include="*backbone*")
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
    with callback:
        trainer.train()

The trainer calls ``model.train()`` at every step, which undoes ``bn.eval()``. Where nothing is resumed and the trainer
has no ``model_init``, a plain block does the same::

    import bnguard

    trainer = Trainer(model, args, train_dataset=dataset)
    with bnguard.frozen(model, use_running_stats=True, include="*backbone*"):
        trainer.train()

Inside of that, a checkpoint that ``train(resume_from_checkpoint=...)`` loads with other statistics is a change, and put
back; the callback begins after it. To learn of an evaluation in train mode, there is the plain block::

    with bnguard.frozen(model):
        trainer.evaluate(dataset)

Needs the extra ``transformers`` (``pip install 'bnguard[transformers]'``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, get_args

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning
from bnguard.guard import messages as _report
from bnguard.guard.frozen import frozen
from bnguard.guard.options import OnChange
from bnguard.guard.phrases import Phrases
from bnguard.integrations._base import missing_text, settings_of
from bnguard.layers.select import Selector
from bnguard.records import GuardedLayer, StatsChange
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.ranks import Group
from bnguard.words import short_repr, suggestion

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import SaveStrategy
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(missing_text(__name__, "transformers", "transformers")) from None

__all__ = ["BNGuardCallback", "CheckAt"]

CheckAt: TypeAlias = Literal["step_end", "epoch_end", "evaluate", "save"]

_EVENTS: Final[tuple[str, ...]] = get_args(CheckAt)
_PHRASES: Final = Phrases(
    place="BNGuardCallback()",
    place_with_budget="BNGuardCallback(updates={})",
    choice="BNGuardCallback({})",
    everything="callback.changes lists them all",
    is_of_run=True,
)


class BNGuardCallback(TrainerCallback):
    """Holds the running statistics of a model still during ``trainer.train()``, or says who moves them.

    A ``Trainer`` tells its callbacks that training begins, after it has loaded the checkpoint it resumes from, and that
    it ends; when it ends with an exception or Ctrl-C it tells nobody. So write ``with callback:`` around
    ``trainer.train()``: the guard begins with the training and leaves with the block, whatever happens.

    Without ``with``, a run that fails leaves the model guarded, until the next ``train()`` of a trainer with this
    callback, or ``stop()``. Where ``auto_find_batch_size=True`` begins anew in between, so does the guard.

    Not covered: ``trainer.evaluate()`` and ``trainer.predict()`` outside of ``train()``, for which
    ``with bnguard.frozen(model):`` is there.

    Args:
        on_change: What to do about an update: ``"raise"``, ``"warn"`` or ``"restore"``, as in ``bnguard.frozen``.
        use_running_stats: Guarded layers normalise with their running statistics, as in eval mode.
        affine: Hold ``weight`` and ``bias`` of the guarded layers too.
        updates: Updates that each layer may make in a run; one more is the change.
        include: Guard only these layers, as in ``bnguard.frozen``.
        exclude: Do not guard these layers.
        group: Whose ranks agree in a distributed run, as in ``bnguard.frozen``.
        model: The model to guard, a teacher say; None for the one that the trainer trains.
        check_at: When to compare the statistics during the run, one event or several: ``"step_end"``, ``"epoch_end"``,
            ``"evaluate"``, ``"save"``; what else but forwards changed is then found there. ``"save"`` compares before a
            checkpoint is made, so that under ``"raise"`` and ``"restore"`` none holds other statistics than those of
            the beginning. Each comparison waits for the device. By default only the end of the run compares.

    Raises:
        TypeError: ``model`` is no module; an option has the wrong type.
        ValueError: An option has a wrong value or contradicts another. A pattern that selects nothing is found here if
            ``model`` is given, else when training begins.

    Warns:
        BNGuardWarning: The model has no layer with running statistics.
    """

    def __init__(
        self,
        on_change: OnChange = "raise",
        *,
        use_running_stats: bool = False,
        affine: bool = False,
        updates: int = 0,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        group: Group = None,
        model: nn.Module | None = None,
        check_at: CheckAt | Iterable[CheckAt] = (),
    ) -> None:
        if isinstance(on_change, nn.Module):
            raise TypeError(
                "BNGuardCallback() guards the model of its trainer; another one is given as model=..., got "
                f"{short_repr(on_change)} for on_change"
            )
        self._settings = settings_of(_PHRASES, on_change, use_running_stats, affine, updates, include, exclude, group)
        self._check_at = _checked_events(check_at)
        self._model = model
        self._guard: frozen | None = None if model is None else frozen._with(model, self._settings)
        self._is_entered = False
        self._has_begun = False

    def __enter__(self) -> Self:
        if self._is_entered:
            raise BNGuardError("this BNGuardCallback is in a with block already: make one for each trainer")
        self.stop()
        self._is_entered, self._has_begun = True, False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_entered = False
        self._leave(error)
        if error is None and not self._has_begun:
            raise BNGuardError(
                "no training began in the block of this BNGuardCallback, so it guarded nothing:\n"
                "call trainer.train() in there, of a Trainer(..., callbacks=[callback])"
            )

    def stop(self) -> None:
        """Ends the guard of a run that has ended with an exception. Otherwise does nothing.

        Warns:
            BNGuardWarning: Something other than a forward changed the statistics; they are put back as ``on_change``
                says.
        """
        guard, ended = self._guard, BNGuardError()
        self._leave(ended)
        notes = getattr(ended, "__notes__", [])
        has_changed = guard is not None and any([not change.prevented for change in guard.changes])
        if notes and has_changed and self._settings.on_change == "raise":
            text = f"a training run ended with an exception, and its guard ends now.\n{notes[0]}"
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the current or last run. See ``bnguard.frozen``."""
        return () if self._guard is None else self._guard.changes

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The guarded layers, and how each is protected; none before the first run, unless ``model`` is given."""
        return () if self._guard is None else self._guard.layers

    def check(self) -> None:
        """Compares the statistics now, and acts as the end of the run would. Outside of a run, does nothing.

        Raises:
            StatsChangedError: Under ``on_change="raise"``, if something changed or the error of a forward was caught.
        """
        if self._guard is not None:
            self._guard.check()

    def report(self) -> str:
        """What is guarded, how, and what changed, as text."""
        return _report.report_text(self.changes, self.layers, self._settings)

    # What the trainer calls.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the guard."""
        self.stop()  # of a run that ended without a word
        model = kwargs["model"] if self._model is None else self._model
        self._guard = frozen._with(model, self._settings)
        self._has_begun = True
        self._guard.start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the guard.

        Raises:
            StatsChangedError: As at the end of a block of ``bnguard.frozen``.
        """
        self._leave(None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compares, if ``check_at`` says so."""
        self._check_if_asked("step_end", saves=control.should_save)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compares, if ``check_at`` says so."""
        self._check_if_asked("epoch_end", saves=control.should_save)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compares, if ``check_at`` says so."""
        may_save = args.save_strategy == SaveStrategy.BEST  # which is decided after this
        self._check_if_asked("evaluate", saves=control.should_save or may_save)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compares, if ``check_at`` says so: what another callback has had saved, or changed, since the comparison."""
        self._check_if_asked("save")

    def _check_if_asked(self, event: CheckAt, *, saves: bool = False) -> None:
        """Compares at an event, or because a checkpoint is made after it."""
        if event in self._check_at or (saves and "save" in self._check_at):
            self.check()

    def _leave(self, error: BaseException | None) -> None:
        if self._guard is not None:  # and does nothing if no block of it is open
            self._guard.__exit__(None if error is None else type(error), error, None)


def _checked_events(check_at: Any) -> frozenset[str]:
    """The events at which to compare."""
    events = [check_at] if isinstance(check_at, str) else check_at
    if not isinstance(events, Iterable):
        raise TypeError(f"check_at must be one of {', '.join(_EVENTS)}, or a list of them, got {short_repr(check_at)}")
    events = list(events)
    for event in events:
        if event not in _EVENTS:
            raise ValueError(f"check_at={check_at!r}: {suggestion(event, _EVENTS)}")
    return frozenset(events)
