"""``BNGuardCallback``: ``frozen`` around the runs of Lightning's ``Trainer``.

For ``lightning`` and for ``pytorch_lightning``: the callback derives from the ``Callback`` of each of the two that is
installed (``lightning`` brings the other one along), so it does not matter which of them is imported, or when.

::

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

    from bnguard.integrations.lightning import BNGuardCallback


    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
            self.backbone.requires_grad_(False)  # which does not stop the running statistics
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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from bnguard.errors import BNGuardError, BNGuardWarning, StatsChangedError
from bnguard.guard import messages as _report
from bnguard.guard.frozen import frozen
from bnguard.guard.options import OnChange
from bnguard.guard.phrases import Phrases
from bnguard.integrations._base import missing_text, settings_of
from bnguard.integrations._checked_save import CheckedSave
from bnguard.layers.select import Selector, is_within
from bnguard.layers.tree import find_layers
from bnguard.records import GuardedLayer, StatsChange
from bnguard.torch_internals.callsite import call_site
from bnguard.torch_internals.ranks import Group
from bnguard.words import short_repr

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as _Lightning
    from pytorch_lightning.callbacks import Callback as _PytorchLightning

    class _Callback(_Lightning, _PytorchLightning):  # type: ignore[misc]  # the same text, with a Trainer each
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
            except Exception as error:  # the other one may be whole
                broken = broken or error
        if found:
            return type("_Callback", tuple(found), {})
        if broken is not None:
            raise broken
        raise ImportError(missing_text(__name__, "lightning", "lightning"))

    _Callback = _callback_class()

__all__ = ["BNGuardCallback"]

_FIT: Final = "fit"


class BNGuardCallback(_Callback):
    """Holds the running statistics of a ``LightningModule``, or of parts of it, during each run of a ``Trainer``.

    A ``frozen`` that begins at ``on_fit_start``, when a checkpoint to resume from has been loaded, and ends at
    ``on_fit_end`` or ``on_exception``. In between it compares the statistics at the start of each validation and before
    each checkpoint, a weights-only one too: under ``"raise"`` and ``"restore"`` no checkpoint holds other statistics
    than those of the beginning, under ``"warn"`` a warning says that it does. ``Trainer.validate()``, ``test()`` and
    ``predict()`` are guarded from their start to their end in the same way.

    What is found goes to the trainer's loggers at each of these comparisons, from the process of rank zero:
    ``bnguard/changed_layers``, and for each layer that changed ``bnguard/<layer>/mean_shift`` (the largest shift of a
    channel's mean since the beginning, in standard deviations) and ``bnguard/<layer>/updates``; of updates that
    ``"raise"`` has stopped, ``bnguard/stopped_layers`` and ``bnguard/<layer>/stopped``. Between comparisons no tensor
    is read.

    With ``use_running_stats=True`` this is the freeze that ``BaseFinetuning.freeze(train_bn=False)`` promises and does
    not keep: under that one the layers normalise with each batch in training, and with the running statistics in
    evaluation.

    Where strategies load the checkpoint after ``on_fit_start`` (FSDP, DeepSpeed, ``ModelParallelStrategy``), the guard
    begins at ``on_sanity_check_start`` or ``on_train_start``, when it has been loaded. With several processes each
    guards its own copy and that of rank zero warns; where a comparison under ``"raise"`` fails in one, all raise.

    Not covered: an update that raises in one process only, as any other exception there. Callbacks that average weights
    keep a model of their own, which is no part of the guarded one: with ``use_buffers=True`` their checkpoints hold its
    statistics; what they copy back at the end of training is a change, and so is what
    ``StochasticWeightAveraging`` does to statistics. If another callback's ``on_exception`` raises, Lightning calls
    none after it: then the guard ends when the next run begins.

    Args:
        target: What to guard: the path of a submodule, such as ``"backbone"`` or ``"net.encoder"``, or a list of them;
            None for the whole ``LightningModule``.
        on_change: See ``frozen``, as for the options that follow. Under ``"raise"`` the error ends the run.
        use_running_stats: See ``frozen``.
        affine: See ``frozen``.
        updates: See ``frozen``; each layer may update so often in the whole run.
        include: See ``frozen``. Names are those in the ``state_dict()`` of the ``LightningModule``, as in a checkpoint.
        exclude: See ``frozen``; names as for ``include``.
        group: See ``frozen``: the ranks whose processes agree at each comparison.
        log_every: Compare, and log, at every so-many-th optimizer step as well; each waits for the device once. None
            compares at validations and checkpoints only.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: As ``frozen``; an empty ``target``, a ``log_every`` that is not positive. When the run begins: the
            model has no such submodule, or ``include`` or ``exclude`` selects nothing.

    Warns:
        BNGuardWarning: When the run begins: there is no layer with running statistics in what is to be guarded.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        on_change: OnChange = "raise",
        *,
        use_running_stats: bool = False,
        affine: bool = False,
        updates: int = 0,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        group: Group = None,
        log_every: int | None = None,
    ) -> None:
        super().__init__()
        self._paths = _as_paths(target)
        self._phrases = _phrases(target)
        settings = settings_of(self._phrases, on_change, use_running_stats, affine, updates, include, exclude, group)
        if log_every is not None and (isinstance(log_every, bool) or not isinstance(log_every, int)):
            raise TypeError(f"log_every must be a whole number of optimizer steps, got {log_every!r}")
        if log_every is not None and log_every < 1:
            raise ValueError(f"log_every={log_every}: the number of optimizer steps must be positive")
        self._settings = settings
        self._log_every = log_every
        self._forget()

    def _forget(self) -> None:
        self._guard: frozen | None = None  # of the current run, else of the last one
        self._save: CheckedSave | None = None  # while a run is guarded
        self._awaits_checkpoint = False
        self._logged_step = 0
        self._warned_of_checkpoint = False

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed in the current or last run; see ``frozen``."""
        return () if self._guard is None else self._guard.changes

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The layers that the current or last run guards, and how; see ``frozen``. Empty before the first."""
        return () if self._guard is None else self._guard.layers

    def report(self) -> str:
        """What the current or last run guards, how, and what changed, as text."""
        return _report.report_text(self.changes, self.layers, self._settings)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the callback in a process that a launcher starts, guards nothing yet.
        guards = ("_guard", "_save")
        return {**self.__dict__, **dict.fromkeys(guards)}

    # What Lightning calls when a run begins and ends.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends what is left of an earlier run that broke off, before a checkpoint is loaded.

        Raises:
            BNGuardError: The run of another trainer is under way.
        """
        if (
            self._save is not None
            and self._save.trainer is not trainer
            and self._save.trainer.state.status == "running"
        ):
            raise BNGuardError("this BNGuardCallback guards the run of another Trainer: make one for each")
        try:
            self._leave(None)
        except StatsChangedError as error:  # of a run that is over
            warnings.warn(str(error), BNGuardWarning, stacklevel=call_site().stacklevel)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the guard, unless a checkpoint is still to be loaded."""
        self._awaits_checkpoint = bool(trainer.strategy.restore_checkpoint_after_setup)
        if not self._awaits_checkpoint:
            self._begin(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins a guard that has waited for a checkpoint."""
        self._begin_late(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins a guard that has waited for a checkpoint."""
        self._begin_late(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the guard."""
        self._leave(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the guard. What is found is added to the exception as a note."""
        told = len(getattr(exception, "__notes__", ()))
        try:
            self._leave(trainer, exception)
        except Exception as failure:  # nothing must take the place of the exception on its way
            exception.add_note(f"bnguard: {type(failure).__name__}: {failure}")
        notes = getattr(exception, "__notes__", ())[told:]
        if notes and isinstance(exception, KeyboardInterrupt) and self._settings.on_change == "raise":
            with suppress(BNGuardWarning):  # Lightning shows no traceback of it, and so no note
                warnings.warn("\n".join(notes), BNGuardWarning, stacklevel=call_site().stacklevel)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the guard of a run that has ended in a way of its own, as the tuner's does."""
        self._leave(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Compares; in ``Trainer.validate()`` begins the guard."""
        if trainer.state.fn == _FIT:
            self._check(trainer)
        else:
            self._begin(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the guard of ``Trainer.validate()``."""
        if trainer.state.fn != _FIT:
            self._leave(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the guard."""
        self._begin(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the guard."""
        self._leave(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins the guard."""
        self._begin(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the guard."""
        self._leave(trainer)

    # What it calls in between.

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compares at every ``log_every``-th optimizer step."""
        if self._log_every is not None:
            step = trainer.global_step  # which a batch with several optimizers moves by more than one
            if step // self._log_every > self._logged_step // self._log_every:
                self._logged_step = step
                self._check(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Compares, also where something else than ``Trainer.save_checkpoint()`` makes a checkpoint."""
        self.before_save(trainer)

    def before_save(self, trainer: Any) -> None:
        """Compares before a checkpoint is made; says so if it will hold changed statistics."""
        self._check(trainer)
        changes = () if self._settings.on_change != "warn" or self._save is None else self.changes
        if changes and trainer.is_global_zero and not self._warned_of_checkpoint:
            self._warned_of_checkpoint = True
            text = _report.checkpoint_text(changes, self._phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)

    # Parts.

    def _begin_late(self, trainer: Any, pl_module: Any) -> None:
        if self._awaits_checkpoint:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._save is not None:  # the same callback is in the list twice
            return
        self._forget()
        for path in self._paths:
            _check_path(pl_module, path, self._phrases)
        if not any([is_within(layer, self._paths) for layer in find_layers(pl_module)]):
            text = _report.unguarded_text(", ".join(self._paths) or type(pl_module).__name__, self._phrases)
            warnings.warn(text, BNGuardWarning, stacklevel=call_site().stacklevel)
            return
        self._guard = frozen._of(pl_module, replace(self._settings, within=self._paths)).start()
        self._logged_step = trainer.global_step
        self._save = CheckedSave.on(trainer)
        self._save.add(self)

    def _check(self, trainer: Any) -> None:
        if self._guard is None or self._save is None or self._save.trainer is not trainer:
            return
        failure: StatsChangedError | None = None
        try:
            self._guard.check()
        except StatsChangedError as error:
            failure = error
        self._conclude(trainer, failure)

    def _leave(self, trainer: Any, error: BaseException | None = None) -> None:
        """Ends the guard of the run, if one is open.

        Args:
            trainer: Whose run it is; None if that is over.
            error: The exception with which the run ends.

        Raises:
            StatsChangedError: As at the end of a block.
        """
        guard, save = self._guard, self._save
        if guard is None or save is None or trainer not in (None, save.trainer):
            return
        self._save = None
        failure: StatsChangedError | None = None
        try:
            guard.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except StatsChangedError as found:
            failure = found
        finally:
            save.remove(self)
        if trainer is None and failure is not None:
            raise failure
        if trainer is not None:
            self._conclude(trainer, failure)

    def _conclude(self, trainer: Any, failure: StatsChangedError | None) -> None:
        """Logs what was found, and raises it."""
        try:
            self._log(trainer)
        finally:
            if failure is not None:
                raise failure

    def _log(self, trainer: Any) -> None:
        if not trainer.is_global_zero or not trainer.loggers or trainer.sanity_checking:
            return
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
        # Batches that ended with a step of an optimizer: the axis of what self.log() logs. trainer.global_step counts
        # the steps of several optimizers one by one.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)


def _as_paths(target: Any) -> tuple[str, ...]:
    if target is None:
        return ()
    paths = [target] if isinstance(target, str) else target
    if not isinstance(paths, (list, tuple)) or not all([isinstance(path, str) for path in paths]):
        raise TypeError(
            "target must be the path of a submodule, such as 'backbone', a list of them, or None for the whole "
            f"LightningModule, got {short_repr(target)}; layers are chosen with include="
        )
    if not paths or not all(paths):
        raise ValueError(f"target={target!r} names no submodule; leave it out to mean the whole LightningModule")
    return tuple(paths)


def _check_path(pl_module: nn.Module, path: str, phrases: Phrases) -> None:
    """Looks for the submodule at a path.

    Raises:
        ValueError: There is none.
    """
    part = pl_module
    names = path.split(".")
    for position, name in enumerate(names):
        child = part._modules.get(name)
        if child is None:
            there = ".".join(names[:position]) or type(pl_module).__name__
            children = [key for key, module in part._modules.items() if module is not None]
            raise ValueError(_report.no_part_text(path, there, name, children, phrases))
        part = child


def _phrases(target: Any) -> Phrases:
    # Its texts are formats.
    first = "" if target is None else repr(target).replace("{", "{{").replace("}", "}}") + ", "
    return Phrases(
        place="BNGuardCallback()",
        place_with_budget="BNGuardCallback(updates={})",
        choice=f"BNGuardCallback({first}{{}})",
        everything="callback.changes lists them all",
        is_of_run=True,
    )
