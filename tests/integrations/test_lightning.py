"""``BNGuardCallback`` with the real Trainer, against a twin run of it without the callback."""

from __future__ import annotations

import copy
import csv
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.integrations import lightning as integration
from bnguard.integrations._wrapped import Wrapped
from bnguard.integrations.lightning import BNGuardCallback
from bnguard.layers.usual_copy import UsualTensors
from tests import forks
from tests.asserts import assert_clean, assert_same_bits, statistics, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:`.*` was called without a model:UserWarning"),
]

EVERY_PACKAGE = pytest.mark.parametrize("package", [pl, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
EVERY_POLICY = pytest.mark.parametrize("on_change", ["raise", "warn", "restore"])


def batches(count: int = 6, seed: int = 1, shuffle: bool = False) -> DataLoader:
    """Batches of another distribution than the one that the backbone knows."""
    make = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(8 * count, 1, 4, 4, generator=make) * 2 + 3, torch.arange(8 * count) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=shuffle)


class Spec:
    """A pretrained backbone and a new head; to be mixed with the LightningModule of either package."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten()
        )
        self.backbone(torch.randn(16, 1, 4, 4))
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        self.losses: list[Tensor] = []
        self.answers: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.answers.append(self.backbone(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.answers.append(self.backbone(batch[0]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.backbone(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Net(Spec, pl.LightningModule):
    """The one of ``lightning``."""


class OldNet(Spec, pytorch_lightning.LightningModule):
    """The one of ``pytorch_lightning``."""


def make_net(package: types.ModuleType = pl) -> Any:
    """A net of one of the packages."""
    return Net() if package is pl else OldNet()


def make_trainer(folder: Path, *callbacks: Any, package: types.ModuleType = pl, **options: Any) -> Any:
    """A trainer that says little."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "callbacks": list(callbacks)}
    usual = {"max_epochs": 2, "enable_checkpointing": False, "log_every_n_steps": 1, "num_sanity_val_steps": 1}
    return package.Trainer(**{**quiet, **fixed, **usual, **options})


@dataclass(repr=False)
class Run:
    """One run of a trainer, and what came of it."""

    net: Any
    trainer: Any
    before: dict[str, Tensor]
    objects: dict[str, Tensor]
    error: BaseException | None = None
    rng: Tensor = field(default_factory=torch.get_rng_state)

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is learned, and what the optimizer keeps of it."""
        momenta = [state["momentum_buffer"] for state in self.trainer.optimizers[0].state.values()]
        return {**dict(self.net.named_parameters()), **{f"momentum {i}": value for i, value in enumerate(momenta)}}

    def statistics(self, part: str = "backbone") -> dict[str, Tensor]:
        """The running statistics of a part, as they are now."""
        return {name: value for name, value in statistics(self.net).items() if name.startswith(part)}

    def has_moved(self, part: str = "backbone") -> bool:
        """Whether any of them has other bits than before the run."""
        return any([not torch.equal(value, self.before[name]) for name, value in self.statistics(part).items()])

    def assert_held(self) -> None:
        """The statistics of the backbone are the objects of before with the bits of before, and nothing is left."""
        for name, tensor in self.statistics().items():
            assert tensor is self.objects[name]
            assert_same_bits(tensor, self.before[name])
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """Model and trainer are without a trace."""
        assert_clean(self.net)
        assert "save_checkpoint" not in vars(self.trainer)
        for callback in self.trainer.callbacks:
            assert not any([isinstance(value, Wrapped) for value in vars(callback).values()])


def fit(net: Any, trainer: Any, train: Any = None, val: Any = None, **options: Any) -> Run:
    """Fits, with a fixed seed, and keeps the error."""
    before = statistics(net)
    run = Run(net, trainer, values(before), before)
    torch.manual_seed(5)
    try:
        trainer.fit(net, train or batches(shuffle=True), val or batches(2, seed=2), **options)
    except BaseException as error:
        run.error = error
    run.rng = torch.get_rng_state()
    return run


@contextmanager
def said() -> Iterator[list[warnings.WarningMessage]]:
    """Catches the warnings of bnguard; those of Lightning are passed over."""
    ours: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        yield ours
    ours += [record for record in records if issubclass(record.category, bnguard.BNGuardWarning)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nets this small are slower in several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once there was one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def at(hook: str, act: Callable[[Any, Any], object], epoch: int = 0) -> Callback:
    """A callback that does something in one hook, at its first call in an epoch."""
    done = []

    def once(self: Any, trainer: Any, net: Any, *rest: Any, **options: Any) -> None:
        if not done and trainer.current_epoch >= epoch:
            done.append(True)
            act(trainer, net)

    return type(f"At_{hook}", (Callback,), {hook: once})()


def fail(error: BaseException) -> Callable[[Any, Any], None]:
    """Raises, wherever it is called."""

    def act(trainer: Any, net: Any) -> None:
        raise error

    return act


def write(trainer: Any, net: Any) -> None:
    """Moves a statistic that no forward moves."""
    net.backbone[1].running_mean.data.add_(1)


def replace(trainer: Any, net: Any) -> None:
    """Puts another tensor in the place of one."""
    net.backbone[1].running_mean = net.backbone[1].running_mean + 1


# What each policy does to a run that would move the statistics of the backbone.


@EVERY_PACKAGE
def test_restore_changes_nothing_but_the_statistics(package, tmp_path):
    """Losses, weights, momenta, random numbers and the head's statistics are the twin's; the backbone's do not move."""
    twin = fit(make_net(package), make_trainer(tmp_path, package=package))
    assert twin.error is None
    assert twin.has_moved()
    run = fit(make_net(package), make_trainer(tmp_path, BNGuardCallback("backbone", "restore"), package=package))
    assert run.error is None
    run.assert_held()
    assert_same_bits(run.net.losses, twin.net.losses)
    assert_same_bits(run.weights, twin.weights)
    assert_same_bits(run.statistics("head"), twin.statistics("head"))
    assert_same_bits(run.rng, twin.rng)


@EVERY_PACKAGE
def test_running_statistics_are_used_as_by_layers_that_are_put_into_eval_mode_before_each_batch(package, tmp_path):
    """Under ``use_running_stats`` everything is bit for bit that of a twin which calls eval() on each layer itself."""

    class Freeze(package.Callback):
        def on_train_batch_start(self, trainer, net, batch, batch_idx):
            for layer in (net.backbone[1], net.backbone[4]):
                layer.eval()

    twin = fit(make_net(package), make_trainer(tmp_path, Freeze(), package=package))
    assert not twin.has_moved()
    guard = BNGuardCallback("backbone", use_running_stats=True)
    run = fit(make_net(package), make_trainer(tmp_path, guard, package=package))
    assert run.error is None
    run.assert_held()
    assert_same_bits(run.net.losses, twin.net.losses)
    assert_same_bits(run.net.answers, twin.net.answers)
    assert_same_bits(run.net.state_dict(), twin.net.state_dict())
    assert_same_bits(run.weights, twin.weights)
    assert_same_bits(run.rng, twin.rng)
    assert all([layer.training for layer in run.net.modules()])


@EVERY_PACKAGE
def test_warn_changes_nothing_at_all(package, tmp_path):
    """Every bit is the twin's; one warning at the line of the forward, and the callback lists what moved."""
    twin = fit(make_net(package), make_trainer(tmp_path, package=package))
    guard = BNGuardCallback("backbone", "warn")
    with said() as words:
        run = fit(make_net(package), make_trainer(tmp_path, guard, package=package))
    assert run.error is None
    [word] = words
    _, first = inspect.getsourcelines(Spec.training_step)
    assert (word.filename, word.lineno) == (__file__, first + 1)
    text = str(word.message)
    assert text.startswith("backbone.1 (BatchNorm2d) is in train mode inside BNGuardCallback() and updates")
    assert "callback.changes lists them all" in text
    assert_same_bits(run.net.state_dict(), twin.net.state_dict())
    assert_same_bits(run.net.losses, twin.net.losses)
    assert_same_bits(run.net.answers, twin.net.answers)
    assert_same_bits(run.weights, twin.weights)
    assert_same_bits(run.rng, twin.rng)
    run.assert_nothing_left()
    assert [(change.names, change.updates) for change in guard.changes] == [
        (("backbone.1",), 12),
        (("backbone.4",), 12),
    ]
    assert all([change.mean_shift > 0.1 for change in guard.changes])
    assert "backbone.4" in guard.report()


@EVERY_PACKAGE
def test_raise_ends_the_run_at_the_line_before_anything_moves(package, tmp_path):
    """The error names layer, line and remedies in the callback's own words; trainer and model are left in order."""
    guard = BNGuardCallback("backbone")
    run = fit(make_net(package), make_trainer(tmp_path, guard, package=package))
    assert isinstance(run.error, bnguard.StatsChangedError)
    text = str(run.error)
    assert text.startswith("backbone.1 (BatchNorm2d) is in train mode inside BNGuardCallback():\n")
    _, first = inspect.getsourcelines(Spec.training_step)
    assert f"test_lightning.py:{first + 1} in training_step" in text
    assert "  BNGuardCallback('backbone', use_running_stats=True)    normalise with the frozen statistics\n" in text
    assert "BNGuardCallback('backbone', on_change=\"restore\")" in text
    run.assert_held()
    assert run.trainer.state.status == "interrupted"
    assert [change.names for change in guard.changes] == [("backbone.1",)]
    # And with what it advises, the run reaches its end.
    for options in ({"use_running_stats": True}, {"on_change": "restore"}):
        assert (
            fit(
                make_net(package), make_trainer(tmp_path, BNGuardCallback("backbone", **options), package=package)
            ).error
            is None
        )


def test_raise_is_silent_where_nothing_moves(tmp_path):
    """A backbone that stays in eval mode is no finding."""
    net = make_net()
    net.backbone.eval()
    run = fit(net, make_trainer(tmp_path, BNGuardCallback("backbone")))
    assert run.error is None
    run.assert_held()
    assert not net.backbone.training


def test_freeze_of_base_finetuning_does_not_keep_its_promise_and_the_callback_does(tmp_path):
    """``freeze(train_bn=False)`` trains on the normalisation of each batch; with the guard, on that of eval mode."""

    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, net):
            self.freeze(net.backbone, train_bn=False)

        def finetune_function(self, net, epoch, optimizer):
            pass

    class Probe(Callback):
        """What the backbone answers in the middle of training, and what it would answer in eval mode."""

        def on_train_batch_start(self, trainer, net, batch, batch_idx):
            with torch.no_grad():
                self.seen = net.backbone(batch[0])
                layers = copy.deepcopy(net.backbone).eval()
                for layer in (layers[1], layers[4]):
                    layer.track_running_stats = True
                self.frozen = layers(batch[0])

    probe = Probe()
    twin = fit(make_net(), make_trainer(tmp_path, Finetuning(), probe))
    assert not twin.has_moved()  # so far the promise is kept
    assert not torch.allclose(probe.seen, probe.frozen, atol=0.1)  # and here it is not
    assert not twin.net.backbone[1].track_running_stats  # for good

    probe = Probe()
    run = fit(
        make_net(), make_trainer(tmp_path, Finetuning(), BNGuardCallback("backbone", use_running_stats=True), probe)
    )
    assert run.error is None
    assert_same_bits(probe.seen, probe.frozen)
    run.assert_held()


