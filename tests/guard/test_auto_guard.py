"""Guards for every model that runs: from its first forward, under the names that its whole model gives it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import bnguard
from bnguard.guard import auto_guard as _auto_guard
from bnguard.guard.hooks import guard_of
from bnguard.guard.options import Frontend, Settings
from bnguard.guard.phrases import FROZEN
from bnguard.guard.requests import GuardRequests
from tests.asserts import assert_clean, assert_same_bits, assert_same_gradients, state_of
from tests.nets import batch_norms, conv_net, images

EVERY = Frontend(FROZEN, has_coverage_warnings=False, is_outermost=True)


@pytest.fixture
def requests() -> Iterator[GuardRequests]:
    """None so far; at the end all have ended."""
    made = GuardRequests()
    yield made
    assert made.end(None) == []


@contextmanager
def every_model(requests: GuardRequests, policy: Any, **options: Any) -> Iterator[_auto_guard.AutoGuard]:
    """Guards every model that runs inside; the requests are left open, for their end to be looked at."""
    guard = _auto_guard.AutoGuard(requests, Settings(policy, frontend=EVERY, **options))
    guard.begin()
    try:
        yield guard
    finally:
        guard.end(for_good=True)


@pytest.fixture
def auto_guard(requests: GuardRequests) -> Iterator[_auto_guard.AutoGuard]:
    """Guards each model that runs."""
    guard = _auto_guard.AutoGuard(requests, Settings("restore"))
    guard.begin()
    yield guard
    guard.end(for_good=True)


def test_open_guards_are_few(
    auto_guard: _auto_guard.AutoGuard, monkeypatch: pytest.MonkeyPatch, requests: GuardRequests
) -> None:
    """The oldest ends for a newer one, and begins again when its model runs; no model is ever updated."""
    monkeypatch.setattr(_auto_guard, "_MOST_OPEN", 2)
    nets = [conv_net() for _ in range(4)]
    before = state_of(nets[0])
    for _ in range(2):
        for number, net in enumerate(nets):
            net(images())
            open_ = [guard_of(batch_norms(other)[0]) is not None for other in nets]
            assert open_[number]
            assert sum(open_) <= 2
            assert_same_bits(state_of(net), before)
    assert requests.end(None) == []
    for net in nets:
        assert_clean(net)


@pytest.mark.usefixtures("auto_guard")
def test_replica_of_a_guarded_model_is_no_other_model() -> None:
    """As DataParallel makes one for each forward: no guard is opened for it."""
    net = conv_net()
    before, layer = state_of(net), net.stem.bn
    net(images())
    replica = layer._replicate_for_data_parallel()
    replica._buffers = {name: buffer.clone() for name, buffer in layer._buffers.items()}
    replica.weight, replica.bias = layer.weight, layer.bias
    replica(torch.ones(4, 3, 2, 2))
    assert guard_of(layer) is not None
    assert guard_of(replica) is None
    assert replica.num_batches_tracked == layer.num_batches_tracked + 1
    assert_same_bits(state_of(net), before)


class Scaled(nn.BatchNorm2d):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(2),
    "instance": lambda: nn.InstanceNorm2d(2, track_running_stats=True, affine=True),
    "own": lambda: Scaled(2),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_first_forward_of_a_layer_that_is_called_itself_is_held(make: Callable[[], nn.Module]) -> None:
    """Torch has chosen its forward before the guard is put on it: outputs and gradients are the twin's all the same."""
    layer = make()
    twin, before = copy.deepcopy(layer), state_of(layer)
    requests = GuardRequests()
    with every_model(requests, "restore"):
        for _ in range(2):
            assert_forward_is_the_twins(layer, twin, before)
    assert requests.end(None) == []
    assert_clean(layer)


def assert_forward_is_the_twins(layer: nn.Module, twin: nn.Module, before: dict[str, Tensor]) -> None:
    """Output and gradients are those of the twin, the state is that of before, and no hook is left of the forward."""
    outputs = [module(images()) for module in (layer, twin)]
    assert_same_bits(*outputs)
    assert_same_bits(state_of(layer), before)
    for output in outputs:
        output.square().sum().backward()
    assert_same_gradients(layer, twin)
    assert len(layer._forward_hooks) == 0


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_first_forward_that_fails(make: Callable[[], nn.Module]) -> None:
    """The error is torch's own, the statistics are those from before it, and the next forward is held."""
    layer = make()
    before = state_of(layer)
    requests = GuardRequests()
    with every_model(requests, "restore"):
        with pytest.raises((ValueError, RuntimeError)) as error:
            layer(torch.ones(1, 2, 1, 1))
        with pytest.raises(error.type) as expected:
            make()(torch.ones(1, 2, 1, 1))
        assert str(error.value) == str(expected.value)
        assert_same_bits(state_of(layer), before)
        layer(images())
        assert_same_bits(state_of(layer), before)
    assert requests.end(None) == []
    assert_clean(layer)


