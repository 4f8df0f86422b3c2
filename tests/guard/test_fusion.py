"""Layers fused with their neighbours, and quantised: what the tools make of a guarded model is the twin's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion

import bnguard
from tests.asserts import assert_clean, assert_same_bits, outcome, state_of, statistics, told, values, warns
from tests.nets import images, warmed
from tests.policies import EVERY_POLICY, POLICIES

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, as it imports itself
    import torch.ao.nn.intrinsic.qat as nniqat
    import torch.ao.quantization as tq
    from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
    from torch.fx.experimental.optimization import fuse as fuse_graph

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning"),
]
PARTS = [["0", "1", "2"]]


def make_net() -> nn.Sequential:
    """A convolution, its BatchNorm and an activation."""
    return warmed(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()))


def for_training(net: Any) -> Any:
    """The net with what quantisation-aware training is to do."""
    net.qconfig = tq.get_default_qat_qconfig("fbgemm")
    return net.train()


def prepared(net: nn.Module, inplace: bool = False) -> Any:
    """The net, fused and with fake quantisation, in train mode."""
    fused = tq.fuse_modules_qat(for_training(net), PARTS, inplace=inplace)
    return tq.prepare_qat(fused, inplace=inplace)


def converted(net: nn.Module) -> Any:
    """The net in integers."""
    net = prepared(net)
    net(images())  # what it observes decides about the scale
    return tq.convert(net.eval())


def prepared_graph(net: nn.Module) -> Any:
    """The net, read by fx, fused and with fake quantisation."""
    return prepare_qat_fx(net.train(), tq.get_default_qat_qconfig_mapping("fbgemm"), (images(),))


def converted_graph(net: nn.Module) -> Any:
    """The same in integers."""
    net = prepared_graph(copy.deepcopy(net))
    net(images())
    return convert_fx(net.eval())


# Tools whose result shares nothing with the net, and tools that change the net, or make layers around its statistics.
COPYING: dict[str, Callable[[Any], Any]] = {
    "fuse_conv_bn_eval": lambda net: fusion.fuse_conv_bn_eval(net[0].eval(), net[1].eval()),
    "fuse_conv_bn_weights": lambda net: nn.ParameterList(
        fusion.fuse_conv_bn_weights(
            net[0].weight, net[0].bias, net[1].running_mean, net[1].running_var, 1e-5, net[1].weight, net[1].bias
        )
    ),
    "fuse_modules": lambda net: tq.fuse_modules(net.eval(), PARTS),
    "fuse_modules_qat": lambda net: tq.fuse_modules_qat(net.train(), PARTS),
    "prepare_qat": prepared,
    "convert": converted,
    "fuse_fx": lambda net: fuse_fx(net.eval()),
    "fuse (fx.experimental)": lambda net: fuse_graph(net.eval()),
    "prepare_fx": lambda net: prepare_fx(net.eval(), tq.get_default_qconfig_mapping("fbgemm"), (images(),)),
    "convert_fx": converted_graph,
}
IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "fuse_modules": lambda net: tq.fuse_modules(net.eval(), PARTS, inplace=True),
    "fuse_modules_qat": lambda net: tq.fuse_modules_qat(net.train(), PARTS, inplace=True),
    "fuse_modules-bn-first": lambda net: tq.fuse_modules(net.eval(), [["1", "2"]], inplace=True),
    "fuse_modules_qat-bn-first": lambda net: tq.fuse_modules_qat(net.train(), [["1", "2"]], inplace=True),
    "prepare_qat": lambda net: prepared(net, inplace=True),
    "prepare_qat_fx": prepared_graph,
}


def assert_same_model(one: nn.Module, other: nn.Module, forwards: bool = True) -> None:
    """Two models have the same state, flags and classes, and do the same in two forward and backward passes."""
    assert [type(part).__name__ for part in one.modules()] == [type(part).__name__ for part in other.modules()]
    assert [part.training for part in one.modules()] == [part.training for part in other.modules()]
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]
    assert_same_bits(plain(one.state_dict()), plain(other.state_dict()))
    if forwards:
        has_gradients = any(p.requires_grad for p in one.parameters())
        for seed in range(2):
            assert_same_bits(
                outcome(one, images(seed=seed), backward=has_gradients),
                outcome(other, images(seed=seed), backward=has_gradients),
            )
            one.zero_grad()
            other.zero_grad()
        assert_same_bits(plain(one.state_dict()), plain(other.state_dict()))


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the integers of quantised tensors, and what is no tensor as it is."""
    tensors = {}
    for name, value in state.items():
        if isinstance(value, tuple):  # packed parameters
            value = value[0]
        if isinstance(value, torch.Tensor):
            tensors[name] = value.int_repr() if value.is_quantized else value
    return tensors