def test_affine_holds_what_weight_decay_moves(tmp_path):
    """Momentum and weight decay do not move weight and bias of guarded layers; without ``affine`` they do."""

    def run(**options):
        net = make_net()
        net.backbone[1].requires_grad_(True)
        before = net.backbone[1].weight.detach().clone()
        run = fit(net, make_trainer(tmp_path, BNGuardCallback("backbone", use_running_stats=True, **options)))
        assert run.error is None
        run.assert_held()
        return torch.equal(net.backbone[1].weight, before)

    assert not run()
    assert run(affine=True)


def test_updates_is_a_budget_of_the_run(tmp_path):
    """Twelve steps are within a budget of twelve, and beyond one of eleven."""
    for budget in (12, 11):
        run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback("head", updates=budget)))
        assert (run.error is None) == (budget == 12)
        if run.error is not None:
            assert "has updated 11 times inside BNGuardCallback(updates=11)" in str(run.error)
        assert run.has_moved("head")
        run.assert_nothing_left()


PHASES: dict[str, tuple[dict[str, int], range]] = {
    "until epoch": ({"until_epoch": 1}, range(6)),
    "from epoch": ({"from_epoch": 2}, range(12, 18)),
    "some epochs": ({"from_epoch": 1, "until_epoch": 2}, range(6, 12)),
    "until step": ({"until_step": 4}, range(4)),
    "some steps": ({"from_step": 2, "until_step": 7}, range(2, 7)),
    "later": ({"from_epoch": 7}, range(0)),
}


class ByHand(Callback):
    """What people write: a guard that is started and stopped at some steps."""

    def __init__(self, part: nn.Module, steps: range) -> None:
        self.guard, self.steps = bnguard.frozen(part, use_running_stats=True), steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps.start and self.steps:
            self.guard.start()
        if trainer.global_step == self.steps.stop:
            self.guard.stop()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.guard.stop()


@pytest.mark.parametrize(("options", "steps"), PHASES.values(), ids=PHASES)
def test_guard_for_a_while_is_start_and_stop_by_hand(options: dict[str, int], steps: range, tmp_path: Path) -> None:
    """In a run of three epochs of six steps."""
    net, twin = make_net(), make_net()
    plain = fit(twin, make_trainer(tmp_path, ByHand(twin.backbone, steps), max_epochs=3))
    callback = BNGuardCallback("backbone", use_running_stats=True, **options)
    run = fit(net, make_trainer(tmp_path, callback, max_epochs=3))
    assert run.error is None
    assert_same_bits(net.losses, twin.losses)
    assert_same_bits(run.weights, plain.weights)
    assert_same_bits(statistics(net), statistics(twin))
    assert run.has_moved()
    run.assert_nothing_left()


def test_phase_of_a_run_that_is_resumed_counts_from_its_first_epoch(tmp_path: Path) -> None:
    """Two epochs, then two more: until epoch 3 is for one of them."""
    trainer = make_trainer(tmp_path, max_epochs=2)
    fit(make_net(), trainer)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    nets = []
    for options in ({"until_epoch": 3}, {"until_epoch": 2}, {"until_epoch": 9}):
        net = make_net()
        callback = BNGuardCallback("backbone", "restore", **options)
        run = fit(net, make_trainer(tmp_path, callback, max_epochs=4), ckpt_path=tmp_path / "two.ckpt")
        assert run.error is None
        run.assert_nothing_left()
        nets.append(int(net.backbone[1].num_batches_tracked))
    assert nets == [1 + 12 + 6, 1 + 12 + 12, 1 + 12]


def test_finding_at_the_end_of_a_phase_ends_the_run(tmp_path: Path) -> None:
    """Of what only the comparison sees; and it is logged."""
    net = make_net()

    class Writing(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 2:
                net.backbone[1].running_mean.add_(1)

    callback = BNGuardCallback("backbone", use_running_stats=True, until_step=4)
    run = fit(net, make_trainer(tmp_path, Writing(), callback))
    assert isinstance(run.error, bnguard.StatsChangedError)
    assert run.trainer.global_step == 4
    assert not run.has_moved()
    run.assert_nothing_left()


def test_module_can_be_the_target(tmp_path: Path) -> None:
    """A part, without its path."""
    net = make_net()
    run = fit(net, make_trainer(tmp_path, BNGuardCallback(net.backbone, use_running_stats=True)))
    assert run.error is None
    run.assert_held()
    assert run.has_moved("head")


@pytest.mark.parametrize(
    ("target", "options", "guarded"),
    [
        (None, {}, ["backbone.1", "backbone.4", "head.1"]),
        ("backbone", {}, ["backbone.1", "backbone.4"]),
        ("backbone.4", {}, ["backbone.4"]),
        (["head", "backbone.1"], {}, ["backbone.1", "head.1"]),
        (None, {"include": "backbone"}, ["backbone.1", "backbone.4"]),
        ("backbone", {"exclude": "*.4"}, ["backbone.1"]),
        (None, {"include": lambda name, module: isinstance(module, nn.BatchNorm1d)}, ["head.1"]),
    ],
)
def test_layers_are_those_of_target_include_and_exclude(target, options, guarded, tmp_path):
    """Names are those of the state dict of the LightningModule; the others go on updating."""
    guard = BNGuardCallback(target, "restore", **options)
    assert guard.layers == ()
    run = fit(make_net(), make_trainer(tmp_path, guard))
    assert run.error is None
    assert [name for layer in guard.layers for name in layer.names] == guarded
    for name in ("backbone.1", "backbone.4", "head.1"):
        assert run.has_moved(name) == (name not in guarded)
    run.assert_nothing_left()


# Scenarios.


class AfterSetup(SingleDeviceStrategy):
    """Loads checkpoints when FSDP and DeepSpeed do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


class LeftInTrainMode(Net):
    """A validation that forgot eval(): Lightning lets a module decide."""

    def on_validation_model_eval(self) -> None:
        pass

    def training_step(self, batch, batch_idx):
        self.backbone.eval()  # only the validation is at fault
        loss = super().training_step(batch, batch_idx)
        self.backbone.train()
        return loss


def test_validation_left_in_train_mode_learns_from_its_data_and_is_stopped(tmp_path):
    """The twin learns from the validation set; under raise the sanity check finds it, under restore nothing moves."""
    twin = fit(LeftInTrainMode(), make_trainer(tmp_path))
    assert twin.error is None
    assert twin.has_moved()
    for strategy in (SingleDeviceStrategy, AfterSetup):
        options = {"strategy": strategy(torch.device("cpu"))}
        run = fit(LeftInTrainMode(), make_trainer(tmp_path, BNGuardCallback("backbone"), **options))
        assert isinstance(run.error, bnguard.StatsChangedError)
        assert "in validation_step" in str(run.error)
        assert run.net.losses == []
        run.assert_held()
    run = fit(LeftInTrainMode(), make_trainer(tmp_path, BNGuardCallback("backbone", "restore")))
    assert run.error is None
    run.assert_held()
    assert_same_bits(run.net.answers, twin.net.answers)


class Undone(Net):
    """``bn.eval()`` once, and a loop that undoes it."""

    def on_fit_start(self) -> None:
        self.backbone.eval()

    def on_train_epoch_start(self) -> None:
        self.train()


def test_eval_mode_that_the_loop_undoes_is_kept(tmp_path):
    """The twin's freeze is over with the first epoch; under ``use_running_stats`` it lasts."""
    twin = fit(Undone(), make_trainer(tmp_path))
    assert twin.has_moved()
    run = fit(Undone(), make_trainer(tmp_path, BNGuardCallback("backbone", use_running_stats=True)))
    assert run.error is None
    run.assert_held()
    run = fit(Undone(), make_trainer(tmp_path, BNGuardCallback("backbone")))
    assert "Choose what you meant:\n  BNGuardCallback('backbone', use_running_stats=True)" in str(run.error)


@EVERY_POLICY
@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_run_that_raises_in_the_middle_leaves_nothing_behind(on_change, kind, tmp_path):
    """The exception reaches the user as it is; statistics are those of the beginning, or under warn the twin's."""
    error = kind("in the middle")
    twin = fit(make_net(), make_trainer(tmp_path, at("on_after_backward", fail(error), epoch=1)))
    assert twin.error is error
    assert twin.has_moved()
    guard = BNGuardCallback("backbone", on_change, use_running_stats=on_change == "raise")
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, guard, at("on_after_backward", fail(error), epoch=1)))
    assert run.error is error
    assert run.trainer.state.status == "interrupted"
    assert len(words) == (on_change == "warn")
    if on_change == "warn":
        assert_same_bits(run.net.state_dict(), twin.net.state_dict())
        run.assert_nothing_left()
    else:
        run.assert_held()


