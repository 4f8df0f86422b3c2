"""transformers: a guard around ``trainer.train()``, against runs of the same trainer without it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_untouched, state_of, statistics, values, warns
from tests.loops import (
    backbone_norms,
    counted_reads,
    data,
    drifted,
    error_without,
    examples_of,
    little_waiting,
    make_model,
    quiet_imports,
    run_code,
)
from tests.readme import LOOPS

with quiet_imports():
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
    from transformers.modeling_layers import GradientCheckpointingLayer

    from bnguard.integrations import transformers as integration
    from bnguard.integrations.transformers import BNGuardCallback

__all__ = ["little_waiting"]

BATCHES = 3
INTERRUPTS = pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])


class Net(nn.Module):
    """The digits net, with the interface that a ``Trainer`` asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixels)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Recording(Trainer):
    """Keeps every loss and the random state after the last step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss]
        self.random = torch.get_rng_state()
        return loss


def make_dataset() -> list[dict[str, Tensor]]:
    """48 digits."""
    return [{"pixels": image, "labels": label} for image, label in zip(*data(), strict=True)]


def make_args(path: Path, **options: Any) -> TrainingArguments:
    """Two epochs of three steps, on the CPU, and silent."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(path), **{**defaults, **options})


def make_trainer(model: nn.Module, path: Path, *callbacks: TrainerCallback, **options: Any) -> Recording:
    """A trainer of digits; it seeds all random numbers."""
    data = make_dataset()
    return Recording(model, make_args(path, **options), train_dataset=data, eval_dataset=data, callbacks=[*callbacks])


class At(TrainerCallback):
    """Does something at one event, at one step if that is given."""

    def __init__(self, event: str, action: Callable[[], object], step: int | None = None) -> None:
        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if step in (None, state.global_step):
                action()

        setattr(self, f"on_{event}", act)


def fail(kind: type[BaseException]) -> Callable[[], None]:
    """A function that raises."""
    return lambda: raise_it(kind("theirs"))


def raise_it(error: BaseException) -> None:
    """``raise``, as a function."""
    raise error


def drift(model: Net) -> bool:
    """Whether the statistics are no longer the first ones."""
    return drifted(model.net)


def assert_same_run(one: Recording, other: Recording, *, statistics_too: bool) -> None:
    """Two trainers have seen the same losses and random numbers, and left the same parameters and optimizer."""
    assert len(one.losses) > 1
    assert_same_bits(one.losses, other.losses)
    assert_same_bits(one.random, other.random)
    assert_same_bits(dict(one.model.named_parameters()), dict(other.model.named_parameters()))
    moments = [[s["exp_avg"] for s in trainer.optimizer.state.values()] for trainer in (one, other)]
    assert moments[0]
    assert_same_bits(*moments)
    if statistics_too:
        assert_same_bits(statistics(one.model), statistics(other.model))


# Exact.


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"eval_strategy": "epoch", "eval_on_start": True}],
    ids=["plain", "bf16", "accumulate", "evaluate"],
)
@pytest.mark.parametrize("form", ["callback", "frozen"])
def test_restore_trains_as_the_twin(form: str, options: Any, tmp_path: Path) -> None:
    """Under ``restore`` a run has the losses, gradients, parameters and random numbers of an unguarded one."""
    model, twin = Net(), Net()
    plain = make_trainer(twin, tmp_path / "twin", **options)
    plain.train()
    assert drift(twin)
    callback = BNGuardCallback(on_change="restore")
    trainer = make_trainer(model, tmp_path / "guarded", *([callback] if form == "callback" else []), **options)

    def run() -> None:
        with callback if form == "callback" else bnguard.frozen(model, "restore"):
            assert trainer.train().global_step == plain.state.global_step

    assert_untouched(model, run)
    assert_same_run(trainer, plain, statistics_too=False)
    assert_clean(model)


