"""``use_running_stats`` on scripted, traced and exported programs: it holds, or is refused at the beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bnguard
from bnguard.torch_internals.programs import normalised_with_batch
from tests.asserts import assert_clean, assert_same_bits, statistics, told, values
from tests.nets import images, warmed
from tests.old_torch import RELEASE

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


def script(net: nn.Module) -> Any:
    """Its mode can be changed."""
    return torch.jit.script(net)


def trace(net: nn.Module) -> Any:
    """Its mode is that of the tracing."""
    return torch.jit.trace(net, images(), check_trace=False)


def export(net: nn.Module) -> Any:
    """As is that of an exported program."""
    return torch.export.export(net, (images(),)).module()


def unflatten(net: nn.Module) -> Any:
    """And of the modules that it is taken apart into."""
    if RELEASE < (2, 5) and any([isinstance(module, nn.InstanceNorm2d) for module in net.modules()]):
        pytest.skip("torch 2.4 cannot unflatten an InstanceNorm")
    return torch.export.unflatten(torch.export.export(net, (images(),), strict=False))


FORMS: list[Callable[[nn.Module], Any]] = [script, trace, export, unflatten]
EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(2, track_running_stats=True),
}
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS)


def make(layer: str, *, training: bool) -> nn.Module:
    """A net with one layer."""
    return nn.Sequential(nn.Conv2d(2, 2, 1), warmed(LAYERS[layer]())).train(training)


@EVERY_FORM
@EVERY_LAYER
def test_program_in_train_mode_is_refused(layer: str, form: Callable[[nn.Module], Any]) -> None:
    """Before anything is touched: its outputs would be those of the batch."""
    program = form(make(layer, training=True))
    before = values(statistics(program))
    remedy = "Call eval.. on it before the block" if form is script else "Trace or export the model in eval mode"
    with (
        pytest.raises(bnguard.BNGuardError, match=rf"would normalise with the batch(.|\n)*{remedy}") as caught,
        bnguard.frozen(program, use_running_stats=True),
    ):
        pytest.fail("the block has begun")
    assert "1 (" in str(caught.value)
    assert_same_bits(statistics(program), before)
    assert_clean(program)


@EVERY_FORM
@EVERY_LAYER
@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
def test_program_in_eval_mode_is_the_eval_twins(layer: str, form: Callable[[nn.Module], Any]) -> None:
    """It normalises with its statistics already, and nothing is said."""
    net = make(layer, training=False)
    program, expected = form(net), net(images())
    with bnguard.frozen(program, use_running_stats=True):
        assert torch.allclose(program(images()), expected, atol=1e-6)
    assert_clean(program)


def test_layer_of_an_unflattened_program_is_said_to_normalise_as_it_was_exported() -> None:
    """A guard holds its statistics, and cannot make it use others."""
    program = unflatten(make("BatchNorm2d", training=False))
    with bnguard.frozen(program, use_running_stats=True) as guard:
        (layer,) = guard.layers
    assert layer.protection == "held in its forward, which normalises as it was exported; compared at exit"


@EVERY_FORM
def test_other_policies_take_a_program_in_train_mode(form: Callable[[nn.Module], Any]) -> None:
    """They do not say what it normalises with."""
    program = form(make("BatchNorm2d", training=True))
    before = values(statistics(program))
    with told() as said, bnguard.frozen(program, "restore"):
        program(images())
    assert len(said.warnings) == (form is not unflatten), "only its forward is one that can be held"
    assert_same_bits(statistics(program), before)


def test_layer_outside_of_the_selection_is_not_refused() -> None:
    """Only what is guarded."""
    net = nn.Sequential(trace(make("BatchNorm2d", training=True)), nn.BatchNorm2d(2))
    with bnguard.frozen(net, use_running_stats=True, include="1"):
        pass


def test_traced_model_that_holds_both() -> None:
    """A layer that was in eval mode when it was traced is as good as frozen."""
    net = nn.Sequential(nn.BatchNorm2d(2).eval(), nn.BatchNorm2d(2))
    program = trace(net)
    with bnguard.frozen(program, use_running_stats=True, include="0"):
        program(images())
    with pytest.raises(bnguard.BNGuardError, match=r"^1 \("), bnguard.frozen(program, use_running_stats=True):
        pass


def test_program_without_its_statistics_normalises_nothing() -> None:
    """One that is given its state with each call has none to be guarded."""
    program = export(make("BatchNorm2d", training=True))
    assert len(normalised_with_batch(program)) == 1
    del program.get_submodule("1").running_mean
    assert normalised_with_batch(program) == frozenset()


class Flow(nn.Module):
    """A layer of a normalizing flow: both directions use the batch's statistics in train mode, and move its own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def statistics(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.training:
            return self.running_mean, self.running_var
        var, mean = torch.var_mean(input, 0, correction=0)
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(var, 0.1)
        return mean, var

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mean, var = self.statistics(input)
        return (input - mean) * (var + 1e-5).rsqrt()

    def inverse(self, input: torch.Tensor) -> torch.Tensor:
        mean, var = self.statistics(input)
        return input * (var + 1e-5).sqrt() + mean


def rows() -> torch.Tensor:
    """Eight rows of three features, off centre."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 2 + 3


Method = Callable[[torch.Tensor], torch.Tensor]
# What no instance can hold: each takes the layer before the block, and gives what is called inside.
UNHELD: dict[str, Callable[[Any], Method]] = {
    "kept": lambda layer: layer.forward,
    "of-the-class": lambda layer: lambda input: type(layer).forward(layer, input),
    "inverse": lambda layer: layer.inverse,
}
WRONG = "its outputs are wrong: it has normalised with the\nbatch, not with the running statistics"


@pytest.mark.parametrize("on_change", ["raise", "restore", "warn"])
@pytest.mark.parametrize(
    ("make", "method"),
    [(nn.BatchNorm1d, "kept"), (nn.BatchNorm1d, "of-the-class"), *[(Flow, method) for method in UNHELD]],
)
def test_method_that_is_not_held_is_told_at_the_end(make: Any, method: str, on_change: Any) -> None:
    """It has normalised with the batch, and the end of the block says so, and what to do."""
    layer = make(3)
    before = values(statistics(layer))
    function = UNHELD[method](layer)
    with told() as said, bnguard.frozen(layer, on_change, use_running_stats=True):
        function(rows())
    assert WRONG in "".join([*said.warnings, said.error or ""])
    assert (said.error is None) == (on_change != "raise")
    if on_change != "warn":
        assert_same_bits(statistics(layer), before)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, Flow])
@pytest.mark.filterwarnings("error::bnguard.BNGuardWarning")
def test_forward_that_is_called_directly_is_the_eval_twins(make: Any) -> None:
    """``layer.forward(x)`` inside finds the forward on the instance; in eval mode nothing is to be held."""
    layer = make(3)
    expected = make(3).eval().forward(rows())
    kept = layer.forward
    with bnguard.frozen(layer, use_running_stats=True):
        assert_same_bits(layer.forward(rows()), expected)
        layer.eval()
        assert_same_bits(kept(rows()), expected)
        if make is Flow:
            layer.inverse(rows())


def test_other_policies_do_not_speak_of_wrong_outputs() -> None:
    """Under ``"raise"`` a forward normalises with its batch, or not at all."""
    layer = nn.BatchNorm1d(3)
    kept = layer.forward
    with told() as said, bnguard.frozen(layer):
        kept(rows())
    assert "forward() called directly" in str(said.error)
    assert "outputs are wrong" not in str(said.error)