def test_exception_on_its_way_is_not_masked_by_a_finding(tmp_path):
    """What changed is put back, and told in a note."""
    error = RuntimeError("of the user")
    guard = BNGuardCallback("backbone", use_running_stats=True)
    callbacks = (guard, at("on_train_batch_end", write), at("on_train_batch_end", fail(error)))
    run = fit(make_net(), make_trainer(tmp_path, *callbacks))
    assert run.error is error
    [note] = error.__notes__
    assert note.startswith("bnguard: running statistics of 1 layer changed inside BNGuardCallback():\n  backbone.1 ")
    run.assert_held()


def test_guard_that_fails_to_end_does_not_mask_an_exception(tmp_path, monkeypatch):
    """Whatever goes wrong at the end is a note of the exception on its way."""
    error = RuntimeError("of the user")
    guard = BNGuardCallback("backbone", "restore")

    def broken(*args, **options):
        raise OSError("no space left")

    run = fit(
        make_net(),
        make_trainer(tmp_path, guard, at("on_train_end", fail(error)), logger=CSVLogger(tmp_path)),
    )
    assert run.error is error
    logger = CSVLogger(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", broken)
    trainer = make_trainer(tmp_path, guard, at("on_train_start", fail(error)), logger=logger)
    run = fit(make_net(), trainer)
    assert run.error is error
    assert error.__notes__ == ["bnguard: OSError: no space left"]
    run.assert_held()


def test_swallowed_error_still_ends_the_run(tmp_path):
    """A training step that catches the error of its forward is found at the next validation."""

    class Swallows(Net):
        def training_step(self, batch, batch_idx):
            with suppress(bnguard.StatsChangedError):
                self.backbone(batch[0])

    assert fit(Swallows(), make_trainer(tmp_path)).has_moved()
    run = fit(Swallows(), make_trainer(tmp_path, BNGuardCallback("backbone")))
    assert "the StatsChangedError that said so was caught" in str(run.error)
    assert run.trainer.current_epoch == 0
    run.assert_held()


@EVERY_POLICY
def test_ctrl_c_leaves_nothing_behind(on_change, tmp_path):
    """Lightning ends the process; the model is as it was, or under warn as the twin's."""
    stop = KeyboardInterrupt()
    twin = fit(make_net(), make_trainer(tmp_path, at("on_after_backward", fail(stop), epoch=1)))
    assert isinstance(twin.error, SystemExit)
    assert twin.has_moved()
    guard = BNGuardCallback("backbone", on_change, use_running_stats=on_change == "raise")
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, guard, at("on_after_backward", fail(stop), epoch=1)))
    assert isinstance(run.error, SystemExit)
    assert len(words) == (on_change == "warn")
    if on_change == "warn":
        assert_same_bits(run.net.state_dict(), twin.net.state_dict())
        run.assert_nothing_left()
    else:
        run.assert_held()


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_finding_at_ctrl_c_is_a_warning(on_change, tmp_path):
    """Lightning shows no KeyboardInterrupt, so that a note would reach nobody. As an error it masks nothing."""

    def act(trainer, net):
        write(trainer, net)
        raise KeyboardInterrupt

    guard = BNGuardCallback("backbone", on_change, use_running_stats=True)
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_batch_end", act)))
    assert isinstance(run.error, SystemExit)
    [word] = words
    assert "running statistics of 1 layer changed inside BNGuardCallback()" in str(word.message)
    run.assert_held()
    run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_batch_end", act)))  # under the filter "error"
    assert isinstance(run.error, SystemExit)
    run.assert_held()


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, AfterSetup])
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("options", [{"use_running_stats": True}, {"on_change": "restore"}], ids=["raise", "restore"])
def test_resuming_begins_with_the_statistics_of_the_checkpoint(strategy, sanity, options, tmp_path):
    """Loading is no change, whenever the strategy loads; the resumed run continues as the twin's does."""
    first = fit(make_net(), make_trainer(tmp_path, max_epochs=1))
    path = tmp_path / "first.ckpt"
    first.trainer.save_checkpoint(path)
    assert first.has_moved()

    def resume(*callbacks):
        device = strategy(torch.device("cpu"))
        trainer = make_trainer(tmp_path, *callbacks, strategy=device, num_sanity_val_steps=sanity)
        return fit(make_net(), trainer, ckpt_path=path, weights_only=False)

    twin = resume()
    assert twin.error is None
    run = resume(BNGuardCallback("backbone", **options))
    assert run.error is None
    assert run.trainer.current_epoch == twin.trainer.current_epoch == 2
    assert_same_bits(run.statistics(), first.statistics())
    assert not all([torch.equal(value, twin.statistics()[name]) for name, value in run.statistics().items()])
    if "on_change" in options:
        assert_same_bits(run.weights, twin.weights)
    run.assert_nothing_left()


@EVERY_PACKAGE
def test_resuming_a_guarded_run_continues_it(package, tmp_path):
    """One epoch, a checkpoint and another epoch are two epochs; and the callback has no state in the checkpoint."""

    def guard():
        return BNGuardCallback("backbone", use_running_stats=True)

    whole = fit(make_net(package), make_trainer(tmp_path, guard(), package=package), batches())
    options = {"package": package, "max_epochs": 1}
    first = fit(make_net(package), make_trainer(tmp_path, guard(), **options), batches())
    path = tmp_path / "first.ckpt"
    first.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)
    assert not any(["BNGuard" in str(key) for key in saved["callbacks"]])
    trainer = make_trainer(tmp_path, guard(), package=package)
    torch.set_rng_state(first.rng)
    trainer.fit(make_net(package), batches(), batches(2, seed=2), ckpt_path=path, weights_only=False)
    assert trainer.current_epoch == 2
    resumed = {name: value for name, value in statistics(trainer.lightning_module).items() if name.startswith("back")}
    assert_same_bits(resumed, whole.statistics())


# Checkpoints.


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("act", [write, replace])
def test_checkpoint_never_holds_drifted_statistics(act, weights_only, tmp_path):
    """Under restore it holds those of the beginning, under raise it is not made, under warn a warning says so."""
    path = tmp_path / "run.ckpt"

    def change_and_save(trainer, net):
        act(trainer, net)
        trainer.save_checkpoint(path, weights_only=weights_only)

    def saved():
        state = torch.load(path, weights_only=False)["state_dict"]
        path.unlink()
        return {name: state[name] for name in twin.statistics()}

    net = make_net()
    net.backbone.eval()
    twin = fit(net, make_trainer(tmp_path, at("on_train_batch_end", change_and_save, epoch=1)))
    assert twin.error is None
    assert not torch.equal(saved()["backbone.1.running_mean"], twin.before["backbone.1.running_mean"])

    with said() as words:
        guard = BNGuardCallback("backbone", "restore", use_running_stats=True)
        run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_batch_end", change_and_save, epoch=1)))
    assert run.error is None
    assert len(words) == 1
    assert_same_bits(saved(), {name: run.before[name] for name in run.statistics()})
    run.assert_held()

    guard = BNGuardCallback("backbone", use_running_stats=True)
    run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_batch_end", change_and_save, epoch=1)))
    assert isinstance(run.error, bnguard.StatsChangedError)
    assert not path.exists()
    run.assert_held()

    net = make_net()
    net.backbone.eval()
    with said() as words:
        guard = BNGuardCallback("backbone", "warn")
        run = fit(net, make_trainer(tmp_path, guard, at("on_train_batch_end", change_and_save, epoch=1)))
    assert run.error is None
    assert_same_bits(saved(), twin.statistics())
    assert len(words) == 2
    text = str(words[1].message)
    assert text.startswith(
        "this checkpoint holds running statistics of 1 layer that changed inside BNGuardCallback():\n"
        "  backbone.1 (BatchNorm2d): running_mean; mean moved by up to "
    )
    assert "BNGuardCallback('backbone', on_change=\"restore\")" in text
    assert words[1].filename == __file__
    run.assert_nothing_left()


