"""A layer whose class is changed inside a block is guarded like one that had the new class before."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnguard
from tests.asserts import assert_clean, assert_same_bits, outcome, state_of, told
from tests.nets import PlainSubclass, ScaledNorm, images, warmed
from tests.policies import EVERY_GUARD, GUARDS


class TwoArguments(nn.BatchNorm2d):
    """Its forward takes more than that of torch."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:  # type: ignore[override]  # as some libraries do
        return super().forward(x) * scale


class OnlyReads(nn.BatchNorm2d):
    """Never updates, in whichever mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class MovesInEval(nn.BatchNorm2d):
    """Updates in either mode, in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.mul_(0.5)  # type: ignore[union-attr]  # it has one
        return super().forward(x)


class OwnCall(nn.BatchNorm2d):
    """Does more than torch around its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = super().__call__(x)
        return output + 1.0


class OwnCallImpl(nn.BatchNorm2d):
    """As OwnCall, a step further inside."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_impl(*args, **kwargs) + 1.0


class InstanceScaled(nn.InstanceNorm2d):
    """An InstanceNorm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return value * 2


class Refusing:
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise KeyError


CHANGES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "own forward": (nn.BatchNorm2d, ScaledNorm),
    "two arguments": (nn.BatchNorm2d, TwoArguments),
    "only reads": (nn.BatchNorm2d, OnlyReads),
    "moves in eval": (nn.BatchNorm2d, MovesInEval),
    "own call": (nn.BatchNorm2d, OwnCall),
    "own call_impl": (nn.BatchNorm2d, OwnCallImpl),
    "sync": (nn.SyncBatchNorm, ScaledNorm),
    "to stock": (ScaledNorm, nn.BatchNorm2d),
    "from only reads": (OnlyReads, MovesInEval),
    "instance": (nn.InstanceNorm2d, InstanceScaled),
    "plain": (nn.BatchNorm2d, PlainSubclass),
}
EVERY_CHANGE = pytest.mark.parametrize("change", CHANGES)
MODES = pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])


def make(cls: type[nn.Module]) -> nn.Sequential:
    """One layer of a class, after some training."""
    options = {"affine": True, "track_running_stats": True} if issubclass(cls, nn.InstanceNorm2d) else {}
    return nn.Sequential(warmed(cls(2, **options)))  # type: ignore[call-arg]  # all are norms


def result(net: nn.Sequential) -> Any:
    """The outcome of one forward and backward, or the first line of our error; and the statistics after it."""
    got: Any
    try:
        got = outcome(net, images())
    except bnguard.StatsChangedError as error:
        got = str(error).partition("\n")[0]
    return got, state_of(net)


def program(net: nn.Sequential, guard: str, after: type[nn.Module], *, is_early: bool) -> Any:
    """What two forwards give in a block in which the class is changed, or in front of which it was."""
    net[0].weight.grad = net[0].bias.grad = None
    if is_early:
        net[0].__class__ = after  # type: ignore[assignment]  # mypy takes it for a property
    results: list[Any] = []
    with told() as said, bnguard.frozen(net, **GUARDS[guard]) as frozen:
        net[0].__class__ = after  # type: ignore[assignment]
        results += [result(net), result(net)]
    changes = [(change.names, change.updates, change.type) for change in frozen.changes]
    assert_clean(net)
    return results, changes, len(said.warnings), said.error and said.error.partition("\n")[0], state_of(net)


def assert_same_results(one: Any, other: Any) -> None:
    """What two programs gave is the same, the tensors by bits."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, Tensor) or one is None or isinstance(one, dict):
        assert_same_bits(one, other)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_results(left, right)
    else:
        assert one == other


@MODES
@EVERY_CHANGE
@EVERY_GUARD
def test_changed_class_is_guarded_like_that_class(guard: str, change: str, mode: bool) -> None:
    """Results, statistics and findings are those of a block that began with the new class."""
    before, after = CHANGES[change]
    net = make(before).train(mode)
    twin = copy.deepcopy(net)
    found = program(net, guard, after, is_early=False)
    assert_same_results(found, program(twin, guard, after, is_early=True))


@EVERY_CHANGE
@EVERY_GUARD
def test_block_that_begins_after_the_change_holds_the_new_class(guard: str, change: str) -> None:
    """Inside another block, which does not know of the change yet."""
    before, after = CHANGES[change]
    found = []
    for is_early in (False, True):
        net = make(before)
        if is_early:
            net[0].__class__ = after  # type: ignore[assignment]
        with told() as said, bnguard.frozen(net, **GUARDS[guard]):
            net[0].__class__ = after  # type: ignore[assignment]
            with bnguard.frozen(net, "restore"):
                inner = result(net)
        found.append((inner, len(said.warnings), said.error, state_of(net)))
        assert_clean(net)
    assert_same_results(*found)


@pytest.mark.parametrize("guard", ["raise", "warn"])
def test_block_that_begins_after_a_forward_was_put_on_the_layer_runs_it(guard: str) -> None:
    """Inside another block, whose hooks do not know of it yet."""
    found = []
    for is_early in (False, True):
        net = make(nn.BatchNorm2d)
        layer: Any = net[0]

        def forward(input: Tensor, layer: Any = layer) -> Tensor:
            output: Tensor = type(layer).forward(layer, input) * 3
            return output

        if is_early:
            layer.forward = forward
        with told() as said, bnguard.frozen(net, **GUARDS[guard]):
            layer.forward = forward
            with bnguard.frozen(net, "restore"):
                inner = result(net)
        found.append((inner, len(said.warnings), said.error, state_of(net)))
        assert layer.forward is forward
    assert_same_results(*found)