@pytest.mark.parametrize("make", [*LAYERS.values(), Scaled], ids=[*LAYERS, "again"])
def test_first_forward_of_such_a_layer_runs_in_eval_mode(make: Callable[[], nn.Module]) -> None:
    """With ``use_running_stats`` the first forward is like the second: that of the layer in eval mode."""
    layer = make() if make is not Scaled else trained(make(2))
    twin, before = copy.deepcopy(layer).eval(), state_of(layer)
    requests = GuardRequests()
    with every_model(requests, "restore", use_running_stats=True):
        for _ in range(2):
            assert_forward_is_the_twins(layer, twin, before)
            assert layer.training
    assert requests.end(None) == []
    assert_clean(layer)


def trained(layer: nn.Module) -> nn.Module:
    """The layer, with statistics that differ from the initial ones."""
    layer(images() * 3 + 1)
    return layer


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_first_forward_in_eval_mode_that_fails(make: Callable[[], nn.Module]) -> None:
    """The mode and the statistics of before are back, also where no hook is called after the forward."""
    layer = make()
    before = state_of(layer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    requests = GuardRequests()
    with every_model(requests, "restore", use_running_stats=True):
        with pytest.raises((ValueError, RuntimeError)):
            layer(torch.ones(1, 3, 2, 2))
        assert layer.training
        other = make()
        handle = other.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            other(images())
        handle.remove()
        with torch.no_grad():
            assert_same_bits(other(images()), make().eval()(images()))
        assert other.training
    assert requests.end(None) == []
    assert_same_bits(state_of(layer), before)
    assert_clean(layer)
    assert_clean(other)


class Lagging(nn.Module):
    """A layer that normalises with what it has learned so far, in train mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(input.detach().mean((0, 2, 3)), 0.5)
        return input - self.running_mean[:, None, None]


@pytest.mark.parametrize("options", [{}, {"use_running_stats": True}], ids=["restore", "running"])
@pytest.mark.parametrize("make", [*LAYERS.values(), Lagging], ids=[*LAYERS, "lagging"])
def test_first_forward_that_is_interrupted(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    """Ctrl-C whose exception is kept, as notebooks do: the next forward is the twin's, and puts back what was left."""
    layer = make()
    twin, before = copy.deepcopy(layer).train("use_running_stats" not in options), state_of(layer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    requests = GuardRequests()
    with every_model(requests, "restore", **options):
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            layer(images())
        handle.remove()
        for seed in (1, 2):
            assert_same_bits(layer(images(seed=seed)), copy.deepcopy(twin)(images(seed=seed)))
        assert layer.training
        assert_same_bits(state_of(layer), before)
        assert len(layer._forward_hooks) == 0
    assert kept.value.__traceback__ is not None
    assert requests.end(None) == []
    assert_clean(layer)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_first_forward_spends_the_budget(make: Callable[[], nn.Module]) -> None:
    """With ``updates=1`` the first forward is the one that updates, and the second one does not."""
    layer = make()
    twin = copy.deepcopy(layer)
    requests = GuardRequests()
    with every_model(requests, "restore", updates=1):
        assert_same_bits(layer(images()), twin(images()))
        after = state_of(twin)
        assert_same_bits(state_of(layer), after)
        assert_same_bits(layer(images(seed=2)), twin(images(seed=2)))
        assert_same_bits(state_of(layer), after)
    assert requests.end(None) == []
    assert_same_bits(state_of(layer), after)
    assert_clean(layer)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_first_forward_beyond_another_budget_is_refused(make: Callable[[], nn.Module]) -> None:
    """``updates=1`` under ``"raise"``: the first forward of each layer is counted, the second one raises."""
    layer = make()
    requests = GuardRequests()
    with every_model(requests, "raise", updates=1):
        layer(images())
        after = state_of(layer)
        with pytest.raises(bnguard.StatsChangedError, match="updates=1"):
            layer(images())
        assert_same_bits(state_of(layer), after)
    with pytest.raises(bnguard.StatsChangedError, match="was caught"):
        requests.end(None)
    assert_clean(layer)


def hooked(layer: nn.Module) -> nn.Module:
    """The layer with a hook of the user's, so that a guard that raises is its ``forward`` as well."""
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


def test_first_forward_of_a_layer_with_hooks_is_refused() -> None:
    """In train mode it raises before it updates, and after torch's own error about its input; in eval mode it runs."""
    layers = [hooked(nn.BatchNorm2d(2)) for _ in range(3)]
    before = [state_of(layer) for layer in layers]
    requests = GuardRequests()
    with every_model(requests, "raise"):
        with pytest.raises(bnguard.StatsChangedError, match="would update"):
            layers[0](images())
        with pytest.raises(ValueError, match="expected 4D input"):
            layers[1](torch.ones(3))
        assert_same_bits(layers[2].eval()(images()), hooked(nn.BatchNorm2d(2)).eval()(images()))
    with pytest.raises(bnguard.StatsChangedError, match="was caught"):
        requests.end(None)
    for layer, state in zip(layers, before, strict=True):
        assert_same_bits(state_of(layer), state)
        assert_clean(layer)


def test_first_forward_in_eval_mode_that_is_traced_is_warned_about() -> None:
    """A program that is traced through it holds the layer in train mode, and its statistics stay."""
    layer = nn.BatchNorm2d(2)
    before = state_of(layer)
    requests = GuardRequests()
    with every_model(requests, "raise", use_running_stats=True):
        with pytest.warns(bnguard.BNGuardWarning, match="traced"):
            make_fx(layer)(images())
        assert_same_bits(state_of(layer), before)
    requests.end(None)
    assert_clean(layer)


@pytest.mark.parametrize("policy", ["raise", "warn", "restore"])
def test_lent_tensors_never_become_the_models_own(policy: Any) -> None:
    """A model that ``functional_call`` runs first: what it was lent is moved, and the model has its own afterwards."""
    net = conv_net()
    twin, own, before = copy.deepcopy(net), dict(net.named_buffers()), state_of(net)
    lent, lent_to_twin = [{name: value.clone() for name, value in before.items()} for _ in range(2)]
    requests = GuardRequests()
    with every_model(requests, policy):
        torch.func.functional_call(net, lent, (images(),))
        torch.func.functional_call(twin, lent_to_twin, (images(),))
        net.eval()(images())
    assert requests.end(None) == []
    assert all(net.get_buffer(name) is tensor for name, tensor in own.items())
    assert_same_bits(state_of(net), before)
    assert_same_bits(lent, lent_to_twin)
    assert lent["stem.bn.num_batches_tracked"] == before["stem.bn.num_batches_tracked"] + 1


def test_model_whose_parameters_alone_are_lent_is_guarded() -> None:
    """Its statistics are its own: the first forward is stopped."""
    net = conv_net()
    requests = GuardRequests()
    with every_model(requests, "raise"), pytest.raises(bnguard.StatsChangedError, match="would update") as error:
        torch.func.functional_call(net, dict(net.named_parameters()), (images(),))
    requests.end(error.value)


class Task(nn.Module):
    """A model that is never called itself, as a trainer's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = conv_net()
        self.head = nn.BatchNorm2d(2)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.head(batch).mean() + self.backbone(batch).mean()


def test_patterns_are_for_the_names_of_the_whole_model() -> None:
    """A part that is called from a method of a model has the name that the model's ``state_dict()`` gives it."""
    task = Task()
    before = state_of(task)
    requests = GuardRequests()
    with every_model(requests, "restore", include=("backbone*",)) as guard:
        for _ in range(2):
            task.training_step(images())
    assert requests.end(None) == []
    assert guard.has_guarded
    after = state_of(task)
    assert after["head.num_batches_tracked"] == 2
    assert_same_bits(*[{key: of[key] for key in of if key.startswith("backbone")} for of in (before, after)])


@pytest.mark.parametrize("patterns", [(), ("backbone*",)], ids=["all", "backbone"])
def test_objects_of_the_process_are_walked_at_most_once_for_all_parts(
    patterns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be a million: one walk names all parts that the model calls; without patterns none is needed."""
    walks = []
    walk = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda *args: walks.append(1) or walk(*args))
    task = Task()
    requests = GuardRequests()
    with every_model(requests, "restore", include=patterns):
        for _ in range(3):
            task.training_step(images())
            for part in task.backbone:
                part.eval()
    assert requests.end(None) == []
    assert len(walks) == len(patterns)


def test_model_in_a_graph_that_no_pattern_matches_is_left_alone() -> None:
    """Whether it is compiled inside or was before: it runs as without a guard of every model, and nothing is said."""
    net, twin = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(nn.BatchNorm2d(2))
    compiled = torch.compile(net, backend="eager")
    for _ in range(2):
        requests = GuardRequests()
        with every_model(requests, "raise", include=("backbone*",)) as guard:
            compiled(images())
        assert requests.end(None) == []
        assert not guard.has_guarded
        twin(images())
        assert_same_bits(state_of(net), state_of(twin))


def test_messages_name_layers_as_the_whole_model_does() -> None:
    """Also where no pattern asked for names: the error, and what the end finds."""
    task = Task()
    requests = GuardRequests()
    with every_model(requests, "raise"):
        with pytest.raises(bnguard.StatsChangedError, match=r"head \(BatchNorm2d\) is in train mode") as error:
            task.training_step(images())
        task.eval().training_step(images())
        task.backbone.stem.bn.running_mean.data.add_(1)
    requests.end(error.value)
    assert {change.names for change in requests.changes} == {("backbone.stem.bn",), ("head",)}