def by_hand(model: Net, mode: bool = True) -> nn.Module:
    """What people write: ``train()`` with BatchNorm in eval mode."""
    nn.Module.train(model, mode)
    for layer in backbone_norms(model):
        layer.eval()
    return model


def test_running_statistics_are_used_where_the_loop_undoes_eval(tmp_path: Path) -> None:
    """The trainer undoes ``bn.eval()`` at each step; under the guard the run is one that calls it again each time."""
    model, drifting, twin = Net(), Net(), Net()
    make_trainer(by_hand(drifting), tmp_path / "drifting").train()
    assert drift(drifting)

    twin.train = lambda mode=True: by_hand(twin, mode)
    plain = make_trainer(twin, tmp_path / "twin")
    plain.train()
    assert not drift(twin)
    callback = BNGuardCallback(use_running_stats=True, include="*backbone*")
    trainer = make_trainer(by_hand(model), tmp_path / "guarded", callback)
    with callback:
        trainer.train()
    assert_same_run(trainer, plain, statistics_too=True)
    assert_clean(model)


def test_warn_trains_as_the_twin_and_tells(tmp_path: Path) -> None:
    """Under ``warn`` the statistics are the twin's too; one warning a run, at the user's line."""
    model, twin = Net(), Net()
    plain = make_trainer(twin, tmp_path / "twin")
    plain.train()
    callback = BNGuardCallback(on_change="warn", exclude="*bn1")
    trainer = make_trainer(model, tmp_path / "guarded", callback)
    with warns() as caught, callback:
        trainer.train()
    assert "net.backbone.bn2 (BatchNorm2d) is in train mode inside BNGuardCallback()" in caught.message
    assert "test_transformers.py" in caught.message
    assert [(change.names, change.updates) for change in callback.changes] == [(("net.backbone.bn2",), 2 * BATCHES)]
    assert "net.backbone.bn2" in callback.report()
    assert [layer.names for layer in callback.layers] == [("net.backbone.bn2",)]
    assert_same_run(trainer, plain, statistics_too=True)


def test_affine_and_updates_are_passed_on(tmp_path: Path) -> None:
    """``affine=True`` holds weight and bias, ``updates`` is a budget of the run."""
    model = Net()
    callback = BNGuardCallback(affine=True, updates=BATCHES)
    trainer = make_trainer(model, tmp_path, callback)
    with (
        pytest.raises(bnguard.StatsChangedError, match=r"updated 3 times inside BNGuardCallback\(updates=3\)"),
        callback,
    ):
        trainer.train()
    assert model.net.backbone.bn1.num_batches_tracked == 3 + BATCHES
    assert_same_bits(model.net.backbone.bn1.weight, make_model().backbone.bn1.weight)
    assert not torch.equal(model.net.backbone.conv1.weight, make_model().backbone.conv1.weight)
    assert_clean(model)


def test_steps_read_no_tensor(tmp_path: Path) -> None:
    """A run reads from the device at its beginning and end; more steps read no more than the twin's."""

    def reads(guards: bool, epochs: int) -> int:
        callback = BNGuardCallback(on_change="restore")
        trainer = make_trainer(Net(), tmp_path, *([callback] if guards else []), num_train_epochs=epochs)
        with counted_reads() as counter:
            trainer.train()
        return counter.count

    assert reads(True, 1) > reads(False, 1)
    assert reads(True, 3) - reads(True, 1) == reads(False, 3) - reads(False, 1)


# What is wrong is said.


def test_raise_stops_the_run(tmp_path: Path) -> None:
    """Under ``raise`` the first train-mode forward ends the run, unchanged, with the line and the way out."""
    model = Net()
    callback = BNGuardCallback()
    trainer = make_trainer(model, tmp_path, callback)

    def run() -> None:
        with pytest.raises(bnguard.StatsChangedError) as caught, callback:
            trainer.train()
        text = str(caught.value)
        assert "net.backbone.bn1 (BatchNorm2d) is in train mode inside BNGuardCallback():" in text
        assert "test_transformers.py" in text
        assert "BNGuardCallback(use_running_stats=True)" in text
        assert not getattr(caught.value, "__notes__", [])

    assert_untouched(model, run)
    assert trainer.state.global_step == 0
    assert [change.names for change in callback.changes] == [("net.backbone.bn1",)]
    assert_clean(model)


