"""``BNGuardCallback``: ``frozen`` around the training runs of a transformers ``Trainer``.

::

    from bnguard.integrations.transformers import BNGuardCallback
    from transformers import Trainer

    callback = BNGuardCallback("backbone", use_running_stats=True)
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
    with callback:
        trainer.train()

The trainer calls ``model.train()`` at every step, which undoes ``bn.eval()``. If no run is resumed and the trainer has
no ``model_init``, a plain block has the same effect::

    import bnguard

    trainer = Trainer(model, args, train_dataset=dataset)
    with bnguard.frozen(model, use_running_stats=True, include="*backbone*"):
        trainer.train()

Inside such a block, ``train(resume_from_checkpoint=...)`` changes the statistics when it loads a checkpoint, and the
guard restores them; the callback begins after that. To find an evaluation in train mode, use a plain block::

    with bnguard.frozen(model):
        trainer.evaluate(dataset)

Needs the extra ``transformers`` (``pip install 'bnguard[transformers]'``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, Unpack, get_args

from bnguard.errors import BNGuardError, BNGuardWarning
from bnguard.guard.options import OnChange
from bnguard.integrations._base import RunGuard, Target, phrases_of
from bnguard.integrations._messages import missing_text
from bnguard.integrations._phase import RunOptions
from bnguard.torch_internals.callsite import call_site
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
_ROUNDING: Final = 1e-6  # the trainer adds up fractions of epochs


class BNGuardCallback(RunGuard, TrainerCallback):
    """Guards the running statistics of a model during ``trainer.train()``.

    A ``Trainer`` calls its callbacks when training begins, after it has loaded the checkpoint it resumes from, and when
    training ends; after an exception or Ctrl-C it calls none. So write ``with callback:`` around ``trainer.train()``:
    the guard begins with the training and ends with the block, however the training ends.

    Without ``with``, the model is still guarded after a run that fails, until the next ``train()`` of a trainer with
    this callback, or ``stop()``. If ``auto_find_batch_size=True`` starts the training again, the guard starts again.

    Not covered: ``trainer.evaluate()`` and ``trainer.predict()`` outside ``train()``: use ``with
    bnguard.frozen(model):`` for these.

    Args:
        target: What to guard: the path of a submodule of the model that the trainer trains, such as ``"backbone"``, or
            a list of them; a module, such as a teacher; None for the whole model.
        on_change: What to do about an update: ``"raise"``, ``"warn"`` or ``"restore"``, as in ``bnguard.frozen``.
        check_at: When to compare the statistics during the run, one event or several: ``"step_end"``, ``"epoch_end"``,
            ``"evaluate"``, ``"save"``, in order to find changes that are not made by forwards. ``"save"`` compares
            before a checkpoint is saved: under ``"raise"`` and ``"restore"`` every checkpoint holds the original
            statistics. Each comparison waits for the device. By default only the end of the run compares.
        **options: ``use_running_stats``, ``affine``, ``updates`` (per run), ``include``, ``exclude``, ``buffers``: see
            ``bnguard.frozen``. ``until_epoch=5`` ends the guard when epoch 5 begins, of which the first is 0;
            ``from_epoch=2`` begins it with epoch 2. ``until_step`` and ``from_step`` count optimizer steps, as
            ``state.global_step`` does.

    Raises:
        TypeError: ``target`` is neither a path nor a module; an option has the wrong type, or there is no such option.
        ValueError: An option has a wrong value or contradicts another. A pattern that selects nothing is found here if
            ``target`` is a module, otherwise when training begins, as is a path that the model does not have.

    Warns:
        BNGuardWarning: The model has no layer with running statistics.
    """

    def __init__(
        self,
        target: Target = None,
        on_change: OnChange = "raise",
        *,
        check_at: CheckAt | Iterable[CheckAt] = (),
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(phrases_of("BNGuardCallback", "callback", target), target, on_change, options)
        self._check_at = _checked_events(check_at)
        if self._part is not None:
            self._prepare(self._part)
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
        self._end_run(error)
        if error is None and not self._has_begun:
            raise BNGuardError(
                "no training began in the block of this BNGuardCallback, so it guarded nothing:\n"
                "call trainer.train() inside the block, with a Trainer(..., callbacks=[callback])"
            )

    def stop(self) -> None:
        """Ends the guard of a run that has ended with an exception. Otherwise does nothing.

        Warns:
            BNGuardWarning: Something other than a forward changed the statistics, under ``on_change="raise"``, which
                restores them.
        """
        notes = self._end_failed_run(BNGuardError())
        has_changed = any([not change.prevented for change in self.changes])
        if notes and has_changed and self._settings.policy.tells_others == "error":
            text = f"a training run ended with an exception, and its guard ends now.\n{notes[0]}"
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    # What the trainer calls.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the guard."""
        self.stop()  # of an earlier run, which failed
        self._has_begun = True
        self._begin_run(kwargs["model"], *_moment(state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the guard.

        Raises:
            StatsChangedError: As at the end of a block of ``bnguard.frozen``.
        """
        self._end_run()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins or ends a guard that is there for some epochs or steps."""
        self._reach(*_moment(state))

    on_step_begin = on_epoch_begin

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compares, if ``check_at`` says so."""
        self._batches += 1
        self._check_if_asked("step_end", saves=control.should_save)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compares, if ``check_at`` says so."""
        self._check_if_asked("epoch_end", saves=control.should_save)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compares, if ``check_at`` says so."""
        may_save = args.save_strategy == SaveStrategy.BEST  # the trainer decides that after this
        self._check_if_asked("evaluate", saves=control.should_save or may_save)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compares, if ``check_at`` says so: another callback may have changed the statistics since the last check."""
        self._check_if_asked("save")

    def _check_if_asked(self, event: CheckAt, *, saves: bool = False) -> None:
        """Compares at an event, or before a checkpoint that is saved after it."""
        if event in self._check_at or (saves and "save" in self._check_at):
            self.check()


def _moment(state: TrainerState) -> tuple[int, int]:
    """The numbers of epochs and of optimizer steps that are over."""
    return int((state.epoch or 0) + _ROUNDING), state.global_step


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
