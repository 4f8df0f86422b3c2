"""fastai: the recipe, against unguarded twins. docs/guides/trainers.md says how to install it without another torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_untouched, state_of, statistics, values
from tests.loops import backbone_norms, data, drifted, little_waiting, make_model, quiet_imports, run_code
from tests.readme import LOOPS

with quiet_imports():
    pytest.importorskip("fastai.learner")
    import fastai.callback.schedule  # noqa: F401  # adds methods to Learner
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import BnFreeze
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

__all__ = ["little_waiting"]

# What it loads, it loads with numpy's former names.
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
INTERRUPTS = pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])


class Recording(Callback):
    """Keeps every training loss; may fail at a batch."""

    def __init__(self, fail_at: int | None = None, kind: type[BaseException] = ZeroDivisionError) -> None:
        self.losses: list[torch.Tensor] = []
        self.fail_at = fail_at
        self.kind = kind

    def before_batch(self) -> None:
        """Fails where it should."""
        if self.training and len(self.losses) == self.fail_at:
            raise self.kind("theirs")

    def after_loss(self) -> None:
        """Keeps the loss."""
        if self.training:
            self.losses.append(self.learn.loss.detach())


def make_dls() -> Any:
    """Three batches to train with, three to validate with."""
    dataset = TensorDataset(*data())
    train = DataLoader(dataset, bs=16, shuffle=True, num_workers=0)
    return DataLoaders(train, DataLoader(dataset, bs=16, num_workers=0), device="cpu")


def make_learner(model: nn.Module, *callbacks: Any, path: Path | None = None) -> Any:
    """A learner of digits that says nothing."""
    learn = Learner(make_dls(), model, loss_func=nn.functional.cross_entropy, cbs=[Recording(), *callbacks], path=path)
    learn.remove_cbs([each for each in learn.cbs if type(each).__name__ in ("Recorder", "ProgressCallback")])
    return learn


def fit(learn: Any, method: str = "fit", *args: Any) -> Any:
    """Trains from a fixed seed; returns the learner."""
    torch.manual_seed(5)
    learn.dls.train.rng.seed(5)
    getattr(learn, method)(*(args or (2,)))
    return learn


def losses(learn: Any) -> list[torch.Tensor]:
    """Every training loss."""
    return learn.recording.losses


def assert_same_fit(one: Any, other: Any) -> None:
    """Two learners have seen the same losses, and left the same parameters."""
    assert len(losses(one)) > 1
    assert_same_bits(losses(one), losses(other))
    assert_same_bits(dict(one.model.named_parameters()), dict(other.model.named_parameters()))


@pytest.mark.parametrize("method", ["fit", "fit_one_cycle", "fine_tune"])
def test_restore_trains_as_the_twin(method: str) -> None:
    """Under ``restore`` a run of any kind has the twin's losses, parameters and random numbers."""
    model, twin = make_model(), make_model()
    plain = fit(make_learner(twin), method)
    random = torch.get_rng_state()
    assert drifted(twin)
    learn = make_learner(model)
    with bnguard.frozen(learn.model, "restore"):
        assert_untouched(model, lambda: fit(learn, method))
    assert_same_bits(torch.get_rng_state(), random)
    assert_same_fit(learn, plain)
    assert_clean(model)


def test_running_statistics_are_used_where_the_loop_undoes_eval() -> None:
    """A loop that undoes ``bn.eval()`` at each epoch: under the guard the run is one that calls it again each time."""

    def eval_by_hand(model: nn.Module) -> nn.Module:
        for layer in backbone_norms(model):
            layer.eval()
        return model

    drifting, model, twin = make_model(), make_model(), make_model()
    fit(make_learner(eval_by_hand(drifting)))
    assert drifted(drifting)
    twin.train = lambda mode=True: eval_by_hand(nn.Module.train(twin, mode))
    plain = fit(make_learner(twin))
    assert not drifted(twin)
    learn = make_learner(eval_by_hand(model))
    with bnguard.frozen(learn.model, use_running_stats=True, include="backbone"):
        fit(learn)
    assert_same_fit(learn, plain)
    assert not drifted(model)


def test_bn_freeze_passes_the_guard() -> None:
    """The library's ``BnFreeze`` holds layers with frozen weights: nothing to say. Others it leaves, which is found."""
    frozen, free = make_model(), make_model()
    for parameter in frozen.backbone.parameters():
        parameter.requires_grad_(False)
    for model in (frozen, free):
        learn = make_learner(model, BnFreeze)
        learn.create_opt = lambda learn=learn: setattr(
            learn, "opt", learn.opt_func(learn.splitter(learn.model), lr=0.01)
        )
        if model is frozen:
            with bnguard.frozen(model):
                fit(learn)
        else:
            with pytest.raises(bnguard.StatsChangedError, match=r"backbone.bn1 "), bnguard.frozen(model):
                fit(learn)
        assert not drifted(model)


