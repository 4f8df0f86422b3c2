"""accelerate: the recipe, and blocks before, around and after ``prepare()``, against unguarded twins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_untouched, state_of, statistics, values
from tests.loops import backbone_norms, data, drifted, little_waiting, make_model, quiet_imports, run_code
from tests.nets import OwnForward, warmed
from tests.readme import LOOPS

with quiet_imports():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

__all__ = ["little_waiting"]

PRECISIONS = pytest.mark.parametrize("precision", ["no", "bf16"])
INTERRUPTS = pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Settings of accelerate hold for the whole process."""

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()


def make_accelerator(precision: str = "no", accumulate: int = 1) -> Accelerator:
    """One on the CPU; settings of an earlier one are forgotten."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)


class Loop:
    """A training loop as people write it with accelerate.

    Attributes:
        model: The model as it came out of ``prepare()``.
        losses: Every loss.
    """

    def __init__(self, model: nn.Module, precision: str = "no", accumulate: int = 1) -> None:
        self.accelerator = make_accelerator(precision, accumulate)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        loader = DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.losses: list[torch.Tensor] = []

    def epoch(self, seed: int | None = 5, fail_at: tuple[int, type[BaseException]] | None = None) -> None:
        """One epoch; it may fail before a step."""
        if seed is not None:
            torch.manual_seed(seed)
        self.model.train()
        for step, (images, labels) in enumerate(self.loader):
            if fail_at is not None and fail_at[0] == step:
                raise fail_at[1]("theirs")
            with self.accelerator.accumulate(self.model):
                output = self.model(images)
                loss = nn.functional.cross_entropy(output.flatten(1), labels)
                self.accelerator.backward(loss)
                self.losses.append(loss.detach())
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=False)


def assert_same_loop(one: Loop, other: Loop) -> None:
    """Two loops have seen the same losses, and left the same parameters and momenta."""
    assert one.losses
    assert_same_bits(one.losses, other.losses)
    assert_same_bits(dict(one.model.named_parameters()), dict(other.model.named_parameters()))
    moments = [[s["momentum_buffer"] for s in loop.optimizer.state.values()] for loop in (one, other)]
    assert_same_bits(*moments)


MODELS = {
    "net": make_model,
    "batch norm": lambda: warmed(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))),
    "root": lambda: warmed(nn.BatchNorm2d(1)),
    "own forward": lambda: warmed(OwnForward(1)),
}


def guarded_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with statistics."""
    return [module for module in model.modules() if "running_mean" in module._buffers]


