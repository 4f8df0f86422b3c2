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