@pytest.mark.parametrize("weights_only", [False, True])
def test_model_checkpoint_saves_what_it_would_save_anyway(weights_only, tmp_path):
    """Each file of ModelCheckpoint, the one at the end of training too, holds the statistics of the beginning."""

    def run(name, *callbacks):
        saver = ModelCheckpoint(
            tmp_path / name, save_last=True, save_top_k=-1, every_n_train_steps=4, save_weights_only=weights_only
        )
        run = fit(make_net(), make_trainer(tmp_path, *callbacks, saver, enable_checkpointing=True))
        assert run.error is None
        files = sorted((tmp_path / name).iterdir())
        assert len(files) >= 4
        return run, [torch.load(file, weights_only=False)["state_dict"] for file in files]

    twin, twin_states = run("twin")
    guarded, states = run("run", BNGuardCallback("backbone", "restore"))
    guarded.assert_held()
    for state, other in zip(states, twin_states, strict=True):
        for name, value in state.items():
            if name in guarded.statistics():
                assert_same_bits(value, guarded.before[name])
            else:
                assert_same_bits(value, other[name])
    assert not torch.equal(twin_states[0]["backbone.1.running_mean"], twin.before["backbone.1.running_mean"])


def test_checkpoint_on_exception_holds_the_statistics_of_the_beginning(tmp_path):
    """Lightning saves it after the guard has ended."""

    def run(*callbacks):
        saver, crash = OnExceptionCheckpoint(tmp_path), at("on_train_batch_end", fail(OSError()), 1)
        run = fit(make_net(), make_trainer(tmp_path, *callbacks, saver, crash, enable_checkpointing=True))
        assert isinstance(run.error, OSError)
        state = torch.load(tmp_path / "on_exception.ckpt", weights_only=False)["state_dict"]
        return all([torch.equal(state[name], run.before[name]) for name in run.statistics()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnExceptionCheckpoint, "teardown", lambda *args, **options: None)
        with said():
            assert not run()
            (tmp_path / "on_exception.ckpt").unlink()
            assert run(BNGuardCallback("backbone", "restore"))


def test_checkpoint_made_behind_the_trainers_back_is_checked(tmp_path):
    """The documented hook compares as well."""
    guard = BNGuardCallback("backbone", use_running_stats=True)

    def dump(trainer, net):
        write(trainer, net)
        trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

    run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_batch_end", dump)))
    assert isinstance(run.error, bnguard.StatsChangedError)
    assert "dump_checkpoint" in "".join(traceback.format_tb(run.error.__traceback__))
    run.assert_held()


def test_trainers_own_save_checkpoint_is_back_afterwards(tmp_path):
    """Somebody's own is called in between, put back at the end, and stays if it came later."""
    saved = []
    for early in (True, False):
        trainer = make_trainer(tmp_path, BNGuardCallback("backbone", "restore"))
        own = saved.append
        if early:
            trainer.save_checkpoint = own
        else:
            put = at("on_train_start", lambda trainer, net, own=own: setattr(trainer, "save_checkpoint", own))
            trainer.callbacks.append(put)
        trainer.callbacks.append(at("on_train_epoch_end", lambda trainer, net: trainer.save_checkpoint("a path")))
        run = fit(make_net(), trainer)
        assert run.error is None
        assert trainer.save_checkpoint is own
    assert saved == ["a path"] * 2


# Every way out.


HOOKS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_before_optimizer_step",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("is_first", [True, False])
def test_nothing_is_left_wherever_another_callback_fails(hook, is_first, tmp_path):
    """Its error reaches the user, and model and trainer are without a trace, in whatever order the callbacks are."""
    error = RuntimeError(hook)
    callbacks = [BNGuardCallback("backbone", "restore"), at(hook, fail(error))]
    run = fit(make_net(), make_trainer(tmp_path, *callbacks[:: -1 if is_first else 1]))
    assert run.error is error
    assert not hasattr(error, "__notes__")
    run.assert_held()


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_finding_at_the_end_reaches_the_user(hook, tmp_path):
    """The trainer ends as after any exception; the twin ends with other statistics and without a word."""
    net = make_net()
    net.backbone.eval()
    twin = fit(net, make_trainer(tmp_path, at(hook, write)))
    assert twin.error is None
    assert twin.has_moved()
    net = make_net()
    net.backbone.eval()
    logger = CSVLogger(tmp_path)
    ends = []
    logger.finalize = ends.append
    run = fit(net, make_trainer(tmp_path, at(hook, write), BNGuardCallback("backbone"), logger=logger))
    assert isinstance(run.error, bnguard.StatsChangedError)
    assert run.trainer.state.status == "interrupted"
    assert ends == ["failed"]
    run.assert_held()


def test_callback_serves_several_runs(tmp_path):
    """Of one trainer and of others, also after a run that failed; each begins with what is there then."""
    guard = BNGuardCallback("backbone", "restore")
    trainer, net = make_trainer(tmp_path, guard), make_net()
    fit(net, trainer).assert_held()
    net.backbone.train()(torch.randn(8, 1, 4, 4))
    trainer.fit_loop.max_epochs = 4
    run = fit(net, trainer)
    assert run.error is None
    assert trainer.current_epoch == 4
    run.assert_held()
    error = RuntimeError("once")
    assert fit(net, make_trainer(tmp_path, guard, at("on_train_batch_start", fail(error)))).error is error
    run = fit(make_net(), make_trainer(tmp_path, guard))
    assert run.error is None
    run.assert_held()


@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_guard_that_lightning_forgets_ends_with_the_next_run(on_change, tmp_path):
    """Where another callback fails in on_exception, none after it is called."""
    guard = BNGuardCallback("backbone", on_change, use_running_stats=True)
    callbacks = (at("on_exception", fail(OSError())), guard, at("on_train_batch_end", write))
    first = fit(make_net(), make_trainer(tmp_path, *callbacks, at("on_train_batch_end", fail(RuntimeError()))))
    assert isinstance(first.error, OSError)
    assert "save_checkpoint" in vars(first.trainer)
    with said() as words:
        second = fit(make_net(), make_trainer(tmp_path, guard))
    assert second.error is None
    assert len(words) == 1
    first.assert_held()
    second.assert_held()


def test_several_callbacks_in_one_trainer(tmp_path):
    """Each guards its part in its own way; the trainer's method is back when both have ended."""
    part, other = BNGuardCallback("backbone", use_running_stats=True), BNGuardCallback("head", "restore")
    run = fit(make_net(), make_trainer(tmp_path, part, other))
    assert run.error is None
    run.assert_held()
    assert not run.has_moved("head")
    assert [len(guard.layers) for guard in (part, other)] == [2, 1]


# What averages weights, tries learning rates, converts.


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: WeightAveraging(), 0),
        (lambda: EMAWeightAveraging(decay=0.9), 1),
        (lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), 1),
    ],
    ids=["average", "ema", "swa"],
)
def test_weight_averaging_does_not_move_what_is_held(make, count, tmp_path):
    """The twin ends with averaged statistics; under restore what is written back is put back, with a warning."""
    assert fit(make_net(), make_trainer(tmp_path, make())).has_moved()
    guard = BNGuardCallback("backbone", "restore", use_running_stats=True)
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, guard, make()))
    assert run.error is None
    assert len(words) == count
    run.assert_held()


class ByHandAgainst(Callback):
    """What people write beside a callback that averages: eval mode, and statistics that are put back after it."""

    def __init__(self, part: nn.Module) -> None:
        self.layers = [layer for layer in part.modules() if isinstance(layer, nn.BatchNorm2d)]
        self.kept = [(layer, dict(layer.named_buffers()), values(dict(layer.named_buffers()))) for layer in self.layers]

    def put_back(self, *args: Any) -> None:
        for layer, objects, kept in self.kept:
            for name, tensor in objects.items():
                setattr(layer, name, tensor)
                tensor.data.copy_(kept[name])

    def on_train_batch_start(self, *args: Any) -> None:
        for layer in self.layers:
            layer.eval()

    on_train_epoch_start = on_validation_epoch_start = on_validation_epoch_end = on_train_end = put_back


AVERAGING = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "ema": lambda: EMAWeightAveraging(decay=0.9),
}
EVERY_AVERAGE = pytest.mark.parametrize("name", AVERAGING)


@EVERY_AVERAGE
@pytest.mark.parametrize("on_change", ["raise", "restore"])
def test_average_is_that_of_a_loop_that_puts_statistics_back_by_hand(name, on_change, tmp_path):
    """The run reaches its end with every bit of the twin's; one warning names the callback, in whatever order."""
    net = make_net()
    twin = fit(net, make_trainer(tmp_path, AVERAGING[name](), ByHandAgainst(net.backbone)))
    assert twin.error is None
    for order in (1, -1):
        average = AVERAGING[name]()
        guard = BNGuardCallback("backbone", on_change, use_running_stats=True)
        with said() as words:
            run = fit(make_net(), make_trainer(tmp_path, *[guard, average][::order]))
        assert run.error is None
        [word] = words
        text = str(word.message)
        assert text.startswith(f"{type(average).__name__} wrote to running statistics of 2 layers inside BNGuardCall")
        assert "backbone.1 (BatchNorm2d): running_" in text  # mean or variance: what rounding moves
        assert word.filename == __file__
        run.assert_held()
        assert_same_bits(run.net.state_dict(), twin.net.state_dict())
        assert_same_bits(run.net.losses, twin.net.losses)
        assert_same_bits(run.net.answers, twin.net.answers)