# Fused inside a block.


@EVERY_POLICY
@pytest.mark.parametrize("tool", COPYING)
def test_model_fused_inside_is_the_twins(tool: str, policy: str) -> None:
    """What a tool makes of a guarded model is unguarded and the twin's; the model and its statistics are as before."""
    net, twin = make_net(), make_net()
    before, objects = values(statistics(net)), statistics(net)
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        fused, fused_twin = COPYING[tool](net), COPYING[tool](twin)
        assert_clean(fused)
        if tool not in ("fuse_conv_bn_weights", "convert", "convert_fx"):
            assert_same_model(copy.deepcopy(fused), copy.deepcopy(fused_twin))
    assert guard.changes == ()
    assert_clean(net)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    assert_same_bits(statistics(net), before)
    assert_same_model(fused, fused_twin, forwards=tool not in ("fuse_conv_bn_weights", "convert"))
    assert_same_model(net, twin)


@EVERY_POLICY
@pytest.mark.parametrize("tool", IN_PLACE)
def test_model_fused_in_place_inside_is_the_twins(tool: str, policy: str) -> None:
    """A model that a tool changes inside a block is the twin's afterwards, with nothing on it or on what left it."""
    net, twin = make_net(), make_net()
    parts, before, objects = list(net.modules()), values(statistics(net)), statistics(net)
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        fused = IN_PLACE[tool](net)
    fused_twin = IN_PLACE[tool](twin)
    assert guard.changes == ()
    for part in (*parts, net, fused):
        assert_clean(part)
    assert_same_bits(objects, before)
    assert_same_model(fused, fused_twin)


@pytest.mark.parametrize("policy", ["raise", "warn", "restore", "budget"])
@pytest.mark.parametrize("tool", ["fuse_modules_qat", "fuse_modules_qat-bn-first", "prepare_qat", "prepare_qat_fx"])
def test_model_fused_in_place_that_runs_inside_moves_nothing(tool: str, policy: str) -> None:
    """The fused model in train mode computes what the twin's does; its updates are held, or found at the end."""
    net, twin = make_net(), make_net()
    before, objects = values(statistics(net)), statistics(net)
    # A tool that keeps the layer leaves it guarded, one that makes another around its statistics does not.
    keeps_layer = tool.startswith("fuse_modules")
    counted = policy == "budget" and keeps_layer
    silent = keeps_layer and policy in ("restore", "budget")
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        fused, fused_twin = IN_PLACE[tool](net), IN_PLACE[tool](twin)
        assert_same_bits(fused(images()), fused_twin(images()))
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy != "raise" and not silent)
    assert all("1 (BatchNorm2d)" in text for text in filter(None, (said.error, *said.warnings)))
    assert len(guard.changes) == (not silent)
    expected = fused_twin if counted or policy == "warn" else None
    if expected is None:
        assert_same_bits(objects, before)
    else:
        assert_same_bits(list(objects.values()), list(statistics(expected).values()))
    assert_clean(fused)


def test_use_running_stats_holds_in_a_model_fused_inside() -> None:
    """A layer that a tool keeps goes on normalising with its running statistics."""
    net, twin = make_net(), make_net()
    before = values(statistics(net))
    with bnguard.frozen(net, use_running_stats=True):
        fused = IN_PLACE["fuse_modules_qat"](net)
        assert_same_bits(fused(images()), twin.eval()(images()))
    assert_same_bits(list(statistics(fused).values()), list(before.values()))


def test_model_that_cannot_be_fused_gives_torchs_error() -> None:
    """The tool's own errors come through, and the model is guarded as before."""
    net, twin = make_net(), make_net()
    with bnguard.frozen(net, "restore"):
        for fuse in (
            lambda model: tq.fuse_modules(model.train(), PARTS, inplace=True),
            lambda model: fusion.fuse_conv_bn_eval(model[0], model[1]),
            lambda model: tq.fuse_modules(model.eval(), [["2", "1"]], inplace=True),
        ):
            with pytest.raises(Exception) as caught:
                fuse(net)
            with pytest.raises(type(caught.value)) as expected:
                fuse(twin)
            assert str(caught.value) == str(expected.value)
        before = values(statistics(net))
        assert_same_bits(net.train()(images()), twin.train()(images()))
        assert_same_bits(statistics(net), before)
    assert_clean(net)


