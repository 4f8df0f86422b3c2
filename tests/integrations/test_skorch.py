"""skorch: the recipe, on pretrained modules, in clones and with its callbacks, against unguarded twins."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_validate
from torch import nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, statistics
from tests.loops import backbone_norms, data, drifted, little_waiting, make_model, quiet_imports, run_code
from tests.readme import LOOPS

with quiet_imports():
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback, Checkpoint, LoadInitState

__all__ = ["little_waiting"]

INTERRUPTS = pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
# skorch splits the digits so that some classes are rare.
pytestmark = pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")


def digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels, as skorch takes them."""
    images, labels = data(64)
    return images.numpy(), labels.numpy()


class Digits(nn.Module):
    """The net as a class, for skorch to make; pretrained all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = make_model()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


class Recording(Callback):
    """Keeps every training loss; may fail at a batch."""

    def __init__(self, fail_at: int | None = None, kind: type[BaseException] = ZeroDivisionError) -> None:
        self.fail_at = fail_at
        self.kind = kind

    def initialize(self) -> Recording:
        """Is called before each fit."""
        self.losses: list[torch.Tensor] = []
        return self

    def on_batch_begin(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        """Fails where it should."""
        if training and len(self.losses) == self.fail_at:
            raise self.kind("theirs")

    def on_batch_end(self, net: Any, loss: Any = None, training: bool = False, **kwargs: Any) -> None:
        """Keeps the loss."""
        if training:
            self.losses.append(loss.detach())


def make_class(**options: Any) -> type[NeuralNetClassifier]:
    """The recipe, with options of ``frozen``."""

    class Guarded(NeuralNetClassifier):
        def fit_loop(self, *args: Any, **kwargs: Any) -> Any:
            with bnguard.frozen(self.module_, **options):
                return super().fit_loop(*args, **kwargs)

    return Guarded


def make_net(
    cls: type[NeuralNetClassifier], module: Any = None, recording: Recording | None = None, **options: Any
) -> Any:
    """A net of two epochs; it trains ``module``, a pretrained one by default."""
    defaults: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss,
        "max_epochs": 2,
        "lr": 0.05,
        "batch_size": 16,
        "verbose": 0,
        "optimizer__momentum": 0.9,
    }
    callbacks = [("recording", recording or Recording()), *options.pop("callbacks", [])]
    return cls(make_model() if module is None else module, callbacks=callbacks, **{**defaults, **options})


def fit(net: Any) -> Any:
    """Fits with fixed random numbers; returns the net."""
    torch.manual_seed(5)
    np.random.seed(5)
    return net.fit(*digits())


def losses(net: Any) -> list[torch.Tensor]:
    """Every training loss."""
    return dict(net.callbacks_)["recording"].losses


def assert_same_fit(one: Any, other: Any) -> None:
    """Two nets have seen the same losses and random numbers, and left the same parameters and momenta."""
    assert len(losses(one)) > 1
    assert_same_bits(losses(one), losses(other))
    assert_same_bits(dict(one.module_.named_parameters()), dict(other.module_.named_parameters()))
    moments = [[s["momentum_buffer"] for s in net.optimizer_.state.values()] for net in (one, other)]
    assert_same_bits(*moments)


@pytest.mark.parametrize("module", ["instance", "class"])
def test_restore_trains_as_the_twin(module: str) -> None:
    """Under ``restore`` a fit is the twin's; the statistics are those of the module that it was given, or has made."""
    make = make_model if module == "instance" else lambda: Digits
    plain = fit(make_net(NeuralNetClassifier, make()))
    random = torch.get_rng_state()
    assert drifted(plain.module_)
    net = fit(make_net(make_class(on_change="restore"), make()))
    assert_same_bits(torch.get_rng_state(), random)
    assert not drifted(net.module_)
    assert_same_fit(net, plain)
    assert_clean(net.module_)
    one, other = [fitted.partial_fit(*digits()) for fitted in seeded(net, plain)]
    assert_same_fit(one, other)


def seeded(*nets: Any) -> Any:
    """Each of them, after the same seed."""
    for net in nets:
        torch.manual_seed(6)
        yield net


