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

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Unpack

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.guard import messages
from bnguard.guard.options import OnChange
from bnguard.integrations._base import RunGuard, Target, missing_text, phrases_of
from bnguard.integrations._phase import RunOptions
from bnguard.layers.select import is_within
from bnguard.layers.tree import find_layers
from bnguard.torch_internals.callsite import call_site

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as _Lightning
    from pytorch_lightning.callbacks import Callback as _PytorchLightning

    class _Callback(_Lightning, _PytorchLightning):  # type: ignore[misc]  # they differ in the type of Trainer
        pass

else:

    def _callback_class() -> type:
        """A class that derives from every ``Callback`` there is."""
        found, broken = [], None
        for name in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found.append(importlib.import_module(name).Callback)
            except ModuleNotFoundError as error:
                if error.name not in (name, "lightning"):
                    broken = broken or error
            except Exception as error:  # the other one may work
                broken = broken or error
        if found:
            return type("_Callback", tuple(found), {})
        if broken is not None:
            raise broken
        raise ImportError(missing_text(__name__, "lightning", "lightning"))

    _Callback = _callback_class()

__all__ = ["BNGuardCallback"]

_FIT: Final = "fit"
_SAVE: Final = "save_checkpoint"


class BNGuardCallback(RunGuard, _Callback):  # type: ignore[misc]  # as _Callback
    """Guards the running statistics of a ``LightningModule``, or of parts of it, during each run of a ``Trainer``.

    In ``Trainer.fit()`` the guard begins at ``on_fit_start``, after a checkpoint to resume from has been loaded, and
    ends at ``on_fit_end`` or ``on_exception``. It compares the statistics at the start of each validation and before
    each checkpoint, a weights-only one too: under ``"raise"`` and ``"restore"`` every checkpoint holds the original
    statistics, under ``"warn"`` a warning reports one that does not. ``Trainer.validate()``, ``test()`` and
    ``predict()`` are guarded from start to end.

    Each comparison logs to the loggers of the trainer, on the process of rank zero: ``bnguard/changed_layers``, and for
    each layer that changed ``bnguard/<layer>/mean_shift`` (the largest shift of a channel's mean since the beginning,
    in standard deviations) and ``bnguard/<layer>/updates``; for updates that ``"raise"`` has stopped
    ``bnguard/stopped_layers`` and ``bnguard/<layer>/stopped``. Between comparisons no tensor is read.

    ``BaseFinetuning.freeze(train_bn=False)`` does not freeze running statistics: its layers normalise with each batch
    in training, and with the running statistics in evaluation. With ``use_running_stats=True`` they are frozen.

    If the strategy loads the checkpoint after ``on_fit_start`` (FSDP, DeepSpeed, ``ModelParallelStrategy``), the guard
    begins at ``on_sanity_check_start`` or ``on_train_start``. With several processes each guards its own copy of the
    model, and raises or warns about that.

    Not covered: callbacks that average weights have a model of their own: with ``use_buffers=True`` their checkpoints
    hold its statistics. What they copy back at the end of training is a change, and so is what
    ``StochasticWeightAveraging`` does to statistics. If ``on_exception`` of another callback raises, Lightning does not
    call the callbacks after it: then the guard ends when the next run begins.

    Args:
        target: What to guard: the path of a submodule of the ``LightningModule``, such as ``"backbone"`` or
            ``"net.encoder"``, or a list of them; a module; None for the whole ``LightningModule``.
        on_change: What to do about an update, as in ``bnguard.frozen``. Under ``"raise"`` the error ends the run.
        log_every: Compare and log at every ``log_every``-th optimizer step as well; each comparison waits for the
            device once. None compares at validations and checkpoints only.
        **options: ``use_running_stats``, ``affine``, ``updates`` (per run), ``include`` and ``exclude``, as in
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
        self._forget()

    def _forget(self) -> None:
        self._guard = None
        self._save: _CheckedSave | None = None  # while a run is guarded
        self._awaits_checkpoint = False
        self._logged_step = 0
        self._warned_of_checkpoint = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the callback in a process that a launcher starts, guards nothing yet.
        return {**self.__dict__, "_guard": None, "_save": None}

    # Hooks at the beginning and the end of a run.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the guard of an earlier run that failed, before a checkpoint is loaded.

        Raises:
            BNGuardError: The run of another trainer has not ended.
        """
        if self._save is None:
            return
        if not self._guards_run_of(trainer) and self._save.trainer.state.status == "running":
            raise BNGuardError("this BNGuardCallback guards the run of another Trainer: make one for each")
        try:
            self._end_run(logs=False)
        except StatsChangedError as error:
            warnings.warn(str(error), BNGuardWarning, stacklevel=call_site().stacklevel)

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
        if self._guards_run_of(trainer):
            notes = self._end_failed_run(exception)
            if notes and isinstance(exception, KeyboardInterrupt) and self._settings.on_change == "raise":
                with suppress(BNGuardWarning):  # Lightning shows no traceback of it, and so no note
                    warnings.warn("\n".join(notes), BNGuardWarning, stacklevel=call_site().stacklevel)

    def teardown(self, trainer: Any, pl_module: Any, stage: str = "") -> None:
        """Ends the guard, also of a run that ends without the hooks of its end, such as that of the tuner."""
        if self._guards_run_of(trainer):
            self._end_run()

    on_fit_end = on_test_end = on_predict_end = teardown

    # Hooks in between.

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compares at every ``log_every``-th optimizer step."""
        if self._log_every is not None:
            step = trainer.global_step  # may increase by more than one per batch, with several optimizers
            if step // self._log_every > self._logged_step // self._log_every:
                self._logged_step = step
                self._check(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Compares before a checkpoint that is not made by ``Trainer.save_checkpoint()``."""
        self._check_before_save(trainer)

    def _check_before_save(self, trainer: Any) -> None:
        """Compares before a checkpoint is made; warns if it will hold changed statistics."""
        self._check(trainer)
        changes = () if self._settings.on_change != "warn" or self._save is None else self.changes
        if changes and trainer.is_global_zero and not self._warned_of_checkpoint:
            self._warned_of_checkpoint = True
            text = messages.checkpoint_text(changes, self._settings.frontend.phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    def _guards_run_of(self, trainer: Any) -> bool:
        return self._save is not None and self._save.trainer is trainer

    def _begin(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._save is not None:  # the callback is in the list twice
            return
        self._forget()
        phrases = self._settings.frontend.phrases
        whole = self._guarded_of(pl_module)
        if not any([is_within(layer, self._paths) for layer in find_layers(whole)]):
            text = messages.unguarded_text(", ".join(self._paths) or type(whole).__name__, phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
            return
        if trainer.state.fn == _FIT:
            self._begin_run(pl_module, trainer.current_epoch, trainer.global_step)
        else:
            self._prepare(pl_module).start()
        self._logged_step = trainer.global_step
        self._save = _CheckedSave.on(trainer, self)

    def _check(self, trainer: Any) -> None:
        if self._guards_run_of(trainer):
            with self._logging(trainer):
                self.check()

    def _end_run(self, error: BaseException | None = None, *, logs: bool = True) -> None:
        save, self._save = self._save, None
        if save is not None:
            with self._logging(save.trainer if logs else None):
                try:
                    super()._end_run(error)
                finally:
                    save.remove(self)

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
        metrics = {
            "bnguard/changed_layers": float(len(changes) - stopped),
            "bnguard/stopped_layers": float(stopped),
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


class _CheckedSave:
    """Replaces ``save_checkpoint`` of one trainer while callbacks guard its run, so that they compare before it.

    ``Callback.on_save_checkpoint`` is not enough: it is not called for weights-only checkpoints, and when it is, the
    state dict has already been taken.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._had_own = _SAVE in vars(trainer)
        self._save = trainer.save_checkpoint
        self._callbacks: list[BNGuardCallback] = []

    @classmethod
    def on(cls, trainer: Any, callback: BNGuardCallback) -> _CheckedSave:
        """Adds a callback to the object that a trainer has already, or to a new one."""
        present = vars(trainer).get(_SAVE)
        save = present if isinstance(present, cls) else cls(trainer)
        save._callbacks.append(callback)
        setattr(trainer, _SAVE, save)
        return save

    def remove(self, callback: BNGuardCallback) -> None:
        """Removes a callback. Without any, restores the trainer, unless other code has replaced ``save_checkpoint``."""
        self._callbacks = [other for other in self._callbacks if other is not callback]
        if self._callbacks or vars(self.trainer).get(_SAVE) is not self:
            return
        if self._had_own:
            setattr(self.trainer, _SAVE, self._save)
        else:
            delattr(self.trainer, _SAVE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for callback in tuple(self._callbacks):
            callback._check_before_save(self.trainer)
        return self._save(*args, **kwargs)
