"""Models that own a running buffer themselves, and statistics of unusual form: as in the unguarded twin."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.asserts import assert_clean, assert_same_bits, state_of, told
from tests.policies import EVERY_GUARD, GUARDS


def batch(seed: int = 0) -> Tensor:
    """Eight rows of three features."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))


class Root(nn.Module):
    """A model with a running mean of its own around layers that have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", None)

    def normalised(self, input: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(input.mean(0), 0.1)
        return input - self.running_mean

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(self.normalised(input)))


class KeepsGradients(Root):
    """A tensor hook of the forward stores the gradient of the features on the model, as Grad-CAM does."""

    def forward(self, input: Tensor) -> Tensor:
        features = self.body(self.normalised(input))
        features.register_hook(functools.partial(setattr, self, "gradient"))
        return self.head(features)


class KeepsInAClosure(Root):
    """A closure that was made in the constructor, and is called by a child, counts and stores."""

    def __init__(self) -> None:
        super().__init__()

        def store(module: nn.Module, args: Any, output: Tensor) -> None:
            self.features = [*getattr(self, "features", []), output.detach()]

        self.body.register_forward_hook(store)

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output + self.features[-1].sum()


class Assigns(Root):
    """Buffers that are no statistics are assigned, from None too, and deleted."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.last = output.detach().mean(0)
        self.register_buffer("first", input[0].clone(), persistent=False)
        return output + self.last


class AddsParts(Root):
    """Makes a layer in its first forward."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if not hasattr(self, "late"):
            torch.manual_seed(2)
            self.late = nn.Linear(2, 2)
        return self.late(output)


class KeywordOnly(Root):
    """Takes its input by keyword, and hands on what it does not know."""

    def forward(self, *, pixels: Tensor, **others: Any) -> Tensor:
        return super().forward(pixels) * others.get("scale", 1)


class Partial(Root):
    """Has a forward that is made of another method."""

    forward = functools.partialmethod(lambda self, scale, input: Root.forward(self, input) * scale, 2.0)


class Wrapped(Root):
    """Has a decorated forward, with the signature of the one inside."""

    @functools.wraps(Root.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return Root.forward(self, *args, **kwargs) + 1


ROOTS: dict[str, type[Root]] = {
    cls.__name__: cls for cls in (KeepsGradients, KeepsInAClosure, Assigns, AddsParts, KeywordOnly, Partial, Wrapped)
}


def run(net: Root, seed: int = 0) -> list[Any]:
    """A forward and a backward pass: the output, the gradients, and what the model has stored."""
    input = batch(seed).requires_grad_()
    output = net(pixels=input, scale=3) if isinstance(net, KeywordOnly) else net(input)
    net.zero_grad()
    output.square().sum().backward()
    stored = [net.__dict__.get("gradient"), *net.__dict__.get("features", []), net.last, net._buffers.get("first")]
    return [output.detach(), input.grad, *[p.grad for p in net.parameters()], *stored]


@EVERY_GUARD
@pytest.mark.parametrize("root", ROOTS)
def test_root_with_a_running_buffer_is_its_twin(root: str, guard: str) -> None:
    """Outputs, gradients, and all that hooks, closures and the forward itself store on the model, over two passes."""
    net, twin = ROOTS[root](), ROOTS[root]()
    if guard in ("raise", "running"):
        twin.eval()
    if guard == "raise":
        net.eval()
    expected, mean = [], twin.running_mean.clone()
    for seed in range(2):
        expected.append(run(twin, seed))
        if guard == "restore" or (guard == "budget" and seed):  # the update is one of those that do not stand
            twin.running_mean.data.copy_(mean)
        mean = twin.running_mean.clone()
    with told() as said, bnguard.frozen(net, **GUARDS[guard]):
        seen = [run(net, seed) for seed in range(2)]
    assert said.error is None
    for one, other in zip(seen, expected, strict=True):
        assert_same_bits(one, other)
    if guard == "rollback":
        assert_same_bits(net.running_mean, torch.zeros(3))
    else:
        assert_same_bits(state_of(net), state_of(twin))
    assert sorted(net._buffers) == sorted(twin._buffers)
    assert net._non_persistent_buffers_set == twin._non_persistent_buffers_set
    assert_clean(net)


@EVERY_GUARD
@pytest.mark.parametrize("root", ROOTS)
def test_signature_in_a_block_is_that_of_the_class(root: str, guard: str) -> None:
    """For tools that choose columns of a data set by it; a forward that was captured inside works afterwards."""
    net, twin = ROOTS[root]().eval(), ROOTS[root]().eval()
    arguments: dict[str, Any] = {"pixels": batch()} if root == "KeywordOnly" else {}
    inputs = () if arguments else (batch(),)
    with bnguard.frozen(net, **GUARDS[guard]):
        assert str(inspect.signature(net.forward)) == str(inspect.signature(twin.forward))
        assert list(inspect.signature(net.forward).parameters) == list(inspect.signature(twin.forward).parameters)
        captured = net.forward
    expected = twin(*inputs, **arguments)
    assert_same_bits(captured(*inputs, **arguments), expected)
    if root != "KeepsInAClosure":  # a local function cannot be pickled
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert_same_bits(other(*inputs, **arguments), twin(*inputs, **arguments))


# Statistics of unusual form.

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": lambda tensor: torch.stack([tensor, tensor], 1).t().contiguous().t()[:, 1],
    "every-other": lambda tensor: tensor.repeat_interleave(2)[::2],
    "negated": lambda tensor: torch.complex(torch.zeros(3), -tensor).conj().imag,
    "offset": lambda tensor: torch.cat([torch.zeros(5), tensor])[5:],
}


class Complex(nn.Module):
    """Keeps the mean of complex numbers, as a conjugated view."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.full((3,), 1 + 2j).conj())

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(torch.complex(input, input).mean(0), 0.1)
        return input - self.running_mean


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", ["in-place", "load", "assign", "forward"])
def test_statistics_of_every_form_are_put_back(form: str, write: str) -> None:
    """The same objects, with the same values and strides; forwards inside are the twin's."""

    def make() -> nn.BatchNorm1d:
        norm = nn.BatchNorm1d(3)
        norm.running_mean, norm.running_var = FORMS[form](torch.arange(3.0)), FORMS[form](torch.arange(1.0, 4.0))
        return norm

    norm, twin, other = make(), make(), nn.BatchNorm1d(3)
    other(batch())
    objects, before = dict(norm.named_buffers()), {name: b.clone() for name, b in make().named_buffers()}

    def change(norm: nn.BatchNorm1d) -> None:
        if write == "in-place":
            norm.running_mean.mul_(3)
            norm.running_var.add_(1)
        elif write == "forward":
            F.batch_norm(batch(), norm.running_mean, norm.running_var, training=True)
        else:
            norm.load_state_dict(copy.deepcopy(other.state_dict()), assign=write == "assign")

    change(twin)
    with told(), bnguard.frozen(norm, "restore"):
        change(norm)
        assert_same_bits(norm(batch(3)), twin(batch(3)))
    assert all(tensor is objects[name] for name, tensor in norm.named_buffers())
    assert_same_bits({name: b.clone() for name, b in norm.named_buffers()}, before)
    assert norm.running_mean.stride() == make().running_mean.stride()
    assert norm.running_mean.is_neg() == make().running_mean.is_neg()