def test_hook_that_fusion_moved_to_another_module_goes() -> None:
    """Fusing moves the hooks of its first module to the fused one: the user's stay there, ours goes."""
    net, twin, seen = (
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()).eval(),
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()),
        [],
    )
    net[0].register_forward_pre_hook(lambda *call: seen.append("user"))
    with bnguard.frozen(net):
        tq.fuse_modules(net, [["0", "1"]], inplace=True)
        assert_same_bits(net(images()), twin.eval()(images()))
    assert_clean(net)
    net(images())
    assert seen == ["user", "user"]


@pytest.mark.parametrize("nested", [1, 2])
def test_hook_that_fusion_moved_goes_without_a_forward(nested: int) -> None:
    """Also where nobody runs the fused model, and where it is copied inside."""
    net = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()).eval()
    guards = [bnguard.frozen(net).start() for _ in range(nested)]
    tq.fuse_modules(net, [["0", "1"]], inplace=True)
    other = copy.deepcopy(net)
    for guard in guards:
        guard.stop()
    assert_clean(net)
    assert_clean(other)


# Fused before a block.


@pytest.mark.parametrize(
    "make",
    [prepared, lambda net: tq.fuse_modules_qat(net.train(), PARTS), prepared_graph],
    ids=["prepare_qat", "fuse_modules_qat", "prepare_qat_fx"],
)
@EVERY_POLICY
def test_guard_around_a_fused_model_acts_at_its_forwards(make: Callable[[Any], Any], policy: str) -> None:
    """The BatchNorm inside a fused layer is named, held and judged as any other; observers move as in the twin."""
    net, twin = make(make_net()), make(make_net())
    before, objects = values(statistics(net)), statistics(net)
    if policy == "running":
        twin.apply(nniqat.freeze_bn_stats)
        for layer in twin.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
    with told() as said, bnguard.frozen(net, **POLICIES[policy]) as guard:
        output = net(images())
    assert (said.error is None) == (policy != "raise")
    assert len(said.warnings) == (policy == "warn")
    name = guard.layers[0].names[0]
    assert all(f"{name} (BatchNorm2d) is in train mode" in text for text in filter(None, (said.error, *said.warnings)))
    assert len(guard.layers) == 1
    assert f"{name}.running_mean" in net.state_dict()
    assert_clean(net)
    assert all(tensor is objects[name] for name, tensor in statistics(net).items())
    if policy == "raise":
        assert_same_bits(statistics(net), before)
        return
    assert_same_bits(output, twin(images()))
    assert_same_bits(statistics(net), statistics(twin) if policy in ("warn", "budget") else before)
    others = [{k: v for k, v in state_of(one).items() if k not in before} for one in (net, twin)]
    assert_same_bits(*others)


@pytest.mark.parametrize("policy", ["raise", "restore", "running"])
def test_frozen_statistics_of_a_quantised_model_are_no_finding(policy: str) -> None:
    """After torch's own ``freeze_bn_stats`` nothing updates, and the guard has nothing to say."""
    net, twin = prepared(make_net()), prepared(make_net())
    net.apply(nniqat.freeze_bn_stats)
    twin.apply(nniqat.freeze_bn_stats)
    with bnguard.frozen(net, **POLICIES[policy]) as guard:
        assert_same_bits(outcome(net, images()), outcome(twin, images()))
    assert guard.changes == ()
    assert_same_bits(net.state_dict(), twin.state_dict())


def test_model_converted_after_a_block_is_the_twins() -> None:
    """Integers that are computed after training under a guard come from the statistics of entry."""
    net, twin = prepared(make_net()), prepared(make_net())
    before = values(statistics(net))
    with bnguard.frozen(net, "restore"):
        net(images())
    twin(images())
    twin.load_state_dict({**twin.state_dict(), **before})
    assert_same_model(tq.convert(net.eval()), tq.convert(twin.eval()), forwards=False)


def test_fused_model_without_statistics_is_said_to_have_none() -> None:
    """Where fusion has folded the layer away there is nothing to guard, and that is said."""
    fused = tq.fuse_modules(make_net().eval(), PARTS)
    with warns() as caught, bnguard.frozen(fused):
        fused(images())
    assert "has no layer with running statistics" in caught.message


def test_linear_layer_fused_inside_is_the_twins() -> None:
    """``fuse_linear_bn_eval`` reads the true statistics and leaves them."""
    layers = [(warmed(nn.Linear(4, 3)).eval(), warmed(nn.BatchNorm1d(3)).eval()) for _ in range(2)]
    with bnguard.frozen(layers[0][1], use_running_stats=True):
        fused = fusion.fuse_linear_bn_eval(*layers[0])
    assert_same_bits(fused.state_dict(), fusion.fuse_linear_bn_eval(*layers[1]).state_dict())
    assert_clean(fused)