class WrongTrainer(Recording):
    """Validates in train mode."""

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model.train()
        return super().prediction_step(model, *args, **kwargs)


def test_validation_left_in_train_mode_is_found(tmp_path: Path) -> None:
    """An evaluation that forgets eval mode moves the statistics; in a block it is stopped."""
    model, twin = Net(), Net()
    args = make_args(tmp_path)
    WrongTrainer(twin, args).evaluate(make_dataset())
    assert drift(twin)
    trainer = WrongTrainer(model, args)

    def run() -> None:
        with (
            pytest.raises(bnguard.StatsChangedError, match=r"net.backbone.bn1 .* is in train mode"),
            bnguard.frozen(model),
        ):
            trainer.evaluate(make_dataset())

    assert_untouched(model, run)
    with bnguard.frozen(model):
        Recording(model, args).evaluate(make_dataset())


def test_validation_in_train_mode_is_beyond_the_budget(tmp_path: Path) -> None:
    """With as many ``updates`` as the run has steps, an evaluation in train mode inside the run is one too many."""
    model = Net()
    callback = BNGuardCallback(updates=BATCHES)
    data = make_dataset()
    args = make_args(tmp_path, num_train_epochs=1, eval_strategy="epoch")
    trainer = WrongTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])
    with pytest.raises(bnguard.StatsChangedError, match="once more"), callback:
        trainer.train()
    assert trainer.state.global_step == BATCHES
    assert model.net.backbone.bn1.num_batches_tracked == 3 + BATCHES


def write(model: Net) -> Callable[[], None]:
    """What no forward explains."""

    def writes() -> None:
        model.net.backbone.bn1.running_mean.data += 1

    return writes


@pytest.mark.parametrize("form", ["with", "bare"])
def test_finding_at_the_end_of_the_run_reaches_the_user(form: str, tmp_path: Path) -> None:
    """What only the comparison at the end finds is raised by ``train()``, once, and put back."""
    model = Net()
    callback = BNGuardCallback(use_running_stats=True)
    trainer = make_trainer(model, tmp_path, callback, At("step_end", write(model), 2))
    with pytest.raises(bnguard.StatsChangedError, match="1 layer changed inside BNGuardCallback") as caught:
        if form == "with":
            with callback:
                trainer.train()
        else:
            trainer.train()
    assert not getattr(caught.value, "__notes__", [])
    assert trainer.state.global_step == 2 * BATCHES
    assert not drift(model)
    assert_clean(model)


@pytest.mark.parametrize(
    ("check_at", "found_at"), [("step_end", 1), ("save", 2), (["evaluate", "epoch_end"], 3), ((), 6)], ids=str
)
def test_check_at_finds_a_write_earlier(check_at: Any, found_at: int, tmp_path: Path) -> None:
    """``check_at`` compares at an event; without it a write is found at the end of the run."""
    model = Net()
    callback = BNGuardCallback(use_running_stats=True, check_at=check_at)
    writer = At("step_end", write(model), 1)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch"}
    trainer = make_trainer(model, tmp_path, writer, callback, **options)
    with pytest.raises(bnguard.StatsChangedError, match="1 layer changed"), callback:
        trainer.train()
    assert trainer.state.global_step == found_at
    assert not drift(model)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