@EVERY_AVERAGE
@pytest.mark.parametrize("weights_only", [False, True])
def test_no_checkpoint_holds_statistics_of_an_average(name, weights_only, tmp_path):
    """Neither those that are averaged nor those of the model; the rest is what the twin saves."""

    def run(folder, guards):
        net = make_net()
        saver = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2, save_last=True)
        saver.save_weights_only = weights_only
        rest = guards or [ByHandAgainst(net.backbone)]
        with said():
            run = fit(net, make_trainer(folder, AVERAGING[name](), *rest, saver, enable_checkpointing=True))
        assert run.error is None
        files = sorted(folder.glob("*.ckpt"))
        assert len(files) >= 6
        return run, [torch.load(file, weights_only=False)["state_dict"] for file in files]

    _, twin_states = run(tmp_path / "twin", [])
    guarded, states = run(tmp_path / "run", [BNGuardCallback("backbone", use_running_stats=True)])
    assert list(states[0]) == list(twin_states[0])
    has_averages = False
    for state, other in zip(states, twin_states, strict=True):
        for key, value in state.items():
            if key in guarded.statistics():
                assert_same_bits(value, guarded.before[key])
                has_averages |= not torch.equal(other[key], guarded.before[key])
            else:
                assert_same_bits(value, other[key])
    assert has_averages == (name == "ema" and not weights_only)


@EVERY_AVERAGE
def test_write_before_an_average_is_no_work_of_its_callback(name, tmp_path):
    """It is an error, of the callback that wrote; the other one's own writes before it were put back."""
    hook, epoch = ("on_train_end", 2) if name == "ema" else ("on_train_epoch_start", 2)
    callbacks = (at(hook, write, epoch), AVERAGING[name](), BNGuardCallback("backbone", use_running_stats=True))
    with said():
        run = fit(make_net(), make_trainer(tmp_path, *callbacks))
    assert isinstance(run.error, bnguard.StatsChangedError)
    assert str(run.error).startswith(f"At_{hook} wrote to running statistics of 1 layer inside BNGuardCallback():\n")
    assert "\n  backbone.1 (BatchNorm2d): running_mean;" in str(run.error)
    run.assert_held()


@EVERY_AVERAGE
@pytest.mark.parametrize("on_change", ["warn", "rollback"])
def test_average_stays_where_changes_are_let_happen(name, on_change, tmp_path):
    """Every bit is the twin's; under rollback but for the backbone's statistics, at the end."""
    twin = fit(make_net(), make_trainer(tmp_path, AVERAGING[name]()))
    with said():
        run = fit(make_net(), make_trainer(tmp_path, AVERAGING[name](), BNGuardCallback("backbone", on_change)))
    assert run.error is None
    assert_same_bits(run.statistics("head"), twin.statistics("head"))
    assert_same_bits(run.weights, twin.weights)
    assert_same_bits(run.net.answers, twin.net.answers)
    assert_same_bits(
        run.statistics(), twin.statistics() if on_change == "warn" else {n: run.before[n] for n in run.statistics()}
    )
    run.assert_nothing_left()


class AveragesByHand(Callback):
    """As many people write it: an average of all floating point values, which is evaluated in place of the model."""

    def on_train_start(self, trainer: Any, net: Any) -> None:
        self.average = {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}

    def on_train_batch_end(self, trainer: Any, net: Any, *rest: Any) -> None:
        for name, value in net.state_dict().items():
            if name in self.average:
                self.average[name].mul_(0.9).add_(value, alpha=0.1)

    def on_validation_start(self, trainer: Any, net: Any) -> None:
        if hasattr(self, "average"):
            self.own = values(net.state_dict())
            net.load_state_dict(self.average, strict=False)

    def on_validation_end(self, trainer: Any, net: Any) -> None:
        if hasattr(self, "average"):
            net.load_state_dict(self.own)

    def on_train_end(self, trainer: Any, net: Any) -> None:
        net.load_state_dict(self.average, strict=False)


class PutsBack(ByHandAgainst):
    """The same for such a callback."""

    on_validation_start = on_validation_end = on_train_end = ByHandAgainst.put_back


@pytest.mark.parametrize("order", [1, -1])
def test_average_of_a_users_callback_is_put_back_at_once(order: int, tmp_path: Path) -> None:
    """Every bit is that of a twin whose statistics are put back by hand; one warning names the callback."""
    net = make_net()
    twin = fit(net, make_trainer(tmp_path, AveragesByHand(), PutsBack(net.backbone)))
    assert twin.error is None
    guard, average = BNGuardCallback("backbone", "restore", use_running_stats=True), AveragesByHand()
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, *[guard, average][::order]))
    assert run.error is None
    [word] = words
    text = str(word.message)
    assert text.startswith("AveragesByHand wrote to running statistics of 1 layer inside BNGuardCallback():\n")
    assert "There are no warnings about later writes of this callback." in text
    run.assert_held()
    assert_same_bits(run.net.state_dict(), twin.net.state_dict())
    assert_same_bits(run.net.losses, twin.net.losses)
    assert_same_bits(run.net.answers, twin.net.answers)
    assert not [name for name in vars(average) if name.startswith("on_")]


def test_write_of_a_users_callback_is_an_error_under_raise(tmp_path: Path) -> None:
    """At once, and it names the callback; the statistics are back."""
    guard, average = BNGuardCallback("backbone", use_running_stats=True), AveragesByHand()
    run = fit(make_net(), make_trainer(tmp_path, average, guard))
    assert isinstance(run.error, bnguard.StatsChangedError)
    text = str(run.error)
    assert text.startswith("AveragesByHand wrote to running statistics of 1 layer inside BNGuardCallback():\n")
    assert 'on_change="restore"' in text
    assert run.trainer.global_step == 6  # at the first validation
    run.assert_held()


def test_users_callback_that_writes_elsewhere_is_no_finding(tmp_path: Path) -> None:
    """One that moves only what is not guarded, one that reads, and one that puts its own hook on the instance."""
    seen = []

    class Reads(Callback):
        def on_train_epoch_end(self, trainer: Any, net: Any) -> None:
            seen.append(float(net.backbone[1].running_mean.sum()))

    own = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, net: seen.append(trainer.current_epoch))
    head = at("on_train_epoch_end", lambda trainer, net: net.head[1].running_mean.add_(1))
    guard = BNGuardCallback("backbone", use_running_stats=True)
    hook = own.on_train_epoch_end
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, Reads(), own, head, guard))
    assert run.error is None
    assert words == []
    assert len(seen) == 4
    assert own.on_train_epoch_end is hook
    run.assert_held()


def test_average_of_a_users_callback_stays_under_warn(tmp_path: Path) -> None:
    """Every bit is that of a twin without a guard."""
    twin = fit(make_net(), make_trainer(tmp_path, AveragesByHand()))
    with said():
        run = fit(make_net(), make_trainer(tmp_path, AveragesByHand(), BNGuardCallback("backbone", "warn")))
    assert run.error is None
    assert_same_bits(run.net.state_dict(), twin.net.state_dict())
    assert_same_bits(run.net.answers, twin.net.answers)


class CopiesItself(Callback):
    """Keeps copies of itself, without what Lightning has set on it."""

    def __init__(self) -> None:
        self.copies: list[Any] = []
        self.calls = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict", "copies")}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls += 1
        self.copies = [copy.deepcopy(self), pickle.loads(pickle.dumps(self))]


def test_copy_of_a_callback_made_in_its_hook_is_unguarded(tmp_path: Path) -> None:
    """Nothing of the guard is in it: its hook is its own, and it needs no bnguard where it is loaded."""
    callback = CopiesItself()
    fit(make_net(), make_trainer(tmp_path, callback, BNGuardCallback("backbone", "restore")))
    assert callback.copies
    for copied in callback.copies:
        assert b"bnguard" not in pickle.dumps(copied)
        copied.on_train_epoch_end(None, None)
        assert (copied.calls, callback.calls) == (3, 2)