@EVERY_GUARD
def test_tensors_lent_to_the_new_class_are_not_guarded(guard: str) -> None:
    """The first forward after the change runs on what ``functional_call`` lends, and moves that as the twin does."""
    found = []
    for options in (GUARDS[guard], None):
        net = make(nn.BatchNorm2d)
        lent = {name: value.clone() for name, value in state_of(net).items()}
        with bnguard.frozen(net, **options) if options is not None else nullcontext():
            net.register_forward_hook(lambda *call: None)
            net[0].register_forward_hook(lambda module, args, output: output + 1)
            net[0].__class__ = PlainSubclass  # type: ignore[assignment]
            output = torch.func.functional_call(net, lent, (images(),)).detach()
        found.append((output, lent, state_of(net)))
    assert_same_results(*found)


@EVERY_GUARD
def test_arguments_of_the_new_class_reach_it(guard: str) -> None:
    """A forward that takes other arguments than torch's gets them, and errors about them are Python's own."""
    net = make(nn.BatchNorm2d).eval()
    layer: Any = net[0]
    with bnguard.frozen(net, **GUARDS[guard]):
        with pytest.raises(TypeError, match=r"_BatchNorm.forward\(\) got an unexpected keyword argument 'scale'"):
            layer(images(), scale=3.0)
        with pytest.raises(TypeError, match=r"_BatchNorm.forward\(\) missing 1 required positional argument: 'input'"):
            layer()
        plain = layer(input=images())
        layer.__class__ = TwoArguments
        assert_same_bits(layer(images(), scale=3.0), plain * 3.0)
        assert_same_bits(layer(x=images()), plain * 2.0)
        assert_same_bits(layer(images(), 4.0), plain * 4.0)
    assert_clean(net)


@EVERY_GUARD
def test_class_that_is_changed_back_is_guarded_as_before(guard: str) -> None:
    """Inside one block, and in the next ones of a guard that is used again, the class at the moment decides."""
    net = make(nn.BatchNorm2d)
    twin = copy.deepcopy(net)
    again = bnguard.frozen(net, **GUARDS[guard])
    for cls in (nn.BatchNorm2d, ScaledNorm, MovesInEval, nn.BatchNorm2d, nn.BatchNorm2d, ScaledNorm, nn.BatchNorm2d):
        found = []
        for each, frozen in ((net, again), (twin, None)):
            with told() as said, frozen or bnguard.frozen(twin, **GUARDS[guard]) as used:
                results = [result(each)]
                each[0].__class__ = cls
                results += [result(each), result(each)]
                assert_same_bits(copy.deepcopy(each).state_dict(), results[-1][-1])
            found.append((results, len(said.warnings), said.error, [change.updates for change in used.changes]))
            assert_clean(each)
        assert_same_results(*found)


@pytest.mark.parametrize("runs", [True, False], ids=["run", "not run"])
@EVERY_GUARD
def test_copy_of_a_layer_that_is_parametrized_inside_is_clean(guard: str, runs: bool) -> None:
    """Parametrizing changes the class to one that makes the copies itself: without anything of the guard."""
    net = make(nn.BatchNorm2d).eval()
    twin = copy.deepcopy(net)
    parametrize.register_parametrization(twin[0], "weight", Doubled())
    with bnguard.frozen(net, **GUARDS[guard]):
        parametrize.register_parametrization(net[0], "weight", Doubled())
        if runs:
            net(images())
        clone = copy.deepcopy(net)
        assert_clean(clone)
        assert list(clone[0].__dict__) == list(copy.deepcopy(twin)[0].__dict__)
        assert_same_bits(clone.train()(images()), twin.train()(images()))
        assert_same_bits(clone.state_dict(), twin.state_dict())
    parametrize.remove_parametrizations(clone[0], "weight")
    assert_clean(pickle.loads(pickle.dumps(clone)))
    assert_clean(net)


def test_failed_copy_of_a_parametrized_layer_says_nothing_else() -> None:
    """A deep copy that fails half-way raises the user's error alone."""
    net = make(nn.BatchNorm2d)
    net[0].__dict__["fails"] = Refusing()
    with bnguard.frozen(net):
        parametrize.register_parametrization(net[0], "weight", Doubled())
        with pytest.raises(KeyError):
            copy.deepcopy(net)
    assert_clean(net)


def test_replica_has_the_forward_of_the_new_class() -> None:
    """A replica of ``DataParallel`` runs it as well."""
    net = make(nn.BatchNorm2d)
    layer: Any = net[0]
    with bnguard.frozen(net, use_running_stats=True):
        layer.__class__ = ScaledNorm
        replica = layer._replicate_for_data_parallel()
        replica._buffers, replica._parameters = dict(layer._buffers), {}
        replica.weight, replica.bias = layer.weight.data, layer.bias.data
        found = replica(images())
    assert_same_bits(found, net.eval()(images()).detach())


@pytest.mark.parametrize("guard", ["raise", "restore", "running"])
def test_graph_has_the_forward_of_the_new_class(guard: str) -> None:
    """So does a compiled graph, traced before or after."""
    net = make(nn.BatchNorm2d).eval()
    torch._dynamo.reset()
    compiled = torch.compile(lambda input: net(input), backend="eager", fullgraph=True)
    compiled(images())
    with bnguard.frozen(net, **GUARDS[guard]):
        assert_same_bits(compiled(images()), net(images()))
        net[0].__class__ = ScaledNorm  # type: ignore[assignment]
        found = compiled(images())
    assert_same_bits(found, net(images()))
    assert_same_bits(compiled(images()), found)
