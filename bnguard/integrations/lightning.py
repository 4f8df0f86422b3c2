"""``BNGuardCallback``: ``frozen`` around the runs of Lightning's ``Trainer``.

For ``lightning`` and for ``pytorch_lightning``: the callback derives from the ``Callback`` of each of the two that is
installed (``lightning`` installs both), so it does not matter which of them is imported, or when.

::

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from bnguard.integrations.lightning import BNGuardCallback


    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
            self.backbone.requires_grad_(False)  # which does not freeze the running statistics
            self.head = nn.Linear(8 * 6 * 6, 10)

        def training_step(self, batch, batch_idx):
            images, labels = batch
            return nn.functional.cross_entropy(self.head(self.backbone(images)), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)


    trainer = Trainer(max_epochs=1, callbacks=[BNGuardCallback("backbone", use_running_stats=True)])
    trainer.fit(Net(), torch.utils.data.DataLoader(digits, batch_size=32))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Final, Unpack

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.guard import messages
from bnguard.guard.frozen import frozen
from bnguard.guard.options import OnChange
from bnguard.integrations._base import RunGuard, Target, phrases_of
from bnguard.integrations._lightning_callback import LightningCallback
from bnguard.integrations._lightning_others import averaging_hooks, trials_of, users_hooks
from bnguard.integrations._messages import checkpoint_text, written_text
from bnguard.integrations._phase import RunOptions
from bnguard.integrations._wrapped import Around, Wrapped
from bnguard.records import StatsChange
from bnguard.torch_internals.callsite import call_site

__all__ = ["BNGuardCallback"]

_FIT: Final = "fit"


class BNGuardCallback(RunGuard, LightningCallback):  # type: ignore[misc]  # as LightningCallback
    """Guards the running statistics of a ``LightningModule``, or of parts of it, during each run of a ``Trainer``.

    In ``Trainer.fit()`` the guard begins at ``on_fit_start``, after a checkpoint to resume from has been loaded, and
    ends at ``on_fit_end`` or ``on_exception``. It compares the statistics at the start of each validation and before
    each checkpoint, a weights-only one too: under ``"raise"`` and ``"restore"`` every checkpoint holds the original
    statistics, under ``"warn"`` a warning reports one that does not. ``Trainer.validate()``, ``test()`` and
    ``predict()`` are guarded from start to end.

    Each comparison logs to the loggers of the trainer, on the process of rank zero: ``bnguard/changed_layers`` (with a
    target ``bnguard/<target>/changed_layers``), and for each layer that changed ``bnguard/<layer>/mean_shift`` (the
    largest shift of a channel's mean since the beginning, in standard deviations) and ``bnguard/<layer>/updates``; for
    updates that ``"raise"`` has stopped ``stopped_layers`` and ``bnguard/<layer>/stopped``. Between comparisons no
    tensor is read.

    ``BaseFinetuning.freeze(train_bn=False)`` freezes no running statistics: its layers normalise with each batch in
    training. With ``use_running_stats=True`` they are frozen.

    If the strategy loads the checkpoint after ``on_fit_start`` (FSDP, DeepSpeed, ``ModelParallelStrategy``), the guard
    begins at ``on_sanity_check_start`` or ``on_train_start``. With several processes each guards its own copy of the
    model, and raises or warns about that.

    ``StochasticWeightAveraging``, ``WeightAveraging`` and ``EMAWeightAveraging`` write statistics of their own to the
    model. Except under ``"warn"``, a guarded layer gets its own back at once, with one warning that names the callback,
    and their checkpoints hold these too. Trial runs of ``LearningRateFinder``, ``BatchSizeFinder`` and ``Tuner`` are
    guarded, each by a block of its own. With ``updates`` they are not limited: Lightning undoes what they do. What your
    own callbacks write to guarded layers between epochs, to evaluate an average for example, is put back at once as
    well, and named: under ``"raise"`` in an error, else in one warning.

    Not covered: if ``on_exception`` of another callback raises, Lightning does not call the callbacks after it: then
    the guard ends when the next run begins. In the process that starts others (``strategy="ddp_spawn"``) ``changes``
    and ``layers`` stay empty.

    Args:
        target: What to guard: the path of a submodule of the ``LightningModule``, such as ``"backbone"`` or
            ``"net.encoder"``, or a list of them; a module; None for the whole ``LightningModule``.
        on_change: What to do about an update, as in ``bnguard.frozen``. Under ``"raise"`` the error ends the run.
        log_every: Compare and log at every ``log_every``-th optimizer step as well; each comparison waits for the
            device once. None compares at validations and checkpoints only.
        **options: ``use_running_stats``, ``affine``, ``updates`` (per run), ``include``, ``exclude``, ``buffers``: see
            ``bnguard.frozen``. Names are those in the ``state_dict()`` of the ``LightningModule``, as in a checkpoint.
            ``until_epoch=5`` ends the guard of ``fit()`` when epoch 5 begins, of which the first is 0;
            ``from_epoch=2`` begins it with epoch 2. ``until_step`` and ``from_step`` count optimizer steps, as
            ``trainer.global_step`` does.

    Raises:
        TypeError: An option has the wrong type, or there is no such option.
        ValueError: As ``frozen``; an empty ``target``, a ``log_every`` that is not positive, a phase that is empty, or
            given in both epochs and steps. When the run begins: the model has no such submodule, or ``include`` or
            ``exclude`` selects nothing.

    Warns:
        BNGuardWarning: When the run begins: there is no layer with running statistics in ``target``.
    """

    def __init__(
        self,
        target: Target = None,
        on_change: OnChange = "raise",
        *,
        log_every: int | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(phrases_of("BNGuardCallback", "callback", target), target, on_change, options)
        if log_every is not None:
            if isinstance(log_every, bool) or not isinstance(log_every, int):
                raise TypeError(f"log_every must be an integer, got {log_every!r}")
            if log_every < 1:
                raise ValueError(f"log_every must be a positive integer, got {log_every}")
        self._log_every = log_every
        self._undo: tuple[Callable[[], None], ...] = ()  # what was done to the trainer and its callbacks
        self._forget()

    def _forget(self) -> None:
        self._guard = None
        self._trainer: Any = None  # while its run is guarded
        self._awaits_checkpoint = False
        self._logged_step = 0
        self._told: set[str] = set()  # what was warned about in this run

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the callback in a process that a launcher starts, guards nothing yet.
        return {**super().__getstate__(), "_guard": None, "_trainer": None, "_undo": ()}

    # Hooks at the beginning and the end of a run.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the guard of an earlier run that failed, before a checkpoint is loaded.

        Raises:
            BNGuardError: The run of another trainer has not ended.
        """
        if self._trainer is not None:
            if not self._guards_run_of(trainer) and self._trainer.state.status == "running":
                raise BNGuardError("this BNGuardCallback guards the run of another Trainer: make one for each")
            try:
                self._end_run(logs=False)
            except StatsChangedError as error:
                warnings.warn(str(error), BNGuardWarning, stacklevel=call_site().stacklevel)
        self._unwrap()
        self._wrap(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the guard, unless a checkpoint will be loaded later."""
        self._awaits_checkpoint = bool(trainer.strategy.restore_checkpoint_after_setup)
        if not self._awaits_checkpoint:
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins a guard that has waited for a checkpoint."""
        if self._awaits_checkpoint:
            self._begin(trainer, pl_module)

    on_sanity_check_start = on_train_start

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins or ends a guard that is there for some epochs or steps."""
        if self._phase.is_whole_run or not self._guards_run_of(trainer):
            return
        epoch, step = trainer.current_epoch, trainer.global_step
        has_ended = self._is_on() and not self._phase.covers(epoch, step)
        with self._logging(trainer if has_ended else None):
            self._reach(epoch, step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins or ends a guard that is there for some epochs or steps."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Compares; begins the guard in ``Trainer.validate()``."""
        if trainer.state.fn == _FIT:
            self._check(trainer)
        else:
            self._begin(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the guard of ``Trainer.validate()``."""
        if trainer.state.fn != _FIT:
            self.teardown(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the guard."""
        self._begin(trainer, pl_module)

    on_predict_start = on_test_start

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the guard. What it found is added to the exception as a note."""
        self._unwrap()
        if self._guards_run_of(trainer):
            notes = self._end_failed_run(exception)
            if notes and isinstance(exception, KeyboardInterrupt) and self._settings.policy.tells_others == "error":
                with suppress(BNGuardWarning):  # Lightning shows no traceback of it, and so no note
                    warnings.warn("\n".join(notes), BNGuardWarning, stacklevel=call_site().stacklevel)

    def teardown(self, trainer: Any, pl_module: Any, stage: str = "") -> None:
        """Ends the guard, also of a run that ends without the hooks of its end, such as that of the tuner."""
        self._unwrap()
        if self._guards_run_of(trainer):
            self._end_run()

    on_fit_end = on_test_end = on_predict_end = teardown

    # Hooks in between.

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compares at every ``log_every``-th optimizer step."""
        self._batches += 1
        if self._log_every is not None:
            step = trainer.global_step  # may increase by more than one per batch, with several optimizers
            if step // self._log_every > self._logged_step // self._log_every:
                self._logged_step = step
                self._check(trainer)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts the batch."""
        self._batches += 1

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Compares before a checkpoint that is not made by ``Trainer.save_checkpoint()``."""
        self._check_before_save(trainer)

    def _check_before_save(self, trainer: Any) -> None:
        """Compares before a checkpoint is made; warns if it will hold changed statistics."""
        self._check(trainer)
        if not self._settings.policy.puts_back and self._trainer is not None and trainer.is_global_zero:
            self._tell_once("save_checkpoint", checkpoint_text, self.changes)

    def _tell_once(self, key: str, text: Callable[..., str], changes: Sequence[StatsChange]) -> None:
        """Warns about changes, if there are any, once a run for each key."""
        if changes and key not in self._told:
            self._told.add(key)
            words = text(changes, self._settings.frontend.phrases)
            warnings.warn(words, BNGuardWarning, stacklevel=call_site().stacklevel)

    # Around methods of the trainer and of other callbacks.

    def _wrap(self, trainer: Any) -> None:
        """Gets called around what other callbacks do to the model, and before each checkpoint.

        ``on_save_checkpoint`` is not enough: it is not called for weights-only checkpoints, and when it is, the state
        dict has already been taken.
        """
        around: list[tuple[Any, str, Around]] = [(trainer, "save_checkpoint", partial(self._around_save, trainer))]
        for callback in trainer.callbacks:
            around += [(callback, trial, self._around_trial) for trial in trials_of(callback)]
            if averaging := averaging_hooks(callback):
                around.append((callback, "on_save_checkpoint", self._around_average_save))
            if not isinstance(callback, RunGuard):
                write = partial(self._around_writes, type(callback).__name__, bool(averaging))
                around += [(callback, hook, write) for hook in {*averaging, *users_hooks(callback)}]
        self._undo = tuple([Wrapped.add(*item) for item in around])

    def _unwrap(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = ()

    @contextmanager
    def _around_save(self, trainer: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        self._check_before_save(trainer)
        yield

    @contextmanager
    def _around_trial(self, trainer: Any, pl_module: Any) -> Iterator[None]:
        """Guards what a finder runs, as Lightning sets all callbacks aside for it."""
        callbacks = trainer.callbacks
        guard: frozen | nullcontext[None] = nullcontext()
        if self._phase.covers(trainer.current_epoch, trainer.global_step) and self._layers_of(pl_module):
            if self._settings.updates:  # Lightning restores the statistics of before, which would be a change
                settings = self._settings._replace(on_change="rollback", updates=0, within=self._paths)
                guard = frozen._with(self._guarded_of(pl_module), settings)
            elif not self._is_on():
                guard = self._prepare(pl_module)
        try:
            with guard:
                yield
        except BaseException:
            trainer.callbacks = callbacks  # else none would be told of the error
            raise

    @contextmanager
    def _around_writes(self, name: str, averages: bool, trainer: Any, *args: Any) -> Iterator[None]:
        """Puts back what another callback writes to guarded layers in a hook."""
        holds = self._holds_against_others()
        if holds:
            self.check()  # what has changed before is not of the callback
        yield
        if not holds or self._guard is None:
            return
        changes, phrases = tuple(self._guard._put_back()), self._settings.frontend.phrases
        if changes and not averages and self._settings.policy.tells_others == "error":
            raise StatsChangedError(written_text(name, changes, phrases, is_error=True), changes)
        self._tell_once(name, partial(written_text, name), changes)

    @contextmanager
    def _around_average_save(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> Iterator[None]:
        """Puts the model's statistics of guarded layers into a checkpoint of averaged weights."""
        yield
        if self._holds_against_others() and self._guard is not None and not self._settings.updates:
            guarded = {id(layer.module): layer.buffers for layer in self._guard._stats_layers}
            state, current = checkpoint["state_dict"], checkpoint.get("current_model_state", {})
            for name, module in pl_module.named_modules(remove_duplicate=False):
                for key in [f"{name}.{buffer}" for buffer in guarded.get(id(module), ())]:
                    if key in state and key in current:
                        state[key] = current[key]

    def _holds_against_others(self) -> bool:
        policy = self._settings.policy
        return self._trainer is not None and policy.puts_back and not policy.hides

    # Parts.

    def _guards_run_of(self, trainer: Any) -> bool:
        return trainer is not None and self._trainer is trainer

    def _begin(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._trainer is not None:  # the callback is in the list twice
            return
        self._forget()
        if not self._layers_of(pl_module):
            what = ", ".join(self._paths) or type(self._guarded_of(pl_module)).__name__
            text = messages.unguarded_text(what, self._settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
            return
        if trainer.state.fn == _FIT:
            self._begin_run(pl_module, trainer.current_epoch, trainer.global_step)
        else:
            self._start(self._prepare(pl_module))
        self._logged_step = trainer.global_step
        self._trainer = trainer

    def _check(self, trainer: Any) -> None:
        if self._guards_run_of(trainer):
            with self._logging(trainer):
                self.check()

    def _end_run(self, error: BaseException | None = None, *, logs: bool = True) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            with self._logging(trainer if logs else None):
                super()._end_run(error)

    @contextmanager
    def _logging(self, trainer: Any) -> Iterator[None]:
        """Logs what the body finds, also if it raises. Without a trainer, logs nothing."""
        failure: StatsChangedError | None = None
        try:
            yield
        except StatsChangedError as error:
            failure = error
        try:
            if trainer is not None and trainer.is_global_zero and trainer.loggers and not trainer.sanity_checking:
                self._log(trainer)
        finally:
            if failure is not None:
                raise failure

    def _log(self, trainer: Any) -> None:
        changes = self.changes
        stopped = len([change for change in changes if change.prevented])
        part = self._part_name(trainer.lightning_module)
        metrics = {
            f"bnguard/{part}changed_layers": float(len(changes) - stopped),
            f"bnguard/{part}stopped_layers": float(stopped),
        }
        for change in changes:
            name = f"bnguard/{change.names[0] or '(root)'}"
            metrics[f"{name}/{'stopped' if change.prevented else 'updates'}"] = float(change.updates)
            if change.mean_shift is not None:
                metrics[f"{name}/mean_shift"] = change.mean_shift
        # The number of batches that ended with an optimizer step, which is the axis of what self.log() logs.
        # trainer.global_step counts the steps of several optimizers one by one.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