@pytest.mark.parametrize("event", ["step_end", "evaluate"])
def test_check_at_save_comes_before_the_checkpoint(strategy: str, event: str, tmp_path: Path) -> None:
    """No checkpoint holds what was written, whether at a step or in the evaluation before it."""
    model = Net()
    entry = {f"net.{name}": value for name, value in values(statistics(model.net)).items()}
    callback = BNGuardCallback(on_change="restore", check_at="save")
    options: dict[str, Any] = {"save_strategy": strategy, "save_steps": 3, "eval_strategy": strategy, "eval_steps": 3}
    if strategy == "best":
        options = {**options, "eval_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(model, tmp_path, At(event, write(model)), callback, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnguard.BNGuardWarning)
        with callback:
            trainer.train()
    saved = sorted(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert saved
    for path in saved:
        state = load_file(path)
        assert_same_bits({name: state[name] for name in entry}, entry)


# However a run ends.


@INTERRUPTS
@pytest.mark.parametrize("event", ["train_begin", "step_begin", "epoch_end", "train_end"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_exception_comes_out(kind: type[BaseException], event: str, order: str, tmp_path: Path) -> None:
    """An exception at any event, of a callback before or after ours, comes out as it is; nothing stays behind."""
    model = Net()
    callback = BNGuardCallback(on_change="restore")
    failing = At(event, fail(kind))
    callbacks = [failing, callback] if order == "before" else [callback, failing]
    trainer = make_trainer(model, tmp_path, *callbacks, num_train_epochs=1)

    def run() -> None:
        with pytest.raises(kind, match="theirs") as caught, callback:
            trainer.train()
        assert not getattr(caught.value, "__notes__", [])

    assert_untouched(model, run)
    assert_clean(model)


@pytest.mark.parametrize("form", ["callback", "frozen", "none"])
def test_exception_in_the_middle_leaves_what_the_twin_has(form: str, tmp_path: Path) -> None:
    """A run that fails at step 2 has trained as its twin until then, and the next run goes on as the twin's."""
    twin, model = Net(), Net()
    callback = BNGuardCallback(on_change="restore")
    trainers = []
    for net, guard in ((twin, None), (model, callback)):
        failing = At("step_begin", fail(KeyboardInterrupt), 2)
        guards = [guard] if guard is not None and form == "callback" else []
        trainer = make_trainer(net, tmp_path / str(len(trainers)), failing, *guards)
        block = {"callback": callback, "frozen": bnguard.frozen(net, "restore")}.get(form) if guard else None
        with pytest.raises(KeyboardInterrupt):
            run_inside(block, trainer)
        assert len(trainer.losses) == 2
        trainer.remove_callback(failing)
        run_inside(block, trainer)
        trainers.append(trainer)
    assert drift(twin)
    assert drift(model) == (form == "none")
    assert_same_run(trainers[1], trainers[0], statistics_too=form == "none")
    assert_clean(model)


def run_inside(block: Any, trainer: Trainer) -> None:
    """Trains, in a block if there is one."""
    if block is None:
        trainer.train()
    else:
        with block:
            trainer.train()


@INTERRUPTS
def test_finding_is_a_note_on_an_exception(kind: type[BaseException], tmp_path: Path) -> None:
    """An exception on its way is not masked by what the guard finds then: that is added to it."""
    model = Net()
    callback = BNGuardCallback(use_running_stats=True)
    trainer = make_trainer(model, tmp_path, At("step_end", write(model), 1), At("step_end", fail(kind), 1), callback)
    with pytest.raises(kind, match="theirs") as caught, callback:
        trainer.train()
    assert "net.backbone.bn1" in caught.value.__notes__[0]
    assert not drift(model)


def test_run_can_be_repeated(tmp_path: Path) -> None:
    """One callback serves several runs, with and without ``with``, as their twins."""
    model, twin = Net(), Net()
    callback = BNGuardCallback(on_change="restore")
    trainer = make_trainer(model, tmp_path / "guarded", callback)

    def run() -> None:
        trainer.train()
        assert_clean(model)
        for _ in range(2):
            with callback:
                trainer.train()

    assert_untouched(model, run)
    plain = make_trainer(twin, tmp_path / "twin")  # here, because it seeds
    for _ in range(3):
        plain.train()
    assert_same_run(trainer, plain, statistics_too=False)


def test_run_that_callbacks_stop_ends_the_block(tmp_path: Path) -> None:
    """``control.should_training_stop`` ends a run as any other."""
    model = Net()
    callback = BNGuardCallback(on_change="restore")
    trainer = make_trainer(model, tmp_path, callback)
    stopper = At("step_end", lambda: setattr(trainer.control, "should_training_stop", True), 2)
    trainer.add_callback(stopper)
    assert_untouched(model, trainer.train)
    assert trainer.state.global_step == 2
    assert_clean(model)


def test_failed_run_without_with_is_ended_by_the_next(tmp_path: Path) -> None:
    """Without ``with`` a failed run leaves its guard; the next ``train()`` begins anew, and nothing stays behind."""
    model = Net()
    callback = BNGuardCallback(on_change="restore")
    failing = At("step_begin", fail(ZeroDivisionError), 2)
    trainer = make_trainer(model, tmp_path, callback, failing)

    def run() -> None:
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert "forward" in model.net.backbone.bn1.__dict__  # the guard is still there
        trainer.remove_callback(failing)
        trainer.train()

    assert_untouched(model, run)
    assert_clean(model)


@pytest.mark.parametrize("changes", [False, True])
def test_stop_ends_the_guard_of_a_failed_run(changes: bool, tmp_path: Path) -> None:
    """``stop()`` ends it too, and never raises; what something other than a forward changed is warned about."""
    model = Net()
    callback = BNGuardCallback()
    trainer = make_trainer(model, tmp_path, callback)
    with pytest.raises(bnguard.StatsChangedError):
        trainer.train()
    if changes:
        write(model)()
    with warns(at="callback.stop()", count=int(changes)) as caught:
        callback.stop()
        callback.stop()
    if changes:
        assert "a training run ended with an exception, and its guard ends now." in caught.message
        assert "net.backbone.bn1" in caught.message
    assert not drift(model)
    assert_clean(model)


def test_smaller_batches_begin_the_guard_anew(tmp_path: Path) -> None:
    """``auto_find_batch_size`` runs the loop again after an out-of-memory error: so does the guard, with its budget."""
    model = Net()
    callback = BNGuardCallback(updates=6)
    oom = At("step_end", once(lambda: raise_it(RuntimeError("CUDA out of memory."))), 2)
    trainer = make_trainer(model, tmp_path, callback, oom, auto_find_batch_size=True, num_train_epochs=1)
    with callback:
        trainer.train()
    steps = {math.ceil(len(make_dataset()) / smaller) for smaller in (8, 14)}  # of 16: half, or nine tenths
    assert trainer.state.global_step in steps
    assert_clean(model)


def once(action: Callable[[], None]) -> Callable[[], None]:
    """Does it the first time only."""
    todo = [action]
    return lambda: todo.pop()() if todo else None


# Checkpoints.


def test_run_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of a guarded run holds the true statistics; resumed from it, a run ends as one that went through."""
    whole, part, fresh = Net(), Net(), Net()
    options = {"save_strategy": "epoch"}
    callback = BNGuardCallback(on_change="restore")
    trainer = make_trainer(whole, tmp_path / "whole", callback, **options)
    with callback:
        trainer.train()
    first = make_trainer(part, tmp_path / "part", callback, At("step_begin", fail(KeyboardInterrupt), 4), **options)
    with pytest.raises(KeyboardInterrupt), callback:
        first.train()
    with torch.no_grad():
        for tensor in [*fresh.parameters(), *[b for b in fresh.buffers() if b.is_floating_point()]]:
            tensor.zero_()  # its statistics too: the guard begins after the checkpoint is loaded
    second = make_trainer(fresh, tmp_path / "part", callback, **options)
    with callback:
        second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2 * BATCHES
    assert_same_bits(second.losses, trainer.losses[BATCHES:])
    assert_same_bits(state_of(fresh), state_of(whole))
    assert not drift(fresh)
    assert_clean(fresh)


def test_resuming_inside_a_plain_block_is_found(tmp_path: Path) -> None:
    """In ``with frozen(model)`` the statistics of the checkpoint are a change: put back, and said."""
    model, fresh = Net(), Net()
    make_trainer(model, tmp_path, save_strategy="epoch").train()
    assert drift(model)
    trainer = make_trainer(fresh, tmp_path, num_train_epochs=3)
    guard = bnguard.frozen(fresh, use_running_stats=True)
    with pytest.raises(bnguard.StatsChangedError, match=r"load_state_dict\(\)"), guard:
        trainer.train(resume_from_checkpoint=True)
    assert not drift(fresh)


def test_best_model_is_loaded_inside_the_run(tmp_path: Path) -> None:
    """``load_best_model_at_end`` loads the statistics that the guard has held: nothing to say."""
    model = Net()
    callback = BNGuardCallback(use_running_stats=True)
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make_trainer(model, tmp_path, callback, **options)
    with callback:
        assert_untouched(model, trainer.train)
    assert trainer.state.best_model_checkpoint is not None


# Which model.


def test_model_init_is_guarded(tmp_path: Path) -> None:
    """The callback guards the model that ``train()`` makes, where a block around would guard another one."""
    callback = BNGuardCallback(on_change="restore")
    made = []

    def init() -> Net:
        made.append(Net())
        return made[-1]

    args, data = make_args(tmp_path), make_dataset()
    trainer = Recording(args=args, train_dataset=data, model_init=init, callbacks=[callback])
    with callback:
        trainer.train()
    assert trainer.model is made[-1]
    assert len(made) > 1
    assert not drift(made[-1])
    plain = Recording(args=args, train_dataset=data, model_init=init)
    plain.train()
    assert drift(made[-1])


@pytest.mark.usefixtures("no_graphs")
def test_guard_of_a_model_that_model_init_replaces_says_that_it_never_ran(tmp_path: Path) -> None:
    """The trainer makes another one, whose statistics move; with the path it is guarded."""
    first, callbacks = Net(), []
    for target in (first, None):
        callback = BNGuardCallback(target, "restore")
        trainer = Recording(
            args=make_args(tmp_path), train_dataset=make_dataset(), model_init=Net, callbacks=[callback]
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        callbacks.append([str(word.message) for word in said if word.category is bnguard.BNGuardWarning])
        assert drift(trainer.model) == (target is first)
    [word], silence = callbacks
    assert word.startswith("no forward of a guarded layer ran inside BNGuardCallback(), while batches did: net.")
    assert "model_init=" in word
    assert not silence


class Stage(GradientCheckpointingLayer):
    """Runs again in backward, if the model is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Staged(PreTrainedModel):
    """A model of transformers with such stages."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.stem, self.stages, self.head = nn.Conv2d(1, 1, 1), nn.Sequential(Stage(), Stage()), nn.Linear(64, 10)
        self.post_init()

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.stages(self.stem(pixels)).flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_recipe_of_gradient_checkpointing_updates_once_a_step(tmp_path: Path) -> None:
    """Bit for bit a run without checkpointing, while statistics move twice without the block."""
    (recipe,) = LOOPS["transformers: gradient checkpointing"]
    models = []
    block = "with bnguard.recompute_frozen(model):"
    assert block in recipe
    plainly = recipe.replace("gradient_checkpointing=True", "gradient_checkpointing=False").replace(
        'gradient_checkpointing_kwargs={"use_reentrant": False}, ', ""
    )
    for code in (recipe, recipe.replace(block, "if True:"), plainly.replace(block, "if True:")):
        model = Staged()
        args = "report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no', per_device_train_batch_size=16"
        names = {"model": model, "folder": str(tmp_path), "dataset": make_dataset()}
        torch.manual_seed(3)
        run_code(code.replace("report_to=[]", args), names)
        assert_clean(model)
        models.append(model)
    once, twice, twin = models
    assert_same_bits(once.state_dict(), twin.state_dict())
    assert int(once.stages[0].norm.num_batches_tracked) == 9
    assert int(twice.stages[0].norm.num_batches_tracked) == 18


class Distilling(Recording):
    """Learns from a teacher that was left in train mode."""

    teacher: Net

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.teacher.train()
        with torch.no_grad():
            wanted = self.teacher(inputs["pixels"])["logits"]
        return nn.functional.mse_loss(model(inputs["pixels"])["logits"], wanted)


def test_another_model_can_be_guarded(tmp_path: Path) -> None:
    """A teacher, which is given itself; the student updates as its twin."""
    student, twin, teacher, drifting = Net(), Net(), Net(), Net()
    callback = BNGuardCallback(teacher, "restore")
    assert [layer.names for layer in callback.layers] == [("net.backbone.bn1",), ("net.backbone.bn2",)]
    args, data = make_args(tmp_path), make_dataset()
    plain = Distilling(twin, args, train_dataset=data)
    plain.teacher = drifting
    plain.train()
    assert drift(drifting)
    trainer = Distilling(student, args, train_dataset=data, callbacks=[callback])
    trainer.teacher = teacher
    with callback:
        assert_untouched(teacher, trainer.train)
    assert_same_run(trainer, plain, statistics_too=True)
    assert_clean(teacher)


PHASES: dict[str, tuple[dict[str, int], range]] = {
    "until epoch": ({"until_epoch": 1}, range(3)),
    "from epoch": ({"from_epoch": 2}, range(6, 9)),
    "some epochs": ({"from_epoch": 1, "until_epoch": 2}, range(3, 6)),
    "until step": ({"until_step": 4}, range(4)),
    "some steps": ({"from_step": 2, "until_step": 7}, range(2, 7)),
    "later": ({"from_epoch": 7}, range(0)),
}


class ByHand(TrainerCallback):
    """What people write: a guard that is started and stopped at some steps."""

    def __init__(self, part: nn.Module, steps: range) -> None:
        self.guard, self.steps = bnguard.frozen(part, "restore"), steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps.start and self.steps:
            self.guard.start()
        if state.global_step == self.steps.stop:
            self.guard.stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.stop()


@pytest.mark.parametrize(("options", "steps"), PHASES.values(), ids=PHASES)
def test_guard_for_a_while_is_start_and_stop_by_hand(options: dict[str, int], steps: range, tmp_path: Path) -> None:
    """Of a part that is named by its path, in a run of three epochs of three steps."""
    model, twin = Net(), Net()
    plain = make_trainer(twin, tmp_path / "twin", ByHand(twin.net.backbone, steps), num_train_epochs=3)
    plain.train()
    callback = BNGuardCallback("net.backbone", "restore", **options)
    trainer = make_trainer(model, tmp_path / "model", callback, num_train_epochs=3)
    with callback:
        trainer.train()
    assert_same_run(trainer, plain, statistics_too=True)
    assert drift(model) == (len(steps) < 9)
    assert_clean(model)


def test_path_without_a_module_is_refused_when_training_begins(tmp_path: Path) -> None:
    """With the submodules that there are."""
    callback = BNGuardCallback("net.backbones")
    trainer = make_trainer(Net(), tmp_path, callback)
    with pytest.raises(ValueError, match="net has no submodule 'backbones'; did you mean 'backbone'"), callback:
        trainer.train()


def test_two_callbacks_of_one_trainer(tmp_path: Path) -> None:
    """Each guards its layers; they end in the order in which they began."""
    model = Net()
    callbacks = [
        BNGuardCallback(on_change="restore", include="*bn1"),
        BNGuardCallback(use_running_stats=True, include="*bn2"),
    ]
    trainer = make_trainer(model, tmp_path, *callbacks)
    with callbacks[0], callbacks[1]:
        assert_untouched(model, trainer.train)
    assert_clean(model)


def test_callback_can_be_copied_and_pickled(tmp_path: Path) -> None:
    """A hyperparameter search pickles its trainer: a copy is a callback of its own."""
    callback = BNGuardCallback(on_change="restore")
    make_trainer(Net(), tmp_path, callback, num_train_epochs=1).train()
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        model = Net()
        trainer = make_trainer(model, tmp_path, copied, num_train_epochs=1)
        with copied:
            assert_untouched(model, trainer.train)
        assert_clean(model)


# Misuse.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"on_change": "raises"}, ValueError, "on_change='raises'.*'raise'"),
        ({"use_running_stats": 1}, TypeError, "use_running_stats must be True or False, got 1"),
        ({"affine": None}, TypeError, "affine must be True or False, got None"),
        ({"updates": -1}, ValueError, "updates=-1"),
        ({"use_running_stats": True, "updates": 1}, ValueError, "contradicts updates=1"),
        ({"include": 3}, TypeError, "include takes glob patterns .* got 3"),
        ({"exclude": []}, ValueError, "exclude is an empty list"),
        ({"target": 3}, TypeError, "target must be the path of a submodule, such as 'backbone', .* got 3"),
        ({"target": []}, ValueError, "target=.* names no submodule"),
        ({"target": make_model(), "include": "layer9"}, ValueError, "layer9"),
        ({"until_epochs": 3}, TypeError, "unknown option 'until_epochs': did you mean 'until_epoch'"),
        ({"check_at": "epoch"}, ValueError, r"check_at='epoch': did you mean 'epoch_end'\?"),
        ({"check_at": 3}, TypeError, "check_at must be one of step_end, epoch_end, evaluate, save, .* got 3"),
    ],
    ids=str,
)
def test_bad_option_is_refused(options: Any, error: type[Exception], text: str) -> None:
    """At construction, with the offending value."""
    with pytest.raises(error, match=text):
        BNGuardCallback(**options)


def test_pattern_without_a_match_is_refused_when_training_begins(tmp_path: Path) -> None:
    """Before the first step, with nothing left on the model."""
    model = Net()
    callback = BNGuardCallback(include="layer9")
    with pytest.raises(ValueError, match="layer9"), callback:
        make_trainer(model, tmp_path, callback).train()
    assert_clean(model)


def test_callback_that_no_trainer_has_is_an_error(tmp_path: Path) -> None:
    """A block in which it was never called guarded nothing, and says so; an exception on its way is not masked."""
    callback = BNGuardCallback(on_change="restore")
    with pytest.raises(bnguard.BNGuardError, match="no training began") as caught, callback:
        make_trainer(Net(), tmp_path, num_train_epochs=1).train()
    assert "callbacks=[callback]" in str(caught.value)
    with pytest.raises(ZeroDivisionError, match="theirs"), callback:
        raise ZeroDivisionError("theirs")


def test_block_in_a_block_of_the_same_callback_is_an_error() -> None:
    """The outer block goes on."""
    callback = BNGuardCallback()
    with pytest.raises(bnguard.BNGuardError, match="in a with block already"), callback, callback:
        raise AssertionError


def test_model_without_statistics_is_warned_about(tmp_path: Path) -> None:
    """At the line that trains; the run goes on."""

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    callback = BNGuardCallback()
    trainer = make_trainer(Plain(), tmp_path, callback, num_train_epochs=1)
    with warns(at="trainer.train()"), callback:
        trainer.train()


def test_missing_transformers_gives_the_install_line() -> None:
    """One sentence that says what to install."""
    line = "ImportError: bnguard.integrations.transformers needs transformers: pip install 'bnguard[transformers]'"
    assert error_without("transformers", "bnguard.integrations.transformers") == line


def test_examples_run(tmp_path: Path) -> None:
    """The examples of the module's docstring do what it says."""
    model = Net()
    model.backbone = model.net.backbone
    names = {"model": model, "args": make_args(tmp_path), "dataset": make_dataset()}
    examples = examples_of(integration)
    assert len(examples) == 3
    for example in examples:
        assert_untouched(model, lambda code=example: run_code(code, names))
        assert_clean(model)
    assert names["callback"].layers
    make_trainer(model, tmp_path).train()
    assert drift(model)