class Tuned(Net):
    """Has what the finders look for, and notes whether the backbone has moved at each of its forwards."""

    lr, batch_size = 0.01, 8

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.counts.add(int(self.backbone[1].num_batches_tracked))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(batches().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return batches(2, seed=2)

    @property
    def counts(self) -> set[int]:
        return self.__dict__.setdefault("_counts", set())


def find_rate(trainer: Any, net: Any) -> None:
    """As a script does."""
    Tuner(trainer).lr_find(net, num_training=4, early_stop_threshold=None)


def find_batch_size(trainer: Any, net: Any) -> None:
    """As a script does."""
    Tuner(trainer).scale_batch_size(net, steps_per_trial=2, init_val=8, max_trials=2)


class InAnEpoch(LearningRateFinder):
    """As Lightning's documentation has it: after the guard has begun."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self.lr_find(trainer, pl_module)


RATES = {"num_training_steps": 4, "early_stop_threshold": None}
FINDERS = {
    "rate": lambda: LearningRateFinder(**RATES),
    "rate in an epoch": lambda: InAnEpoch(**RATES),
    "batch size": lambda: BatchSizeFinder(steps_per_trial=2, init_val=8, max_trials=2),
}
TUNERS = {"rate": find_rate, "batch size": find_batch_size}
EVERY_FINDER = pytest.mark.parametrize("name", [*FINDERS, *[f"tuner: {name}" for name in TUNERS]])


def try_out(name: str, folder: Path, *callbacks: Any) -> Run:
    """A run with trial runs in it, or one of the tuner's."""
    net, is_tuner = Tuned(), name.startswith("tuner")
    trainer = make_trainer(folder, *([] if is_tuner else [FINDERS[name]()]), *callbacks)
    before = statistics(net)
    run = Run(net, trainer, values(before), before)
    torch.manual_seed(5)
    try:
        if is_tuner:
            TUNERS[name.partition(": ")[2]](trainer, net)
        else:
            trainer.fit(net)
    except BaseException as error:
        run.error = error
    return run


@EVERY_FINDER
@pytest.mark.parametrize("options", [{"on_change": "restore"}, {"use_running_stats": True}], ids=["restore", "running"])
def test_trial_runs_are_guarded(name, options, tmp_path):
    """The twin's backbone moves in the trials of a finder; the guarded one does at no forward."""
    twin = try_out(name, tmp_path)
    assert twin.error is None
    assert len(twin.net.counts) > 2
    run = try_out(name, tmp_path, BNGuardCallback("backbone", **options))
    assert run.error is None
    assert run.net.counts == {1}
    run.assert_held()
    assert len(run.net.losses) == len(twin.net.losses)
    if "on_change" in options:
        assert_same_bits(run.net.losses, twin.net.losses)


@EVERY_FINDER
def test_trial_run_that_would_update_raises(name, tmp_path):
    """Before anything moves, and nothing is left, although Lightning leaves other callbacks in the trainer."""
    guard = BNGuardCallback("backbone")
    run = try_out(name, tmp_path, guard)
    assert isinstance(run.error, bnguard.StatsChangedError)
    assert "in training_step" in str(run.error)
    assert guard in run.trainer.callbacks
    run.assert_held()
    assert [change.names for change in guard.changes] == [("backbone.1",)]


@EVERY_FINDER
def test_trial_runs_of_a_layer_in_eval_mode_are_no_finding(name, tmp_path):
    """Under raise, with statistics that nothing moves."""

    class Careful(Tuned):
        def training_step(self, batch, batch_idx):
            self.backbone.eval()
            return super().training_step(batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Tuned", Careful)
        run = try_out(name, tmp_path, BNGuardCallback("backbone"))
    assert run.error is None
    run.assert_held()


@EVERY_FINDER
def test_trial_runs_spend_no_budget(name, tmp_path):
    """Lightning undoes what they do, which is no change either."""
    twin = try_out(name, tmp_path)
    updates = int(twin.net.head[1].num_batches_tracked)
    assert len(twin.net.losses) > max(updates, 1)
    run = try_out(name, tmp_path, BNGuardCallback("head", updates=max(updates, 1)))
    assert run.error is None
    assert_same_bits(run.net.state_dict(), twin.net.state_dict())
    run.assert_nothing_left()


def test_trial_run_outside_of_the_phase_is_not_guarded(tmp_path):
    """Nor is that of a model without layers to guard."""
    for guard in (BNGuardCallback("backbone", from_epoch=1, until_epoch=2, on_change="restore"), None):
        run = try_out("rate", tmp_path, *filter(None, [guard]))
        assert run.error is None
        assert {1, 2, 3, 4} <= run.net.counts


def test_tuner_that_ends_a_run_in_its_own_way_ends_the_guard(tmp_path):
    """Neither on_fit_end nor on_exception is called then."""
    guard = BNGuardCallback("backbone", "restore")
    run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_epoch_end", fail(_TunerExitException()))))
    assert run.error is None
    assert run.trainer.current_epoch == 0
    run.assert_held()


def test_double_precision_is_guarded_as_it_is(tmp_path):
    """Statistics are converted before the guard begins."""
    guard = BNGuardCallback("backbone", use_running_stats=True)
    run = fit(make_net(), make_trainer(tmp_path, guard, precision="64-true"))
    assert run.error is None
    assert run.net.backbone[1].running_mean.dtype == torch.float64
    expected = {name: value.to(run.statistics()[name].dtype) for name, value in run.before.items() if "backb" in name}
    assert_same_bits(run.statistics(), expected)
    run.assert_nothing_left()


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiles", [False, True])
def test_wrapper_of_fabric_is_seen_through(compiles):
    """Names are those of the state dict, and patterns match them."""
    net = make_net()
    names = [name.removesuffix(".running_mean") for name in net.state_dict() if name.endswith("running_mean")]
    model = Fabric(accelerator="cpu", devices=1).setup(torch.compile(net) if compiles else net)
    assert [layer.names for layer in bnguard.frozen(model).layers] == [(name,) for name in names]
    assert len(bnguard.frozen(model, include="backbone").layers) == 2
    assert list(model.state_dict()) == list(net.state_dict())


# Runs without training.


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_runs_without_training_are_guarded_from_start_to_end(what, tmp_path):
    """A test in train mode moves the twin's statistics; raise stops it, restore holds, and nothing is left."""

    class InTrainMode(Net):
        def on_validation_model_eval(self):
            pass

        on_test_model_eval = on_predict_model_eval = on_validation_model_eval

    def run(*callbacks):
        net, trainer = InTrainMode(), make_trainer(tmp_path, *callbacks)
        before = statistics(net)
        run = Run(net, trainer, values(before), before)
        try:
            getattr(trainer, what)(net, batches(2))
        except bnguard.StatsChangedError as error:
            run.error = error
        return run

    twin = run()
    assert twin.has_moved()
    guard = BNGuardCallback("backbone", "restore")
    guarded = run(guard)
    assert guarded.error is None
    guarded.assert_held()
    assert len(guard.layers) == 2
    assert_same_bits(guarded.net.answers, twin.net.answers)
    stopped = run(BNGuardCallback("backbone"))
    assert "in train mode inside BNGuardCallback()" in str(stopped.error)
    stopped.assert_held()


def test_fast_dev_run_and_a_run_without_batches(tmp_path):
    """The guard begins and ends in both."""
    for options in ({"fast_dev_run": True}, {"limit_train_batches": 0}, {"max_epochs": 0}):
        run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback("backbone", "restore"), **options))
        assert run.error is None
        run.assert_held()


# What is logged.


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows that the logger has written about bnguard, less what is empty."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [
            {key: value for key, value in row.items() if value and not key.startswith("epoch")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if any(["bnguard" in key for key in row])]


# By what Lightning calls the step in its own rows, the number of optimizer steps that were made.
AT_VALIDATIONS = {5: 6, 11: 12, 12: 12}
EVERY_FOURTH = {3: 4, 5: 6, 7: 8, 11: 12, 12: 12}


@pytest.mark.parametrize(("log_every", "steps"), [(None, AT_VALIDATIONS), (4, EVERY_FOURTH)], ids=str)
def test_drift_is_logged_at_validations_and_every_so_many_steps(log_every, steps, tmp_path):
    """Largest shift of a mean since the beginning, by layer, and the number of updates; those of the twin's run."""
    expected = {}

    def measure(trainer, net):
        layer = net.backbone[1]
        mean, var = start["running_mean"].double(), start["running_var"].double()
        shift = (layer.running_mean.double() - mean).abs() / (var + layer.eps).sqrt()
        expected[trainer.global_step] = shift.max().item()

    class Probe(Callback):
        def on_train_batch_end(self, trainer, net, *rest):
            measure(trainer, net)

    net = make_net()
    start = values(dict(net.backbone[1].named_buffers()))
    fit(net, make_trainer(tmp_path, Probe()))
    logger = CSVLogger(tmp_path)
    with said():
        run = fit(
            make_net(), make_trainer(tmp_path, BNGuardCallback("backbone", "warn", log_every=log_every), logger=logger)
        )
    assert run.error is None
    rows = {int(row["step"]): row for row in logged(Path(logger.log_dir))}
    assert list(rows) == list(steps)
    for step, row in rows.items():
        assert float(row["bnguard/backbone/changed_layers"]) == 2
        assert float(row["bnguard/backbone.1/updates"]) == steps[step]
        assert float(row["bnguard/backbone.1/mean_shift"]) == expected[steps[step]]
        assert "bnguard/backbone.4/mean_shift" in row


def test_finding_is_logged_before_it_is_raised(tmp_path):
    """Of a forward, which changed nothing, and of a comparison."""
    for options, counter, key in (
        ({}, "stopped_layers", "stopped"),
        ({"use_running_stats": True}, "changed_layers", "mean_shift"),
    ):
        logger = CSVLogger(tmp_path)
        callbacks = (BNGuardCallback("backbone", **options), at("on_train_batch_end", write))
        run = fit(make_net(), make_trainer(tmp_path, *callbacks, logger=logger))
        assert isinstance(run.error, bnguard.StatsChangedError)
        row = logged(Path(logger.log_dir))[-1]
        assert float(row[f"bnguard/backbone/{counter}"]) == 1
        assert float(row["bnguard/backbone/changed_layers"]) + float(row["bnguard/backbone/stopped_layers"]) == 1
        assert float(row[f"bnguard/backbone.1/{key}"]) > 0