def test_running_statistics_are_used_where_the_loop_undoes_eval() -> None:
    """A loop that undoes ``bn.eval()`` at each batch: under the guard the fit is one that calls it again each time."""

    def eval_by_hand(model: nn.Module) -> nn.Module:
        for layer in backbone_norms(model):
            layer.eval()
        return model

    drifting = fit(make_net(NeuralNetClassifier, eval_by_hand(make_model())))
    assert drifted(drifting.module_)
    twin = make_model()
    twin.train = lambda mode=True: eval_by_hand(nn.Module.train(twin, mode))
    plain = fit(make_net(NeuralNetClassifier, twin))
    assert not drifted(twin)
    net = fit(make_net(make_class(use_running_stats=True, include="backbone"), eval_by_hand(make_model())))
    assert_same_fit(net, plain)
    assert not drifted(net.module_)


def test_raise_reaches_the_user() -> None:
    """The first batch ends the fit, with the layer and the line; nothing has changed."""
    module = make_model()
    with pytest.raises(bnguard.StatsChangedError, match=r"test_skorch.py:\d+ in ") as caught:
        fit(make_net(make_class(), module))
    assert "backbone.bn1 (BatchNorm2d) is in train mode inside frozen()" in str(caught.value)
    assert not drifted(module)
    assert_clean(module)


def test_finding_at_the_end_of_the_fit_reaches_the_user() -> None:
    """What only the comparison at the end finds is raised by ``fit()``."""

    class Writing(Callback):
        def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
            net.module_.backbone.bn1.running_mean.data += 1

    module = make_model()
    with pytest.raises(bnguard.StatsChangedError, match="1 layer changed"):
        fit(make_net(make_class(use_running_stats=True), module, callbacks=[("writing", Writing())]))
    assert not drifted(module)


@INTERRUPTS
def test_exception_goes_where_it_went_without_the_guard(kind: type[BaseException]) -> None:
    """A fit that fails at the third batch raises, or is ended by Ctrl-C, as the twin's; nothing stays behind."""

    def outcome(cls: type[NeuralNetClassifier], module: nn.Module) -> tuple[Any, ...]:
        recording, raised = Recording(2, kind), None
        net = make_net(cls, module, recording)
        try:
            fit(net)
        except kind as error:
            raised = (str(error), getattr(error, "__notes__", []))
        return raised, torch.stack(losses(net)).tolist(), torch.get_rng_state().tolist()

    twin, module = make_model(), make_model()
    expected = outcome(NeuralNetClassifier, twin)
    assert drifted(twin)
    assert (expected[0] is None) == (kind is KeyboardInterrupt)
    assert outcome(make_class(on_change="restore"), module) == expected
    assert_same_bits(dict(module.named_parameters()), dict(twin.named_parameters()))
    assert not drifted(module)
    assert_clean(module)


class WrongValidation(NeuralNetClassifier):
    """Validates in train mode."""

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            self.module_.train()
        return super().infer(*args, **kwargs)


def recipe_names() -> dict[str, Any]:
    """What the recipes share."""
    images, labels = digits()
    return {"model": make_model(), "X": images, "y": labels}


def test_validation_left_in_train_mode_is_found() -> None:
    """A validation in train mode updates, too; with the recipe it is stopped, and one in eval mode passes."""
    right, wrong = [fit(make_net(cls)).module_ for cls in (NeuralNetClassifier, WrongValidation)]
    assert wrong.backbone.bn1.num_batches_tracked > right.backbone.bn1.num_batches_tracked
    names, (first, recipe) = recipe_names(), LOOPS["skorch"]
    run_code(first, names)
    run_code(recipe, names)
    assert_same_bits(fit(make_net(names["Checked"])).module_.state_dict(), right.state_dict())
    names = {"WrongValidation": WrongValidation, "bnguard": bnguard}
    run_code(recipe.replace("(NeuralNetClassifier)", "(WrongValidation)"), names)
    module = make_model()
    with pytest.raises(bnguard.StatsChangedError, match=r"backbone.bn1 .* is in train mode"):
        fit(make_net(names["Checked"], module))
    assert module.backbone.bn1.num_batches_tracked == 3 + 4  # the four batches that it trained on
    assert_clean(module)