@INTERRUPTS
def test_exception_comes_out(kind: type[BaseException]) -> None:
    """A run that fails at the third batch raises what the twin's raises, and leaves nothing behind."""
    model, twin = make_model(), make_model()
    learners = [make_learner(each) for each in (model, twin)]
    for learn in learners:
        learn.recording.fail_at, learn.recording.kind = 2, kind
    with pytest.raises(kind, match="theirs"):
        fit(learners[1])
    assert drifted(twin)

    def run() -> None:
        with pytest.raises(kind, match="theirs") as caught, bnguard.frozen(model, "restore"):
            fit(learners[0])
        assert not getattr(caught.value, "__notes__", [])

    assert_untouched(model, run)
    assert_same_fit(*learners)
    assert_clean(model)


def test_cancelled_fit_ends_the_block() -> None:
    """``CancelFitException`` ends a run as in the twin."""
    model, twin = make_model(), make_model()
    learners = [make_learner(each) for each in (model, twin)]
    for learn in learners:
        learn.recording.fail_at, learn.recording.kind = 2, CancelFitException
    with bnguard.frozen(model, "restore"):
        assert_untouched(model, lambda: fit(learners[0]))
    fit(learners[1])
    assert len(losses(learners[1])) == 2
    assert_same_fit(*learners)
    assert_clean(model)


def test_raise_stops_the_run() -> None:
    """The first batch ends it, with the layer and the user's line; nothing has changed."""
    model = make_model()
    with pytest.raises(bnguard.StatsChangedError, match=r"test_fastai.py:\d+ in fit") as caught, bnguard.frozen(model):
        fit(make_learner(model))
    assert "backbone.bn1 (BatchNorm2d) is in train mode" in str(caught.value)
    assert not drifted(model)


class TrainModeValidation(Callback):
    """Forgets eval mode."""

    order = 99

    def before_validate(self) -> None:
        """Runs after fastai's own callback, which calls ``eval()``."""
        self.model.train()


def test_validation_left_in_train_mode_is_found() -> None:
    """A validation in train mode moves the statistics; in the block of the recipe it is stopped."""
    twin = make_model()
    make_learner(twin, TrainModeValidation()).validate()
    assert drifted(twin)
    recipe = LOOPS["fastai"][1]
    model = make_model()
    with pytest.raises(bnguard.StatsChangedError, match=r"backbone.bn1 .* is in train mode"):
        run_code(recipe, {"bnguard": bnguard, "learn": make_learner(model, TrainModeValidation())})
    assert not drifted(model)
    run_code(recipe, {"bnguard": bnguard, "learn": make_learner(model)})


def test_run_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """A checkpoint saved in a block has the true statistics; loaded before the next block, the run is the twin's."""

    def resumed(guards: bool) -> Any:
        first, second = make_learner(make_model(), path=tmp_path), make_learner(make_model(), path=tmp_path)
        if guards:
            with bnguard.frozen(first.model, "restore"):
                fit(first).save("one")
        else:
            fit(first).save("one")
        with torch.no_grad():
            for tensor in [*second.model.parameters(), *[b for b in second.model.buffers() if b.is_floating_point()]]:
                tensor.zero_()
        second.load("one")
        assert_same_bits(state_of(second.model), state_of(first.model))
        if guards:
            with bnguard.frozen(second.model, "restore"):
                return fit(second)
        return fit(second)

    learn, plain = resumed(True), resumed(False)
    assert_same_fit(learn, plain)
    assert drifted(plain.model)
    assert not drifted(learn.model)


def test_learning_rate_finder_moves_nothing(tmp_path: Path) -> None:
    """``lr_find()`` trains, and loads what was before, statistics too: in a block there is nothing to say."""
    model = make_model()
    learn = Learner(make_dls(), model, loss_func=nn.functional.cross_entropy, path=tmp_path)
    with bnguard.frozen(learn.model, use_running_stats=True), learn.no_bar():
        assert_untouched(model, lambda: learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None))


def test_recipe_runs() -> None:
    """The code of the document trains and holds the statistics; without its block they drift."""
    recipe = LOOPS["fastai"][0]
    quiet = recipe.replace("learn.fit(2)", "with learn.no_bar(), learn.no_logging():\n        learn.fit(2)")
    assert quiet != recipe
    model = make_model()
    before = values(statistics(model))
    run_code(quiet, {"model": model, "dls": make_dls()})
    assert_same_bits(statistics(model), before)
    assert not torch.equal(model.backbone.conv1.weight, make_model().backbone.conv1.weight)
    assert_clean(model)
    unguarded = quiet.replace(
        'with bnguard.frozen(learn.model, use_running_stats=True, include="backbone"):', "if True:"
    )
    assert unguarded != quiet
    run_code(unguarded, {"model": model, "dls": make_dls()})
    assert drifted(model)