def test_metrics_of_several_callbacks_have_keys_of_their_own(tmp_path):
    """By the target: a path, several, a module, the whole model; else by the patterns."""
    net, logger = make_net(), CSVLogger(tmp_path)
    guards = [
        BNGuardCallback("backbone.1", "warn"),
        BNGuardCallback(["backbone.4", "head.1"], "warn"),
        BNGuardCallback(net.head, "warn"),
        BNGuardCallback(nn.BatchNorm1d(3), "restore"),
        BNGuardCallback(on_change="warn"),
        BNGuardCallback(on_change="warn", include="backbone.*"),
    ]
    with said():
        assert fit(net, make_trainer(tmp_path, *guards, logger=logger)).error is None
    row = {key: value for row in logged(Path(logger.log_dir)) for key, value in row.items()}
    assert {key: float(value) for key, value in row.items() if key.endswith("changed_layers")} == {
        "bnguard/backbone.1/changed_layers": 1,
        "bnguard/backbone.4,head.1/changed_layers": 2,
        "bnguard/head/changed_layers": 1,
        "bnguard/BatchNorm1d/changed_layers": 0,
        "bnguard/changed_layers": 3,
        "bnguard/backbone.*/changed_layers": 2,
    }


def test_nothing_found_is_logged_as_zero(tmp_path):
    """And the sanity check logs nothing."""
    logger = CSVLogger(tmp_path)
    run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback("backbone", "restore"), logger=logger))
    assert run.error is None
    rows = logged(Path(logger.log_dir))
    nothing = {"bnguard/backbone/changed_layers": "0.0", "bnguard/backbone/stopped_layers": "0.0"}
    assert rows == [{**nothing, "step": step} for step in ("5", "11", "12")]


def test_every_batch_is_logged_where_it_steps_twice(tmp_path):
    """On the axis of the model's own figures; with two optimizers the number of steps passes over some multiples."""

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            self.manual_backward(loss)
            for optimizer in self.optimizers()[: 1 if self.trainer.global_step == 0 else 2]:
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.head.parameters(), lr=0.1) for _ in range(2)]

    logger = CSVLogger(tmp_path)
    guard = BNGuardCallback("backbone", "restore", log_every=2)
    run = fit(Manual(), make_trainer(tmp_path, guard, logger=logger, max_epochs=1))
    assert run.error is None
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    own = [row["step"] for row in rows if row["loss"]]
    ours = [row["step"] for row in rows if row["bnguard/backbone/changed_layers"]]
    assert own == ["0", "1", "2", "3", "4", "5"]
    assert set(ours) == {*own[1:], "6"}  # all but the first batch, of one step; and the end