def test_fit_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """``LoadInitState`` loads before the guard begins: what is then held are the statistics of the checkpoint."""
    first = make_net(NeuralNetClassifier, callbacks=[("saved", Checkpoint(monitor=None, dirname=str(tmp_path)))])
    fit(first)
    assert drifted(first.module_)

    def resumed(cls: type[NeuralNetClassifier]) -> Any:
        checkpoint = Checkpoint(monitor=None, dirname=str(tmp_path))
        return fit(make_net(cls, callbacks=[("load", LoadInitState(checkpoint))]))

    net, plain = resumed(make_class(on_change="restore")), resumed(NeuralNetClassifier)
    assert_same_fit(net, plain)
    assert_same_bits(statistics(net.module_), statistics(first.module_))
    with pytest.raises(AssertionError):
        assert_same_bits(statistics(plain.module_), statistics(first.module_))


def test_checkpoint_of_a_guarded_fit_has_the_true_statistics(tmp_path: Path) -> None:
    """A checkpoint written at an epoch inside the block, and a pickle of the net, hold what the module has."""
    saver = Checkpoint(monitor=None, dirname=str(tmp_path), load_best=True)
    net = fit(make_net(make_class(on_change="restore"), callbacks=[("saved", saver)]))
    assert not drifted(net.module_)
    saved = torch.load(tmp_path / "params.pt", weights_only=True)
    assert_same_bits({name: tensor for name, tensor in saved.items() if "bn" in name},
                     {name: tensor for name, tensor in net.module_.state_dict().items() if "bn" in name})  # fmt: skip
    plain = fit(make_net(NeuralNetClassifier))
    module = pickle.loads(pickle.dumps(net.module_))
    assert_same_bits(state_of(module), state_of(net.module_))
    assert drifted(plain.module_)


def test_clones_are_guarded() -> None:
    """Cross-validation and search train copies of a pretrained module: every copy keeps its statistics."""
    images, labels = digits()

    def modules(cls: type[NeuralNetClassifier], module: nn.Module) -> list[nn.Module]:
        net = make_net(cls, module, train_split=None)
        found = cross_validate(net, images, labels, cv=2, return_estimator=True, error_score="raise")["estimator"]
        search = GridSearchCV(net, {"lr": [0.01, 0.05]}, cv=2, error_score="raise").fit(images, labels)
        return [*[each.module_ for each in found], search.best_estimator_.module_]

    assert all([drifted(each) for each in modules(NeuralNetClassifier, make_model())])
    module = make_model()
    before = state_of(module)
    guarded = modules(make_class(use_running_stats=True), module)
    assert not any([drifted(each) for each in guarded])
    assert all([each is not module for each in guarded])
    assert_same_bits(state_of(module), before)
    for each in guarded:
        assert_clean(each)


def test_recipe_runs() -> None:
    """The code of the document trains, holds the statistics, and can be cloned; without its block they drift."""
    recipe = LOOPS["skorch"][0]
    names = recipe_names()
    run_code(recipe, names)
    module = names["net"].module_
    assert module is names["model"]
    assert not torch.equal(module.backbone.conv1.weight, make_model().backbone.conv1.weight)
    assert not drifted(module)
    assert_clean(module)
    assert not drifted(fit(clone(names["net"])).module_)
    unguarded = recipe.replace(
        'with bnguard.frozen(self.module_, use_running_stats=True, include="backbone"):', "if 1:"
    )
    assert unguarded != recipe
    names = recipe_names()
    run_code(unguarded, names)
    assert drifted(names["model"])


def test_block_around_fit_may_guard_another_module() -> None:
    """Why the block is in ``fit_loop()``: where ``fit()`` makes a new module, one around it guards the old one."""
    net = fit(make_net(NeuralNetClassifier, Digits))
    old = net.module_
    with bnguard.frozen(old, "restore"):
        fit(net)
    assert net.module_ is not old
    assert drifted(net.module_)