@PRECISIONS
@pytest.mark.parametrize("place", ["before", "inside"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_restore_trains_as_the_twin(make: Any, place: str, precision: str) -> None:
    """``prepare()`` before or inside of the block: the run is the twin's, and so is what runs after the block."""
    model, twin = make(), make()
    first, random = values(statistics(twin)), []
    plain = Loop(twin, precision)
    plain.epoch()
    random.append(torch.get_rng_state())
    with pytest.raises(AssertionError):  # without a guard they move
        assert_same_bits(statistics(twin), first)

    def run() -> Loop:
        prepared = Loop(model, precision) if place == "before" else None
        with bnguard.frozen(model, "restore"):
            loop = prepared or Loop(model, precision)
            loop.epoch()
        return loop

    loop = assert_untouched(model, run)
    random.append(torch.get_rng_state())
    assert_same_bits(*random)
    assert_same_loop(loop, plain)

    # Under bf16 accelerate keeps the forward of the model that it was given: nothing of ours holds in it any more.
    twin.load_state_dict(model.state_dict())
    loop.epoch()
    plain.epoch()
    assert_same_loop(loop, plain)
    assert_same_bits(statistics(model), statistics(twin))
    unwrapped = [each.accelerator.unwrap_model(each.model, keep_fp32_wrapper=False) for each in (loop, plain)]
    outputs = []
    for each in unwrapped:
        torch.manual_seed(6)
        outputs.append(each(data(8)[0]))
    assert_same_bits(*outputs)
    assert_same_bits(state_of(unwrapped[0]), state_of(unwrapped[1]))
    assert unwrapped[0] is model
    if not (place == "inside" and precision == "bf16" and model in guarded_layers(model)):  # that one it keeps
        assert_clean(model)


@PRECISIONS
def test_running_statistics_are_used_where_the_loop_undoes_eval(precision: str) -> None:
    """``model.train()`` undoes ``bn.eval()``; under the guard the run is one that calls it again each time."""

    def eval_by_hand(model: nn.Module) -> nn.Module:
        for layer in backbone_norms(model):
            layer.eval()
        return model

    drifting, model, twin = make_model(), make_model(), make_model()
    Loop(eval_by_hand(drifting), precision).epoch()
    assert drifted(drifting)
    twin.train = lambda mode=True: eval_by_hand(nn.Module.train(twin, mode))
    plain = Loop(twin, precision)
    plain.epoch()
    assert not drifted(twin)
    loop = Loop(eval_by_hand(model), precision)
    with bnguard.frozen(loop.model, use_running_stats=True):
        assert_untouched(model, loop.epoch)
    assert_same_loop(loop, plain)
    assert_clean(model)


@PRECISIONS
def test_accumulated_gradients_are_the_twins(precision: str) -> None:
    """Steps that ``accumulate()`` leaves out accumulate the twin's gradients."""
    model, twin = make_model(), make_model()
    loop = Loop(model, precision, accumulate=2)
    with bnguard.frozen(loop.model, "restore"):
        assert_untouched(model, loop.epoch)
    plain = Loop(twin, precision, accumulate=2)
    plain.epoch()
    assert drifted(twin)
    assert_same_loop(loop, plain)


def test_budget_finds_that_accumulation_updates_at_each_batch() -> None:
    """One optimizer step of two accumulated batches updates twice, which ``updates=1`` finds."""
    model = make_model()
    loop = Loop(model, accumulate=2)
    guard = bnguard.frozen(loop.model, updates=1)
    with pytest.raises(bnguard.StatsChangedError, match=r"has updated once inside frozen\(updates=1\)"), guard:
        loop.epoch()
    assert len(loop.losses) == 1
    assert model.backbone.bn1.num_batches_tracked == 4


@PRECISIONS
@INTERRUPTS
@pytest.mark.parametrize("place", ["before", "inside"])
def test_exception_comes_out(kind: type[BaseException], place: str, precision: str) -> None:
    """A loop that fails in the middle leaves the statistics as they were; the next one goes on as the twin's."""
    model, twin = make_model(), make_model()
    loops = []
    for net, guards in ((model, True), (twin, False)):
        prepared = Loop(net, precision) if place == "before" else None
        guard = bnguard.frozen(net, "restore") if guards else nullcontext()
        with pytest.raises(kind, match="theirs") as caught, guard:
            loops.append(prepared or Loop(net, precision))
            loops[-1].epoch(fail_at=(2, kind))
        assert not getattr(caught.value, "__notes__", [])
    assert drifted(twin)
    assert not drifted(model)
    assert_clean(model)
    with bnguard.frozen(model, "restore"):
        loops[0].epoch()
    loops[1].epoch()
    assert_same_loop(*loops)


def test_raise_stops_the_loop_at_the_users_line() -> None:
    """The error names the layer, and the line of the loop."""
    loop = Loop(make_model(), "bf16")
    guard = bnguard.frozen(loop.model)
    with pytest.raises(bnguard.StatsChangedError, match=r"test_accelerate.py:\d+ in epoch") as caught, guard:
        loop.epoch()
    assert "backbone.bn1 (BatchNorm2d) is in train mode" in str(caught.value)
    assert loop.losses == []


def test_validation_left_in_train_mode_is_found() -> None:
    """A validation that forgets ``eval()`` moves the statistics; in a block it is stopped, and otherwise passes."""

    @torch.no_grad()
    def validate(loop: Loop) -> None:
        for images, labels in loop.loader:
            loop.accelerator.gather_for_metrics((loop.model(images).argmax(1), labels))

    twin, model = Loop(make_model()), Loop(make_model())
    validate(twin)
    assert drifted(twin.model)
    for precision in ("no", "bf16"):
        model = Loop(make_model(), precision)
        with pytest.raises(bnguard.StatsChangedError, match=r"backbone.bn1 "), bnguard.frozen(model.model):
            validate(model)
        assert not drifted(model.model)
        model.model.eval()
        with bnguard.frozen(model.model):
            validate(model)


def test_loop_resumes_from_a_state(tmp_path: Path) -> None:
    """A state saved in a block has the true statistics; a loop that loads it goes on as the twin that loads its own."""

    def resumed(guards: bool, path: Path) -> Loop:
        def block(model: nn.Module) -> Any:
            return bnguard.frozen(model, "restore") if guards else nullcontext()

        first = Loop(make_model())
        with block(first.model):
            first.epoch()
            first.accelerator.save_state(str(path))
        fresh = make_model()
        with torch.no_grad():
            for tensor in [*fresh.parameters(), *[each for each in fresh.buffers() if each.is_floating_point()]]:
                tensor.zero_()
        loop = Loop(fresh)
        loop.accelerator.load_state(str(path))
        assert_same_bits(state_of(fresh), state_of(first.model))
        with block(loop.model):
            loop.epoch(seed=None)
        return loop

    loop, plain = resumed(True, tmp_path / "guarded"), resumed(False, tmp_path / "twin")
    assert drifted(plain.model)
    assert not drifted(loop.model)
    assert_same_loop(loop, plain)


def test_state_loaded_inside_the_block_is_a_change(tmp_path: Path) -> None:
    """Its statistics are put back, and that is said."""
    other = Loop(make_model())
    other.epoch()
    other.accelerator.save_state(str(tmp_path))
    loop = Loop(make_model())
    with pytest.raises(bnguard.StatsChangedError, match=r"load_state_dict\(\)"), bnguard.frozen(loop.model):
        loop.accelerator.load_state(str(tmp_path))
    assert not drifted(loop.model)


def test_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the document trains, holds the statistics, and saves the true ones."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.05), "loader": loader}
    (recipe,) = LOOPS["accelerate"]
    assert_untouched(model, lambda: run_code(recipe, names))
    assert not torch.equal(model.backbone.conv1.weight, make_model().backbone.conv1.weight)
    assert_clean(model)
    Loop(fresh := make_model()).accelerator.load_state(str(tmp_path / "checkpoint"))
    assert_same_bits(state_of(fresh), state_of(model))

    model = make_model()
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.05), "loader": loader}
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unguarded = recipe.replace('with bnguard.frozen(model, use_running_stats=True, include="backbone"):', "if True:")
    assert unguarded != recipe
    run_code(unguarded, names)
    assert drifted(model)