READS = [
    (torch, "equal"),
    (UsualTensors, "read"),
    *[(Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__")],
]


@pytest.mark.parametrize(("options", "reads"), [({}, False), ({"log_every": 1}, True)])
@pytest.mark.parametrize("on_change", ["raise", "warn", "restore"])
def test_no_tensor_is_read_in_a_training_step(on_change, options, reads, tmp_path, monkeypatch):
    """From the first batch to the last of an epoch, not once more than in the twin's run; with ``log_every`` it is."""

    def count(*callbacks):
        seen = []

        def begin(trainer, net):
            for owner, name in READS:
                plain = getattr(owner, name)
                spy = lambda *args, plain=plain, **options: seen.append(plain) or plain(*args, **options)  # noqa: E731
                monkeypatch.setattr(owner, name, spy)

        class End(Callback):
            def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
                if trainer.is_last_batch:
                    monkeypatch.undo()

        end = End()
        trainer = make_trainer(
            tmp_path, at("on_train_batch_start", begin), *callbacks, end, max_epochs=1, limit_val_batches=0
        )
        with said():
            run = fit(make_net(), trainer)
        assert run.error is None
        return len(seen)

    guard = BNGuardCallback("backbone", on_change, use_running_stats=on_change == "raise", **options)
    assert (count(guard) > count()) == reads


# Several processes.


DISTRIBUTED = """
import json, sys, warnings
from pathlib import Path
import torch
import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
import bnguard
from bnguard.integrations.lightning import BNGuardCallback
from tests.integrations.test_lightning import Net

torch.set_num_threads(1)
data = DataLoader(TensorDataset(torch.randn(48, 1, 4, 4), torch.arange(48) % 3), batch_size=8)
for name, writer, options in json.loads(sys.argv[1]):
    folder = Path(name).absolute()
    folder.mkdir(exist_ok=True)

    class Write(pl.Callback):
        def on_train_batch_end(self, trainer, net, *rest):
            # The last step: before each forward DDP broadcasts the statistics of rank zero.
            if trainer.global_rank == writer and trainer.global_step == 3:
                net.backbone[1].num_batches_tracked.data.add_(1)

    guards = [] if options is None else [BNGuardCallback("backbone", **options)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=CSVLogger(folder, "", ""),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[*guards, Write()],
    )
    net, failure = Net(), None
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            trainer.fit(net, data, data)
        except Exception as error:  # of a rank that another one has left, that of torch
            failure = f"{type(error).__name__}: {error}"
    ours = [str(record.message) for record in records if issubclass(record.category, bnguard.BNGuardWarning)]
    told = {"count": int(net.backbone[1].num_batches_tracked), "error": failure, "warnings": len(ours)}
    (folder / str(trainer.global_rank)).write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_several_processes(tmp_path):
    """Each is guarded, and warns or raises for itself; none waits for another. That of rank zero logs."""
    runs = [
        ("twin", None, None),
        ("restore", None, {"on_change": "restore"}),
        ("warn", None, {"on_change": "warn"}),
        ("raise", 0, {"use_running_stats": True}),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    log = tmp_path / "log"
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", DISTRIBUTED, json.dumps(runs)],
                cwd=tmp_path,
                env={**os.environ, **path, **world, "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in (0, 1)
        ]
    try:
        for process in processes:
            assert process.wait(timeout=120) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = {name: [json.loads((tmp_path / name / str(rank)).read_text()) for rank in (0, 1)] for name, *_ in runs}
    assert [process["count"] for process in told["twin"]] == [4, 4]
    assert told["restore"] == [{"count": 1, "error": None, "warnings": 0}] * 2
    assert [process["count"] for process in told["warn"]] == [4, 4]
    assert [process["warnings"] for process in told["warn"]] == [2, 1]  # that of the checkpoint is of rank zero
    rows = logged(tmp_path / "warn")
    assert rows
    assert {row["bnguard/backbone.1/updates"] for row in rows} == {"3.0"}
    zero, one = told["raise"]
    assert zero["count"] == one["count"] == 1
    assert zero["error"].startswith("StatsChangedError: ")
    assert (
        "running statistics of 1 layer changed inside BNGuardCallback():\n  backbone.1 (BatchNorm2d)" in zero["error"]
    )
    assert "StatsChangedError" not in (one["error"] or "")


SPAWNING = """
import lightning.pytorch as pl
from bnguard.integrations.lightning import BNGuardCallback
from tests.integrations.test_lightning import Net, batches

if __name__ == "__main__":
    guard = BNGuardCallback("backbone", "warn")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy="ddp_spawn", max_steps=2, logger=False, callbacks=[guard],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )
    trainer.fit(Net(), batches())
    print("changes here:", len(guard.changes))
"""


@pytest.mark.slow
def test_processes_that_lightning_starts_say_where_their_changes_are(tmp_path):
    """The callback of the process that started them is another one, whose ``changes`` stay empty."""
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNING)
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "without further warnings; callback.changes lists them all, in this process." in done.stderr
    assert "changes here: 0\n" in done.stdout


# What is refused, and what is told.


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((3,), {}, TypeError, "target must be the path of a submodule, such as 'backbone', .* got 3"),
        (((nn.BatchNorm1d(2),),), {}, TypeError, "target must be the path .* layers are chosen with include="),
        (("",), {}, ValueError, "target='' names no submodule; leave it out to mean the whole model"),
        ((), {"until_epoch": 0}, ValueError, "until_epoch=0 must be greater than 0"),
        (([],), {}, ValueError, r"target=\[\] names no submodule"),
        ((["a", None],), {}, TypeError, "target must be"),
        ((), {"on_change": "rase"}, ValueError, "on_change='rase': did you mean 'raise'"),
        ((), {"updates": -1}, ValueError, "updates=-1"),
        ((), {"use_running_stats": 1}, TypeError, "use_running_stats must be True or False, got 1"),
        ((), {"include": []}, ValueError, "include is an empty list"),
        ((), {"log_every": 0}, ValueError, "log_every must be a positive integer, got 0"),
        ((), {"log_every": 2.0}, TypeError, "log_every must be an integer, got 2.0"),
        ((), {"log_every": True}, TypeError, "log_every must be an integer, got True"),
    ],
)
def test_bad_options_are_refused_at_construction(arguments, options, error, text):
    """With the value, and what is valid."""
    with pytest.raises(error, match=text):
        BNGuardCallback(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (
            ("backbon",),
            {},
            "BNGuardCallback(): target 'backbon': Net has no submodule 'backbon'; did you mean 'backbone'? (valid",
        ),
        (
            ("backbone.9",),
            {},
            "target 'backbone.9': backbone has no submodule '9'; valid are '0', '1', '2', '3', '4' and '5'",
        ),
        (
            ("backbone.1.bn",),
            {},
            "target 'backbone.1.bn': backbone.1 has no submodule 'bn'; backbone.1 has no submodules",
        ),
        ((), {"include": "backbome"}, "include='backbome' matches none of the 3 layers with running statistics; close"),
        (
            ("head",),
            {"include": "backbone"},
            "include='backbone' matches modules, but none of the 1 layer with running statistics",
        ),
        (("head",), {"exclude": "head"}, "include and exclude leave none of the 1 layers"),
    ],
)
def test_path_that_leads_nowhere_ends_the_run_before_it_begins(arguments, options, text, tmp_path):
    """With the nearest name that exists."""
    run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback(*arguments, **options)))
    assert isinstance(run.error, ValueError)
    assert text in str(run.error)
    assert run.net.losses == []
    run.assert_held()


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("what", ["fit", "validate", "predict"])
def test_guard_of_layers_that_never_ran_says_so(what, tmp_path):
    """Of a module that is no part of the model, and of a part that has no place in its forward."""
    net = make_net()
    net.spare = nn.Sequential(nn.BatchNorm1d(4))
    for target in (nn.BatchNorm1d(3), "spare"):
        trainer = make_trainer(tmp_path, BNGuardCallback(target, "restore"))
        with said() as words:
            getattr(trainer, what)(net, batches(), *[batches(2)] * (what == "fit"))
        [word] = words
        assert str(word.message).startswith("no forward of a guarded layer ran inside BNGuardCallback(), while batches")
        assert word.filename == __file__
        assert_clean(net)


def test_guard_of_a_run_without_batches_accuses_nobody(tmp_path):
    """Nor where the model skips its epochs."""

    class Skips(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    for net, options in ((Net(), {"max_epochs": 0}), (Skips(), {"limit_val_batches": 0})):
        run = fit(net, make_trainer(tmp_path, BNGuardCallback("backbone", "restore"), **options))
        assert run.error is None
        run.assert_held()


def test_part_without_statistics_is_a_warning(tmp_path):
    """Generic training code must keep running."""
    with said() as words:
        run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback("head.3")))
    assert run.error is None
    [word] = words
    assert str(word.message).startswith("head.3 has no layer with running statistics: BNGuardCallback() has nothing to")
    assert word.filename == __file__
    run.assert_nothing_left()


@EVERY_PACKAGE
def test_callback_is_one_of_each_package(package, tmp_path):
    """So that a trainer takes it without a list, and a configuration file by its class."""
    assert issubclass(BNGuardCallback, package.Callback)
    guard = BNGuardCallback()
    assert make_trainer(tmp_path, package=package, callbacks=guard).callbacks == [guard]


def test_callback_can_be_copied_and_pickled(tmp_path):
    """Before a run, and after one: a launcher may send it to other processes."""
    guard = BNGuardCallback("backbone", "restore", include="*.1")
    for other in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        run = fit(make_net(), make_trainer(tmp_path, other))
        assert run.error is None
        assert len(other.layers) == 1
        again = copy.deepcopy(other)
        assert again.layers == again.changes == ()


def test_run_inside_a_run_is_not_disturbed_by_a_copy(tmp_path):
    """A copy made while the guard is open guards nothing, and neither does a copied model."""
    copies = []
    guard = BNGuardCallback("backbone", "restore")
    keep = at(
        "on_train_batch_end", lambda trainer, net: copies.append((copy.deepcopy(guard), copy.deepcopy(net.backbone)))
    )
    run = fit(make_net(), make_trainer(tmp_path, guard, keep))
    run.assert_held()
    [(other, backbone)] = copies
    assert_clean(backbone)
    before = values(dict(backbone.named_buffers()))
    backbone(torch.randn(8, 1, 4, 4))
    assert not torch.equal(backbone[1].running_mean, before["1.running_mean"])
    other.teardown(run.trainer, run.net, "fit")
    run.assert_held()


def test_layer_that_comes_during_a_run_is_warned_about(tmp_path):
    """It is not guarded; so it is with a path, and without one."""
    for target in ("backbone", None):
        add = at("on_train_start", lambda trainer, net: net.backbone.add_module("extra", nn.BatchNorm1d(4)))
        with said() as words:
            run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback(target, "restore"), add))
        assert run.error is None
        [word] = words
        assert str(word.message).startswith("backbone.extra came into the model inside BNGuardCallback() and was not")
    add = at("on_train_start", lambda trainer, net: net.head.add_module("extra", nn.BatchNorm1d(3)))
    with said() as words:
        fit(make_net(), make_trainer(tmp_path, BNGuardCallback("backbone", "restore"), add))
    assert words == []


def test_callback_of_a_run_that_is_under_way_is_refused(tmp_path):
    """By another trainer, whose run would end the guard of the first."""
    guard = BNGuardCallback("backbone", "restore")
    errors = []

    def predict(trainer, net):
        with pytest.raises(bnguard.BNGuardError, match="make one for each") as caught:
            make_trainer(tmp_path, guard).predict(make_net(), batches(1))
        errors.append(caught.value)

    run = fit(make_net(), make_trainer(tmp_path, guard, at("on_train_epoch_end", predict)))
    assert run.error is None
    assert len(errors) == 1
    run.assert_held()


def test_callback_that_is_listed_twice_guards_once(tmp_path):
    """And leaves nothing behind."""
    guard = BNGuardCallback("backbone", "restore")
    run = fit(make_net(), make_trainer(tmp_path, guard, guard))
    assert run.error is None
    run.assert_held()


def test_messages_call_the_guard_by_its_name(tmp_path):
    """Its budget is that of the run; weight and bias that were set free again are told as such."""
    run = fit(make_net(), make_trainer(tmp_path, BNGuardCallback("backbone", updates=2)))
    text = str(run.error)
    assert "has updated twice inside BNGuardCallback(updates=2):" in text
    assert "The budget is that of the whole run." in text
    guard = BNGuardCallback("backbone", use_running_stats=True, affine=True)
    free = at("on_train_start", lambda trainer, net: net.requires_grad_(requires_grad=True))
    run = fit(make_net(), make_trainer(tmp_path, guard, free))
    text = str(run.error)
    assert text.startswith("affine parameters of 2 layers changed inside BNGuardCallback():\n")
    assert "unless requires_grad_(True) is called again" in text
    assert "F.batch_norm" not in text
    assert text.endswith("The original parameters have been restored.")
    assert guard.report().startswith(
        "BNGuardCallback('backbone', on_change=\"raise\", use_running_stats=True, affine=True) guards 2 layers.\n"
    )


MISSING = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
{then}
"""


def test_missing_library_is_one_sentence(tmp_path):
    """With the command that installs it."""
    code = MISSING.format(names=["lightning", "pytorch_lightning"], then="import bnguard.integrations.lightning")
    done = forks.run("-c", code)
    assert done.returncode == 1
    expected = "ImportError: bnguard.integrations.lightning needs lightning: pip install 'bnguard[lightning]'\n"
    assert done.stderr.endswith(expected)
    fields = metadata.metadata("bnguard")
    assert "lightning" in fields.get_all("Provides-Extra")


@pytest.mark.parametrize(
    ("missing", "left"),
    [("lightning", "pytorch_lightning"), pytest.param("pytorch_lightning", "lightning", marks=pytest.mark.slow)],
)
def test_either_library_is_enough(missing, left):
    """Whichever is installed."""
    then = (
        "from bnguard.integrations.lightning import BNGuardCallback\n"
        "print([base.__module__.partition('.')[0] for base in BNGuardCallback.__mro__ if base.__name__ == 'Callback'])"
    )
    code = MISSING.format(names=[missing], then=then)
    done = forks.run("-c", code)
    assert done.stdout == f"['{left}']\n"


BROKEN = """
import importlib.abc, importlib.machinery, sys

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module):
        {does}

sys.meta_path.insert(0, Broken())
{then}
"""
FAILS = "raise AttributeError('module numpy has no attribute Inf')"


@pytest.mark.slow
@pytest.mark.parametrize("does", [FAILS, "raise ImportError('no symbol')", "pass"])
def test_broken_library_does_not_hide_the_other(does):
    """One that cannot be imported, or is an empty folder."""
    then = (
        "from bnguard.integrations.lightning import BNGuardCallback\n"
        "print([base.__module__.partition('.')[0] for base in BNGuardCallback.__mro__ if base.__name__ == 'Callback'])"
    )
    code = BROKEN.format(name="pytorch_lightning", does=does, then=then)
    done = forks.run("-c", code)
    assert done.stdout == "['lightning']\n"


def test_library_that_is_there_and_broken_is_not_said_to_be_missing():
    """Its own error says what is wrong."""
    code = MISSING.format(names=["torchmetrics"], then="import bnguard.integrations.lightning")
    done = forks.run("-c", code)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'torchmetrics'\n")


def test_example_of_the_module_runs_and_does_what_it_says(tmp_path, monkeypatch):
    """With digits; and without the callback, the statistics move."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits(n_class=10)
    images = torch.tensor(digits.images[:128], dtype=torch.float32).unsqueeze(1) / 16
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(integration.__doc__.partition("::\n")[2])
    quiet = "logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, "
    code = example.replace("Trainer(max_epochs", f"Trainer({quiet}max_epochs")
    assert code != example
    for callbacks in ('callbacks=[BNGuardCallback("backbone", use_running_stats=True)]', "callbacks=[]"):
        code = code.replace('callbacks=[BNGuardCallback("backbone", use_running_stats=True)]', callbacks)
        names = {"digits": TensorDataset(images, torch.tensor(digits.target[:128]))}
        exec(compile(code, "example", "exec"), names)
        net = names["trainer"].lightning_module
        assert (int(net.backbone[1].num_batches_tracked) == 0) == (callbacks != "callbacks=[]")