@pytest.mark.parametrize("on_change", ["restore", "raise", "rollback"])
def test_conjugated_statistics_are_put_back(on_change: Any) -> None:
    """Values, object and the conjugation."""
    layer, twin = Complex(), Complex()
    mean = layer.running_mean
    with told(), bnguard.frozen(layer, on_change):
        try:
            output = layer(batch())
        except bnguard.StatsChangedError:
            output = None
        if output is not None:
            assert_same_bits(output, twin(batch()))
        layer.running_mean.mul_(2)
    assert layer.running_mean is mean
    assert mean.is_conj()
    assert_same_bits(mean.resolve_conj(), torch.full((3,), 1 - 2j))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.InstanceNorm1d])
@EVERY_GUARD
def test_default_device_at_the_end_decides_nothing(layer: Any, guard: str) -> None:
    """A ``torch.device("meta")`` block, or a default device, that is set inside and is still there at the end."""

    def make() -> Any:
        return layer(3, track_running_stats=True)

    norm, twin, other, input = make(), make(), make(), batch().t().expand(2, 3, 8).contiguous()
    other(input + 1)
    guard_of_block = bnguard.frozen(norm, **GUARDS[guard])
    with told():
        guard_of_block.start()
        if guard in ("budget", "warn"):
            norm(input)
            twin(input)
        elif guard == "rollback":
            norm(input)
        try:
            torch.set_default_device("meta")
            if guard != "warn":
                norm.running_mean.copy_(other.running_mean)
            guard_of_block.stop()
        finally:
            torch.set_default_device(None)
    assert_same_bits(state_of(norm), state_of(twin))


@EVERY_GUARD
def test_statistic_that_is_not_persistent_comes_back_so(guard: str) -> None:
    """Deleted, replaced by a plain attribute, or registered as persistent: the state dict is that of before."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3), persistent=False)
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, input: Tensor) -> Tensor:
            return input - self.running_mean

    for action in ("delete", "attribute", "register", "none"):
        net = Plain()
        keys, mean = list(net.state_dict()), net.running_mean
        with told(), bnguard.frozen(net, **GUARDS[guard]):
            del net.running_mean
            if action == "attribute":
                net.running_mean = torch.ones(3)
            elif action == "register":
                net.register_buffer("running_mean", torch.ones(3))
            elif action == "none":
                net.running_mean = None
        if guard != "warn":
            assert list(net.state_dict()) == keys, action
            assert net.running_mean is mean


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("on_change", ["restore", "warn", "raise"])
def test_budget_of_statistics_that_grow(updates: int, on_change: Any) -> None:
    """Each update gives them another shape; the first ``updates`` stand, and the policy decides about the others."""

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(0))

        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                self.running_mean = torch.cat([self.running_mean, input.mean(0)])
            return input - self.running_mean[-3:]

    net, twin, states = Grows(), Grows(), []
    for seed in range(3):
        twin(batch(seed))
        states.append(twin.running_mean.clone())
    with told() as said, bnguard.frozen(net, on_change, updates=updates):
        for seed in range(3):
            net(batch(seed))
    assert (said.error is not None) == (on_change == "raise" and updates < 3)
    assert_same_bits(net.running_mean, states[-1 if on_change == "warn" else updates - 1])
